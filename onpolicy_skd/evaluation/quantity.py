"""Read a short text as one quantity: "$1,234", "18 eggs", "1 1/2 cups", "18\\,\\text{km/h}" (docs/evaluation.md).

The text is normalized, must hold exactly one number, and nothing in it may change that number: "18 or 19", "not 18",
"18 x 2", "18-20" and "1,2" are no quantities. Units are not compared, and the percent sign is a unit: 18% is 18.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# Characters and markup that say nothing about the number.
CHARACTERS = str.maketrans(
    {chr(c): "\u00a4" for c in [*range(0x3000), *range(0xFE00, 0xFFFF)] if unicodedata.category(chr(c)) == "Sc"}
    | dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", "\u2009")
    | dict.fromkeys("\u200b\u2060\ufeff", "")
    | {c: " {}/{} ".format(*unicodedata.normalize("NFKC", c).split("\u2044")) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
    | {"\u2044": "/", "\u2019": "'", "\u2248": "="}
)
FIGURE = r"\{\s*(-?[0-9.,]+)\s*\}"
WRAPPER = r"\\(?:text(?!dollar)\w*|math\w+|mbox|boxed)\s*\{([^{}]*)\}"
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<<[^<>]*>>|</?[A-Za-z][\w-]*>|<\|\w+\|>|`", ""),  # GSM8K's calculator annotations; tags; code
        (r"(?<![\w*])[*_]+(?=[^\s*_])|(?<=[^\s*_])[*_]+(?=$|[\s.,;:!?)])", ""),  # emphasis
        (rf"\\[dtc]?frac\s*(?:{FIGURE}\s*{FIGURE}|([0-9])\s*([0-9]))", r" \1\3/\2\4 "),
        (WRAPPER, r"\1"),
        (WRAPPER, r"\1"),  # nested wrappers
        (r"\\(?:left|right|displaystyle|textdollar|!)", ""),
        (r"\{,\}", ","),
        (r"\\[,;: ]|~|\\quad", "\u2009"),
        (r"\\([%#&_\u00a4])", r"\1"),
        (r"\b(?:[A-Z]{1,3}(?=\u00a4)|(?:[A-Z]{3}|Rs\.?)\s*(?=[-0-9.]))", ""),  # US$18, USD 18
        (r"-\s*\u00a4\s*(?=[0-9.])", "-"),
        ("\u00a4", " "),
        (r"\\[()\[\]]", " "),
        (r"\^\{?\s*\\circ\s*\}?|\\degree", "°"),
        (r"\\approx", "="),
        (r"((?<![A-Za-z])(?:[kcdm]?m|s|h|in|ft|yd|mi)|[a-z]{3})\^\{?-?[1-4]\}?(?![0-9])", r"\1"),  # m^2, m/s^{2}
        (r"(?<![A-Za-z])([kcdm]?m|in|ft|yd)[23](?!\w)", r"\1"),  # m2
        (r"(?i)\b(?:negative|minus)\s+(?=[0-9.])", "-"),
    )
]

# How a number is written, in normalized text.
INTEGER = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\u2009[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])(?<![0-9)%]\s)[-+]\s*)?"
    rf"(?:(?:(?P<integer>{INTEGER})\s+(?:and\s+)?)?(?P<top>{DECIMAL})\s*/\s*(?P<bottom>{DECIMAL})|(?P<decimal>{DECIMAL}))"
    r"(?:\s*(?P<scale>(?i:hundred|thousand|million|billion|trillion)(?![-\w])|(?<=[0-9])[kKMB](?!\w)))?"
)
ZEROS = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "m": 6, "billion": 9, "b": 9, "trillion": 12}
SEPARATORS = str.maketrans("", "", ", \u2009")

# Text before or after a number that changes its value.
OPERATORS = r"*\u00d7÷·<>≠≤≥±√\\{}|^"
NUMERAL = (
    r"(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b(?!-)"
)
MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
BEFORE = re.compile(
    "|".join(
        (
            rf"[{OPERATORS}]|[/_]\s*$",
            r"[A-Za-z]$",  # B18, x18
            r"\b(?:[A-Za-z]|sqrt|log|ln|sin|cos|tan|exp|abs)\s*\($",
            r"(?i:\b(?:not|never|cannot|neither|nor|between)\b|n't\b)",
            r"(?i:\b(?:than|least|most|over|under|above|below|nearly|almost|plus|times|or|one)[\s(]*$)",
            r"(?i:(?<!rounds )(?<!rounded )\bup to[\s(]*$|\b(?:divided|multiplied) by[\s(]*$)",
            r"(?i:\b(?:half|third|quarter|percent|square|root) of[\s(]*$)",
            r"(?i:\b(?:half|twice|double|triple|root|sqrt|log|ln|sin|cos|tan)[\s(]*$)",
            rf"(?i:\b{MONTH}\s*$)",
        )
    )
)
AFTER = re.compile(
    "|".join(
        (
            rf"[{OPERATORS}+?]|^\s*[!²³¹⁰⁴-⁹]|/\s*$",
            r"^[abeijnoqruvwxyzπ](?![A-Za-z])|[-/]\s*[nxyz]\b",  # 18x; not 18m, 18 x
            rf"(?i:\b(?:and|or|plus|minus|times|point)\s+{NUMERAL}|^\s*to\s+{NUMERAL})",
            r"(?i:^\s*half\b(?!-)|\band\s+(?:an?|one)\s+(?:half|third|quarter)\b|\b(?:squared|cubed|factorial)\b)",
            r"(?i:^\s*or\s+\w|\bor\s+(?:more|less|fewer|so)\b)",
            r"(?i:^\s*not\b|^\s*(?:is|was)(?:n't|\s+(?:not|wrong|incorrect))\b)",
            rf"(?i:^(?:st|nd|rd|th)?\s+(?:of\s+)?{MONTH})",
        )
    )
)
UNEQUAL = re.compile(r"[!<>≠≤≥]\s*$|[,;]\s|\b(?:or|not)\b|(?:[0-9]|^)\s*and\b")  # before the last equals sign
SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z(])")
RETRACTED = re.compile(r"(?i)\b(?:no|not|wait|actually|sorry|correction|instead|or|but|oops|wrong|incorrect)\b|n't\b")


class Quantity(NamedTuple):
    value: Fraction
    is_ratio: bool  # written with a fraction bar

    def equals(self, other: Quantity) -> bool:
        """Compare exactly; a fraction and a decimal are compared to six decimals, as math-verify does."""
        if self.is_ratio == other.is_ratio:
            return self.value == other.value
        return round(self.value, 6) == round(other.value, 6)


@functools.lru_cache(256)
def normalized(text: str) -> str:
    """Return ``text`` without Markdown, LaTeX wrappers and currency signs; thin and fixed spaces become U+2009."""
    text = text.translate(CHARACTERS)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip(" #\t\r\n\u2009")


def has_number(text: str) -> bool:
    return NUMBER.search(normalized(text)) is not None


@functools.lru_cache(256)
def quantity(text: str) -> Quantity | None:
    """Read all of ``text`` as one quantity; None if it is not exactly one."""
    text = normalized(text)
    first = NUMBER.search(text)
    if first and (end := SENTENCE_END.search(text, first.end())):
        if RETRACTED.search(text, end.end()):
            return None
        text = text[: end.start()]
    left, equals, text = text.rpartition("=")
    numbers = [*NUMBER.finditer(text)]
    if len(numbers) != 1 or (equals and UNEQUAL.search(left)):
        return None
    number = numbers[0]
    if BEFORE.search(text[: number.start()]) or AFTER.search(text[number.end() :]):
        return None
    return _read(number)


def _read(number: re.Match[str]) -> Quantity | None:
    if number["bottom"]:
        integer, top, bottom = (_figure(number[group] or "0") for group in ("integer", "top", "bottom"))
        if bottom == 0 or (number["integer"] and top >= bottom):
            return None
        value = integer + top / bottom
    else:
        value = _figure(number["decimal"])
    if number["scale"]:
        value *= 10 ** ZEROS[number["scale"].lower()]
    return Quantity(-value if number["sign"] and "-" in number["sign"] else value, bool(number["bottom"]))


def _figure(text: str) -> Fraction:
    return Fraction(text.translate(SEPARATORS))
