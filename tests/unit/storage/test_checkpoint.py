import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onpolicy_skd.learner.optimizer import load_optimizer_tensors, optimizer_tensors
from onpolicy_skd.report.metrics_log import MetricsLog, read
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.storage.checkpoint import CheckpointError
from onpolicy_skd.storage.files import SaveError

TENSORS = {"a": torch.arange(5.0), "deep/b": torch.ones(2, 3, dtype=torch.bfloat16)}


def test_round_trip_and_only_the_newest_are_kept(tmp_path):
    for step in (1, 20, 3, 100):
        checkpoint.save(tmp_path, step, {"note": step}, TENSORS, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    loaded = checkpoint.newest(tmp_path)
    assert (loaded.step, loaded.state) == (100, {"note": 100})
    assert all(torch.equal(loaded.tensors[n], t) for n, t in TENSORS.items())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([checkpoint.STATE, checkpoint.TENSORS]), st.floats(0, 0.999), st.integers(1, 255))
def test_one_flipped_byte_is_noticed_and_the_previous_checkpoint_is_used(tmp_path_factory, name, place, flip):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, 1, {"good": True}, TENSORS, keep=3)
    damaged = checkpoint.save(folder, 2, {"good": False}, TENSORS, keep=3) / name
    content = bytearray(damaged.read_bytes())
    content[int(place * len(content))] ^= flip
    damaged.write_bytes(bytes(content))
    loaded = checkpoint.newest(folder)
    assert loaded is not None
    if loaded.step == 2:  # the flip turned one kind of white space into another
        assert name == checkpoint.STATE
        assert loaded.state == {"good": False}
    else:
        assert loaded.state == {"good": True}


@pytest.mark.parametrize("damage", ["no state", "no tensors", "future"])
def test_damage_is_named(tmp_path, damage, caplog):
    path = checkpoint.save(tmp_path, 7, {}, TENSORS, keep=1)
    if damage == "no state":
        (path / checkpoint.STATE).unlink()
    elif damage == "no tensors":
        (path / checkpoint.TENSORS).unlink()
    else:
        state = json.loads((path / checkpoint.STATE).read_text()) | {"format": 99}
        (path / checkpoint.STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"step-00000007"):
        checkpoint.load(path)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path) is None
    assert "step-00000007" in caplog.text


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {}, TENSORS, keep=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SaveError, match=r"step 2 cannot be written to .*No space left"):
        checkpoint.save(tmp_path, 2, {}, TENSORS, keep=1)
    assert checkpoint.newest(tmp_path).step == 1
    monkeypatch.undo()
    checkpoint.save(tmp_path, 2, {}, TENSORS, keep=2)  # leftovers do not disturb the next try
    assert checkpoint.newest(tmp_path).step == 2


def test_optimizer_state_round_trips_exactly():
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def work(model, optimizer, steps):
        for _ in range(steps):
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    uninterrupted, optimizer = make()
    work(uninterrupted, optimizer, 6)
    half, optimizer = make()
    work(half, optimizer, 3)
    saved = optimizer_tensors(optimizer, dict(half.named_parameters()))
    other, fresh = make()
    other.load_state_dict(half.state_dict())
    load_optimizer_tensors(fresh, dict(other.named_parameters()), saved)
    work(other, fresh, 3)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), other.parameters(), strict=True))


def test_metrics_of_steps_that_are_done_again_are_forgotten(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write({"step": step, "loss": step / 2})
        if step == 2:
            log.write({"step": 3, "event": "evaluation", "name": "during"})
    log.write({"step": 5, "event": "evaluation", "name": "after"})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    assert [r["step"] for r in read(log.path) if "loss" in r] == [0, 1, 2, 3, 4]
    resumed = MetricsLog(tmp_path, first_step=3)
    resumed.write({"step": 3, "loss": 9})
    resumed.close()
    assert [(r["step"], r.get("loss")) for r in read(log.path)] == [(0, 0), (1, 0.5), (2, 1.0), (3, None), (3, 9)]


def test_damage_inside_a_metrics_file_is_not_hidden(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read(tmp_path / "metrics.jsonl")


def test_a_checkpoint_that_was_being_replaced_is_not_lost(tmp_path):
    """A kill between two renames leaves the previous one under another name."""
    path = checkpoint.save(tmp_path, 4, {"good": 1}, TENSORS, keep=2)
    path.rename(tmp_path / ".step-00000004.old")
    (tmp_path / ".step-00000004.tmp").mkdir()
    loaded = checkpoint.newest(tmp_path)
    assert (loaded.step, loaded.state) == (4, {"good": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004"]


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 4, {}, TENSORS, keep=2)
    monkeypatch.setattr(checkpoint, "sha256", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.newest(tmp_path)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).step == 4


def test_metrics_go_back_with_the_run_but_faults_and_what_came_before_stay(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 0, "event": "evaluation", "name": "before"})
    log.write({"step": 0, "loss": 1.0})
    log.write({"step": 1, "event": "fault", "cause": "killed"})
    log.close()
    MetricsLog(tmp_path, 0, resumed=True).close()
    assert [r.get("event") for r in read(tmp_path / "metrics.jsonl")] == ["evaluation", "fault"]


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 0, "loss": 1.0})

    class Full:
        """Takes half of what it is given."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            return self.file.write(line[: len(line) // 2])

    log._file = Full(log._file)
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 1, "loss": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_have_the_mode_of_the_umask(tmp_path, umask, mode):
    """Checkpoints, caches and text alike, whatever mode a library writes its files with."""
    before = os.umask(umask)
    try:
        saved = checkpoint.save(tmp_path / "checkpoints", 1, {}, {"weight": torch.zeros(2)}, keep=2)
        with files.replacing(tmp_path / "shard.safetensors") as temporary:
            save_file({"weight": torch.zeros(2)}, temporary)
        files.write_text(tmp_path / "summary.json", "{}")
    finally:
        os.umask(before)
    written = [*saved.iterdir(), tmp_path / "shard.safetensors", tmp_path / "summary.json"]
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in written} == {oct(mode)}
    assert not list(tmp_path.glob(".mode*"))


def test_tensors_are_checked_without_being_loaded_and_read_slice_by_slice(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from onpolicy_skd.storage import checkpoint

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

        folder = Path(sys.argv[1])
        before = resident()
        loaded = checkpoint.load(checkpoint.newest(folder).path, verify=False)
        tensor = loaded.tensors["a"]
        checked = resident() - before
        half = tensor.chunk(2)[1].clone()
        print(checked, resident() - before, half.sum().item())
    """)
    checkpoint.save(tmp_path, 1, {}, {"a": torch.ones(2**25)}, keep=1)  # 128 MiB
    command = [sys.executable, "-c", script, str(tmp_path)]
    checked, read, total = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(total) == 2**24
    assert int(checked) < 20
    assert int(read) < 180  # half of the file and its copy


def test_tensors_of_a_file_are_a_mapping(tmp_path):
    checkpoint.save(tmp_path, 1, {}, TENSORS, keep=1)
    tensors = checkpoint.newest(tmp_path).tensors
    assert sorted(tensors) == sorted(TENSORS)
    assert "b" not in tensors
    with pytest.raises(KeyError):
        tensors["b"]
    (tmp_path / "step-00000001" / checkpoint.TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001.*cannot be read"):
        checkpoint.load(tmp_path / "step-00000001", verify=False).tensors  # noqa: B018


def test_a_checkpoint_in_the_background_is_the_one_of_its_moment(tmp_path, monkeypatch):
    """Training changes the tensors in place while they are being written."""
    written, gate = [], threading.Event()
    write = checkpoint._write

    def slow(*given):
        gate.wait(10)
        written.append(given[2])
        return write(*given)

    monkeypatch.setattr(checkpoint, "_write", slow)
    writer, tensors = checkpoint.BackgroundWriter(), {n: t.clone() for n, t in TENSORS.items()}
    path = writer.save(tmp_path / "background", 3, {"note": 3}, tensors, keep=1)
    assert written == []
    for tensor in tensors.values():
        tensor.zero_()
    gate.set()
    writer.wait()
    assert written == [3]
    checkpoint.save(tmp_path / "plain", 3, {"note": 3}, TENSORS, keep=1)
    assert path == tmp_path / "background" / "step-00000003"
    for name in (checkpoint.STATE, checkpoint.TENSORS):
        assert (path / name).read_bytes() == (tmp_path / "plain" / path.name / name).read_bytes()
    writer.wait()  # nothing to wait for


def test_an_error_in_the_background_is_raised_by_the_next_call_which_saves_all_the_same(tmp_path, monkeypatch):
    writer, full = checkpoint.BackgroundWriter(), [True, False, True]
    write = checkpoint._write

    def refuses(*given):
        if full.pop(0):
            raise OSError("no space left")
        return write(*given)

    monkeypatch.setattr(checkpoint, "_write", refuses)
    writer.save(tmp_path, 1, {}, TENSORS, keep=2)
    with pytest.raises(SaveError, match="step 1 "):
        writer.save(tmp_path, 2, {}, TENSORS, keep=2)
    writer.save(tmp_path, 3, {}, TENSORS, keep=2)
    with pytest.raises(SaveError, match="step 3 "):
        writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
