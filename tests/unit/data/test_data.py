import copy
import dataclasses
import itertools
import json
from collections import Counter

import pytest
from helpers import tiny_settings
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from onpolicy_skd.data import demo_task
from onpolicy_skd.data.prompts import hold_out, load_prompts, prompts_of_step, render
from onpolicy_skd.data.rows import DataError, load_questions, read_jsonl
from onpolicy_skd.evaluation.exact_match import reference_number
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run.prepare import Run, prepare

TOKENIZER = load_tokenizer("bundled:demo_student")


def settings_for(**data):
    return tiny_settings(data=data).data


def test_the_real_gsm8k_loads_whole(gsm8k):
    cfg = settings_for(source="gsm8k", path=str(gsm8k))
    train, test = list(load_questions(cfg, "train")), list(load_questions(cfg, "eval"))
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0][0] == "train.jsonl#1"
    assert reference_number(train[0][2]) == "72"
    assert all(float(reference_number(answer)) is not None for _, _, answer in train + test)


def test_gsm8k_prompts_round_trip_and_over_long_ones_are_named(gsm8k):
    cfg = settings_for(source="gsm8k", path=str(gsm8k), max_prompt_tokens=4000, train_problems=50)
    prompts = load_prompts(cfg, TOKENIZER, "train")
    assert len(prompts) == 50
    for p in prompts:
        assert p.question in TOKENIZER.decode(p.token_ids)
    tight = cfg.model_copy(update={"max_prompt_tokens": 200})
    with pytest.raises(DataError, match=r"train\.jsonl#\d+: the prompt has \d+ tokens, data\.max_prompt_tokens=200"):
        load_prompts(tight, TOKENIZER, "train")
    dropped = load_prompts(tight.model_copy(update={"overlong": "drop"}), TOKENIZER, "train")
    assert dropped == [p for p in prompts if len(p.token_ids) <= 200]


def test_any_jsonl_with_named_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "1+1?", "a": "2"}\n\n{"q": "2+2?", "a": "4", "more": 1}\n')
    cfg = settings_for(source="jsonl", train_file=str(file), question_column="q", answer_column="a")
    assert [q for _, q, _ in load_questions(cfg, "train")] == ["1+1?", "2+2?"]
    with pytest.raises(DataError, match=r"data\.eval_file"):
        list(load_questions(cfg, "eval"))
    prompts = load_prompts(cfg, TOKENIZER, "train")
    assert [p.row for p in prompts] == ["rows.jsonl#1", "rows.jsonl#3"]  # lines, blank ones counted
    assert prompts[1].columns == {"q": "2+2?", "a": "4", "more": 1}


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b'{"question": "a", "answer": "b"}\n{"question": \n', "line 2: not JSON"),
        (b'["question"]\n', "line 1: a list"),
        (b'{"question": "a"}\n', r"row 1: column 'answer' is missing or not text; this row has 'question'"),
        (b'{"question": 3, "answer": "b"}\n', r"row 1: column 'question' is missing or not text"),
        (b'{"question": "  ", "answer": "b"}\n', "row 1: column 'question' is empty"),
        (b'{"question": "bad \\ud800?", "answer": "b"}\n', r"row 1: column 'question' holds half of a surrogate pair"),
        (b'{"question": "a", "answer": "\\udc00"}\n', r"row 1: column 'answer' holds half of a surrogate pair"),
        (b'{"question": "a", "answer": ""}\n', "row 1: column 'answer' is empty"),
        (b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": " \\n"}', "row 2: column 'answer' is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "no prompt is left"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"question": "a", "answer": "b", "n": ' + b"9" * 5000 + b"}", "line 1: a number has more than 4300 digits"),
        (b'{"question": "a\\u200b", "answer": "\\u200b \\u2060"}', "row 1: column 'answer' is empty"),
        (b'{"question": "\\ufeff", "answer": "a"}', "row 1: column 'question' is empty"),
        (b'{"question": "a", "answer": "b", "answer": "c"}', "line 1: the key 'answer' is there twice"),
    ],
)
def test_bad_rows_are_one_error_that_names_file_and_row(tmp_path, content, needle):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=needle):
        load_prompts(settings_for(source="jsonl", train_file=str(file)), TOKENIZER, "train")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "1+1?", "answer": "2"}\n')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [{"question": "1+1?", "answer": "2"}]


def test_joined_files_keep_their_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\xef\xbb\xbf{"a": 2, "b": 3, "b": 3}\n\xef\xbb\xbf\n')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2, "b": 3}]


@pytest.mark.parametrize("appended", ["<|end|>", "<|pad|> <|end|>"])
def test_no_end_of_sequence_is_left_behind_a_prompt(appended):
    tokenizer = load_tokenizer("bundled:demo_student")
    names = ["<|user|>", *appended.split()]
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"<|user|> $A {appended}", special_tokens=ids)
    assert tokenizer("Hi")["input_ids"][-1] == tokenizer.eos_token_id
    prompt = render("Hi?", tokenizer, settings_for(template="plain"))
    assert tokenizer.decode(prompt) == "<|user|>Question: Hi?\nAnswer:"


def test_a_prompt_without_tokens_is_refused_by_row(tmp_path):
    tokenizer = load_tokenizer("bundled:demo_student")
    tokenizer.chat_template = "{{ '' }}"
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl#1: data\.template=chat: .* has no tokens"):
        load_prompts(settings_for(source="jsonl", train_file=str(tmp_path / "a.jsonl")), tokenizer, "train")


def test_a_template_that_fails_on_a_later_row_is_refused_by_row(tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{{ raise_exception('too long') if messages[0].content | length > 5 else messages[0].content }}"
    )
    rows = ['{"question": "1+1?", "answer": "2"}', '{"question": "1+1+1?", "answer": "3"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"a.jsonl#2: data.template=chat: the template fails: .*too long"):
        load_prompts(settings_for(source="jsonl", train_file=str(tmp_path / "a.jsonl")), tokenizer, "train")


def test_an_unknown_split_of_the_demo_task_is_refused():
    with pytest.raises(DataError, match=r"data\.eval_split=dev: .*accepted: train, test"):
        list(load_questions(settings_for(eval_split="dev"), "eval"))


def test_the_validation_split_depends_on_the_questions_alone():
    prompts = load_prompts(settings_for(train_problems=60), TOKENIZER, "train")
    train, held_out = hold_out(prompts, 10)
    assert (len(train), len(held_out)) == (50, 10)
    elsewhere = [dataclasses.replace(p, key=f"hub#{i}", row=f"hub#{i}") for i, p in enumerate(reversed(prompts))]
    assert {p.question for p in hold_out(elsewhere, 10)[1]} == {p.question for p in held_out}
    padded = [dataclasses.replace(p, question=p.question.replace(" ", "\n ")) for p in prompts]
    assert [p.row for p in hold_out(padded, 10)[1]] == [p.row for p in held_out]


def test_no_copy_of_a_held_out_question_is_trained_on():
    prompts = load_prompts(settings_for(train_problems=20), TOKENIZER, "train")
    copies = [dataclasses.replace(p, key=f"{p.key}.2") for p in prompts]
    train, held_out = hold_out([*prompts, *copies], 5)
    assert (len(train), len(held_out)) == (30, 5)
    assert not {p.question for p in train} & {p.question for p in held_out}
    with pytest.raises(DataError, match="there are 20 different training problems"):
        hold_out([*prompts, *copies], 20)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "gone.jsonl"))


def test_a_hub_set_that_cannot_be_had_is_one_error():
    with pytest.raises(DataError, match=r"openai/gsm8k .main, train. cannot be loaded from the hub"):
        list(load_questions(settings_for(source="gsm8k"), "train"))


def test_a_hub_set_with_its_own_columns(tmp_path):
    """`datasets` reads a folder as it reads a hub repository, so the code path of data.source=hub runs offline."""
    (tmp_path / "train.jsonl").write_text('{"q": "1+1?", "a": "2"}\n{"q": "2+2?", "a": "4"}\n')
    cfg = settings_for(source="hub", name=str(tmp_path), question_column="q", answer_column="a")
    assert [(q, a) for _, q, a in load_questions(cfg, "train")] == [("1+1?", "2"), ("2+2?", "4")]


def test_requests_of_a_step_are_reproducible_and_have_seeds_of_their_own():
    settings = tiny_settings(rollout={"n": 4}, learner={"batch_size": 24})
    prompts = load_prompts(settings.data.model_copy(update={"train_problems": 5}), TOKENIZER, "train")
    run = Run(settings, TOKENIZER, 512, prompts, [])
    first = run.requests(prompts, 0)
    assert first == run.requests(prompts, 0)
    assert len(first) == 24  # six prompts of a set of five: one comes twice, and still every key and seed is unique
    assert len({r.key for r in first}) == len({r.seed for r in first}) == 24
    assert run.steps == 1
    assert not {r.seed for r in first} & {r.seed for r in run.requests(prompts, 1)}


def test_templates():
    chat = render("Hi?", TOKENIZER, settings_for(system="Be brief.", instruction=" Think."))
    assert TOKENIZER.decode(chat) == "<|system|>Be brief.<|user|>Hi? Think.<|assistant|>"
    plain = render("Hi {x}?", TOKENIZER, settings_for(template="plain"))
    assert TOKENIZER.decode(plain) == "Question: Hi {x}?\nAnswer:"
    bare = load_tokenizer("bundled:demo_student")
    bare.chat_template = None
    with pytest.raises(DataError, match=r"data\.template=plain"):
        render("Hi?", bare, settings_for())


def test_thinking_mode_reaches_the_template():
    tokenizer = load_tokenizer("bundled:demo_student")
    tokenizer.chat_template = "{{ enable_thinking }}"
    assert tokenizer.decode(render("Hi", tokenizer, settings_for())) == "False"
    assert tokenizer.decode(render("Hi", tokenizer, settings_for(thinking=True))) == "True"


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 30), st.integers(0, 3))
def test_every_epoch_sees_every_prompt_once(count, per_step, first, seed):
    steps = range(first, first + 3 * count)
    order = [i for step in steps for i in prompts_of_step(count, per_step, step, seed)]
    assert order == [i for step in steps for i in prompts_of_step(count, per_step, step, seed)]
    start = -(-first * per_step // count) * count - first * per_step  # the next epoch's border
    assert sorted(order[start : start + count]) == list(range(count))


def test_different_seeds_give_different_orders():
    assert prompts_of_step(1000, 16, 0, 1) != prompts_of_step(1000, 16, 0, 2)
    assert prompts_of_step(1000, 16, 0, 1) != prompts_of_step(1000, 16, 1000, 1)


def test_demo_problems_are_solvable_distinct_and_split():
    train = list(itertools.islice(demo_task.problems("train"), 3000))
    test = list(itertools.islice(demo_task.problems("test"), 500))
    questions = [p["question"] for p in train + test]
    assert len(set(questions)) == 3500
    assert all(demo_task.split_of(p["question"]) == "test" for p in test)
    for p in train + test:
        for step in p["answer"].split("<<")[1:]:
            sum_, rest = step.split(">>")
            left, right = sum_.split("=")
            assert eval(left.replace("/", "//")) == int(right)  # arithmetic of the demo task
            assert rest.startswith(right)
        assert p["answer"].rsplit(">>", 1)[1].split()[0] == reference_number(p["answer"])
    assert train == list(itertools.islice(demo_task.problems("train"), 3000))
    with pytest.raises(ValueError, match="accepted: train, test"):
        next(demo_task.problems("dev"))


def test_the_recipe_makes_the_bundled_tokenizer():
    from onpolicy_skd.data.demo_pair import encode, train_tokenizer

    made = train_tokenizer()
    assert made.get_vocab() == TOKENIZER.get_vocab()
    problem = next(demo_task.problems("test"))
    assert encode(problem, made) == encode(problem, TOKENIZER)
    assert encode(problem, made)[1][-1] == TOKENIZER.eos_token_id


def test_demo_text_survives_the_tokenizer_with_single_digits():
    for p in itertools.islice(demo_task.problems("test"), 200):
        text = p["question"] + p["answer"]
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(ids) == text
        assert not [t for t in TOKENIZER.convert_ids_to_tokens(ids) if sum(c.isdigit() for c in t) > 1]
    assert Counter(json.dumps(p) for p in itertools.islice(demo_task.problems("test"), 100)).most_common(1)[0][1] == 1


def test_validation_is_always_the_same_part_of_the_training_problems(tmp_path):
    """Whatever the seed of the run and however many problems it trains on; nothing of the test split."""
    file, held_out = tmp_path / "train.jsonl", []
    file.write_text("".join(json.dumps(p) + "\n" for p in itertools.islice(demo_task.problems("train"), 300)))
    source = {"source": "jsonl", "train_file": file, "eval_file": file, "validation_problems": 40}
    for data, seed in (({}, 1), ({"train_problems": 50}, 2)):
        run = prepare(tiny_settings(data={**source, **data}, run={"seed": seed}))
        assert not {p.key for p in run.train} & {p.key for p in run.validation}
        assert len(run.train) == data.get("train_problems", 260)
        held_out.append([p.key for p in run.validation])
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 40
    with pytest.raises(DataError, match=r"data\.validation_problems=300: there are 300 different training problems"):
        prepare(tiny_settings(data={**source, "validation_problems": 300}))
    run = prepare(tiny_settings(data={"validation_problems": 4, "train_problems": 50}))
    assert all(p.row.startswith("demo:train#") for p in run.validation)
