"""Shared fixtures."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)  # the time of one example depends on the machine
settings.load_profile("no_deadline")
END = pytest.StashKey[float]()  # time.monotonic() after which no test starts
ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gsm8k() -> Path:
    """The folder of the real GSM8K; tests that read it say so when it is not next to the checkout."""
    folder = Path(os.environ.get("GSM8K_DIR", GSM8K))
    if not (folder / "test.jsonl").exists():
        pytest.skip("GSM8K's train.jsonl and test.jsonl are not here; set GSM8K_DIR to the folder that holds them")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="start no test later; the order of the files depends on the commit")


def pytest_configure() -> None:
    """Give each worker of pytest-xdist its cores, which the processes that it starts inherit.

    Engines that compute on the same cores slow each other down several times.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        worker, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[worker::count] or cores)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a time limit, order the files by a hash of the commit, so that each commit skips different ones."""
    if config.option.minutes is not None:
        config.stash[END] = time.monotonic() + 60 * config.option.minutes
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False).stdout
        items.sort(key=lambda item: hashlib.sha256(commit + str(item.path.relative_to(ROOT)).encode()).digest())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch  # late: it takes seconds, and the process that only distributes the tests does not need it

    torch.manual_seed(0)  # whatever ran before in this process
    if time.monotonic() > item.config.stash.get(END, float("inf")):
        pytest.skip(f"not started within --minutes={item.config.option.minutes:g}; without that option it runs")
