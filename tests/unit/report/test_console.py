import io

import pytest
from rich.console import Console

from onpolicy_skd.report import console
from onpolicy_skd.report.console import Display

RECORD = {
    "step": 0, "loss": 1.25, "divergence_selected": 1.125, "entropy": 0.5, "positions_selected": 10, "positions": 50,
    "samples": 3, "generated": 4, "truncated": 0.25, "response_tokens": 17.0, "sampler_gap": 1e-7, "grad_norm": 2.0,
    "lr": 1e-4, "tokens_per_second": 512.4,
    "seconds": {"rollout": 1.0, "filter": 0.0, "learn": 2.0, "sync": 0.1, "step": 3.1},
}  # fmt: skip


def shown(records, width=160, terminal=False):
    out = io.StringIO()
    screen = Console(file=out, force_terminal=terminal, width=width, soft_wrap=not terminal, color_system=None)
    with Display(200, divergence="reverse_kl", console=screen) as display:
        for record in records:
            display.step(record)
        display.log("[bold]words[/bold] stay as they are")
    return out.getvalue()


def test_a_plain_log_has_a_legend_once_and_a_line_per_step(monkeypatch):
    now = iter([100.0, 104.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    *legend, first, second, words = shown([RECORD, RECORD | {"step": 1}]).splitlines()
    assert legend[0].startswith("columns: loss = objective, nats per selected token")
    assert all(len(line) <= 110 for line in legend)
    assert first == (
        "step 1/200  loss 1.2500  reverse_kl 1.1250  entropy 0.500  grad_norm 2.00  length 17  clipped 25%  tok/s 512  "
        "time 3.1s  lr 1.0e-04  kept 3/4  selected 20%  gap 1.0e-07  (rollout 1.0 filter 0.0 learn 2.0 sync 0.1)  "
        "eta 0:10:17"  # 199 steps of 3.1 s
    )
    assert second.startswith("step 2/200")
    assert second.endswith("eta 0:13:12")  # 198 steps of 4 s: evaluations and checkpoints between steps count
    assert words == "[bold]words[/bold] stay as they are"


def test_what_a_step_did_not_measure_is_a_dash():
    record = {k: v for k, v in RECORD.items() if k not in ("sampler_gap", "truncated")}
    assert "clipped -" in shown([record])
    assert "gap -" in shown([record])


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_terminal_shows_a_table_as_wide_as_it_has_room_for(width):
    text = shown([RECORD], width, terminal=True)
    row = next(line for line in text.splitlines() if "1/200" in line and "1.2500" in line)
    assert len(row.rstrip()) <= width
    assert ("1.0e-07" in text) == (width == 160)
    assert "grad_norm" in text
    assert "…" not in text  # no column is squeezed
