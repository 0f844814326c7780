"""What crosses Ray: resources, tensors on the wire, and the teacher as an actor."""

import io
import socket
import time
from dataclasses import astuple

import pytest
import ray
import torch
from conftest import tiny_settings
from rich.console import Console

from actors.cluster import ClusterError, check_cpus, connect, plan, running_here
from actors.teacher import RemoteTeacher, TeacherActor, build_teacher
from actors.transport import pack, pack_named, unpack, unpack_named
from onpolicy_skd.config import ClassSettings
from onpolicy_skd.models import load_tokenizer
from onpolicy_skd.report.console import Display
from onpolicy_skd.trajectory import Trajectory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_survive_the_wire(dtype):
    tensor = torch.randn(5, 3).to(dtype)
    assert torch.equal(unpack(pack(tensor)), tensor)
    named = dict(unpack_named(pack_named([("a", tensor), ("b", tensor.T)])))
    assert torch.equal(named["b"], tensor.T)
    array, _ = pack(tensor)
    array.flags.writeable = False  # as from the object store
    unpack((array, str(dtype).removeprefix("torch."))).add_(1)


def test_roles_use_gpus_when_the_cluster_has_any():
    assert [r.gpus for r in plan(tiny_settings(), 0).roles] == [0, 0, 0]
    assert [r.gpus for r in plan(tiny_settings(), 3).roles] == [1, 1, 1]
    assert [r.gpus for r in plan(tiny_settings(run={"device": "cpu"}), 8).roles] == [0, 0, 0]
    assert [r.count for r in plan(tiny_settings(rollout={"actors": 2}), 4).roles] == [1, 1, 2]
    assert [r.gpus for r in plan(tiny_settings(cluster={"learner_gpus": 0.5}), 0).roles] == [0, 0, 0]
    shares = tiny_settings(cluster={"learner_gpus": 0.5, "teacher_gpus": 0.25, "rollout_gpus": 0.25})
    assert [r.gpus for r in plan(shares, 1).roles] == [0.5, 0.25, 0.25]
    several = plan(tiny_settings(teacher={"actors": 3}, learner={"ranks": 4}), 8)
    assert [(r.name, r.count) for r in several.roles] == [("learner", 4), ("teacher", 3), ("rollout", 1)]
    alone = plan(tiny_settings(teacher={"placement": "learner"}), 2)
    assert alone.teacher.count == 0


def test_too_few_gpus_or_cpus_are_said_with_the_arithmetic():
    with pytest.raises(
        ClusterError, match=r"asks for 3 GPUs .learner 1 x 1 \+ teacher 1 x 1 \+ rollout 1 x 1. but .* has 2"
    ):
        plan(tiny_settings(), 2)
    with pytest.raises(ClusterError, match=r"asks for 2 GPUs .* has 0"):
        plan(tiny_settings(cluster={"learner_gpus": 0, "teacher_gpus": 0, "rollout_gpus": 2}), 0)
    many = plan(tiny_settings(rollout={"actors": 20}), 0)
    with pytest.raises(ClusterError, match=r"22 actors ask for 22 x 0\.25 = 5\.5 CPUs but the cluster has 2"):
        check_cpus(many, 2)


def test_the_record_of_a_killed_ray_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert running_here() is None
    record = tmp_path / "ray" / "ray_current_cluster"
    record.parent.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        record.write_text(address)
        assert running_here() == address
    assert running_here() is None  # nobody listens any more
    record.write_text("no address")
    assert running_here() is None
    started = time.monotonic()
    with (
        pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"),
        connect(tiny_settings(cluster={"address": address})),
    ):
        pass
    assert time.monotonic() - started < 10


@pytest.fixture
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("count", [1, 2])
def test_teacher_actors_give_what_the_plain_teacher_gives(local_ray, count):
    settings = tiny_settings()
    tokenizer = load_tokenizer("bundled:demo_teacher")
    ids = torch.tensor(tokenizer("Now Zoe has <<22*2=44>>44 coins.")["input_ids"]).numpy()
    members = [
        Trajectory(f"t{cut}", ids[:cut], ids[cut:], torch.zeros(len(ids) - cut).numpy(), "stop", 0) for cut in (3, 6)
    ]
    plain = build_teacher(settings, 512, 0)
    plain.encode(members)
    actors = [TeacherActor.remote(settings, 512, 0, number, count) for number in range(count)]
    remote = RemoteTeacher(actors, "cpu")
    remote.expect([actor.encode.remote(members) for actor in actors], members)
    wanted = [("t6", [2, 0]), ("t3", [4])]
    assert torch.allclose(remote.rows(wanted), plain.rows(wanted), atol=1e-5)
    assert torch.equal(remote.head(), plain.head())
    for got, expected in zip(remote.scalars(["t6", "t3"]), plain.scalars(["t6", "t3"]), strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    drawn = (wanted, [5, 6], ClassSettings(sampler="rs_kd", draws=9))
    for got, expected in zip(astuple(remote.classes(*drawn)), astuple(plain.classes(*drawn)), strict=True):
        assert got == expected if isinstance(got, str) else torch.allclose(got, expected, atol=1e-5)
    if count == 2:  # each knows its share alone
        with pytest.raises(KeyError, match="t3"):
            ray.get(actors[1].rows.remote([("t3", [0])]))
    remote.release(["t3"])
    with pytest.raises(KeyError, match="t3"):
        remote.rows([("t3", [0])])
    for actor in actors:
        ray.kill(actor)


RECORD = {
    "step": 4, "loss": 1.25, "entropy": 0.5, "positions_selected": 10, "positions": 50, "samples": 3, "generated": 4,
    "response_tokens": 17.0, "sampler_gap": 1e-7, "grad_norm": 2.0,
    "seconds": {"rollout": 1.0, "filter": 0.0, "learn": 2.0, "sync": 0.1},
}  # fmt: skip


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Display(10, console=Console(file=out, force_terminal=False, soft_wrap=True)) as display:
        display.step(RECORD)
        display.say("[bold]words[/bold] stay as they are")
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 4  loss 1.2500  entropy 0.500  selected 10/50  kept 3/4")
    assert second == "[bold]words[/bold] stay as they are"


def test_a_live_table_on_a_terminal():
    out = io.StringIO()
    with Display(10, console=Console(file=out, force_terminal=True, width=140)) as display:
        display.step(RECORD)
    assert "1.2500" in out.getvalue()
    assert "5/10" in out.getvalue()
