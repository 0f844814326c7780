"""The evaluation suite: calibration against its definition, match rules against lm-eval's, the command line."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from eval import agreement, calibration, suite
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.rows import read_jsonl
from onpolicy_skd.models import loading as models
from onpolicy_skd.models import split_model

# -- calibration ---------------------------------------------------------------------------------------------------


def test_the_calibration_error_of_an_example_by_hand():
    """Two predictions at 0.95, the first right; two at 0.35, both wrong: 1/2 * 0.45 + 1/2 * 0.35."""
    measured = calibration.calibration(np.array([0.95, 0.95, 0.35, 0.35]), np.array([True, False, False, False]))
    assert measured.ece == pytest.approx(0.40)
    assert (measured.count, measured.confidence, measured.accuracy) == (4, pytest.approx(0.65), 0.25)
    assert [b.count for b in measured.bins if b.count] == [2, 2]
    assert len(measured.bins) == 15


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=60), st.integers(1, 20))
def test_every_prediction_is_in_one_bin_and_the_error_is_its_definition(predictions, bins):
    confidence, correct = np.array([c for c, _ in predictions]), np.array([r for _, r in predictions], bool)
    measured = calibration.calibration(confidence, correct, bins)
    expected = 0.0
    for i, b in enumerate(measured.bins):
        inside = [(c, r) for c, r in predictions if (b.low < c <= b.high) or (i == 0 and c == 0)]
        assert b.count == len(inside)
        if inside:
            mean, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected += len(inside) / len(predictions) * abs(mean - accuracy)
    assert measured.ece == pytest.approx(expected)
    assert sum(b.count for b in measured.bins) == len(predictions)


def test_the_error_is_small_for_calibrated_and_large_for_overconfident_predictions():
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    correct = rng.random(200_000) < confidence
    assert calibration.calibration(confidence, correct).ece < 0.01
    assert calibration.calibration(np.sqrt(confidence), correct).ece > 0.1


def test_confidence_of_choices_is_their_softmax():
    measured = calibration.choice_calibration([[-1.0, -2.0], [-5.0, -4.0, -4.5]], [0, 2])
    first, second = 1 / (1 + np.exp(-1)), 1 / (np.exp(-1) + 1 + np.exp(-0.5))
    assert measured.confidence == pytest.approx((first + second) / 2)
    assert measured.accuracy == 0.5


def test_next_token_predictions_are_those_of_the_full_softmax():
    model = tiny_model("llama", tied=True)
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(2, 97, a).tolist(), rng.integers(2, 97, b).tolist()) for a, b in ((5, 3), (9, 1), (2, 7))]
    measured, logprobs = calibration.next_token_calibration(split_model.split(model, 97), 0, pairs)
    confidence, correct, sums = [], [], []
    for context, rest in pairs:
        logits = model.double()(input_ids=torch.tensor([context + rest])).logits[0, len(context) - 1 : -1]
        probs = torch.softmax(logits, -1)
        confidence += probs.amax(-1).tolist()
        correct += (probs.argmax(-1) == torch.tensor(rest)).tolist()
        sums.append(probs[torch.arange(len(rest)), rest].log().sum().item())
    expected = calibration.calibration(np.array(confidence), np.array(correct))
    assert measured.ece == pytest.approx(expected.ece, abs=1e-5)
    assert measured.confidence == pytest.approx(expected.confidence, abs=1e-5)
    assert logprobs == pytest.approx(sums, abs=1e-4)


# -- agreement with lm-eval ----------------------------------------------------------------------------------------

PIECES = ["#### ", "####", "18", "1,234", "$18", "18.00", ".5", "-", "\u2212", "1/2", "5%", " ", "\n", ".", "..", ",",
          "The answer is ", "\\boxed{18}", "\\boxed{", "eggs", "$", "#", "0018", "18.", "\u00bd", "\uff13"]  # fmt: skip
REFERENCES = ["so 18\n#### 18", "#### 1,234", "#### -5", "#### 0.5", "#### 1234.50", "#### $18"]


@given_settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32))
def test_strict_is_lm_evals_strict_match_on_any_answer(seed):
    rng = np.random.default_rng(seed)
    records = [
        {
            "key": str(i),
            "output": "".join(rng.choice(PIECES, rng.integers(0, 8))),
            "reference": str(rng.choice(REFERENCES)),
        }
        for i in range(1_500)
    ]
    wrong = [(r, j) for r, j in zip(records, agreement.judge(records), strict=True) if j.strict != j.strict_match]
    assert not wrong, wrong[:3]


def test_both_rules_agree_on_real_worked_answers(gsm8k):
    rows = list(read_jsonl(gsm8k / "test.jsonl"))
    records = [
        {"key": f"{kind}{i}", "output": change(row["answer"]), "reference": row["answer"]}
        for kind, change in {
            "as it is": str,
            "said": lambda a: a.replace("#### ", "The answer is "),
            "of another": lambda a: a + "1",
        }.items()
        for i, row in enumerate(rows)
    ]
    judgments = agreement.judge(records)
    assert len(judgments) == 3 * 1_319
    assert all(j.strict == j.strict_match for j in judgments)
    differing = [j for j in judgments if j.match != j.flexible]
    assert not differing, differing[:3]
    assert sum(j.match for j in judgments) == 2 * 1_319


def test_each_disagreement_has_its_reason():
    cases = {
        "#### 18\nthat is 3 x 6": "a number follows the final answer",
        "#### 18.00": "the same number, written otherwise",
        "#### 17\nNo: 18": "the number after the final answer is the right one",
        "#### 36/2": "flexible-extract reads a piece of the number",
        "<think>so 18": "flexible-extract reads the thinking",
        "<think>5 + 13</think>no number": None,
        "#### 18\nQuestion: 2 + 3?": "flexible-extract reads the turn after the answer",
        r"\boxed{2 \times 9}": "a formula, which math-verify computes",
        "#### 17 or 18": "the stated answer is not one number",
        "between 17 and 18": "the last number is not stated alone",
        "#### \u221218": "lm-eval does not read the minus sign \u2212",
        "18" + " word" * 1_000: "the last number stands more than 4000 characters before the end",
        "#### **18**": None,
        "#### 18 eggs": None,
        "#### Final answer\n\\boxed{18}": None,
    }
    judgments = agreement.judge([{"key": k, "output": k, "reference": "#### 18"} for k in cases])
    reasons = {j.key: agreement.reason(j) for j in judgments if j.match != j.flexible}
    assert reasons == {key: why for key, why in cases.items() if why}
    half = agreement.judge([{"key": "a", "output": "#### \u00bd", "reference": "#### 1/2"}])
    assert agreement.reason(half[0]) == "flexible-extract reads no number"


def test_the_agreement_command_counts_and_names_answers(tmp_path, capsys):
    rows = [{"key": "right", "output": "#### 18"}, {"key": "wrong", "output": "#### 17"}]
    rows += [{"key": "differs", "output": "#### 18.00"}]
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(r | {"reference": "#### 18"}) + "\n" for r in rows))
    assert agreement.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 answers")
    assert "match: 1 disagreements" in printed
    assert "differs: right here" in printed


def test_records_that_are_none_are_refused(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text('{"key": "a", "output": "1"}\n')
    assert agreement.main([str(file)]) == 2
    assert "record 1: has no reference" in capsys.readouterr().err


# -- the command ---------------------------------------------------------------------------------------------------

ROWS = {
    "gsm8k/test": [{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}] * 3,
    "arc_easy/test": [
        {"question": "Which one flies?", "choices": {"text": ["dog", "bird"], "label": ["A", "B"]}, "answerKey": "B"},
        {"question": "Which is hot?", "choices": {"text": ["fire", "ice"], "label": ["A", "B"]}, "answerKey": "A"},
    ],
    "hellaswag/validation": [
        {"activity_label": "A", "ctx_a": "A man cooks.", "ctx_b": "he", "endings": ["eats.", "flies."], "label": "0"}
    ],
    "piqa/validation": [{"goal": "To boil water,", "sol1": "heat it.", "sol2": "freeze it.", "label": 0}],
    "lambada_openai/test": [{"text": "She knocked, but nobody opened the door"}, {"text": "He drank a glass of water"}],
    "ifeval/train": [
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"a": None}]}
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """lm-eval's IFEval downloads NLTK's data when it is imported; a network that drops packets would stall here."""
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)


@pytest.fixture
def local_tasks(tmp_path):
    for name, rows in ROWS.items():
        file = tmp_path / "tasks" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "tasks"


def run(folder, *arguments):
    options = ["--model", "bundled:demo_student", "--device", "cpu", "--max-length", "128", "--fewshot", "0"]
    return suite.main([*options, "--out", str(folder), *arguments])


def check_outcome(folder, model="bundled:demo_student"):
    """Check that suite.json is complete and its numbers are the model's."""
    result = json.loads((folder / "suite.json").read_text())
    assert set(result["tasks"]) == set(suite.TASKS)
    for name, task in suite.TASKS.items():
        assert tuple(result["tasks"][name]["metrics"]) == task.metrics
    problems = {n: result["tasks"][n]["problems"] for n in ("gsm8k", "arc_easy", "lambada_openai")}
    assert problems == {"gsm8k": 2, "arc_easy": 2, "lambada_openai": 2}
    assert 0 <= result["mean_accuracy"] <= 1
    kinds = {n: c["kind"] for n, c in result["calibration"].items()}
    assert kinds == {n: t.calibrated for n, t in suite.TASKS.items() if t.calibrated}
    assert (folder / "reliability.png").stat().st_size > 1_000
    tokenizer = models.load_tokenizer(model)
    split = split_model.split(models.load_model(model, torch.float32, "cpu").eval(), 512)
    texts = [row["text"].rpartition(" ") for row in ROWS["lambada_openai/test"]]
    pairs = [suite.encode_pair(tokenizer, context, f" {word}") for context, _, word in texts]
    _, logprobs = calibration.next_token_calibration(split, tokenizer.pad_token_id, pairs)
    perplexity = result["tasks"]["lambada_openai"]["metrics"]["perplexity"]["value"]
    assert np.log(perplexity) == pytest.approx(-np.mean(logprobs), rel=1e-4)  # lm-eval's forward and ours
    assert result["calibration"]["lambada_openai"]["count"] == sum(len(rest) for _, rest in pairs)


def test_generation_settings_of_the_checkpoint_are_not_used(tmp_path):
    folder = shutil.copytree(models.resolve_path("bundled:demo_student"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "repetition_penalty": 9.0}))
    arguments = argparse.Namespace(
        model=str(folder), backend="transformers", device="cpu", dtype="float32", max_length=64, batch_size=2,
        trust_remote_code=False,
    )  # fmt: skip
    used = suite.language_model(arguments).model.generation_config
    assert (used.eos_token_id, used.repetition_penalty) == (1, None)


@pytest.mark.slow
def test_the_suite_on_transformers(local_tasks, tmp_path, capsys):
    assert run(tmp_path / "out", "--data", str(local_tasks), "--limit", "2", "--backend", "transformers") == 0
    check_outcome(tmp_path / "out")
    printed = capsys.readouterr().out
    assert "exact_match,strict-match" in printed
    assert "mean accuracy" in printed
    samples = (tmp_path / "out" / "samples" / "gsm8k.jsonl").read_text().splitlines()
    assert len(samples) == 4  # two problems, two filters


@pytest.mark.slow
def test_the_suite_on_vllm(local_tasks, tmp_path):
    assert run(tmp_path / "out", "--data", str(local_tasks), "--limit", "2", "--backend", "vllm") == 0
    check_outcome(tmp_path / "out")


def test_missing_input_is_refused_before_a_model_loads(local_tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "language_model", lambda _: pytest.fail("a model was loaded"))

    def refusal(*arguments):
        assert run(tmp_path / "out", *arguments) == 2
        return capsys.readouterr().err

    assert "--tasks mmlu: not in the suite; accepted: gsm8k" in refusal("--tasks", "mmlu")
    assert "no such folder" in refusal("--data", str(tmp_path / "nowhere"))
    assert "--limit 0: accepted: at least 1" in refusal("--limit", "0")
    (local_tasks / "piqa" / "validation.jsonl").rename(local_tasks / "piqa" / "dev.jsonl")
    assert "piqa needs" in refusal("--data", str(local_tasks), "--tasks", "piqa")
    ifeval = local_tasks / "ifeval" / "train.jsonl"
    row = ROWS["ifeval/train"][0] | {"instruction_id_list": ["length_constraints:number_sentences"]}
    ifeval.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("nltk.data.find", _no_data)
    assert "needs NLTK's data set punkt_tab" in refusal("--data", str(local_tasks), "--tasks", "ifeval")


def _no_data(_):
    raise LookupError


def test_a_missing_task_is_refused_with_the_names_of_the_files_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", _unreachable)
    with pytest.raises(ConfigError, match=r"gsm8k/test.jsonl, .*gsm8k/train.jsonl"):
        suite.load_tasks(["gsm8k"], tmp_path)


def _unreachable(*_, **__):
    raise ConnectionError("no hub")
