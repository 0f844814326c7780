"""What a machine lacks for a run on its GPUs: one error before Ray starts, or a warning."""

import logging
import types

import pytest
import torch
from helpers import tiny_settings

from actors import cluster
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.run import machine
from onpolicy_skd.run.machine import check_machine

VLLM = {"rollout": {"engine": "vllm"}}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine on which nothing is missing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(machine, "python_header", lambda: tmp_path)
    monkeypatch.setattr(machine, "shared_memory", lambda: 16e9)
    return monkeypatch


def without_driver(gpu, version):
    gpu.setattr(machine, "driver_version", lambda: version)
    gpu.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_complete_machine_is_not_refused(gpu, device, caplog):
    check_machine(tiny_settings(run={"device": device}, **VLLM))
    assert not caplog.records


@pytest.mark.parametrize(("version", "needle"), [(None, "no NVIDIA driver answers"), ("535.129.03", "too old")])
def test_the_driver_is_refused_by_name(gpu, version, needle):
    without_driver(gpu, version)
    with pytest.raises(ConfigError, match=rf"run.device=cuda: .*{needle}.*CUDA 13.0 needs a driver of at least 580"):
        check_machine(tiny_settings(run={"device": "cuda"}))


def test_an_old_driver_with_which_torch_works_is_accepted(gpu):
    """NVIDIA's forward compatibility packages run new CUDA on old drivers of data center cards."""
    gpu.setattr(machine, "driver_version", lambda: "535.129.03")
    check_machine(tiny_settings(run={"device": "cuda"}))


def test_a_torch_that_sees_no_card_is_refused(gpu):
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="torch sees no CUDA device here"):
        check_machine(tiny_settings(run={"device": "auto"}))


@pytest.mark.parametrize(
    ("missing", "needle"), [("compiler", "there is no C compiler"), ("headers", "Python's headers are missing")]
)
def test_what_triton_needs_is_asked_for_where_vllms_gpu_build_runs(gpu, tmp_path, missing, needle):
    if missing == "compiler":
        gpu.setattr(machine.shutil, "which", lambda _: None)
    else:
        gpu.setattr(machine, "python_header", lambda: tmp_path / "Python.h")
    with pytest.raises(ConfigError, match=f"^rollout.engine=vllm: .*{needle}.*rollout.engine=transformers"):
        check_machine(tiny_settings(**VLLM))
    teacher = {"teacher": {"engine": "vllm"}, "rollout": {"engine": "transformers"}}
    with pytest.raises(ConfigError, match=f"^teacher.engine=vllm: .*{needle}"):
        check_machine(tiny_settings(**teacher))
    check_machine(tiny_settings(rollout={"engine": "transformers"}))
    gpu.setattr(machine, "vllm_version", lambda: "0.32.0+cpu")
    check_machine(tiny_settings(**VLLM))


def test_a_compiler_may_be_named_by_cc(gpu):
    gpu.setattr(machine.shutil, "which", lambda _: None)
    gpu.setenv("CC", "/opt/cc")
    check_machine(tiny_settings(**VLLM))


def test_a_small_shared_memory_is_a_warning(gpu, caplog):
    gpu.setattr(machine, "shared_memory", lambda: 64 << 20)
    with caplog.at_level(logging.WARNING):
        check_machine(tiny_settings())
    (record,) = caplog.records
    assert "/dev/shm has 0.067 GB" in record.getMessage()
    assert "--shm-size=8g" in record.getMessage()


@pytest.mark.parametrize(
    ("device", "driver", "visible"), [("cpu", "580.1", None), ("auto", None, None), ("auto", "580.1", "")]
)
def test_nothing_is_asked_of_a_run_on_cpus(gpu, device, driver, visible, caplog):
    without_driver(gpu, driver)
    gpu.setattr(machine, "shared_memory", lambda: 0)
    gpu.setattr(machine.shutil, "which", lambda _: None)
    if visible is not None:
        gpu.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_machine(tiny_settings(run={"device": device}, **VLLM))
    assert not caplog.records


def test_the_check_comes_before_a_private_ray_and_not_before_another(gpu, monkeypatch):
    """A cluster's nodes are other machines."""
    without_driver(gpu, None)
    addresses = []
    monkeypatch.setattr(cluster, "_init", lambda address, **_: addresses.append(address))
    monkeypatch.setattr(cluster, "ray", types.SimpleNamespace(cluster_resources=dict))
    monkeypatch.setattr(cluster, "answers", lambda _: True)
    monkeypatch.setattr(cluster, "running_here", lambda: None)
    settings = tiny_settings(run={"device": "cuda"})
    with pytest.raises(ConfigError, match="no NVIDIA driver"):
        cluster._join_or_start(None, settings)
    assert addresses == []
    cluster._join_or_start("10.0.0.1:6379", settings)
    assert addresses == ["10.0.0.1:6379"]
