"""Mixes of data sources: their order, what is refused, and that a resumed run continues them exactly."""

import json
from collections import Counter

import pytest
from helpers import tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import dump, parse_override, resolve
from onpolicy_skd.config.yaml_text import parse
from onpolicy_skd.data.prompts import load_prompts, mixed_prompts_of_step
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run.preflight import check_template
from onpolicy_skd.run.prepare import prepare

DEMO = {"source": "demo", "train_problems": 30, "weight": 3}


@pytest.fixture
def chats(tmp_path):
    """A source of ten conversations."""
    turns = [
        [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}] for i in range(10)
    ]
    text = "".join(json.dumps({"messages": t, "answer": str(i + 1)}) + "\n" for i, t in enumerate(turns))
    (tmp_path / "chats.jsonl").write_text(text)
    return {"source": "jsonl", "train_file": str(tmp_path / "chats.jsonl"), "messages_column": "messages"}


def mixed(*sources, **sections):
    return tiny_settings(**sections | {"data": {"source": "gsm8k", "mix": list(sources), **sections.get("data", {})}})


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 7), st.integers(0, 40), st.integers(0, 3))
def test_the_order_is_a_pure_function_and_every_epoch_of_a_source_sees_each_prompt_once(counts, per_step, step, seed):
    starts = [sum(counts[:i]) for i in range(len(counts))]
    members = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    weights = [1.0 + i for i in range(len(counts))]
    order = [mixed_prompts_of_step(members, weights, per_step, s, seed) for s in range(step + 1)]
    assert order[step] == mixed_prompts_of_step(members, weights, per_step, step, seed)
    assert all(len(indices) == per_step for indices in order)
    for source in members:
        seen = [i for indices in order for i in indices if i in source]
        for start in range(0, len(seen) - len(source) + 1, len(source)):
            assert sorted(seen[start : start + len(source)]) == list(source)


def test_sources_are_drawn_in_proportion_to_their_weights():
    members, weights = [range(100), range(100, 1100), range(1100, 1105)], [3.0, 1.0, 0.5]
    drawn = [i for step in range(500) for i in mixed_prompts_of_step(members, weights, 16, step, 7)]
    counts = Counter(next(n for n, source in enumerate(members) if i in source) for i in drawn)
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(counts[number] / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5
    assert mixed_prompts_of_step(members, weights, 16, 3, 7) != mixed_prompts_of_step(members, weights, 16, 3, 8)


@pytest.mark.parametrize("mode", ["on_policy", "mixed", "off_policy"])
def test_a_resumed_run_continues_a_mix_exactly(chats, mode):
    def steps(first, last):
        run = prepare(mixed(DEMO, chats, mode=mode, learner={"batch_size": 6}))
        requests = [[(r.key, r.seed, r.prompt_ids) for r in run.requests(run.train, s)] for s in range(first, last)]
        digests = [[(t.key, t.digest) for t in run.references(run.train, s)] for s in range(first, last)]
        return run, [*zip(requests, digests, strict=True)]

    run, expected = steps(0, 9)
    assert steps(5, 9)[1] == expected[5:]
    assert {p.source for p in run.train} == {0, 1}
    assert len(run.train) == 40
    sources = {p.key: p.source for p in run.train}
    keys = [key.partition(":")[2].rpartition("/")[0] for pair in expected for rows in pair for key, *_ in rows]
    assert 0.5 < sum(sources[k] == 0 for k in keys) / len(keys) < 1.0


def test_evaluations_alternate_between_the_sources_that_have_problems(chats):
    with_eval = chats | {"eval_file": chats["train_file"]}
    prompts = load_prompts(mixed(DEMO, chats, with_eval).data, load_tokenizer("bundled:demo_student"), "eval", 5)
    assert [p.source for p in prompts] == [0, 2, 0, 2, 0]
    run = prepare(mixed(chats))
    assert run.held_out == []
    run = prepare(mixed(DEMO, chats, data={"validation_problems": 8}))
    assert len(run.validation) == 8
    assert not {p.key for p in run.train} & {p.key for p in run.validation}
    assert [p.source for p in run.train].count(0) == 30  # of 20,000, after the problems held out


def test_the_same_question_in_two_sources_has_two_keys(chats):
    run = prepare(mixed(chats, chats))
    assert len({p.key for p in run.train}) == 20


def test_each_source_keeps_its_rules_and_shared_settings_stay_outside(chats, tmp_path):
    for sources, needle in [
        ([DEMO, {"source": "jsonl"}], r"data\.mix\[1\]: data\.train_file: needed"),
        ([{"source": "demo", "name": "x"}], r"data\.mix\[0\]: data\.name=x: accepted with data\.source=hub or text"),
        ([{"source": "text", "train_file": "a"}], r"data\.mix\[0\]: source=text: packed text asks for no response"),
        ([chats | {"shots": 2}], r"data\.mix\[0\]: data\.shots: made for questions"),
        ([DEMO | {"weight": 0}], r"data\.mix\.0\.weight=0: .*greater than 0"),
        ([DEMO | {"weight": 1e308}] * 2, r"data\.mix\.0\.weight=1e\+308: .*less than or equal to 1"),
        ([chats | {"teacher_column": ""}], r"data\.mix\[0\]: data\.teacher_column='': no name of a column"),
        ([DEMO | {"wieght": 1}], r"unknown setting 'data\.mix\.0\.wieght'"),
    ]:
        with pytest.raises(ConfigError, match=needle):
            mixed(*sources)
    with pytest.raises(ConfigError, match=r"data\.question_column=q: with data\.mix each source has its own"):
        mixed(DEMO, data={"question_column": "q"})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl row 1: column 'messages' is missing or no list"):
        prepare(mixed(DEMO, chats | {"train_file": str(bad)}))
    tokenizer = load_tokenizer("bundled:demo_student")
    check_template(mixed(DEMO, chats).data, tokenizer)
    fails = "{% if messages | length == 1 and '1?' in messages[0].content %}{{ 1 / 0 }}{% endif %}"
    tokenizer.chat_template = fails + "{{ messages[-1].content }}"
    with pytest.raises(DataError, match=r"chats\.jsonl#1: .*ZeroDivisionError"):
        check_template(mixed(DEMO, chats).data, tokenizer)


def test_a_source_without_prompts_left_is_named(chats):
    run = prepare(mixed(DEMO, chats))
    with pytest.raises(ConfigError, match=r"data\.mix\[1\]: none of its prompts is left"):
        run.requests([p for p in run.train if p.source == 0], 0)


def test_a_mix_survives_yaml_and_the_command_line(chats):
    settings = mixed(DEMO, chats)
    assert resolve(parse(dump(settings))) == settings
    override = parse_override("data.mix=[{source: demo, weight: 2}, {source: jsonl, train_file: a.jsonl}]")
    assert [source.weight for source in resolve(override).data.mix] == [2.0, 1.0]
