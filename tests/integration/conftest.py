"""Fixtures of the tests with Ray."""

from collections.abc import Iterator

import pytest
from ray_helpers import ray_cluster


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a Ray that the runs of a module share."""
    with ray_cluster() as address:
        yield address
