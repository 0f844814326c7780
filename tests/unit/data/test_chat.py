"""Conversations: which tokens are prompt, which are the assistant's, and which rows are refused."""

import json
from itertools import groupby

import numpy as np
import pytest
from helpers import tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.data import chat as chats
from onpolicy_skd.data.prompts import load_prompts
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.run import prepare as preparation
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.selection.prefilter import as_text

WITH_SYSTEM = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITHOUT_SYSTEM = (  # as Mistral's: the user's turn ends with what asks for an answer
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>{% else %} {{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
)
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
WITH_TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% for m in messages %}<|"
    "{{ 'user' if m.role == 'tool' else m.role }}|>{% if m.role == 'assistant' %}"
    "START{{ m.content }}" + CALLS + "<|end|>STOP{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = WITH_TOOLS.replace("START", "{% generation %}").replace("STOP", "{% endgeneration %}")
BY_PREFIX = WITH_TOOLS.replace("START", "").replace("STOP", "")
DROPS_THINKING = (  # as Qwen3's: turns before the last lose what they thought
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ 'hm, ' if m.role == 'assistant' and loop.last }}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>hm, {% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 4?"},
    {"role": "assistant", "content": "It is 7."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
WITH_CALLS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
    {"role": "tool", "name": "add", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
CASES = [
    (WITH_SYSTEM, [SYSTEM, *TWO_TURNS], None, ["It is 4.<|end|>", "It is 7.<|end|>"]),
    (WITHOUT_SYSTEM, TWO_TURNS, None, [" It is 4.<|end|>", " It is 7.<|end|>"]),
    (MARKED, WITH_CALLS, TOOLS, ['[add {"a": 2}]<|end|>', "It is 4.<|end|>"]),
    (BY_PREFIX, WITH_CALLS, TOOLS, ['[add {"a": 2}]<|end|>', "It is 4.<|end|>"]),
    (None, TWO_TURNS, None, ["It is 4.", "It is 7.<|end|>"]),  # the bundled template puts no end behind a turn
]


def tokenizer_with(template):
    tokenizer = load_tokenizer("bundled:demo_student")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def settings_for(tmp_path, rows, **sections):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "train_file": file, "messages_column": "messages", "max_prompt_tokens": 300}
    return tiny_settings(data=data | sections.pop("data", {}), **sections)


def prepared(monkeypatch, settings, template):
    monkeypatch.setattr(preparation.models, "load_tokenizer", lambda *_: tokenizer_with(template))
    return prepare(settings)


def supervised_texts(trajectory, tokenizer):
    """Return the text of each run of supervised tokens."""
    mask = np.ones(len(trajectory.response_ids), bool) if trajectory.supervised is None else trajectory.supervised
    tokens = [*zip(mask.tolist(), trajectory.response_ids.tolist(), strict=True)]
    runs = [[i for _, i in run] for kept, run in groupby(tokens, key=lambda pair: pair[0]) if kept]
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(("template", "messages", "tools", "expected"), CASES)
def test_supervised_positions_are_exactly_the_tokens_of_the_assistant(
    tmp_path, monkeypatch, template, messages, tools, expected
):
    settings = settings_for(tmp_path, [{"messages": messages, "tools": tools}], mode="off_policy")
    run, tokenizer = prepared(monkeypatch, settings, template), tokenizer_with(template)
    (t,) = run.every_reference(run.train)
    assert supervised_texts(t, tokenizer) == expected
    assert len(t.sampler_logprobs) == len(t.target_ids)
    rendered = tokenizer.apply_chat_template(messages_of(run), tools=tools, tokenize=False)
    text = tokenizer.decode([*t.prompt_ids, *t.response_ids])
    assert rendered.startswith(text) or text == rendered + "<|end|>"
    scored = as_text(run.train[0], "prompt+answer", tokenizer)
    assert scored.target_ids.tolist() == t.target_ids.tolist()


def messages_of(run):
    return run.train[0].chat.messages


@pytest.mark.parametrize(("template", "messages", "tools", "expected"), CASES)
def test_the_last_turn_is_what_is_generated(tmp_path, template, messages, tools, expected):
    settings = settings_for(tmp_path, [{"messages": messages, "tools": tools}, {"messages": messages[:-1]}])
    tokenizer = tokenizer_with(template)
    prompt, open_ended = load_prompts(settings.data, tokenizer, "train")
    text = tokenizer.decode(prompt.token_ids)
    assert text.endswith("<|assistant|>")
    assert ("add" in text.partition("<|user|>")[0]) == bool(tools)
    assert expected[-1].removesuffix("<|end|>") not in text
    assert prompt.columns["messages"] == messages
    if not tools:
        assert open_ended.token_ids == prompt.token_ids
        assert open_ended.key == f"{prompt.key}.2"


@pytest.mark.parametrize(("supervise", "expected"), [("last", ["It is 7.<|end|>"]), ("all", None)])
def test_other_choices_of_what_is_supervised(tmp_path, monkeypatch, supervise, expected):
    rows, refs = [{"messages": [SYSTEM, *TWO_TURNS]}], {"supervise": supervise}
    settings = settings_for(tmp_path, rows, mode="off_policy", references=refs)
    run, tokenizer = prepared(monkeypatch, settings, WITH_SYSTEM), tokenizer_with(WITH_SYSTEM)
    (t,) = run.every_reference(run.train)
    if expected is None:
        assert (len(t.prompt_ids), t.supervised) == (1, None)
    else:
        assert supervised_texts(t, tokenizer) == expected
        assert t.prompt_ids.tolist() == run.train[0].token_ids


def test_a_row_whose_turns_cannot_be_told_apart_is_refused_by_file_and_line(tmp_path, monkeypatch):
    rows = [{"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS}]
    settings = settings_for(tmp_path, rows, mode="off_policy")
    message = r"chats\.jsonl#2: message 2: the chat template does not render .*references\.supervise=last"
    with pytest.raises(DataError, match=message):
        prepared(monkeypatch, settings, DROPS_THINKING)
    settings = settings_for(tmp_path, rows, mode="off_policy", references={"supervise": "last"})
    run = prepared(monkeypatch, settings, DROPS_THINKING)
    texts = [supervised_texts(t, run.tokenizer) for t in run.every_reference(run.train)]
    assert texts == [["It is 4.<|end|>"], ["It is 7.<|end|>"]]
    unmarked = MARKED.replace("{% generation %}{{ m.content }}" + CALLS, CALLS + "{% generation %}{{ m.content }}")
    half = unmarked.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and not m.tool_calls %}")
    settings = settings_for(tmp_path, [{"messages": WITH_CALLS}], mode="off_policy")
    with pytest.raises(DataError, match=r"chats\.jsonl#1: message 2: the chat template marks no text of this turn"):
        prepared(monkeypatch, settings, half)


USER = {"role": "user", "content": "Hi"}
BAD_ROWS = [
    ({"question": "Hi"}, "row 2: column 'messages' is missing or no list of messages; this row has 'question'"),
    ({"messages": []}, "row 2: column 'messages' is missing or no list"),
    ({"messages": "Hi"}, "row 2: column 'messages' is missing or no list"),
    ({"messages": ["Hi"]}, "row 2: message 1: must be an object with a role"),
    ({"messages": [{"from": "human", "value": "Hi"}]}, "row 2: message 1: must be an object with a role"),
    ({"messages": [USER, {"role": "bot", "content": "Hi"}]}, "row 2: message 2: must be an object with a role"),
    ({"messages": [{"role": "user", "content": 3}]}, "row 2: message 1: its content is no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "row 2: message 1: its content is no text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "row 2: message 1 holds half of a surrogate pair"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "row 2: message 2: the assistant says nothing"),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, "row 2: the assistant's last turn must follow"),
    ({"messages": [USER, SYSTEM]}, "row 2: the assistant's last turn must follow"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 5}]}, "row 2: message 2: tool_calls must be a list"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": True}]}, "row 2: message 2: tool_calls must be a list"),
    ({"messages": [{"role": "user"}]}, "row 2: message 1: the user says nothing"),
    ({"messages": [{"role": "user", "content": ""}]}, "row 2: message 1: the user says nothing"),
    ({"messages": [{"role": "user", "content": []}]}, "row 2: message 1: the user says nothing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "A cat."}]}]},
        "row 2: message 1: its content has a part of type image; accepted: parts of type text",
    ),
    ({"messages": "[]"}, "accepted: a list of objects with role and content, but not the JSON text of one"),
    ({"messages": WITH_CALLS}, "chats.jsonl#2: the student's chat template does not show tool_calls"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": ["add"]}]}, "row 2: message 2: each of its tool_calls"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
        "row 2: message 2: the arguments of add are no JSON object",
    ),
    ({"messages": [USER], "tools": {"name": "add"}}, "row 2: column 'tools': must be a list of tools"),
    ({"messages": [USER], "tools": "add"}, "row 2: column 'tools': must be a list of tools"),
    ({"messages": [USER], "tools": TOOLS}, "chats.jsonl#2: the student's chat template does not show tools"),
    ({"messages": [USER], "answer": 4}, "row 2: column 'answer' is missing or not text"),
    (
        {"messages": [USER, USER]},
        "chats.jsonl#2: data.template=chat: the template fails: TemplateError: roles must alternate",
    ),
]


@pytest.mark.parametrize(("row", "needle"), BAD_ROWS)
def test_bad_rows_are_one_error_that_names_file_and_line(tmp_path, row, needle):
    settings = settings_for(tmp_path, [{"messages": TWO_TURNS}, row])
    alternating = "{% if messages | length == 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(DataError) as error:
        load_prompts(settings.data, tokenizer_with(alternating + WITH_SYSTEM), "train")
    assert needle in str(error.value)
    assert "\n" not in str(error.value)


def test_content_in_pieces_tools_as_text_and_a_system_message(tmp_path):
    pieces = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]
    rows = [
        {"messages": [{"role": "user", "content": pieces}], "tools": json.dumps(TOOLS)},
        {"messages": [SYSTEM, USER], "tools": None, "answer": "4"},
    ]
    settings = settings_for(tmp_path, rows, data={"system": "Be kind."})
    first, second = load_prompts(settings.data, tokenizer_with(BY_PREFIX), "train")
    assert [m["content"] for m in first.chat.messages] == ["Be kind.", "2 + 2?"]
    assert first.chat.tools == TOOLS
    assert [m["content"] for m in second.chat.messages] == ["Be brief.", "Hi"]
    assert (first.answer, second.answer) == ("", "4")
    assert second.question == "system: Be brief.\n\nuser: Hi"


@pytest.mark.parametrize(
    ("sections", "needle"),
    [
        ({"data": {"shots": 1}}, "data.shots: made for questions"),
        ({"data": {"template": "plain"}}, "data.messages_column=messages: accepted with data.template=chat only"),
        ({"references": {"annotations": "strip"}, "mode": "off_policy"}, "references.annotations=strip: made for"),
        ({"mode": "mixed", "references": {"source": "file", "file": "a"}}, "references.source=file: made for"),
    ],
)
def test_settings_of_questions_are_refused_with_conversations(tmp_path, sections, needle):
    with pytest.raises(ConfigError, match=needle):
        settings_for(tmp_path, [], **sections)
    with pytest.raises(ConfigError, match=r"data\.tools_column=x: accepted with data\.messages_column only"):
        tiny_settings(data={"tools_column": "x"})


TEXT_THEN_CALL = [USER, {"role": "assistant", "content": "Wait.", "tool_calls": WITH_CALLS[1]["tool_calls"]}]
TWO_SPANS = (  # a turn's text and its calls
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %} then {% generation %}" + CALLS + "<|end|>{% endgeneration %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAST_UNMARKED = TWO_SPANS.replace("{% if m.role != 'assistant' %}", "{% if m.role != 'assistant' or loop.last %}")
LAST_MARKED = TWO_SPANS.replace("{% if m.role != 'assistant' %}", "{% if not loop.last %}")
MARKS_ALL = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endfor %}"
)
GREETS = [{"role": "assistant", "content": "Hello."}, *TWO_TURNS[:2]]
MOVES_SYSTEM = (  # as Mistral's: the last message of the user holds the system message
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>"
    "{% if loop.revindex == 2 %}{{ messages[0].content }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "supervise", "expected"),
    [
        (TWO_SPANS, TEXT_THEN_CALL, "response", ["Wait.", '[add {"a": 2}]<|end|>']),
        (TWO_SPANS, TEXT_THEN_CALL, "last", ["Wait.", '[add {"a": 2}]<|end|>']),
        (TWO_SPANS, [*TWO_TURNS[:2], *TEXT_THEN_CALL], "last", ["Wait.", '[add {"a": 2}]<|end|>']),
        (LAST_UNMARKED, TWO_TURNS, "response", "message 4: the chat template marks no text of this turn"),
        (LAST_UNMARKED, TWO_TURNS, "last", "message 4: the chat template marks no text of this turn"),
        (MARKS_ALL, TWO_TURNS, "response", "message 1: the chat template marks this text of the role user"),
        (
            MARKS_ALL,
            [SYSTEM, *TWO_TURNS],
            "response",
            "message 1: the chat template marks this text of the role system",
        ),
        (MARKED, GREETS, "response", ["Hello.<|end|>", "It is 4.<|end|>"]),
        (MARKED, GREETS, "last", ["It is 4.<|end|>"]),
        (LAST_MARKED, TWO_TURNS, "last", ["It is 7.", "<|end|>"]),
        (MOVES_SYSTEM, [SYSTEM, *TWO_TURNS], "response", ["It is 4.<|end|>", "It is 7.<|end|>"]),
        (WITH_SYSTEM, GREETS, "response", "message 1: the conversation starts with the assistant"),
        (WITH_SYSTEM, GREETS, "last", ["It is 4.<|end|>"]),
    ],
)
def test_marked_spans_belong_to_the_turns_of_the_assistant(
    tmp_path, monkeypatch, template, messages, supervise, expected
):
    settings = settings_for(tmp_path, [{"messages": messages}], mode="off_policy", references={"supervise": supervise})
    if isinstance(expected, str):
        with pytest.raises(DataError, match=f"chats.jsonl#1: {expected}"):
            prepared(monkeypatch, settings, template)
    else:
        run = prepared(monkeypatch, settings, template)
        (t,) = run.every_reference(run.train)
        assert supervised_texts(t, run.tokenizer) == expected


def test_tool_calls_that_a_template_shows_without_naming_them_are_accepted(tmp_path):
    settings = settings_for(tmp_path, [{"messages": WITH_CALLS}, {"messages": [USER | {"tool_calls": []}]}])
    shows_all = "{{ messages | tojson }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert len(load_prompts(settings.data, tokenizer_with(shows_all), "train")) == 2
    settings = settings_for(tmp_path, [{"messages": [USER | {"tool_calls": []}]}])
    assert len(load_prompts(settings.data, tokenizer_with(WITH_SYSTEM), "train")) == 1


@pytest.mark.parametrize("mode", ["on_policy", "off_policy"])
def test_named_templates_without_a_default_are_one_error(tmp_path, monkeypatch, mode):
    settings = settings_for(tmp_path, [{"messages": TWO_TURNS}], mode=mode)
    with pytest.raises(DataError, match=r"chats\.jsonl#1: .*chat templates named rag, and none named default"):
        prepared(monkeypatch, settings, {"rag": WITH_SYSTEM})
    prepared(monkeypatch, settings, {"rag": WITH_SYSTEM, "default": WITH_SYSTEM})


def test_conversations_without_a_turn_of_the_assistant_have_no_reference(tmp_path, monkeypatch):
    rows = [{"messages": TWO_TURNS}, {"messages": TWO_TURNS[:1], "answer": "4"}]
    with pytest.raises(DataError, match=r"chats\.jsonl#2: the conversation has no turn of the assistant"):
        prepared(monkeypatch, settings_for(tmp_path, rows, mode="off_policy"), WITH_SYSTEM)
    samples = {"when": "prefilter", "keep": 0.5}
    with pytest.raises(ConfigError, match=r"chats\.jsonl#2: has no reference answer to score"):
        prepared(monkeypatch, settings_for(tmp_path, rows, samples=samples), WITH_SYSTEM)


def test_long_conversations_are_refused_or_dropped_by_their_last_turn(tmp_path, monkeypatch):
    rows = [{"messages": TWO_TURNS[:2]}, {"messages": [*TWO_TURNS[:3], {"role": "assistant", "content": "7 " * 50}]}]
    sections = {"mode": "off_policy", "rollout": {"max_tokens": 40}}
    message = r"chats\.jsonl#2: its reference answer has \d+ tokens, rollout\.max_tokens=40"
    with pytest.raises(ConfigError, match=message):
        prepared(monkeypatch, settings_for(tmp_path, rows, **sections), WITH_SYSTEM)
    run = prepared(monkeypatch, settings_for(tmp_path, rows, data={"overlong": "drop"}, **sections), WITH_SYSTEM)
    assert [p.row for p in run.train] == ["chats.jsonl#1"]


def test_special_ids_hold_added_tokens():
    tokenizer = tokenizer_with(None)
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")} <= chats.special_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("a") not in chats.special_ids(tokenizer)
