"""Uploads by huggingface_hub to a stand-in of the hub; tests/integration/test_train.py uploads a run's student."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT
from hub_server import TOKEN, running_hub

CODE = """
import sys
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.run.hub import push
folder, name, private = sys.argv[1:]
settings = resolve({"run": {"dir": folder, "name": "r"}, "hub": {"push": name, "private": private == "1"}})
print(push(settings, print))
"""


@pytest.fixture
def student(tmp_path):
    final = tmp_path / "r" / "final"
    final.mkdir(parents=True)
    (final / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# r\n")
    (final / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    return final


def push(student, name, private=True, **environment):
    """Return the lines that ``hub.push`` logs, and what it returns."""
    base = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    home = {"HF_HOME": str(student.parents[1] / "home"), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", CODE, str(student.parents[1]), name, str(int(private))]
    done = subprocess.run(
        arguments, env=base | home | environment, capture_output=True, text=True, check=True, cwd=student.parents[1]
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("private", [True, False])
def test_all_files_of_the_student_arrive(student, private):
    with running_hub() as hub:
        lines = push(student, "me/r", private, HF_TOKEN=TOKEN, **hub.environment)
    assert lines[-2:] == [f"the student is at {hub.url}/me/r", f"{hub.url}/me/r"]
    assert hub.files["me/r"] == {path.name: path.read_bytes() for path in student.iterdir()}
    assert [repo["visibility"] for repo in hub.created] == ["private" if private else "public"]


def test_a_name_without_an_owner_goes_to_the_account(student):
    with running_hub() as hub:
        push(student, "r", HF_TOKEN=TOKEN, **hub.environment)
    assert set(hub.files) == {"me/r"}


def test_a_refused_token_is_one_warning_without_the_token(student):
    with running_hub() as hub:
        lines = push(student, "me/r", HF_TOKEN="a-token-that-is-refused", **hub.environment)
    assert len(lines) == 2
    assert lines[0].startswith("warning: hub.push=me/r: ")
    assert "401" in lines[0]
    assert lines[0].endswith(f"The student stays in {student}; upload it with: hf upload me/r {student} --private")
    assert "a-token-that-is-refused" not in lines[0]
    assert lines[1] == "None"
    assert hub.files == {}


def test_no_login_is_one_warning_and_no_request(student):
    with running_hub() as hub:
        lines = push(student, "me/r", **hub.environment)
    assert lines[0].startswith("warning: hub.push=me/r: no login for the Hugging Face hub; run `hf auth login` or set ")
    assert lines[1:] == ["None"]
    assert hub.requests == []


def test_a_hub_that_is_away_is_one_warning(student):
    with running_hub() as hub:
        environment = hub.environment
    lines = push(student, "me/r", HF_TOKEN=TOKEN, **environment)
    assert lines[0].startswith("warning: hub.push=me/r: ")
    assert lines[1:] == ["None"]
