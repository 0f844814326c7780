import itertools
import json
import time

import numpy as np
import pytest
from helpers import tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from eval import gsm8k as evaluation
from onpolicy_skd.data.rows import load_questions
from onpolicy_skd.evaluation import evaluate, exact_match
from onpolicy_skd.evaluation.exact_match import final_answer, reference_number, score, wilson
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.types import Prompt, SamplingParams, Trajectory


@pytest.mark.parametrize(
    ("output", "reference", "match", "strict"),
    [
        ("48/2=24\n#### 24", "#### 24", True, True),
        ("#### 1,234", "#### 1234", True, True),
        ("#### 1234", "#### 1,234", True, True),
        ("#### $18", "#### 18", True, False),
        ("#### 18.00", "#### 18", True, False),
        ("The answer is 18.", "#### 18", True, False),
        ("The answer is $18.00.", "#### 18", True, False),
        (r"so \boxed{18}", "#### 18", True, False),
        (r"so \boxed{\frac{36}{2}}", "#### 18", True, False),
        ("#### \u22125", "#### -5", True, False),
        ("#### -5", "#### 5", False, False),
        ("#### 18 apples", "#### 18", True, True),
        ("#### 17\nNo, wait.\n#### 18", "#### 18", True, False),
        ("#### 18\n#### 17", "#### 18", False, True),
        ("#### 1/2", "#### 0.5", True, False),
        ("18 is not it: 19", "#### 18", False, False),
        ("####", "#### 18", False, False),
        ("", "#### 18", False, False),
        ("no number here", "#### 18", False, False),
        (r"\boxed{", "#### 18", False, False),
        (r"18 so \boxed{", "#### 18", True, False),
        (r"\boxed{18} and \boxed{", "#### 18", True, False),
        ("18 apples\n####", "#### 18", True, False),
        ("#### 18..", "#### 18", True, False),
        ("#### 18.", "#### 18", True, True),
        ("#### 1 1/2", "#### 1.5", True, False),
        (r"\boxed{\dfrac{3}{4}}", "#### 0.75", True, False),
        ("#### 50%", "#### 50", True, True),
        ("#### 18", "#### $18", True, True),
        ("18 \uff13", "#### 18", True, False),
        ("#### 9**9**9**9**9", "#### 18", False, False),
        ("<script>alert(18)</script>", "#### 18", True, False),
    ],
)
def test_both_rules_on_nasty_outputs(output, reference, match, strict):
    verdict = score(output, reference)
    assert (verdict.match, verdict.strict) == (match, strict), verdict.extracted


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "#### " * 200_000,
        "{" * 1_000_000,
        "1," * 500_000,
        r"\boxed{" * 99999,
        "#### (((2^{1000})^{1000})^{1000})",
        r"\boxed{\int_0^1 x^{x^x} dx}",
        "#### 9^{9^{9^{9}}}",
        r"\boxed{\sum_{n=1}^{10^9} \sin(n)}",
        r"#### \prod_{n=1}^{9999999} n",
        "#### 2**(10**10)",
        r"\boxed{\binom{10^6}{10^5}}",
        r"\boxed{100000000!}",
    ],
)
def test_no_output_takes_more_than_seconds(text):
    start = time.thread_time()
    score(text, "#### 18")
    assert time.thread_time() - start < 10.0


def test_a_comparison_that_only_waits_for_a_busy_machine_is_finished():
    with exact_match._within(0.05):
        time.sleep(0.3)


def test_an_interrupt_that_is_swallowed_comes_again():
    swallowed = 0

    def stubborn():
        nonlocal swallowed
        while swallowed < 3:
            try:
                while True:
                    pass
            except exact_match._TooLongError:
                swallowed += 1
        raise exact_match._TooLongError

    with pytest.raises(exact_match._TooLongError), exact_match._within(0.05):
        stubborn()
    assert swallowed == 3


def test_every_real_reference_answer_is_right_by_both_rules(gsm8k):
    data_cfg = tiny_settings(data={"source": "gsm8k", "path": str(gsm8k)}).data
    for _, _, answer in load_questions(data_cfg, "eval"):
        verdict = score(answer, answer)
        assert verdict.match, answer
        assert verdict.strict, answer
        worked = answer.replace("####", "The answer is")
        assert score(worked, answer).match, answer
        assert not score(worked, answer).strict
        wrong = f"#### {float(reference_number(answer)) + 1:g}"
        assert not score(wrong, answer).match


def test_the_final_answer_is_the_last_one_stated():
    assert final_answer("1 then 2 then 3.5 eggs") == "3.5"
    assert final_answer("a #### 7 b\nrest 9") == "7 b"
    assert final_answer(r"\boxed{1} \boxed{2}") == "2"
    assert final_answer("word") is None


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def fake_generate(tokenizer, answers):
    def generate(requests, sampling):
        trajectories = []
        for i, r in enumerate(requests):
            ids = np.asarray(tokenizer(answers[i % len(answers)])["input_ids"])
            trajectories.append(Trajectory(r.key, np.array([1]), ids, np.zeros(len(ids), np.float32), "stop", 0))
        return trajectories[::-1]  # engines may answer in any order

    return generate


def test_evaluation_counts_and_records(tmp_path):
    tokenizer = load_tokenizer("bundled:demo_student")
    prompts = [Prompt(f"p{i}", [5, 6], f"q{i}", "#### 7") for i in range(4)]
    generate = fake_generate(tokenizer, ["so\n#### 7", "7", "#### 8", ""])
    done = evaluate.evaluate(generate, prompts, tokenizer, SamplingParams(8, 0.0))
    assert done.result["match"]["share"] == 0.5
    assert done.result["strict"]["share"] == 0.25
    assert done.result["match"]["interval"] == wilson(2, 4)
    assert [r["match"] for r in done.records] == [True, True, False, False]
    done.write_records(tmp_path / "deep" / "r.jsonl")
    assert [json.loads(line)["key"] for line in (tmp_path / "deep" / "r.jsonl").read_text().splitlines()] == [
        "p0/0", "p1/0", "p2/0", "p3/0"]  # fmt: skip
    sampled = evaluate.evaluate(generate, prompts, tokenizer, SamplingParams(8, 1.0), samples=2)
    assert sampled.result["match"]["share"] == 0.5
    low, high = sampled.result["match"]["interval"]
    assert low <= 0.5 <= high


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_subsets_of_the_answers(samples):
    for right in range(samples + 1):
        answers = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            exact = np.mean([any(chosen) for chosen in itertools.combinations(answers, k)], dtype=np.float64)
            assert evaluate.pass_at_k(right, samples, k) == pytest.approx(exact, abs=1e-15)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_is_the_product_of_its_paper(samples, data):
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    wrong = samples - right
    product = 1.0 if wrong < k else 1.0 - np.prod(1.0 - k / np.arange(wrong + 1, samples + 1, dtype=np.float64))
    assert evaluate.pass_at_k(right, samples, k) == pytest.approx(product, abs=1e-12)


def test_several_samples_have_avg_and_pass_at_powers_of_two():
    rows = [[True, False, False, True, False], [False] * 5, [True] * 5]
    records = [{"match": m, "strict": False, "finish_reason": "stop", "tokens": 4} for samples in rows for m in samples]
    result = evaluate.summarize(records, 5)
    assert (result["problems"], result["samples"]) == (3, 5)
    assert result["match"]["share"] == pytest.approx((0.4 + 0 + 1) / 3)
    assert list(result["pass_at"]["match"]) == ["1", "2", "4"]
    assert result["pass_at"]["match"]["2"]["share"] == pytest.approx((0.7 + 0 + 1) / 3)
    half = 1.959964 * np.std([0.7, 0, 1], ddof=1) / 3**0.5
    low, high = result["pass_at"]["match"]["2"]["interval"]
    assert (low, high) == (pytest.approx(max(0, 1.7 / 3 - half)), pytest.approx(min(1, 1.7 / 3 + half)))
    assert result["strict"]["interval"] == wilson(0, 3)  # three equal values are no certainty


def test_records_of_an_earlier_evaluation_are_kept_and_new_ones_handed_over():
    tokenizer = load_tokenizer("bundled:demo_student")
    prompts = [Prompt(f"p{i}", [5, 6], f"q{i}", "#### 7") for i in range(4)]
    generate = fake_generate(tokenizer, ["#### 7"])
    first = evaluate.evaluate(generate, prompts[:3], tokenizer, SamplingParams(8, 0.0))
    known = [r | {"output": "kept"} for r in first.records[1:]]
    new: list = []
    second = evaluate.evaluate(generate, prompts, tokenizer, SamplingParams(8, 0.0), known=known, on_record=new.append)
    assert {r["key"] for r in new} == {"p0/0", "p3/0"}
    assert [r["output"] for r in second.records] == ["#### 7", "kept", "kept", "#### 7"]
    complete = evaluate.evaluate(None, prompts, tokenizer, SamplingParams(8, 0.0), known=second.records)
    assert complete.records == second.records


def test_a_stop_text_is_no_part_of_the_judged_answer():
    tokenizer = load_tokenizer("bundled:demo_student")
    prompts = [Prompt("p", [5, 6], "q", "#### 7")]
    generate = fake_generate(tokenizer, ["#### 7\nQuestion: 8"])
    [record] = evaluate.evaluate(generate, prompts, tokenizer, SamplingParams(8, 0.0, stop=("Question:",))).records
    assert (record["output"], record["match"]) == ("#### 7\n", True)
    [record] = evaluate.evaluate(generate, prompts, tokenizer, SamplingParams(8, 0.0)).records
    assert record["output"] == "#### 7\nQuestion: 8"


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=pytest.mark.slow), "transformers"])
def test_command_line_on_the_bundled_teacher(tmp_path, capsys, engine):
    code = evaluation.main(
        ["--model", "bundled:demo_teacher", "--problems", "40", "--out", str(tmp_path), "data.source=demo",
         "data.max_prompt_tokens=96", "rollout.max_tokens=128", f"rollout.engine={engine}"]
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["match"]["share"] >= 0.9
    assert result["problems"] == len((tmp_path / "records.jsonl").read_text().splitlines()) == 40
    assert "match:" in capsys.readouterr().out


def test_command_line_errors(capsys):
    assert evaluation.main(["--model", "bundled:none", "data.source=demo"]) == 2
    assert evaluation.main(["--model", "bundled:demo_teacher", "--samples", "0"]) == 2
    assert evaluation.main(["--model", "bundled:demo_teacher", "data.sorce=demo"]) == 2
    assert "did you mean 'data.source'" in capsys.readouterr().err
