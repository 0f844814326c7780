"""Judge answers by two rules, scored side by side (docs/evaluation.md has the table of forms).

``strict``: the number after the first ``####`` equals the reference's, as text without thousands separators; the rule
of the GSM8K authors and, answer by answer, of lm-eval's strict-match (``python -m eval.agreement``).
``match``: drop thinking and later turns, locate the stated answer (last ``####``, else last ``\\boxed{}``, else last
number), read all of it as one quantity, compare. An answer that is no quantity is compared as text and by math-verify.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from math_verify import LatexExtractionConfig, parse, verify

from onpolicy_skd.evaluation.quantity import CHARACTERS, NUMBER, Quantity, has_number, normalized, quantity

ANSWER_TAIL = 4_000  # characters from the end that may hold the final answer
LONGEST_ANSWER = 100  # characters of a box, of a formula, and of the answer that a record keeps
LONGEST_COMPARISON = 0.4  # CPU seconds of symbolic algebra; a comparison that takes longer counts as not equal
AGAIN = 0.05  # seconds between further interrupts
Z = 1.959964  # normal quantile of the two-sided 95 % interval
MARKER, BOXED = "####", re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
STRICT = re.compile(r"#### (-?[0-9.,]+)")
for _name in ("math_verify", "math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # their warnings are about single answers

# -- where an answer stands ----------------------------------------------------------------------------------------
_THOUGHT = r"(?:think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad)"
THINKING = re.compile(  # an opening tag, or a closing one with its slash or ``end``
    rf"(?i)[<◁]\|?\s*(?P<end>/)?\s*(?:\w+:)?{_THOUGHT}(?:\s[^<>\n]{{0,40}})?\|?[>▷]|\[(?P<end2>/)?think\]"
    r"|<\|(?:begin|(?P<end3>end))_of_thought\|>"
    r"|<\|channel\|>(?:analysis|commentary|(?P<end4>final))|\Aanalysis(?=[A-Z])|(?P<end5>assistantfinal)"  # harmony
)
_TASK = r"(?i:question|problem|instruction|exercise|example|task|input|q)"
HEADING = re.compile(r"(?!(?i:the |final |correct )*(?i:answer)\b|[^\s=]+\s*=)[A-Za-z]|[0-9]+[.)]\s+[A-Za-z]")
STATEMENT = re.compile(
    rf"(?:(?P<marked>####\s*+(?!{HEADING.pattern})|\\(?:boxed|fbox)[ {{])|"
    r"(?P<heading>####)|[Aa]nswer(?: is|:))[^\n#]{0,40}?[0-9]"
)
TURN = re.compile(  # a new problem or turn; ``marked``: only after an answer that has a marker or a box
    r"(?m)(?P<blank>^[ \t]*\n)?^[ \t#>*]*(?:(?i:question|problem|instruction|human|user|q)[ \t]*[0-9]*\**[ \t]*:"
    r"|(?:user|human|assistant|system)[ \t]*$)|<\|\w+\|>\s*user\b"
    rf"|(?P<marked>^[ \t]*(?:#+|\*\*|[0-9]+[.)])[ \t*]*{_TASK}(?:[ \t]*[0-9]+)?[ \t]*(?:[.:]|\*\*|$)"
    rf"|^[ \t]*{_TASK}(?:[ \t]*[0-9]+[ \t]*(?:[.:)]|$)|[ \t]*:|[.)][ \t])|(?<=\s)(?:Question|Problem|Q)[ ]?[0-9]*:)"
)
END_OF_TURN = re.compile(  # the end of a turn
    r"(?:</s>|<end_of_turn>|<eos>|"
    r"<[|\uff5c](?:endoftext|end_of_text|im_end|eo[tm]_id|end|return|end\u2581of\u2581sentence)[|\uff5c]>)\s*|(?=\[INST\])"
)
SECTION = re.compile(r"(?i)(?:step|part|note|verif\w+|check\w*|explanation)\b")  # a heading even with no text below
LABEL = re.compile(r"(?i)^(?:so |the |final |correct )*answer(?: is)?[:\s]+")
# Between two numbers that are not one answer.
JOINED = re.compile(
    r"[)\]]?[^\S\n]*(?:or|and|to|(?:out )?of|in|less|over|plus|minus|times|by|(?:divided|multiplied) by|mod|[-=]*>|→"
    r"|[-/:*\u00d7x+^·÷]+|\\(?:times|cdot|div))?[^\S\n]*[(\[]?|,"
)
BULLET = re.compile(r"(?m)^[ \t]*[-*+•][ \t]+|(?<=\n\n)[ \t]*>[ \t]+")
CLAUSE_START = re.compile(r"[,;:!?|]\s|(?<!\b[A-Z][a-z]{2})\.\s|\n")
_TOKEN = r"[^\s=+*/\u00d7÷·^-]++"
CHAIN = re.compile(  # the expression before an equals sign, without the words of its sentence
    r"(?:[A-Za-z]+ of |twice )?"
    rf"(?:(?:[0-9.,]+(?:[^\S\n]+[A-Za-z]+){{1,3}}+\)?|{_TOKEN})[^\S\n]*[-+*/\u00d7÷·^]+[^\S\n]*)*"
    rf"(?:[0-9.]+[^\S\n]+)?{_TOKEN}[^\S\n]*=[^\w\n]*$"
)
CLAUSE_END = re.compile(r"[.,;:!|)](?:\s|$)|\n|\(|\\boxed")
TAKEN_BACK = re.compile(r"(?i)[\s.,;:!)]*(?:no(?=[.,!]|\s*\Z)|wait|actually|sorry|oops|correction|wrong|incorrect)\b")


@dataclass(frozen=True, slots=True)
class Score:
    match: bool
    strict: bool
    extracted: str | None  # the final answer that ``match`` looked at


def score(output: str, answer: str) -> Score:
    """Judge ``output`` against the reference ``answer``; takes less than a CPU second whatever the text."""
    reference, strict = _stated_reference(answer), STRICT.search(output)
    gold = quantity(reference)
    extracted = final_answer(output, numeric=gold is not None)
    return Score(
        match=extracted is not None and _equal(reference, gold, extracted),
        strict=strict is not None and _plain(strict.group(1)) == reference_number(answer),
        extracted=extracted and extracted[:LONGEST_ANSWER],
    )


def reference_number(answer: str) -> str:
    """Return what ``strict`` compares with: the number after ``####``, or the whole answer if there is none."""
    number = STRICT.search(answer.replace("$", ""))
    return _plain(number.group(1)) if number else answer.strip()


def check_reference(answer: str) -> str | None:
    """Return the reason why ``answer`` cannot be read whole, so that no output could be judged; None if it can."""
    stated = _stated_reference(answer)
    if not stated:
        return "the reference answer is empty"
    if quantity(stated):
        return None
    exponent = re.search(r"[0-9][eE][-+]?[0-9]", stated)  # neither read as 1000 nor as a product
    has_digit, marked = re.search("[0-9]", stated), MARKER in answer
    if _formula(stated) and not exponent and not (marked and re.fullmatch(r"[-0-9.,:/\s<>≤≥~?]+", stated)):
        return None
    if len(stated) <= LONGEST_ANSWER and not (has_digit and (marked or exponent)):
        return None  # compared as text
    return f"the reference answer {stated[:LONGEST_ANSWER]!r} cannot be read whole as one number, formula or short text"


def _stated_reference(answer: str) -> str:
    lines = [piece.strip().partition("\n")[0].strip() for piece in answer.split(MARKER)[1:]]
    if MARKER in answer and (any(lines) or not BOXED.search(answer)):
        return next(filter(None, reversed(lines)), "")
    return next(_boxes(answer), answer.strip())


def judged_text(output: str) -> str:
    """Return the part of ``output`` that ``match`` judges: after the thinking, up to the first new turn."""
    closed = [tag.end() for tag in THINKING.finditer(output) if any(tag.groups())]
    text = THINKING.split(output[closed[-1] if closed else 0 :], maxsplit=1)[0]
    digit, statement = re.search("[0-9]", text), STATEMENT.search(text)
    if end := END_OF_TURN.search(text, digit.end() if digit else 1):
        text = text[: end.end()]
    marked = next((s.end() for s in STATEMENT.finditer(text) if s["marked"]), len(text))
    asks_itself = TURN.match(text.lstrip())
    for turn in TURN.finditer(text, digit.end()) if digit else ():
        answered = statement is not None and statement.end() <= turn.start()
        if turn["marked"]:
            line = text[max(0, turn.start() - LONGEST_ANSWER) : turn.start()].rstrip().rpartition("\n")[2]
            stated = STATEMENT.search(line)
            answered = marked <= turn.start() or (stated is not None and not stated["heading"])
        if answered or (turn["blank"] and not asks_itself):
            return text[: turn.start()]
    return text


def final_answer(output: str, numeric: bool = True) -> str | None:
    """Return the text in which ``output`` states its final answer, or None.

    If not ``numeric``, the answer needs no number, and the last line takes the place of the last number.
    """
    text = judged_text(output)[-ANSWER_TAIL:]
    pieces = text.split(MARKER)
    for place in range(len(pieces) - 1, 0, -1):
        line, _, below = MARKER.join(pieces[place:]).strip().partition("\n")
        line = line.partition(MARKER)[0].strip()
        follows = below.strip() if numeric else BOXED.search(below)
        title = normalized(line)
        is_section = SECTION.match(title) and "=" not in title
        is_heading = (line.endswith(":") or HEADING.match(title)) if follows else is_section
        if line and not is_heading and (not numeric or has_number(line)):
            return line
    if boxed := next((b for b in _boxes(text) if not numeric or has_number(b)), None):
        return boxed
    return _last_number(text) if numeric else (text.strip().splitlines() or [None])[-1]


def _boxes(text: str) -> Iterator[str]:
    """Yield the contents of closed, short, nonempty boxes, last one first."""
    for piece in reversed(BOXED.split(text)[1:]):
        if bare := re.match(rf"[^\S\n]*\$?([-.]?[0-9][^$\n]{{0,{LONGEST_ANSWER}}})(?=[$\n]|\Z)", piece):  # \boxed 18
            yield bare[1].strip()
            continue
        depth = 0
        for place, char in enumerate(piece[: LONGEST_ANSWER + 2]):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                if content := piece[1:place].strip():
                    yield content
                break


def _last_number(text: str) -> str | None:
    """Return the last number, if the clause around it states that number."""
    text = BULLET.sub("", normalized(text))
    numbers = [*NUMBER.finditer(text)]
    if not numbers:
        return None
    last, previous = numbers[-1], numbers[-2].end() if len(numbers) > 1 else 0
    before = text[previous : last.start()]
    if previous and JOINED.fullmatch(before):
        return None
    head = CLAUSE_START.split(before)[-1]
    if side := CHAIN.search(text[max(0, last.start() - LONGEST_ANSWER) : last.start()]):
        head = side.group()
    tail = CLAUSE_END.split(text[last.end() :], maxsplit=1)
    clause = head + last.group() + tail[0]
    retracted = TAKEN_BACK.match(text, last.end() + len(tail[0]))
    return last.group().strip() if not retracted and quantity(clause) else None


def _equal(reference: str, gold: Quantity | None, stated: str) -> bool:
    if gold and (guess := quantity(stated)):  # the usual case needs no symbolic algebra
        return gold.equals(guess)
    if _words(reference) and _words(reference) == _words(stated):
        return True
    formulas = _formula(reference), _formula(stated)
    if not all(formulas) or (gold and "=" in normalized(stated)):  # math-verify drops left sides
        return False
    _warm_up()
    try:
        with _within(LONGEST_COMPARISON):
            return _verified(*formulas)
    except _TooLongError:
        return False


def _verified(reference: str, stated: str) -> bool:
    only_latex = [LatexExtractionConfig()]  # math-verify's other parser takes a number out of text that it cannot parse
    gold, guess = (parse(f, only_latex, fallback_mode="no_fallback", parsing_timeout=0) for f in (reference, stated))
    return bool(gold and guess) and verify(gold, guess, timeout_seconds=0)


@functools.cache
def _warm_up() -> None:
    """Load the parser's tables and sympy's simplification once per process, outside a comparison's time limit."""
    _verified("$x+1$", "$2x+1$")


def _words(text: str) -> str:
    return " ".join(LABEL.sub("", normalized(text)).strip(" .()").casefold().split())


def _formula(text: str) -> str:
    """Return ``text`` between dollar signs; empty if it is long or has words, which math-verify would multiply."""
    text = LABEL.sub("", text.translate(CHARACTERS).replace("\u00a4", "").strip("*_ "))
    text = re.sub(r"\\[()\[\]]|\\(?:text|mathrm|mbox)\s*\{[^{}]*\}$", "", text).strip(" .")
    has_words = re.search(r"[A-Za-z]{2}|[0-9]_|\\\w?dots", re.sub(r"\\(?!\w?dots)[A-Za-z]+", "", text))
    return f"${text}$" if text and len(text) <= LONGEST_ANSWER and not has_words else ""


class _TooLongError(BaseException):
    """The timeout of a comparison; like KeyboardInterrupt, it passes a library's ``except Exception``."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise _TooLongError in the block once its thread has used ``seconds`` of CPU, so that a busy machine changes no
    verdict. Raise it repeatedly, because a bare ``except`` may swallow it.

    Outside the main thread, where signals cannot be handled, the block runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    active, limit = True, time.thread_time() + seconds

    def stop(*_: object) -> None:
        if active and time.thread_time() >= limit:
            raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            yield
        finally:
            active = False  # a signal may come just before, hence the second ``finally``
    finally:
        active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").replace("\u2212", "-").removesuffix(".")


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927); unlike the normal interval, it holds near 0 and 1."""
    if total == 0:
        return (0.0, 1.0)
    share, spread = right / total, Z * Z / total
    center = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return (max(0.0, center - half), min(1.0, center + half))
