import os
import socket
import subprocess
import sys

import pytest

from onpolicy_skd.storage.files import LockedError, RunPaths, lock, replace_folder, replacing, write_text

HOLD = """
import sys, time
from pathlib import Path
from onpolicy_skd.storage.files import lock
with lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_the_process(tmp_path):
    file = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        refusal = (
            rf"^the run is in use by process {process.pid} on {socket.gethostname()}; wait for its end, or stop it$"
        )
        with pytest.raises(LockedError, match=refusal), lock(file, "the run"):
            pass
        process.kill()
    assert file.read_text()  # what it left is no obstacle
    with lock(file, "the run"):
        assert file.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        with pytest.raises(LockedError), lock(file, "the run"):
            pass
    with lock(file, "the run"):
        pass


def test_paths_of_a_run_lie_in_its_folder_or_next_to_it(tmp_path):
    paths = RunPaths(tmp_path / "runs" / "a")
    names = [name for name in dir(RunPaths) if isinstance(getattr(RunPaths, name), property)]
    shared = {"packed_text", "prefilter", "references"}
    locations = {name: getattr(paths, name) for name in names}
    assert len(set(locations.values())) == len(names)
    for name, path in locations.items():
        assert path.parent == (tmp_path / "runs" if name in shared else paths.folder)
    assert paths.evaluation("after", 7) == paths.evaluations / "after-000007.jsonl"


def fail_after_writing(file):
    file.write_text("new")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "a") as temporary:
        fail_after_writing(temporary)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_others_may_read_every_file_and_enter_every_folder_that_replaces_another(tmp_path):
    """transformers writes several chat templates into a folder of a checkpoint."""
    for name, text in (("final", "old"), ("new", "new")):
        (tmp_path / name / "templates").mkdir(parents=True)
        (tmp_path / name / "templates" / "tool.jinja").write_text(text)
    (tmp_path / "new" / "templates" / "tool.jinja").chmod(0o600)
    before = os.umask(0o022)
    try:
        replace_folder(tmp_path / "final", tmp_path / "new")
    finally:
        os.umask(before)
    templates = tmp_path / "final" / "templates"
    assert (templates.stat().st_mode & 0o777, (templates / "tool.jinja").stat().st_mode & 0o777) == (0o755, 0o644)
    assert (templates / "tool.jinja").read_text() == "new"
