"""Proof that a weight update reaches every trained parameter of the rollout engines; made once, before the first step.

The learner adds noise to its parameters, the engines get them the way they get every update, and generate.  Both sides
then have the same log-probabilities only if the engines use each new parameter: also where an engine packs, merges or
copies parameters, and on every way of sending them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.groups import ActorGroups
from actors.weight_sync import WeightSync
from onpolicy_skd.models.loading import ModelError
from onpolicy_skd.types import RolloutRequest, SamplingParams

REQUESTS, TOKENS = 4, 16  # of each engine; tokens of a prompt and of its response
TOLERANCE = {True: 0.01, False: 0.15}  # nats between engine and learner; True: both compute in float32


def prove_update(groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int) -> None:
    """Raise ModelError, naming kinds of parameters, if the engines keep old values after an update.

    Leaves the learner as it was and the engines with wrong weights: send the true ones afterwards.
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


def _gap(groups: ActorGroups, sync: WeightSync, version: int, vocabulary: int, kinds: Sequence[str] | None) -> float:
    """Return the largest mean difference of a response's log-probabilities, with noise in ``kinds`` of parameters."""
    cfg = groups.settings
    rng = np.random.default_rng(0)
    length = min(TOKENS, cfg.max_model_length // 2)
    prompts = rng.integers(0, vocabulary, (REQUESTS * len(groups.engines), length)).tolist()
    requests = [RolloutRequest(f"proof/{i}", prompt, i) for i, prompt in enumerate(prompts)]
    groups.call_ranks(lambda rank: rank.perturb.remote(kinds))
    try:
        sync.push(version, groups.timeout_s())
        trajectories = groups.rollouts.gather(requests, SamplingParams(length))
        return float(np.max(groups.call_ranks(lambda rank: rank.sampler_gaps.remote(trajectories))))
    finally:
        groups.call_ranks(lambda rank: rank.undo_perturb.remote())
