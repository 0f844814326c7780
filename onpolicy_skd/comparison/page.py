"""``report.html`` of a comparison: a single file that loads nothing from the network; model output is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from onpolicy_skd.comparison import results as report
from onpolicy_skd.comparison.figures import svg
from onpolicy_skd.comparison.grid import Comparison, PlannedRun
from onpolicy_skd.comparison.results import MODES, ModeDifference, RowResult

VIEWS = 4  # rollouts shown token by token per run
FULL_COLOR = 2.0  # student entropy, nats, at which a token has the full color
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5c656e; --line: #d8dee4; --band: #f3f5f7;
  --hot: 235, 120, 30; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --soft: #9aa4ae; --line: #333a42;
  --band: #1d2228; --hot: 165, 76, 0; --mark: #6cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin-bottom: .3rem; } p, li { max-width: 48rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; white-space: normal; }
ul { columns: 26rem 2; column-gap: 3rem; } li { break-inside: avoid; }
tbody tr:hover td { background: var(--band); }
figure { margin: 1.5rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.rollout { margin: 1rem 0; padding: .8rem 1rem; background: var(--band); border-radius: .4rem; }
.prompt { color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
.tokens { font: .9rem/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .5rem; }
.t { border-radius: .2rem; background: rgba(var(--hot), var(--a)); }
.t:hover, .t:focus { outline: 2px solid var(--soft); }
.t:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0; z-index: 1; padding: .8rem 1rem;
  background: var(--ink); color: var(--paper); font: 1rem/1.4 system-ui, sans-serif; text-align: center; }
.s { box-shadow: inset 0 0 0 1.5px var(--mark); } details > summary { cursor: pointer; }
@media print { body { max-width: none; font-size: 11px; padding: 0; } table { font-size: 9px; }
  th, td { padding: .15rem .25rem; } .wide { overflow: visible; } figure, .rollout, tr { break-inside: avoid; }
  .t { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
@media (max-width: 40rem) { body { font-size: 15px; } figure { overflow-x: auto; } figure svg { min-width: 36rem; } }
"""


def page(
    comparison: Comparison, rows: Sequence[RowResult], across: Sequence[ModeDifference], figures: dict[str, Figure]
) -> str:
    """Return the HTML document."""
    grid, settings = comparison.grid, comparison.untrained.settings
    known = report.untrained(comparison)
    title = f"Comparison: {grid.dir.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Student <code>{escape(settings.student.model)}</code>, teacher "
        f"<code>{escape(settings.teacher_models)}</code>, seeds {', '.join(map(str, grid.seeds))}. Exact match in "
        f"percent on the same held-out problems. Untrained student "
        f"{report.shown_percent(known['student'])}, teacher {report.shown_percent(known['teacher'])}.</p>",
        '<p class="soft">Mean ± standard deviation over seeds; 95 % interval of the mean (Student\'s t). Differences: '
        "bootstrap over problems and seeds, paired by problem. <b>Bold</b> only where a difference is more than noise "
        "after Holm's correction within the mode.</p>",
    ]
    sections += [f'<p class="soft">{escape(line)}</p>' for line in report.notes(comparison)]
    for mode, name in MODES.items():
        of_mode = [r for r in rows if r.mode == mode]
        if of_mode:
            sections += [f"<h2>{name}</h2>", _table(of_mode, grid.baseline)]
            sections.append(_list(report.sentence(r, grid.baseline) for r in of_mode))
            orderings = [o for r in of_mode if (o := report.ordering(r, of_mode, grid.baseline))]
            if orderings:
                sections += ["<h3>Published orderings</h3>", _list(orderings)]
    if across:
        sections += [f"<h2>{report.ACROSS}</h2>", _list(map(report.mode_sentence, across))]
    if figures:
        sections.append("<h2>Figures</h2>")
    for name, figure in figures.items():
        sections.append(f"<figure>{svg(figure)}<figcaption>{report.CAPTIONS[name]}</figcaption></figure>")
    sections += _token_views(comparison)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _table(rows: Sequence[RowResult], baseline: str) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in report.columns(baseline))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><b>{escape(cell)}</b></td>"
            if r.significant and place == report.DIFFERENCE
            else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(report.cells(r))
        )
        + "</tr>"
        for r in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(lines: Any) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _token_views(comparison: Comparison) -> Iterator[str]:
    """Yield the HTML of the recorded rollouts of the trained students of the first seed."""
    shown = [
        r for r in comparison.trained if r.seed == comparison.grid.seeds[0] and r.status == "finished" and _views(r)
    ]
    if not shown:
        return
    yield "<h2>Tokens</h2>"
    yield (
        "<p>Held-out rollouts of the trained students. The stronger the color, the higher the student's entropy "
        f"(full at {FULL_COLOR:g} nats); outlined: positions that training would select. Point at a token or "
        "click it for its numbers.</p>"
    )
    shown.sort(key=lambda run: run.settings.positions.policy == "full")  # runs that select all positions come last
    for place, run in enumerate(shown):
        views = "".join(_rollout(view) for view in _views(run)[:VIEWS])
        opened = " open" if place == 0 else ""
        yield f"<details{opened}><summary>{escape(run.row.name)}, {MODES[run.mode].lower()}</summary>{views}</details>"


def _views(run: PlannedRun) -> list[dict[str, Any]]:
    files = sorted(run.paths.evaluations.glob("tokens-after-*.jsonl"))
    return [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()] if files else []


def _rollout(view: dict[str, Any]) -> str:
    spans = []
    for text, entropy, divergence, selected in zip(
        view["tokens"], view["entropy"], view["divergence"], view["selected"], strict=True
    ):
        strength = min(1.0, max(0.0, entropy) / FULL_COLOR)
        about = f"entropy {entropy:.3f} nats, divergence {divergence:.3f} nats, {'' if selected else 'not '}selected"
        kind = "t s" if selected else "t"
        spans.append(
            f'<span class="{kind}" style="--a:{strength:.2f}" title="{about}" tabindex="0">{escape(text)}</span>'
        )
    end = "" if view["finish_reason"] == "stop" else ' <span class="soft">(cut off)</span>'
    asked = f'<div class="prompt">{escape(view["prompt"])}</div>'
    return f'<div class="rollout">{asked}<div class="tokens">{"".join(spans)}{end}</div></div>'
