"""A Ray that several runs share: starting one costs more than a short run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Start a Ray node and yield its address; other runs on this machine do not find it."""
    with tempfile.TemporaryDirectory() as folder:  # short: sockets lie in it
        with pytest.MonkeyPatch.context() as patch:  # mock.patch.dict clears the environment, which Ray's threads read
            patch.setenv("RAY_TMPDIR", folder)
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            yield str(cluster.address)
        finally:
            cluster.shutdown()
