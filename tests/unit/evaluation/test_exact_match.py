"""How answers are judged: the table of forms in docs/evaluation.md, near misses, a fuzz, and hostile texts."""

import re
import threading
import time

import pytest
from helpers import ROOT, tiny_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.data.rows import DataError, load_questions
from onpolicy_skd.evaluation.exact_match import check_reference, final_answer, judged_text, score
from onpolicy_skd.evaluation.quantity import Quantity, quantity
from onpolicy_skd.models.loading import load_tokenizer

SPACES = (" ", "\u00a0", "\u2009", "\u202f")
CODE = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)")


def examples(cell):
    """The code spans of a table's cell, with the line breaks and spaces that their signs stand for."""
    for _, text in CODE.findall(cell):
        text = text.strip().replace("⏎", "\n").replace("\\|", "|")  # noqa: PLW2901
        yield from (text.replace("␣", space) for space in (SPACES if "␣" in text else [""]))


def table_of_forms():
    """(form, reference, right examples, wrong examples) of each row of the table in docs/evaluation.md."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split("### Forms")[1].split("### Against lm-eval")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [(form.strip(), ref.strip().strip("`"), [*examples(a)], [*examples(b)]) for form, ref, a, b in rows[1:]]


FORMS = table_of_forms()
RIGHT = [(form, reference, text) for form, reference, right, _ in FORMS for text in right]
WRONG = [(form, reference, text) for form, reference, _, wrong in FORMS for text in wrong]
WITH_18 = sorted({(form, text) for form, reference, text in RIGHT if reference == "18" and "18" in text})


@pytest.mark.parametrize(("form", "reference", "text"), RIGHT)
def test_right_examples_of_the_page(form, reference, text):
    assert score(text, reference).match, score(text, reference).extracted


@pytest.mark.parametrize(("form", "reference", "text"), WRONG)
def test_wrong_examples_of_the_page(form, reference, text):
    assert not score(text, reference).match, score(text, reference).extracted


# -- the references of GSM8K ---------------------------------------------------------------------------------------


@pytest.fixture
def references(gsm8k):
    """(worked answer, its number) of each problem of GSM8K's test set."""
    data = tiny_settings(data={"source": "gsm8k", "path": str(gsm8k)}).data
    answers = [answer for _, _, answer in load_questions(data, "eval")]
    return [(a, a.rpartition("####")[2].strip().replace(",", "")) for a in answers]


def counted(references, text_of):
    """How many outputs ``text_of(number)`` are right, and how many of another number are."""
    right = sum(score(text_of(number), answer).match for answer, number in references)
    return right, sum(score(text_of(str(int(number) + 1)), answer).match for answer, number in references[::20])


def test_each_form_is_right_on_all_gsm8k_references(references):
    assert len(references) == 1_319
    assert len(WITH_18) > 70
    for form, text in WITH_18:
        assert counted(references, lambda number, text=text: text.replace("18", number)) == (1_319, 0), (form, text)


def test_other_writings_are_right_on_all_gsm8k_references(references):
    writings = {
        "commas": lambda n: f"#### {int(n):,}",
        "thin spaces": lambda n: f"#### {int(n):,}".replace(",", "\u2009"),
        "narrow spaces": lambda n: f"#### {int(n):,}".replace(",", "\u202f"),
        "spaces": lambda n: f"#### {int(n):,}".replace(",", " "),
        "LaTeX spaces": lambda n: rf"\boxed{{{int(n):,}}}".replace(",", r"\,"),
        "LaTeX commas": lambda n: rf"\boxed{{{int(n):,}}}".replace(",", "{,}"),
        "decimal": lambda n: f"#### {n}.0",
        "thousand": lambda n: f"#### {int(n) / 1000} thousand",
        "fraction": lambda n: f"#### {3 * int(n)}/3",
        "LaTeX fraction": lambda n: rf"\boxed{{\frac{{{2 * int(n)}}}{{2}}}}",
    }
    for name, text_of in writings.items():
        assert counted(references, text_of) == (1_319, 0), name


def test_mixed_numbers_and_percent_on_all_gsm8k_references(references):
    for name, text in {"mixed": "#### {} 1/2", "LaTeX": r"\boxed{{{}\frac{{1}}{{2}}}}", "percent": "{}.5 %"}.items():
        right = [score(text.format(n), f"#### {n}.5").match for _, n in references]
        other = [score(text.format(n), f"#### {n}").match for _, n in references]
        assert (sum(right), sum(other)) == (1_319, 0), name


def test_negative_numbers_need_their_sign(references):
    numbers = [number.lstrip("-") for _, number in references]
    for sign in ("-", "\u2212", "-$", "minus ", "minus USD "):
        assert all(score(f"#### {sign}{n}", f"#### -{n}").match for n in numbers)
        assert not any(score(f"#### {sign}{n}", f"#### {n}").match for n in numbers)
    assert not any(score(f"#### {n}", f"#### -{n}").match for n in numbers)


def test_the_noun_of_the_solution_may_follow(references):
    """As models copy it: "#### 18 every" of "... = $18 every day at the farmer's market"."""
    nouns = 0
    for answer, number in references:
        solution = re.sub("<<.*?>>", "", answer.rpartition("####")[0])
        if words := re.findall(rf"(?<![\d.,]){number}\s+([A-Za-z][A-Za-z' -]*)", solution):
            nouns += 1
            for text in (f"#### {number} {words[-1]}", f"#### {number} {words[-1].split()[0]}"):
                assert score(text, answer).match, text
    assert nouns == 993


# -- near misses ---------------------------------------------------------------------------------------------------

NEAR_MISSES = [
    r"4\sqrt(2)", "18,00", "1,8", "18 or 19", "17 or 18", "17 and 18", "between 17 and 18", "from 17 to 18",
    "18 to 20", "18-20", "18\u201320", "18 - 20", "18..20", "-18", "\u221218", "\u201318", "- 18", "minus 18",
    "negative 18", "not 18", "isn't 18", "18 is not the answer", "18 is wrong", "18e3", "18e-1", "0x18", "18:30",
    "10:18", "18/0", "18/2", "2/18", "1/18", "18 1/2", "18\u00bd", r"18\frac{1}{2}", r"\frac{18}{5}", r"\frac{1}{18}",
    "18 \u00d7 2", "2 \u00d7 18", "18 * 2", "18 x 2", "18x2", r"18 \times 2", r"18 \cdot 2", "2(18)", "18 + 1",
    "18 - 1", "18 plus two", "18+", "18!", "18^2", "18**2", "18\u00b2", "18 squared", r"\sqrt{18}", "\u221a18",
    "sqrt(18)", "log 18", r"18\sqrt{2}", "18x", "18y", "x18", "18i", r"18\pi", "18\u03c0", "18 eggs and 5 hens",
    "18 eggs and five hens", "18 feet 6 inches", "18 dollars and 50 cents", "18 dollars and fifty cents", "18, 19",
    "18; 19", "18 19", "(18, 19)", "[18, 19]", r"\{18, 19\}", "x = 18, y = 19", "x = 18 or x = 19", "18 = 17 + 2",
    "x > 18", "18 < x", "> 18", "<= 18", "\u2265 18", "x \u2260 18", r"x \neq 18", r"x \geq 18", "18 \u00b1 1",
    r"18 \pm 1", "18\\ldots", "at least 18", "at most 18", "more than 18", "less than 18", "over 18", "nearly 18",
    "almost 18", "up to 18", "half of 18", "twice 18", "a third of 18", "18% of 50", "18 out of 20", "18 of 20",
    "18 million", "18 thousand", "18k", "$18M", "18 hundred", "18 and a half", "18 point five", "18 or more",
    "2024-01-18", "18/01/2024", "18.01.2024", "January 18", "18 May", "18th of December", "Dec. 18", "18 May 2024",
    "A18", "18.5", "18.0000001", "1.8", "0.18", ".18", "180", "118", "1 8", "18\u2009000", "18 000", "18,000",
    "18.000.000", "18_000", "18_2", "18 (or 19)", "18. No, 19.", "18. Wait, not 18.", "eighteen or 18", "18?",
    "f(18)", "18 mod 5", "18 choose 2",
    "-(18)", "- (18)", "x + 18", "x - 18", "x -18", "cost - 18", "F-18", "2x = 18", "2 x = 18", "4s = 18", "x + 2 = 18",
    "x^2 = 18", "x\u00b2 = 18", "x/2 = 18", "2/x = 18", "-x = 18", "|x| = 18", "x + y = 18", "2L + 2W = 18",
    "total / 2 = 18", r"\sqrt{x} = 18", r"\frac{x}{2} = 18", "half of x = 18", "17 \u2192 18", "18 & a half",
    "18-and-a-half",
    "18 one-half", "18 three quarters", "18 and two-thirds", "18 a third", "18/two", "18 over two", "18 divided by two",
    "18 less two", "18 doubled", "18 halved", "18 twice", "thrice 18", "two hundred 18", "two hundred and 18",
    "18 hundredths",
    "18 tenths", "18 bn", "18mn", "18 mil", "18 lakh", "18 crore", "18 millions", "18-thousand", "18 hundred thousand",
    "18 K",
    "18 and change", "18ish", "18-odd", "as many as 18", "upwards of 18", "one of 18", "two thirds of 18",
    "half of the 18", "one out of 18", "18 to one", "18 out of twenty", "~~18~~", "<del>18</del>", r"\cancel{18}",
]  # fmt: skip


@pytest.mark.parametrize("frame", ["#### {}", "It follows.\n**#### {}**", "\\boxed{{{}}}", "#### The answer is {}"])
def test_near_misses_stay_wrong(frame):
    assert len(NEAR_MISSES) > 140
    assert not [text for text in NEAR_MISSES if score(frame.format(text), "#### 18").match]


def test_a_number_of_the_reasoning_is_not_the_answer_where_one_is_stated():
    for stated in ("#### 5", r"\boxed{5}", "#### 5\nThat is 18 - 13.", r"\boxed{5}, and not 18", "#### five or so: 5"):
        assert not score(f"She has 18 eggs. 18 - 13 = 5.\n{stated}", "#### 18").match, stated
    assert not score("She has 18 eggs, so 17 or 18", "#### 18").match


def test_no_output_is_right_for_two_values():
    """Equality is transitive: 18% cannot be both 18 and 0.18, 3/4 not both 3 and 0.75."""
    texts = ["18%", "18.5%", "3/4", "1 1/2", "18 thousand", "1,8", "18 or 19", "18e3", "1/3", "-18", "$18"]
    references = ["18", "0.18", "18.5", "0.185", "3", "4", "3/4", "1.5", "11/2", "1", "18000", "19", "1/3", "-18"]
    for text in texts:
        assert sum(score(f"#### {text}", f"#### {reference}").match for reference in references) <= 1, text


# -- where the answer stands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "stated"),
    [
        ("#### 18 eggs\nbye", "18 eggs"),
        ("#### Final answer\n\\boxed{18}", "18"),
        ("#### The total of 3 days\n5 + 13 = 18", "18"),
        ("#### 18\n#### Note\nno number", "18"),
        ("one \\boxed{18} \\boxed{} \\boxed{\\text{eggs}}", "18"),
        ("it is 3/4.", "3/4"),
        ("it costs $1,234.50 today", "1,234.50"),
        ("1.5 million people", "1.5 million"),
        ("10:30", None),
        ("<think>18", None),
        ("#### \n", None),
    ],
)
def test_what_states_the_answer(output, stated):
    assert final_answer(output) == stated


def test_thinking_and_later_turns_are_not_judged():
    assert judged_text("<think>5</think> so 18") == " so 18"
    assert judged_text("5</think>18<think>7") == "18"
    assert judged_text("#### 18\n\nQuestion: 5?") == "#### 18\n\n"[:-1]
    assert judged_text("#### 18<|im_end|>\n<|im_start|>user\n5?") == "#### 18<|im_end|>\n"
    restated = "Question: 9 * 2?\nAnswer: #### 18"
    assert judged_text(restated) == restated
    socratic = "Question 1: 9?\nQuestion 2: 9 * 2?\n#### 18"
    assert judged_text(socratic) == socratic
    assert judged_text(f"#### 18\n\nQ: {'word ' * 9_000}\n#### 5").strip() == "#### 18"
    assert score(f"<think>{'18 ' * 9_000}", "#### 18").extracted is None


THINKING = [
    *(f"<{tag}>#### 5</{tag}>" for tag in ("thoughts", "analysis", "scratchpad", "reflection", "seed:think")),
    "<|thinking|>#### 5<|/thinking|>", "<think >\n#### 5\n</think >\n", "<|begin_of_thought|>#### 5<|end_of_thought|>",
    "\u25c1think\u25b7#### 5\u25c1/think\u25b7",
]  # fmt: skip
LATER = [
    "\n\n### Question\nx", "\n\n## Problem 2\nx", "\n\n**Problem 2.** x", "\n\nExample 2:\nx", "\n\nExercise 3\nx",
    "\n\nTask: x", "\n\nQ. x?\nA.", "\n\n### Instruction\nx", "\n\nInput: x\nOutput:", " Question: x",
    "\nuser\nx\nassistant", "</s>[INST] x [/INST]", " [INST] x", "<|endoftext|>John has", "<|im_end|>\n",
    "<|eot_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_turn>\n<start_of_turn>user\nx\n",
]  # fmt: skip


@pytest.mark.parametrize("thinking", THINKING)
def test_each_kind_of_thinking_is_dropped(thinking):
    assert score(thinking + "18", "#### 18").match
    assert final_answer(thinking.partition("#### 5")[0] + "#### 5") is None


@pytest.mark.parametrize("answer", ["#### 18", r"\boxed{18}", "The answer is 18."])
def test_nothing_after_a_turn_is_judged(answer):
    assert not [later for later in LATER if not score(f"{answer}{later} #### 5", "#### 18").match]


@pytest.mark.parametrize(
    "reasoning",
    [
        "Step 1: 9 hens\nExample: 9",
        "#### Step 1: 9 hens\n\nExample: 2 eggs",
        "Task: 5\n\nInput: 9\nOutput: 1",
        "### Problem 2\n9",
    ],
)
def test_headings_in_the_reasoning_end_no_answer(reasoning):
    assert score(f"{reasoning}\n#### 18", "#### 18").match


# -- a fuzz: the verdict is known by construction ------------------------------------------------------------------

VALUES = {  # how a value of n thousandths is written, and its value in thousandths
    "integer": (str, lambda n: 1000 * n),
    "commas": (lambda n: f"{n:,}", lambda n: 1000 * n),
    "thin": (lambda n: f"{n:,}".replace(",", "\u2009"), lambda n: 1000 * n),
    "decimal": (lambda n: f"{n // 1000}.{n % 1000:03}", lambda n: n),
    "fraction": (lambda n: f"{n}/1000", lambda n: n),
    "LaTeX": (lambda n: rf"\frac{{{n}}}{{1000}}", lambda n: n),
    "mixed": (lambda n: f"{n // 1000 + 1} {n % 1000}/1000", lambda n: n // 1000 * 1000 + 1000 + n % 1000),
    "thousand": (lambda n: f"{n} thousand", lambda n: 1_000_000 * n),
}
SIGNS = {"": 1, "-": -1, "\u2212": -1, "minus ": -1}
UNITS = [
    ("", ""), ("$", ""), ("\\$", ""), ("\u20ac", ""), ("USD ", ""), ("", " eggs"), ("", "%"), ("", " km/h"),
    ("", " m^2"), ("", r"\text{ eggs}"), ("", " eggs per day"),
]  # fmt: skip
SPOILERS = [("", "")] * 8 + [
    ("not ", ""), ("", " or 7"), ("7 and ", ""), ("", " to 7"), ("at least ", ""), ("", " or more"), ("half of ", ""),
    ("", " and 7 hens"),
]  # fmt: skip
MARKS = ["{}", "**{}**", "__{}__", "{}.", "({})", "x = {}"]
FRAMES = [
    "#### {}", "so\n**#### {}**", "\\boxed{{{}}}", "#### Final answer\n\\boxed{{{}}}", "#### 7.7777\n#### {}",
    "#### {}\nbye 7.7777", "<think>#### 7.7777</think>#### {}", "#### {}\n\nQuestion: 7.7777?\n#### 7.7777",
]  # fmt: skip
CASE = st.tuples(
    st.integers(0, 9_999_999),
    *(st.sampled_from(options) for options in (list(VALUES), list(SIGNS), UNITS, SPOILERS, MARKS, FRAMES)),
    st.sampled_from([0, 0, 1]),
)


def built(n, value, sign, unit, spoiler, mark, frame, off):
    """An output, its reference and whether the output is right."""
    write, thousandths = VALUES[value]
    stated = mark.format(spoiler[0] + sign + unit[0] + write(n) + unit[1] + spoiler[1])
    meant = SIGNS[sign] * thousandths(n) + off
    reference = f"{'-' * (meant < 0)}{abs(meant) // 1000}.{abs(meant) % 1000:03}"
    return frame.format(stated), reference, off == 0 and spoiler == ("", "")


@settings(max_examples=100, deadline=None)
@given(st.lists(CASE, min_size=100, max_size=100))
def test_verdicts_of_10_000_built_answers(cases):
    for case in cases:
        output, reference, right = built(*case)
        assert score(output, f"so\n#### {reference}").match == right, (output, reference, score(output, reference))


@given(st.text(max_size=40), st.text(max_size=20))
def test_any_text_is_judged_and_equals_itself_at_most(output, reference):
    verdict = score(output, reference)
    assert isinstance(verdict.match, bool)
    assert not verdict.match or verdict.extracted


# -- references ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ["18", "#### 18", "so\n#### 1,234", "#### 3/4", "#### 1 1/2", "#### 18%", "#### $18", "#### 18 eggs", "\\boxed{18}",
     "Paris", "#### Paris", "x+1", "#### (1, 2)", "10:30", "2 apples and 3 pears", "#### x = 5"],
)  # fmt: skip
def test_references_that_can_be_read(answer):
    assert check_reference(answer) is None
    stated = answer.rpartition("####")[2].strip()
    assert score(f"#### {stated}", answer).match


@pytest.mark.parametrize(
    "answer",
    [
        "", "  \n", "####", "#### 18 or 19", "#### 1,2", "#### 18/0", "#### 10:30", "#### 2024-01-18",
        "#### 1e3", "1E-3", "#### >18", "#### < 5",
        "#### 18 eggs and 5 hens", "She has 16 eggs and eats 3 of them. She sells the rest for 2 dollars each. " * 2,
    ],
)  # fmt: skip
def test_references_that_cannot_be_read(answer):
    assert check_reference(answer)


def test_numbers_of_more_digits_than_python_reads_are_never_right():
    assert "cannot be read whole" in str(check_reference("#### " + "9" * 4_500))
    for output in ("#### 18", "#### " + "9" * 4_500, "#### " + "9" * 5_000):
        assert not score(output, "#### " + "9" * 4_500).match


def test_a_row_with_such_a_reference_is_refused_where_it_is_judged(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "#### 18"}\n{"question": "b", "answer": "#### 18 or 19"}\n')
    data = tiny_settings(data={"source": "jsonl", "train_file": str(file), "eval_file": str(file)}).data
    tokenizer = load_tokenizer("bundled:demo_student")
    assert len(load_prompts(data, tokenizer, "train")) == 2
    with pytest.raises(DataError, match=r"rows\.jsonl#2: the reference answer '18 or 19' cannot be read whole"):
        load_prompts(data, tokenizer, "eval")
    assert len(load_prompts(data, tokenizer, "eval", limit=1)) == 1


def test_all_gsm8k_references_can_be_read(gsm8k):
    data = tiny_settings(data={"source": "gsm8k", "path": str(gsm8k)}).data
    answers = [answer for split in ("train", "eval") for _, _, answer in load_questions(data, split)]
    assert len(answers) == 7_473 + 1_319
    assert not [a for a in answers if check_reference(a)]


# -- numbers and time ----------------------------------------------------------------------------------------------


def test_a_quantity_is_the_whole_text():
    assert quantity("$1,234.50 per day") == Quantity(quantity("1234.5").value, is_ratio=False)
    assert quantity("1 1/2 cups").value == quantity("1.5").value
    assert quantity("3/4").is_ratio
    assert quantity("9" * 3_900).value == int("9" * 3_900)
    assert quantity("eggs") is quantity("") is quantity("5 and 6") is None


HOSTILE = [
    "1 111 ", "1 ", "1,", "1/", "1 and ", "<<", "</a", r"\text{", r"\frac{", r"\frac{1}", "{", "*", "_", "- ", " ",
    "\n", "\n ", "#### ", r"\boxed{", r"\boxed{1", "= 1", "answer: ", "\n\nQuestion: ", "<think>", "</think>",
    "<|a|>", "or ", "not ", ". ", "!", "(", "\\", "\u2009111", "1e9", "$", "-$", "~", "^m^2", "january ",
    "~~", "~~1", "<del>", "[INST]", "</s>1", "\nTask: ", "\n## Task ", "x + 1 = ", "1 a b c + ", "a+", "1 a ",
    r"\boxed 1", "#### answer 1\nTask: ", "\u25c1think", "\n**", "- (", "of 0 cents ", "a 0", "<|channel|>",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_repetitions_take_seconds_at_most(piece):
    for text in (piece * (1_000_000 // len(piece)), "#### 18" + piece * 1_000, f"{piece * 1_000}#### {piece * 600}x"):
        start = time.thread_time()
        score(text, "#### 18")
        assert time.thread_time() - start < 10.0  # below a second, but slow machines differ; quadratic time is hours


def test_formulas_are_compared_off_the_main_thread_too():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(score(r"\boxed{\sqrt{324}}", "#### 18").match))
    thread.start()
    thread.join()
    assert verdicts == [True]
