"""The model card: metadata as the hub reads it, figures of the summary, and a command that repeats the run."""

import re
import shlex

import pytest
import yaml
from helpers import tiny_settings
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from onpolicy_skd.config.loading import build_settings, load_settings, resolve
from onpolicy_skd.config.schema import rules_of, walk
from onpolicy_skd.config.validation import value_of
from onpolicy_skd.data.prompts import render
from onpolicy_skd.models.loading import ASSETS
from onpolicy_skd.report import card

SUMMARY = {
    "run": "r", "steps": 7, "problems": 1319, "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "exact_match": {"before": 0.25, "after": 0.5, "teacher": None},
    "exact_match_interval": {"before": [0.2, 0.3], "after": [0.45, 0.55], "teacher": None},
    "strict_match": {"before": 0.25, "after": 0.5, "teacher": None},
    "strict_match_interval": {"before": [0.2, 0.3], "after": [0.45, 0.55], "teacher": None},
    "divergence": {"before": 0.5, "after": 0.25}, "divergence_reference": {"before": None, "after": None},
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the card of a run with the given settings, and loads it as the hub would."""

    def build(**sections):
        settings = tiny_settings(**({"run": {"dir": tmp_path, "name": "r"}} | sections))
        (settings.run.folder / "final").mkdir(parents=True, exist_ok=True)
        (settings.run.folder / "curves.png").write_bytes(b"\x89PNG")
        return ModelCard.load(card.write(settings, SUMMARY))

    return build


def test_the_card_of_a_run_on_hub_models_and_data(write, tmp_path):
    loaded = write(
        data={"source": "gsm8k"},
        student={"model": "Qwen/Qwen3-1.7B"},
        teacher={"model": "Qwen/Qwen3-8B", "dtype": "auto"},
        positions={"k": 0.1},
    )
    data = loaded.data
    assert (data.base_model, data.datasets, data.library_name) == ("Qwen/Qwen3-1.7B", ["openai/gsm8k"], "transformers")
    assert data.license is None
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config) == ("openai/gsm8k", "main")
    assert (result.metric_type, result.metric_value) == ("exact_match", 50.0)
    for line in (
        "`Qwen/Qwen3-1.7B`, distilled from `Qwen/Qwen3-8B` on its own responses",
        "reverse_kl at 10 % of the positions (top_k by student_entropy), 7 optimizer steps of 16 samples",
        "| student before | 25.0 % (20.0 to 30.0) | 25.0 % (20.0 to 30.0) |",
        "| student after | 50.0 % (45.0 to 55.0) | 50.0 % (45.0 to 55.0) |",
        "reverse_kl per token of the student's rollouts: 0.5000 nats before, 0.2500 after.",
        "![Curves of the run](curves.png)",
        "Versions: python 3.11.7, torch 2.13.0.",
        "add `license: NAME`",
    ):
        assert line in loaded.text
    assert (tmp_path / "r" / "final" / "curves.png").read_bytes() == b"\x89PNG"


def test_local_models_and_files_are_named_without_their_folders(write, tmp_path):
    student, data = tmp_path / "students" / "mine", tmp_path / "data" / "train.jsonl"
    student.mkdir(parents=True)
    loaded = write(student={"model": str(student)}, data={"source": "jsonl", "train_file": data, "eval_file": data})
    assert loaded.data.base_model is None
    assert loaded.data.datasets is None
    assert loaded.data.eval_results is None
    assert "`mine`, distilled from `bundled:demo_teacher`" in loaded.text
    assert "data.train_file=train.jsonl" in loaded.text
    assert str(tmp_path) not in loaded.content


def test_the_card_of_a_mix_names_the_data_of_all_its_sources(write, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answer": "2"}\n')
    demo, file = {"source": "demo"}, {"source": "jsonl", "train_file": str(rows), "eval_file": str(rows)}
    loaded = write(data={"source": "gsm8k", "mix": [demo, file]})  # data.source is the default, which a mix replaces
    assert (loaded.data.datasets, loaded.data.eval_results) == (None, None)
    assert "Data: `demo`, `rows.jsonl`." in loaded.text
    loaded = write(data={"source": "gsm8k", "mix": [demo, {"source": "gsm8k"}]})
    assert (loaded.data.datasets, loaded.data.eval_results) == (["openai/gsm8k"], None)
    loaded = write(data={"source": "gsm8k", "mix": [{"source": "hub", "name": "a/b", "subset": "c"}]})
    (result,) = loaded.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("a/b", "c", "test")


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"system": 'Answer "briefly" {so}.', "instruction": "\nReason step by step, in \\boxed{}. 日本"},
        {"thinking": True},
        {"template": "plain", "plain": "Q: {question}\n{x}\nA:", "instruction": " 'please'"},
        {"mix": [{"source": "demo", "instruction": "!"}]},
    ],
)
def test_the_code_of_the_card_makes_the_prompt_of_training(write, data):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "demo_student")
    tokenizer.chat_template = "{% if enable_thinking is false %}<pad>{% endif %}" + tokenizer.chat_template
    loaded = write(data={"source": "gsm8k" if "mix" in data else "demo"} | data)
    (code,) = re.findall(r"```python\n(.*?)```", loaded.text, re.DOTALL)
    scope = {"tokenizer": tokenizer}
    exec(code.partition("model = ")[2].partition("\n")[2].partition("output = ")[0], scope)
    settings = tiny_settings(data={"source": "gsm8k" if "mix" in data else "demo"} | data)
    assert scope["inputs"]["input_ids"][0].tolist() == render("QUESTION", tokenizer, settings.data.sources[0])


def test_the_card_says_how_many_examples_were_in_a_prompt(write):
    assert "# In training 4 examples stood before the question.\nmessages = [" in write(data={"shots": 4}).text


def test_the_card_names_a_mixture_of_divergences(write):
    loaded = write(alignment={"mixture": {"gate": "eopd"}})
    assert "distillation: reverse and forward KL mixed by eopd at 20 %" in loaded.text


def test_credentials_stay_out_of_the_card(write, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345678")
    loaded = write(data={"source": "demo", "system": "abcdefgh12345678"})
    assert "data.system=***" in loaded.text
    assert "abcdefgh12345678" not in loaded.content


@pytest.mark.parametrize("config", ["demo", "gsm8k_on_policy", "paper/table5/on_se_kd", "qwen_coder_cpu"])
def test_the_command_repeats_the_settings_that_affect_the_result(config):
    changes = ["--config", config, "rollout.stop=[\"it's\", '\\n\\n']", "student.lora_rank=4", "learner.lr=5e-6"]
    settings = load_settings([*changes, "data.instruction=/no_think; 'quoted' "])
    command = card.command(settings)
    assert max(map(len, command.splitlines())) < 92
    verb, *rest = shlex.split(command.removeprefix("skd ").replace("\\\n", ""))
    assert verb == "train"
    again = load_settings(rest)
    differ = {
        key for key, field in walk()
        if rules_of(field)["affects_result"] and value_of(settings, key) != value_of(again, key)
    }  # fmt: skip
    assert differ == set()
    assert again.run.name == settings.run.name


def test_a_run_on_defaults_is_one_word():
    assert card.command(build_settings(None)) == "skd train"


def test_a_mix_is_in_the_command_of_the_card(tmp_path):
    rows = tmp_path / "rows.jsonl"
    mix = [{"source": "demo", "weight": 2.0}, {"source": "jsonl", "train_file": str(rows)}]
    command = card.command(resolve({"data": {"source": "gsm8k", "mix": mix}}))
    words = dict(word.split("=", 1) for word in shlex.split(command.replace("\\\n", " "))[2:])
    shown = yaml.safe_load(words["data.mix"])
    assert shown == [{"source": "demo", "weight": 2.0}, {"source": "jsonl", "train_file": "rows.jsonl"}]
