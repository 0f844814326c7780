"""Proof, before the first step, that a weight update reaches every trained parameter of the rollout engines.

The learner adds noise to its parameters and sends them like any update; the engines then generate.  An engine that
uses the new parameters gives the log-probabilities of the learner with noise; an engine that kept the old ones gives
those of the learner without noise.  The proof works for every way to send weights, for engines that pack, merge or
copy parameters, and for any precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from actors.groups import ActorGroups
from actors.rollout_actor import RolloutGroup
from actors.weight_sync import WeightSync
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

REQUESTS, TOKENS = 4, 16  # requests per engine; tokens of each prompt, and the most tokens of its response
SLEEP_TOLERANCE = 0.05  # nats per token between two answers of one engine with the same weights
TOLERANCE = 0.01  # nats per token between engine and learner that both compute in float32, with noise everywhere
LOUDNESS = (1.0, 4.0, 16.0)  # factors of the noise, tried in this order until one decides


def prove_update(groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int) -> None:
    """Raise ModelError, naming kinds of parameters, if the engines keep old values after an update.

    Leaves the learner as it was, but the engines with perturbed weights: send the learner's weights afterwards.
    """
    measure = functools.partial(_gaps, groups, sync, version, vocabulary)
    if groups.call_ranks(lambda rank: rank.in_float32.remote()) and np.max(measure(None)[0]) <= TOLERANCE:
        return
    kinds: list[str] = groups.call_ranks(lambda rank: rank.parameter_kinds.remote())
    old = [kind for kind in kinds if not _takes(kind, measure)]
    if old:
        named = ", ".join(old) if len(old) < len(kinds) else "all parameters"
        raise ModelError(
            f"rollout.engine={groups.settings.rollout.engine}: an update gives the engine no new values of "
            f"{named}; train this model with rollout.engine=transformers"
        )


def _takes(kind: str, measure: Callable[..., np.ndarray]) -> bool:
    """Return True if all responses are at least twice as close to the learner with noise in ``kind`` as without it."""
    for loudness in LOUDNESS:
        new, old = measure(kind, loudness)
        if (new < old / 2).all():
            return True
        if (old < new / 2).any():
            return False
    return False  # no noise in these parameters changes the responses: there is no proof


def greedy_answers(rollouts: RolloutGroup, engines: int, vocabulary: int, longest: int) -> list[Trajectory]:
    """Return greedy responses of the engines to random prompts, which are the same in each call."""
    requests, length = _requests(engines, vocabulary, longest)
    return rollouts.gather(requests, SamplingParams(length, temperature=0.0))


def check_sleep(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> None:
    """Raise ModelError unless engines give the same answers after they slept and got the same weights again.

    Sleep discards tensors that are neither parameters nor named buffers, and some models have such tensors.  The check
    compares log-probabilities up to the first token that differs: of two about equally likely tokens, GPU kernels may
    choose either.
    """
    gaps = []
    for a, b in zip(before, after, strict=True):
        shared = min(len(a.response_ids), len(b.response_ids))
        different = np.flatnonzero(a.response_ids[:shared] != b.response_ids[:shared])
        compared = different[0] + 1 if len(different) else shared
        gaps.append(np.abs(a.sampler_logprobs[:compared] - b.sampler_logprobs[:compared]).mean())
    gap = float(np.mean(gaps))
    if not gap <= SLEEP_TOLERANCE:
        raise ModelError(
            f"cluster.topology=colocated: after its first sleep the rollout engine, with the same weights, differs by "
            f"{gap:.3g} nats per token from before: sleep loses a part of this model; use cluster.topology=split or "
            "rollout.engine=transformers"
        )


def _requests(engines: int, vocabulary: int, longest: int) -> tuple[list[RolloutRequest], int]:
    """Return requests with random prompts, and the number of tokens of each prompt, which also limits its response."""
    length = min(TOKENS, longest // 2)
    prompts = np.random.default_rng(0).integers(0, vocabulary, (REQUESTS * engines, length)).tolist()
    return [RolloutRequest(f"proof/{i}", prompt, i) for i, prompt in enumerate(prompts)], length


def _gaps(
    groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int, kind: str | None, loudness: float = 1.0
) -> np.ndarray:
    """Add noise to parameters of a ``kind`` (None: all) and return the gap of each response, nats per token ``[2, n]``.

    The first row holds the gaps to the learner with the noise, the second those to the learner without it.
    """
    requests, length = _requests(len(groups.engines), vocabulary, groups.settings.max_model_length)
    groups.call_ranks(lambda rank: rank.perturb.remote(kind, loudness))
    try:
        sync.push(version, groups.timeout_s())
        trajectories = groups.rollouts.gather(requests, SamplingParams(length))
        new = groups.call_ranks(lambda rank: rank.sampler_gaps.remote(trajectories))
    finally:
        groups.call_ranks(lambda rank: rank.undo_perturb.remote())
    return np.array([new, groups.call_ranks(lambda rank: rank.sampler_gaps.remote(trajectories))])
