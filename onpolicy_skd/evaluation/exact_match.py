"""When is an answer right?  Two rules, scored side by side.

``strict``: the number after the first ``####`` equals the reference's, as text without thousands separators; the rule
of the GSM8K authors and, answer by answer, of lm-eval's strict-match (``python -m eval.agreement``).
``match``: the final answer (after the last ``####``, else in the last ``\\boxed{}``, else the last number; one that is
empty or cut off does not count) equals the reference's by math-verify, so that 18, 18.00 and $18 agree.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from math_verify import parse, verify

from onpolicy_skd.evaluation.stop_texts import before_stop
from onpolicy_skd.types import RolloutRequest, Trajectory

ANSWER_TAIL = 4_000  # characters from the end that may hold the final answer
STRICT = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"[-\u2212]?\$?[0-9][0-9,]*(?:\.[0-9]+)?|[-\u2212]?\$?\.[0-9]+")
BOXED = "\\boxed"
LONGEST_ANSWER = 100  # characters of a stated answer that are read
LONGEST_COMPARISON = 0.5  # seconds of symbolic algebra; what takes longer is not equal
AGAIN = 0.05  # seconds after which it is interrupted once more
PLAIN = re.compile(r"-?[0-9]*\.?[0-9]+")
for _name in ("math_verify", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # their warnings are about single answers


@dataclass(frozen=True, slots=True)
class Score:
    match: bool
    strict: bool
    extracted: str | None  # the final answer that ``match`` looked at


def reference_number(answer: str) -> str:
    """The number after ``####`` of a GSM8K reference answer, or the whole answer if there is none."""
    found = STRICT.search(answer.replace("$", ""))
    return _plain(found.group(1)) if found else answer.strip()


def final_answer(output: str) -> str | None:
    """The part of ``output`` that states its final answer, or None."""
    tail = output[-ANSWER_TAIL:]
    _, marker, after = tail.rpartition("####")
    stated = after.strip().split("\n", 1)[0].strip()
    if marker and stated:
        return stated[:LONGEST_ANSWER]
    boxes = (_braced(part) for part in reversed(tail.split(BOXED)[1:]))
    if boxed := next(filter(None, boxes), None):
        return boxed
    numbers = NUMBER.findall(tail)
    return numbers[-1] if numbers else None


def score(output: str, answer: str) -> Score:
    """Scores ``output`` against the reference ``answer``; takes less than a second whatever the text."""
    gold = reference_number(answer)
    found = STRICT.search(output)
    extracted = final_answer(output)
    return Score(
        match=extracted is not None and _equal(gold, extracted),
        strict=found is not None and _plain(found.group(1)) == gold,
        extracted=extracted,
    )


def with_correctness(
    trajectories: Sequence[Trajectory], requests: Sequence[RolloutRequest], tokenizer: Any, stop: Sequence[str] = ()
) -> list[Trajectory]:
    """``trajectories`` (one per request) with ``correct`` set where the request brings the reference answer along.

    What follows one of the ``stop`` texts is not judged.
    """
    found = []
    for t, request in zip(trajectories, requests, strict=True):
        if request.answer is not None:
            output = before_stop(tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True), stop)
            t = dataclasses.replace(t, correct=score(output, request.answer).match)  # noqa: PLW2901
        found.append(t)
    return found


def _equal(gold: str, extracted: str) -> bool:
    number = NUMBER.search(extracted)
    if number and number.group() == extracted.rstrip(".").rstrip():
        extracted = _plain(number.group())
        if PLAIN.fullmatch(gold) and PLAIN.fullmatch(extracted):  # the usual case needs no symbolic algebra
            return Fraction(gold) == Fraction(extracted)
    try:
        with _within(LONGEST_COMPARISON):
            truth, guess = (parse(f"${text}$", parsing_timeout=0) for text in (gold, extracted))
            return bool(truth and guess) and verify(truth, guess, timeout_seconds=0)
    except _TooLongError:
        return False


class _TooLongError(BaseException):
    """Like KeyboardInterrupt, no ``except Exception`` of a library swallows it."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Ends what it holds by _TooLongError, again and again: one may be lost in a destructor or a bare ``except``.

    Off the main thread, where there are no signals, it only waits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    active = True

    def stop(*_: object) -> None:
        if active:
            raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").replace("\u2212", "-").removesuffix(".")


def _braced(text: str) -> str | None:
    """What stands in the braces that ``text`` begins with, if they are closed soon and hold anything."""
    depth = 0
    for place, char in enumerate(text[: LONGEST_ANSWER + 2]):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[1:place].strip() or None
    return None


def wilson(right: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927): holds near 0 and 1, where the normal one does not."""
    if total == 0:
        return (0.0, 1.0)
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return (max(0.0, centre - half), min(1.0, centre + half))
