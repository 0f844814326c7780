"""Few-shot prompts: the same examples in every prompt, and none of them among the problems."""

import json

import pytest
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data.prompts import load_prompts, load_shots
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.models.loading import load_tokenizer

TOKENIZER = load_tokenizer("bundled:demo_student")
DEMO = {"source": "demo", "max_prompt_tokens": 900}


def data_cfg(**data):
    return tiny_settings(data={**DEMO, **data}).data


def text_of(prompt):
    return TOKENIZER.decode(prompt.token_ids)


def test_plain_examples_have_lm_evals_format():
    cfg = data_cfg(shots=2, template="plain", instruction=" Think.")
    (q1, a1), (q2, a2) = load_shots(cfg)
    prompt = load_prompts(cfg, TOKENIZER, "eval", 1)[0]
    assert text_of(prompt) == (
        f"Question: {q1} Think.\nAnswer: {a1}\n\nQuestion: {q2} Think.\nAnswer: {a2}\n\n"
        f"Question: {prompt.question} Think.\nAnswer:"
    )


def test_chat_examples_are_turns():
    cfg = data_cfg(shots=1, system="Be brief.")
    [(question, answer)] = load_shots(cfg)
    prompt = load_prompts(cfg, TOKENIZER, "eval", 1)[0]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": prompt.question},
    ]
    assert prompt.token_ids == TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_examples_are_the_same_everywhere_and_are_not_trained_on():
    with_shots = data_cfg(shots=3, train_problems=5)
    shots = load_shots(with_shots)
    assert shots == load_shots(data_cfg(shots=3))
    train = load_prompts(with_shots, TOKENIZER, "train")
    without = load_prompts(data_cfg(train_problems=8), TOKENIZER, "train")
    assert [p.key for p in train] == [p.key for p in without[3:]]
    heads = {text_of(p).partition(p.question)[0] for p in [*train, *load_prompts(with_shots, TOKENIZER, "eval", 5)]}
    assert len(heads) == 1  # the same examples before every question


def test_examples_are_left_out_of_an_evaluation_on_the_training_split(tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = data_cfg(source="jsonl", train_file=file, eval_file=file, shots=2)
    assert [p.question for p in load_prompts(cfg, TOKENIZER, "eval")] == [r["question"] for r in rows[2:]]


def test_examples_that_cannot_be_had_are_refused(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "What?", "answer": " "}\n')
    cfg = data_cfg(source="jsonl", train_file=file, shots=1)
    with pytest.raises(DataError, match=r"train.jsonl row 1: column 'answer' is empty"):
        load_shots(cfg)
    file.write_text('{"question": "What?", "answer": "That."}\n')
    with pytest.raises(DataError, match=r"data.shots=2: the training split has 1 rows"):
        load_shots(cfg.model_copy(update={"shots": 2}))
    with pytest.raises(DataError, match=r"raise the limit, lower data.shots or"):
        load_prompts(data_cfg(shots=3, max_prompt_tokens=60), TOKENIZER, "eval")
    with pytest.raises(ConfigError, match=r"data\.shots: text has no answers"):
        tiny_settings(mode="off_policy", data={"source": "text", "train_file": str(file), "shots": 1})
