"""This machine as a run on GPUs needs it: driver, C compiler and Python's headers for Triton, shared memory for Ray."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.models.loading import pick_device
from onpolicy_skd.models.vllm_setup import vllm_version

logger = logging.getLogger(__name__)

LEAST_DRIVER = {12: 525, 13: 580}  # major version of the driver by CUDA's major version
LEAST_SHARED_MEMORY = 8e9  # bytes of /dev/shm: Ray's object store
SHARED_MEMORY = Path("/dev/shm")
NO_DEVICES = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs


def check_machine(settings: Settings) -> None:
    """Check this machine for a run on its GPUs; return at once for a run on CPUs.

    Warns of a small /dev/shm.  Raises ConfigError if the driver, or what Triton needs for vLLM's GPU build, is missing.
    """
    device, driver = settings.run.device, driver_version()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in NO_DEVICES
    if device == "cpu" or (device == "auto" and (driver is None or hidden)):
        return
    if not torch.cuda.is_available():
        check_driver(device, driver)
        pick_device("cuda")  # raises ModelError for any other reason
    if setting := vllm_setting(settings):
        check_compiler(setting)
    if (size := shared_memory()) < LEAST_SHARED_MEMORY:
        logger.warning(
            "/dev/shm has %.2g GB, and Ray's object store, through which rollouts and weights travel, works best with "
            "%g or more; start a container with --shm-size=%gg",
            size / 1e9, LEAST_SHARED_MEMORY / 1e9, LEAST_SHARED_MEMORY / 1e9,
        )  # fmt: skip


def check_driver(device: str, driver: str | None) -> None:
    """Raise ConfigError unless the version ``driver`` fits torch's CUDA; ``device``: the setting."""
    needed = f"torch's CUDA {torch.version.cuda} needs a driver of at least {least_driver()}"
    if driver is None:
        raise ConfigError(
            f"run.device={device}: no NVIDIA driver answers here (nvidia-smi prints no version); {needed}, and a "
            "container --gpus all; accepted without a GPU: run.device=cpu"
        )
    if int(driver.partition(".")[0]) < least_driver():
        raise ConfigError(
            f"run.device={device}: the NVIDIA driver {driver} is too old: {needed}; accepted with this driver: "
            "run.device=cpu, or a torch for its CUDA"
        )


def check_compiler(setting: str) -> None:
    """Raise ConfigError unless Triton can compile on this machine; ``setting``: the setting that asks for vLLM."""
    name, why = setting.partition("=")[0], "Triton compiles kernels of vLLM's GPU build when an engine starts"
    if c_compiler() is None:
        raise ConfigError(
            f"{setting}: {why}, and there is no C compiler (gcc or clang on the PATH, or CC); install gcc, or set "
            f"{name}=transformers"
        )
    if not python_header().exists():
        raise ConfigError(
            f"{setting}: {why}, and Python's headers are missing ({python_header()}); install python3-dev, or set "
            f"{name}=transformers"
        )


def vllm_setting(settings: Settings) -> str | None:
    """Return the setting that asks for an engine of vLLM's GPU build; None if none does."""
    if importlib.util.find_spec("vllm") is None or "cpu" in vllm_version():
        return None
    if settings.needs_engines and settings.rollout.engine == "vllm":
        return "rollout.engine=vllm"
    local_teacher = settings.cache.path is None and any(s.teacher.engine == "vllm" for s in settings.by_teacher)
    return "teacher.engine=vllm" if local_teacher else None


def driver_version() -> str | None:
    """Return the driver's version as nvidia-smi prints it; None if it prints none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    version = re.search(r"\d+(\.\d+)+", output)
    return version.group() if version else None


def least_driver() -> int:
    """Return the major version of the oldest driver for torch's CUDA; 0 for a torch without CUDA."""
    return LEAST_DRIVER.get(int((torch.version.cuda or "0").partition(".")[0]), 0)


def c_compiler() -> str | None:
    """Return the C compiler that Triton takes."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path:
    return Path(sysconfig.get_paths()["include"]) / "Python.h"


def shared_memory() -> int:
    """Return the size of /dev/shm, bytes; 0 without it."""
    return shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.exists() else 0
