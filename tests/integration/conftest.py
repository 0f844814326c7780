"""Fixtures of the tests with Ray."""

import tempfile
from collections.abc import Iterator

import pytest
from ray_helpers import ray_cluster


@pytest.fixture(scope="session", autouse=True)
def separate_ray() -> Iterator[None]:
    """Hide running Rays from the tests, and the Ray of one worker of pytest-xdist from the others: a run joins it."""
    # The path must be short, because sockets lie in it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a Ray that the runs of a module share."""
    with ray_cluster() as address:
        yield address
