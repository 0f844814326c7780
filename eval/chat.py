"""Ask a question; the student before and after training and the teacher answer side by side.

Questions are typed at a prompt or read from a pipe line by line.  If the output is not a terminal, each question gives
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from eval.gsm8k import settings_for
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, parse_override
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data.demo_task import problems
from onpolicy_skd.storage.files import config_beside
from onpolicy_skd.types import RolloutRequest, SamplingParams, seed_of

if TYPE_CHECKING:
    from onpolicy_skd.rollout.engine import RolloutEngine

NARROWEST = 20  # characters of a column; with less room, answers are shown one below the other
HINT = "Type a question; an empty line, Ctrl-D or Ctrl-C ends."
DEMO_HINT = "The bundled models can solve only problems like this one:"


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int
    complete: bool  # False: cut at the token limit


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that answers, with the tokenizer for its prompts."""

    label: str
    engine: RolloutEngine
    tokenizer: Any

    def answer(self, question: str, settings: Settings, sampling: SamplingParams) -> Answer:
        """Answer ``question`` in the prompt format of ``settings.data``.  Raises DataError if it is too long."""
        from onpolicy_skd.data.prompts import DataError, load_shots, render
        from onpolicy_skd.evaluation.stop_texts import before_stop

        ids = render(question, self.tokenizer, settings.data, load_shots(settings.data))
        if len(ids) > settings.data.max_prompt_tokens:
            raise DataError(
                f"the prompt has {len(ids)} tokens, data.max_prompt_tokens={settings.data.max_prompt_tokens}; ask a "
                "shorter question, or raise the limit"
            )
        request = RolloutRequest(self.label, ids, seed_of(settings.run.seed, "chat", question))
        (trajectory,) = self.engine.generate([request], sampling)
        text = self.tokenizer.decode(trajectory.response_ids.tolist(), skip_special_tokens=True)
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in before_stop(text, sampling.stop))
        return Answer(shown.strip(), len(trajectory.response_ids), trajectory.finish_reason == "stop")


def models_of(args: argparse.Namespace) -> dict[str, tuple[str, bool]]:
    """Return by label a model, and True if its prompts are made with the student's tokenizer.

    The models of a run share a vocabulary, and training made all prompts with the student's tokenizer.
    """
    run_config = args.config or config_beside(args.model)
    if args.alone or args.versus or run_config is None:
        return {name: (name, False) for name in [*(args.versus or []), args.model]}
    run = build_settings(run_config, [parse_override(text) for text in args.overrides])
    teacher = {} if run.teachers else {"teacher": (run.teacher_model.model, True)}  # several teachers are left out
    return {"before": (run.student.model, True), "after": (args.model, True), **teacher}


def load(args: argparse.Namespace, settings: Settings) -> list[Speaker]:
    """Load all models.  Raises ConfigError."""
    from transformers.utils.logging import disable_progress_bar

    from onpolicy_skd.models.loading import load_tokenizer
    from onpolicy_skd.rollout.transformers_engine import TransformersEngine

    disable_progress_bar()
    speakers = []
    for label, (model, shares_tokenizer) in models_of(args).items():
        print(f"loading {model}", file=sys.stderr)
        trust = (settings.teacher_model if label == "teacher" else settings.student).trust_remote_code
        tokenizer = load_tokenizer(args.model if shares_tokenizer else model, settings.student.trust_remote_code)
        speakers.append(Speaker(label, TransformersEngine(model, settings, trust), tokenizer))
    return speakers


def side_by_side(answers: Mapping[str, Answer | None], width: int) -> RenderableType:
    """Return the answers as columns, or as rows if ``width`` is too small; None stands for a pending answer."""
    columns = width // len(answers) >= NARROWEST
    table = Table(expand=True, show_header=columns, show_lines=not columns, padding=(0, 1))
    if columns:
        for label in answers:
            table.add_column(Text(label), ratio=1, overflow="fold", header_style="bold")
        table.add_row(*map(_cell, answers.values()))
        return table
    table.add_column(overflow="fold")
    for label, answer in answers.items():
        table.add_row(Text(label, style="bold"))
        table.add_row(_cell(answer))
    return table


def _cell(answer: Answer | None) -> RenderableType:
    if answer is None:
        return Spinner("dots")
    note = f"{answer.tokens} tokens" + ("" if answer.complete else ", cut at the limit")
    return Text.assemble(answer.text or "(nothing)", "\n\n", (note, "dim"))


def reply(question: str, speakers: Sequence[Speaker], settings: Settings, sampling: SamplingParams) -> Iterator[Answer]:
    return (speaker.answer(question, settings, sampling) for speaker in speakers)


def show(labels: Sequence[str], answers: Iterable[Answer], console: Console) -> None:
    """Show answers in a terminal as they arrive."""
    shown: dict[str, Answer | None] = dict.fromkeys(labels)
    with Live(side_by_side(shown, console.width), console=console, transient=True) as live:
        for label, answer in zip(labels, answers, strict=True):
            shown[label] = answer
            live.update(side_by_side(shown, console.width))
    console.print(side_by_side(shown, console.width))  # in full: the live table is cut at the screen's height


def hint(settings: Settings) -> str:
    """Return what a chat in a terminal prints first, with an example question if its data is the demo task."""
    if all(source.source != "demo" for source in settings.data.sources):
        return HINT
    return f"{HINT}\n{DEMO_HINT}\n{next(problems('test'))['question']}"


def questions(interactive: bool) -> Iterator[str]:
    """Yield questions: those typed up to an empty line, or all lines of a pipe that are not blank.

    Raises ConfigError for input that is not valid text.
    """
    if not interactive:
        try:
            for line in sys.stdin:
                line.encode()  # a C locale reads such bytes as surrogates
                if question := line.strip():
                    yield question
        except UnicodeError as error:
            raise ConfigError(f"the questions are not {sys.stdin.encoding or 'Unicode'} text: {error}") from None
        return
    import readline  # noqa: F401  gives input() its history and arrow keys

    try:
        while question := input("> ").strip():
            yield question
    except EOFError:
        print()


def chat(speakers: Sequence[Speaker], settings: Settings, sampling: SamplingParams) -> int:
    """Answer all questions; return the exit code: 2 if a question from a pipe was refused, else 0."""
    console, refused = Console(highlight=False), False
    labels = [speaker.label for speaker in speakers]
    interactive = sys.stdin.isatty() and console.is_terminal
    if interactive:
        print(hint(settings))
    for question in questions(interactive):
        if console.is_terminal and not interactive:
            console.print(Text(f"> {question}"))
        answers = reply(question, speakers, settings, sampling)
        try:
            if console.is_terminal:
                show(labels, answers, console)
            else:
                texts = dict(zip(labels, (a.text for a in answers), strict=True))
                print(json.dumps({"question": question} | texts, ensure_ascii=False), flush=True)
        except ConfigError as error:
            refused = True
            print(f"error: {error}", file=sys.stderr)
    return 2 if refused and not interactive else 0


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.chat") -> int:
    """Run the command line and return the exit code: 0 for success, 2 for bad input."""
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=prog, description=about, epilog=more.strip())
    parser.add_argument("--model", required=True, help="folder (runs/NAME/final), hub name, or bundled:NAME")
    others = parser.add_mutually_exclusive_group()
    others.add_argument(
        "--versus", action="append", metavar="MODEL", help="model to compare with, any number of times (default: the "
        "run's student before training and its teacher)",
    )  # fmt: skip
    others.add_argument("--alone", action="store_true", help="compare with no other model")
    parser.add_argument("--config", type=Path, help="settings file (default: config.yaml next to the model)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy, as evaluations are")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for skd train")
    args = parser.parse_args(argv)
    try:
        if args.temperature < 0:
            raise ConfigError(f"--temperature {args.temperature:g}: accepted: 0 or above")
        settings = settings_for(args.model, args.config, args.overrides)
        limit = settings.eval.max_tokens or settings.rollout.max_tokens
        sampling = SamplingParams(limit, args.temperature, stop=tuple(settings.rollout.stop))
        return chat(load(args, settings), settings, sampling)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 0
    except BrokenPipeError:  # the reader of a pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
