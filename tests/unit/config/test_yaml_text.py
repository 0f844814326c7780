"""Comments of YAML that may be meant as text."""

import pytest

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, load_settings


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("data:\n  instruction: End with\n    #### ANSWER\n", "line 3: data.instruction: .*'#### ANSWER'"),
        ("data:\n  instruction:\n\n    #### ANSWER\n", "line 4: data.instruction: .*'#### ANSWER'"),
        ("data: {instruction: End with\n#### ANSWER\n}\n", "line 2: data.instruction: .*'#### ANSWER'"),
        ("rollout:\n  stop:\n  - End #### here\n", r"line 3: rollout\.stop\.0: .*'#### here'"),
        ("rollout:\n  stop:\n  - End\n    #### here\n", r"line 4: rollout\.stop\.0: .*'#### here'"),
        ("run:\n  name: run #3\n", "line 2: run.name: .*'#3'"),
        ("run:\n  name: #3\n", "line 2: run.name: .*'#3'"),
        ("run: {dir: runs #3\n}\n", "line 1: run.dir: .*'#3'"),
        ("student: {model: my #model\n}\n", "line 1: student.model: .*'#model'"),
        ("data:\n  mix:\n  - {source: demo, question_column: a #b\n}\n", r"data\.mix\.0\.question_column: .*'#b'"),
        ("extends: base #3.yaml\n", "line 1: extends: .*'#3.yaml'"),
    ],
)
def test_a_comment_that_may_be_text_is_refused(tmp_path, text, needle):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=needle):
        build_settings(tmp_path / "c.yaml")


def test_usual_comments_are_accepted(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data:\n  instruction: Think\n  # of the next setting\n  shots: 0 #none\n"
        "rollout:\n  stop:\n    # texts\n    - a\n    # and\n    - 'b #c'  # quoted\n"
        "student:\n  model: my/model  #comment\n    #lora_rank: 8\n"
        "teacher:\n  model: my/teacher # comment\n"
        "positions: {policy: top_k #comment\n}\n"
        "#end\n"
    )
    settings = build_settings(tmp_path / "c.yaml")
    assert (settings.data.instruction, settings.rollout.stop) == ("Think", ["a", "b #c"])
    assert (settings.student.model, settings.teacher.model) == ("my/model", "my/teacher")


@pytest.mark.parametrize(
    ("value", "needle"),
    [
        ("####", r"a comment starts at '####'; quote text inside the value: \['####'\]"),
        ("[End #### here]", "not YAML .quote text"),
        ("End #### here", "rollout.stop: a comment starts at '#### here'; quote"),
        ("End", "accepted: a list, for example"),
    ],
)
def test_a_list_on_the_command_line_says_what_to_quote(value, needle):
    with pytest.raises(ConfigError, match=needle):
        load_settings([f"rollout.stop={value}"])
    assert load_settings(["rollout.stop=['####']"]).rollout.stop == ["####"]
