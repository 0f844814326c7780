"""The demo task: generated word problems in the GSM8K answer format.

A problem is a short story about one quantity that changes two to four times::

    Mia has 14 apples. She buys 3 bags with 6 apples each. Then she gives away 8 apples.
    How many apples does Mia have now?

and its answer works through the story with GSM8K's calculator annotations::

    The bags hold <<3*6=18>>18 apples. Now Mia has <<14+18=32>>32 apples. ...
    #### 24

Problems are a pure function of (split, index).  A question belongs to exactly one split, chosen by a
hash of its text, so that train and test share no problem however many are generated.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator

SPLITS = ("train", "test")
TEST_SHARE = 10  # one question in ten belongs to the test split

_PEOPLE = {
    "Mia": "She", "Tom": "He", "Ana": "She", "Ben": "He", "Lily": "She", "Max": "He",
    "Zoe": "She", "Sam": "He", "Ruth": "She", "Leo": "He", "Kate": "She", "Paul": "He",
}  # fmt: skip
_ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "toys")
_BOXES = ("bags", "boxes", "packs", "jars")

Step = tuple[str, str, int]  # sentence of the story, sentences of the solution, new count


def _calc(left: int, op: str, right: int) -> tuple[str, int]:
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[op]
    return f"<<{left}{op}{right}={value}>>{value}", value


def _gain(rng: random.Random, who: str, item: str, count: int) -> Step | None:
    more = rng.randint(2, 30)
    text, value = _calc(count, "+", more)
    verb = rng.choice(("finds", "gets", "buys"))
    return f"{verb} {more} more {item}", f"Now {who} has {text} {item}.", value


def _give(rng: random.Random, who: str, item: str, count: int) -> Step | None:
    if count < 4:
        return None
    less = rng.randint(2, min(count - 1, 30))
    text, value = _calc(count, "-", less)
    verb = rng.choice(("gives away", "loses", "sells"))
    return f"{verb} {less} {item}", f"Now {who} has {text} {item}.", value


def _boxes(rng: random.Random, who: str, item: str, count: int) -> Step | None:
    number, size, box = rng.randint(2, 9), rng.randint(2, 9), rng.choice(_BOXES)
    hold, inside = _calc(number, "*", size)
    text, value = _calc(count, "+", inside)
    story = f"buys {number} {box} with {size} {item} each"
    return story, f"The {box} hold {hold} {item}. Now {who} has {text} {item}.", value


def _double(rng: random.Random, who: str, item: str, count: int) -> Step | None:
    if count > 49:
        return None
    text, value = _calc(count, "*", 2)
    return f"doubles the number of {item}", f"Now {who} has {text} {item}.", value


def _half(rng: random.Random, who: str, item: str, count: int) -> Step | None:
    if count % 2 or count < 4:
        return None
    text, value = _calc(count, "/", 2)
    return f"gives half of the {item} to a friend", f"Now {who} has {text} {item}.", value


_EVENTS: tuple[Callable[[random.Random, str, str, int], Step | None], ...] = (_gain, _give, _boxes, _double, _half)


def _problem(rng: random.Random) -> dict[str, str]:
    who = rng.choice(list(_PEOPLE))
    item = rng.choice(_ITEMS)
    count = rng.randint(3, 40)
    story, solution = [f"{who} has {count} {item}."], []
    steps = rng.randint(2, 4)
    while len(solution) < steps:
        step = rng.choice(_EVENTS)(rng, who, item, count)
        if step is None or step[2] > 99:  # at most two digits, so that a tiny model can learn the arithmetic
            continue
        sentence, worked, count = step
        story.append(f"{'Then ' + _PEOPLE[who].lower() if solution else _PEOPLE[who]} {sentence}.")
        solution.append(worked)
    story.append(f"How many {item} does {who} have now?")
    return {"question": " ".join(story), "answer": " ".join(solution) + f"\n#### {count}"}


def split_of(question: str) -> str:
    """Return the only split that ``question`` may appear in."""
    digest = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
    return "test" if digest % TEST_SHARE == 0 else "train"


def problems(split: str, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield distinct problems of ``split`` without end, each ``{"question", "answer"}``.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"demo task: unknown split {split!r}; accepted: {', '.join(SPLITS)}")
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        problem = _problem(rng)
        if problem["question"] not in seen and split_of(problem["question"]) == split:
            seen.add(problem["question"])
            yield problem
