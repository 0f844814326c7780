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
WRAPPER = r"\\(?:text(?!dollar)\w*|math\w+|mbox|fbox|boxed|underline|emph|bm|boldsymbol)\s*\{([^{}]*)\}"
ARROW = r"(?:[-=]+>|[→⇒➜]|\\(?:[Rr]ightarrow|to|implies)\b)"
MINOR = r"(?:cents?|pence|minutes?|seconds?|inch(?:es)?|ounces?)"
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"~~[^~\n]+~~|<(del|strike)>[^<>]*</\1>|\\(?:[bx]?cancel|sout)\s*\{[^{}]*\}", ""),  # struck out
        (
            r"<<[^<>]*>>|</?[A-Za-z][\w-]*>|<[|\uff5c][^<>|\uff5c\n]{1,30}[|\uff5c]>|`",
            "",
        ),  # annotations; tags; code
        (r"(?<![\w*])[*_]+(?=[^\s*_])|(?<=[^\s*_])[*_]+(?=$|[\s.,;:!?)])", ""),  # emphasis
        (rf"\\[dtc]?frac\s*(?:{FIGURE}\s*{FIGURE}|([0-9])\s*([0-9]))", r" \1\3/\2\4 "),
        (r"\\(?:text)?color\s*\{\w*\}\s*(?:\{([^{}]*)\})?|\\(?:boxed|fbox)\s+(?=[-$.0-9])", r"\1"),
        (WRAPPER, r"\1"),
        (r"\\[dtc]?frac\s*\{\s*([A-Za-z]{2,}|m)\s*\}\s*\{\s*([A-Za-z]+)\s*\}", r"\1/\2"),  # km/h
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
        (rf"(?i)\A[\s#*]*(?:(?:the |final |correct )*answer\s*(?:{ARROW}|-(?=\s))|{ARROW})", ""),
        (rf"(?i)(?<=[a-z])(?:,|\s+and)?\s+0+\s+{MINOR}(?=[\s.]*\Z)", ""),  # 18 dollars and 0 cents
    )
]

# How a number is written, in normalized text.
INTEGER = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\u2009[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)"
DECIMAL = rf"(?:{INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
SCALES = {"hundred": 10**2, "thousand": 10**3, "k": 10**3, "lakh": 10**5, "crore": 10**7}
SCALES |= dict.fromkeys(("million", "mil", "mln", "mn", "m"), 10**6)
SCALES |= dict.fromkeys(("billion", "bln", "bn", "b"), 10**9) | {"trillion": 10**12}
SCALE = "(?:" + "|".join(name for name in SCALES if len(name) > 1) + ")"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])(?<![0-9)%]\s)[-+]\s*)?"
    rf"(?:(?:(?P<integer>{INTEGER})\s+(?:and\s+)?)?(?P<top>{DECIMAL})\s*/\s*(?P<bottom>{DECIMAL})|(?P<decimal>{DECIMAL}))"
    rf"(?:[\s-]*(?P<scale>(?i:{SCALE})(?=s?(?![-\w]))|(?<=[0-9])[kKMB](?!\w))s?)?"
)
LONGEST_NUMBER = 4_000  # characters of a quantity; Python refuses integers of more than 4,300 digits
SEPARATORS = str.maketrans("", "", ", \u2009")

# Text before or after a number that changes its value.
OPERATORS = r"*\u00d7÷·<>≠≤≥±√\\{}|^"
CARDINAL = (
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
)
NUMERAL = rf"(?:(?:{CARDINAL}|{SCALE})\b(?!-))"  # not "18 two-liter bottles"
FRACTION = r"(?:half|third|quarter|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million|billion)th)"
FRACTIONS = rf"(?:halves|{FRACTION}s)"
MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|"
    r"oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
MULTIPLE = r"(?:half|twice|thrice|(?:halv|doubl|tripl|quadrupl)(?:e|ed|ing))"
BEFORE = re.compile(
    "|".join(
        (
            rf"[{OPERATORS}]|[/_]\s*$|[-+][\s(\[]*$",
            r"[A-Za-z]$",  # B18, x18
            r"\b(?:[A-Za-z]|sqrt|log|ln|sin|cos|tan|exp|abs)\s*\($",
            r"(?i:\b(?:not|never|cannot|neither|nor|between)\b|n't\b)",
            r"(?i:\b(?:than|least|most|over|under|above|below|nearly|almost|plus|less|times|or|one)[\s(]*$)",
            r"(?i:(?<!rounds )(?<!rounded )\bup to[\s(]*$|\b(?:divided|multiplied) by[\s(]*$|\bas \w+ as[\s(]*$)",
            rf"(?i:\b(?:{FRACTIONS}|{FRACTION}|one|{CARDINAL}|percent|square|root|out|upwards?|excess|short|shy)"
            r" of(?: the)?[\s(]*$)",
            rf"(?i:\b(?:{MULTIPLE}|root|sqrt|log|ln|sin|cos|tan)[\s(]*$)",
            rf"(?i:\b(?:{CARDINAL}|{SCALE}s?)(?:\s+and|\s*&)?[\s(-]*$)",
            rf"(?i:\b{MONTH}\s*$)",
        )
    )
)
AFTER = re.compile(
    "|".join(
        (
            rf"[{OPERATORS}+?]|^\s*[!²³¹⁰⁴-⁹]|/\s*$",
            r"^[abeijnoqruvwxyzπ](?![A-Za-z])|[-/]\s*[nxyz]\b|^\s+[kKB](?!\w)",  # 18x; not 18m, 18 x
            rf"(?i:(?:\b(?:and|or|plus|minus|times|point|of|by|less)\b|^\s*(?:to|over)\b|[/&])[\s-]*(?:one\b(?!-)|{NUMERAL}))",
            rf"(?i:^[\s-]*(?:{NUMERAL}|half\b(?!-)|(?!quarters){FRACTIONS}\b|(?!half-){MULTIPLE}\b(?<!double)(?<!triple)))",
            rf"(?i:(?:^|\band\b|&)[\s-]*(?:an?|one|{CARDINAL})[\s-]+(?:{FRACTIONS}|{FRACTION})\b)",
            r"(?i:\b(?:(?:squar|cub|doubl|tripl|quadrupl|halv)ed|factorial)\b)",
            r"(?i:^\s*or\s+\w|\bor\s+(?:more|less|fewer|so)\b|^[\s-]*(?:ish|odd|something)\b)",
            r"(?i:\b(?:and|plus)[\s-]+(?:change|some|more|up|over|counting)\W*$)",
            r"(?i:^\s*not\b|^\s*(?:is|was)(?:n't|\s+(?:not|wrong|incorrect))\b)",
            rf"(?i:^(?:st|nd|rd|th)?\s+(?:of\s+)?{MONTH})",
        )
    )
)
# A sign after these is an operator or a dash: x -18, cost - 18; not "is - 18".
OPERAND = re.compile(r"(?:^|[^\w'])[A-Za-z]\s*$")
WORD = re.compile(r"(?<!\bis)(?<!\bare)(?<!\bwas)(?<!\bequals)(?<=[A-Za-z])\s*$")

# The left side of an equation: a name or an arithmetic expression without a variable.
TIMES = re.compile(r"(?<=[\w)%])\s+[xX]\s+(?=[\w(.-])|(?<=[0-9)])\s*[xX]\s*(?=[0-9(.-])")
SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w+)")
OPERATOR = re.compile(
    r"[+*\u00d7÷·√^²³%|{}]|/(?!\s*(?:[A-Za-z]{2}|[ghlms]\b))|(?<![A-Za-z])-|-(?![A-Za-z])|\\?\bsqrt|\\(?:times|cdot|div|frac)"
    rf"|(?i:\b{MULTIPLE}\b)"
)
VARIABLE = re.compile(
    r"(?i)(?<![A-Za-z'\\])[bejnoqruvwxyz](?![A-Za-z'])|(?<![-+*/]\s)(?<![-+*/0-9.])[0-9.]+[A-Za-z]\W*$"
)
LETTER = re.compile(r"(?<![A-Za-z'\\])[A-Za-z](?![A-Za-z'])")
UNEQUAL = re.compile(r"[!<>≠≤≥]\s*$|[,;]\s|\b(?:or|not)\b|(?:[0-9]|^)\s*and\b")  # before the last equals sign
SENTENCE_END = re.compile(r"[.!]\s+(?=[A-Z(])|[,;]?\s(?:because|since)\s")
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
    first = NUMBER.search(text) if len(text) <= LONGEST_NUMBER else None
    if first and (end := SENTENCE_END.search(text, first.end())):
        if RETRACTED.search(text, end.end()):
            return None
        text = text[: end.start()]
    left, equals, text = text.rpartition("=")
    numbers = [*NUMBER.finditer(text)] if first else []
    if len(numbers) != 1 or (equals and (UNEQUAL.search(left) or all(map(_is_open, left.split("="))))):
        return None
    number = numbers[0]
    before, sign = text[: number.start()], number["sign"]
    if BEFORE.search(before) or AFTER.search(text[number.end() :]):
        return None
    if sign and (OPERAND.search(before) or (sign[-1].isspace() and WORD.search(before))):
        return None
    return _read(number)


def _is_open(side: str) -> bool:
    """Return True if a side of an equation computes with something unknown: x + 2, 2x, cost / 2; not x, 9 eggs * 2."""
    side = TIMES.sub("*", SUBSCRIPT.sub("", side.rpartition(":")[2]))
    if not re.search("[0-9]", side):
        return bool(OPERATOR.search(side) and LETTER.search(side))
    operands = [piece for piece in OPERATOR.split(side) if re.search(r"\w", piece)]
    return bool(VARIABLE.search(side)) or not all(re.search("[0-9]", piece) for piece in operands)


def _read(number: re.Match[str]) -> Quantity | None:
    if number["bottom"]:
        integer, top, bottom = (_figure(number[group] or "0") for group in ("integer", "top", "bottom"))
        if bottom == 0 or (number["integer"] and top >= bottom):
            return None
        value = integer + top / bottom
    else:
        value = _figure(number["decimal"])
    if number["scale"]:
        value *= SCALES[number["scale"].lower()]
    return Quantity(-value if number["sign"] and "-" in number["sign"] else value, bool(number["bottom"]))


def _figure(text: str) -> Fraction:
    return Fraction(text.translate(SEPARATORS))
