"""The learner's side of weight transfer to the rollout engines."""

from __future__ import annotations

from collections import deque

import ray
import torch

from actors.serialization import Packed, pack_named
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import Address, Sender, WeightSpec, exported
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import pick_device, pick_dtype


class SendsWeights:
    """Methods of LearnerActor that give the student's weights away: as objects, by broadcast, or by CUDA IPC."""

    _settings: Settings
    _learner: Learner
    _sender: Sender | None = None  # rank 0's, with sync.method=broadcast

    def weights(self) -> dict[str, Packed]:
        """Return all weights as arrays."""
        with self._learner.spans("pack weights"):
            return pack_named(self._learner.state.weights(self._engine_dtype))

    @property
    def _engine_dtype(self) -> torch.dtype:
        return pick_dtype(self._settings.rollout.dtype, pick_device(self._settings.run.device))

    def open_group(self) -> tuple[Address, WeightSpec]:
        """Return the address at which the engines' workers meet rank 0, and the spec of what it will broadcast."""
        if self._sender is not None:
            self._sender.close()
        self._sender = Sender(ray.util.get_node_ip_address(), pick_device(self._settings.run.device))
        return self._sender.address, self._learner.state.weight_spec(self._engine_dtype)

    def join_group(self, count: int) -> None:
        """Wait for the engines' workers, after ``open_group``."""
        assert self._sender is not None
        self._sender.join(count, self._settings.faults.timeout_s())

    def send(self) -> None:
        """Broadcast the weights; ranks other than 0 only help to gather them."""
        weights = self._learner.state.weights(self._engine_dtype)
        with self._learner.spans("send weights"):
            if self._sender is None:  # not rank 0
                deque(weights, maxlen=0)
            else:
                self._sender.send(weights)

    def export_weights(self) -> WeightSpec:
        """Copy the weights in this GPU's memory, until ``drop_export``, and return how to map the copy."""
        self._copies = []
        weight_spec, self._copies = exported(self._learner.state.weights(self._engine_dtype, everywhere=True))
        torch.cuda.empty_cache()  # an engine that wakes up may need it
        return weight_spec

    def drop_export(self) -> None:
        self._copies = []
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
