"""The learner's side of weight transfer to the rollout engines, and of the proof that it works (weight_proof.py)."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from torch.distributed.tensor import DTensor

from actors.serialization import Packed, pack_named
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.weight_transfer import Address, Sender, WeightSpec, exported
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.models.loading import pick_device, pick_dtype
from onpolicy_skd.types import Trajectory, seed_of

WATCH_S = 0.2  # seconds between two checks of whether a broadcast has ended
NOISE = 0.3  # standard deviation of the noise, as a share of a parameter's root mean square
NOISE_OF_ZEROS = 0.02  # standard deviation of the noise in parameters that are all zero


class SendsWeights:
    """Methods of LearnerActor that send the student's weights: as objects, by broadcast, or by CUDA IPC."""

    _settings: Settings
    _learner: Learner
    _sender: Sender | None = None  # rank 0's, with sync.method=broadcast
    _copy: Tensor | None = None  # of the weights, with sync.method=ipc
    _unperturbed: Sequence[tuple[Tensor, Tensor]] = ()  # parameters, each with its copy from before ``perturb``

    def weights(self) -> dict[str, Packed]:
        """Return all weights by name, as numpy arrays of the engine's dtype; only rank 0's are complete."""
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

    def init_process_group(self, count: int) -> None:
        """Form the group of ``count`` processes, this one and all engine workers; call it after ``open_group``."""
        assert self._sender is not None
        self._sender.init_process_group(count, self._settings.faults.timeout_s())

    def send(self, received: Sequence[ray.ObjectRef]) -> None:
        """Broadcast the weights; ranks other than 0 only help to gather them.

        ``received``: refs of the engines' calls that receive the weights.  If one of them fails, the broadcast is
        aborted, because NCCL would wait forever for that engine to receive the rest.
        """
        weights = self._learner.state.weights(self._engine_dtype)
        with self._learner.spans("send weights"):
            if self._sender is None:  # not rank 0
                deque(weights, maxlen=0)
            else:
                with on_failure(received, self._sender.abort):
                    self._sender.send(weights)

    def export_weights(self) -> WeightSpec:
        """Copy the weights within this GPU's memory and return how to map the copy; ``drop_export`` frees it."""
        state, self._copy = self._learner.state, None
        weights = state.weights(self._engine_dtype, everywhere=True)
        weight_spec, self._copy = exported(weights, state.weight_spec(self._engine_dtype))
        torch.cuda.empty_cache()  # an engine that wakes up may need it
        return weight_spec

    def drop_export(self) -> None:
        self._copy = None
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    # -- proof of a weight update (weight_proof.py) ----------------------------------------------------------------

    def in_float32(self) -> bool:
        """Return True if learner and engines compute in float32."""
        device, learner = pick_device(self._settings.run.device), self._settings.learner
        return self._engine_dtype == pick_dtype(learner.compute_dtype, device) == torch.float32

    def parameter_kinds(self) -> list[str]:
        """Return the names of the trained parameters, without duplicates, with ``*`` in place of layer numbers.

        A LoRA adapter's parameters appear under the name of the module that it adapts.
        """
        return sorted({_kind(name) for name, _ in self._trained()})

    @torch.no_grad()
    def perturb(self, kind: str | None, loudness: float) -> None:
        """Add noise to the trained parameters of a ``kind`` (None: to all) until ``undo_perturb``."""
        self._learner.state.reshard()
        copies = []
        for name, parameter in self._trained():
            if kind in (None, _kind(name)):
                copies.append((parameter, parameter.to("cpu", copy=True)))
                self._unperturbed = copies
                scale = parameter.square().mean().sqrt().item() * NOISE or NOISE_OF_ZEROS if parameter.numel() else 0.0
                rng = torch.Generator(parameter.device).manual_seed(seed_of("noise", name))
                parameter.add_(loudness * scale * torch.randn(parameter.shape, generator=rng, device=parameter.device))

    @torch.no_grad()
    def undo_perturb(self) -> None:
        self._learner.state.reshard()
        for parameter, copy in self._unperturbed:
            parameter.copy_(copy)
        self._unperturbed = ()

    def sampler_gaps(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return each trajectory's mean absolute gap between sampler's and student's log-probabilities, nats."""
        return self._learner.scorer.sampler_gaps(trajectories)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the trainable parameters by name, each as this rank's shard."""
        for name, parameter in self._learner.student.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data


@contextmanager
def on_failure(calls: Sequence[ray.ObjectRef], action: Callable[[], None]) -> Iterator[None]:
    """Call ``action`` from another thread as soon as one of ``calls`` fails, if the block has not ended by then."""
    ended = threading.Event()

    def watch() -> None:
        pending = list(calls)
        while pending and not ended.is_set():
            done, pending = ray.wait(pending, timeout=WATCH_S)
            try:
                ray.get(done)
            except RayError:
                if not ended.is_set():
                    action()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(r"\.lora_\w+(\.\w+)*$", "", name))
