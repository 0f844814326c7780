"""Proof that a weight update reaches every trained parameter of the rollout engines; made once, before the first step.

The learner adds noise to its parameters, and the engines receive them like every update and generate.  Both sides then
have the same log-probabilities only if the engines use each new parameter.  This holds for every way to send weights,
and for engines that pack, merge or copy parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.groups import ActorGroups
from actors.rollout_actor import RolloutGroup
from actors.weight_sync import WeightSync
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.types import RolloutRequest, SamplingParams, Trajectory

REQUESTS, TOKENS = 4, 16  # requests per engine; tokens of each prompt, and at most as many of its response
SLEEP_TOLERANCE = 0.05  # nats per token between two answers of one engine with the same weights
TOLERANCE = {True: 0.01, False: 0.15}  # nats per token between engine and learner; True: both compute in float32


def prove_update(groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int) -> None:
    """Raise ModelError, naming kinds of parameters, if the engines keep old values after an update.

    Leaves the learner as it was, but the engines with perturbed weights: send the learner's weights afterwards.
    """
    settings = groups.settings
    precise: bool = groups.call_ranks(lambda rank: rank.in_float32.remote())
    tolerance = TOLERANCE[precise]
    gap = _gap(groups, sync, version, vocabulary, None)
    if gap <= tolerance:
        return
    kinds: list[str] = groups.call_ranks(lambda rank: rank.parameter_kinds.remote())
    old = [kind for kind in kinds if not _gap(groups, sync, version, vocabulary, [kind]) <= tolerance]
    named = ", ".join(old) if 0 < len(old) < len(kinds) else "all parameters"
    raise ModelError(
        f"rollout.engine={settings.rollout.engine}: after a weight update the engine differs from the student by "
        f"{gap:.3g} nats per token, because it does not take new values of {named}; train this model with "
        "rollout.engine=transformers"
    )


def greedy_answers(rollouts: RolloutGroup, engines: int, vocabulary: int, longest: int) -> list[Trajectory]:
    """Return greedy responses of the engines to random prompts, which are the same in each call."""
    requests, length = _requests(engines, vocabulary, longest)
    return rollouts.gather(requests, SamplingParams(length, temperature=0.0))


def check_sleep(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> None:
    """Raise ModelError unless engines give the same answers after they slept and got the same weights again.

    Sleep discards what is neither a parameter nor a named buffer, and some models have such tensors.  Log-probabilities
    are compared up to the first token that differs: where two are about equally likely, GPU kernels may choose either.
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
    """Return requests with random prompts, and the tokens of a prompt, which also limit its response."""
    length = min(TOKENS, longest // 2)
    prompts = np.random.default_rng(0).integers(0, vocabulary, (REQUESTS * engines, length)).tolist()
    return [RolloutRequest(f"proof/{i}", prompt, i) for i, prompt in enumerate(prompts)], length


def _gap(groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int, kinds: Sequence[str] | None) -> float:
    """Return the largest gap of a response, nats per token, with noise in ``kinds`` of parameters (None: in all)."""
    requests, length = _requests(len(groups.engines), vocabulary, groups.settings.max_model_length)
    groups.call_ranks(lambda rank: rank.perturb.remote(kinds))
    try:
        sync.push(version, groups.timeout_s())
        trajectories = groups.rollouts.gather(requests, SamplingParams(length))
        return float(np.max(groups.call_ranks(lambda rank: rank.sampler_gaps.remote(trajectories))))
    finally:
        groups.call_ranks(lambda rank: rank.undo_perturb.remote())
