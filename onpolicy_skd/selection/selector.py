"""Selection of positions over a run: metric, policy, and the state that they keep between steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config import plugins
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import PositionSettings
from onpolicy_skd.selection.metrics import (
    FROM_RECORDS,
    FROM_TEACHER_ROWS,
    METRICS,
    MODEL_FREE,
    RANGES,
    Metric,
    Signals,
)
from onpolicy_skd.selection.positions import POLICIES, Context, Policy, Selection, full, scheduled_k
from onpolicy_skd.selection.weighting import WEIGHTINGS, normalized
from onpolicy_skd.types import seed_of

State = dict[str, Tensor]
SELECT_ALL = ("full", "weighted")  # policies that select all eligible positions
SELECT_SHARE = ("top_k", "curriculum", "bandit")  # policies that select exactly a share k, so all of them at k = 1


class ScoreQueue:
    """The last ``size`` scores of the training stream, first in, first out (GLS; Wang et al., 2021)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores = torch.empty(0)

    def threshold(self, k: float) -> float | None:
        """Return the (1 - k) quantile; None before the first batch."""
        if not len(self._scores):
            return None
        count = min(len(self._scores), math.ceil(round(k * len(self._scores), 9)))
        return self._scores.topk(count).values[-1].item()

    def push(self, scores_N: Tensor) -> None:
        """Append the scores of an optimizer batch."""
        self._scores = torch.cat([self._scores, scores_N.detach().float().cpu()])[-self._size :]

    def state_dict(self) -> State:
        return {"scores": self._scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._scores = state["scores"].clone()


class Bandit:
    """EXP3 (Auer et al., 2002) over metrics.

    The reward is the relative decrease of the probe's divergence since the arm was last played (or since the start), in
    [0, 1]; an increase counts as 0 (EKD).
    """

    def __init__(self, arms: Sequence[str], gamma: float, seed: int) -> None:
        self.arms = tuple(arms)
        self._gamma = gamma
        self._seed = seed
        self._log_weights = torch.zeros(len(arms), dtype=torch.float64)
        self._last = torch.full((len(arms),), math.nan, dtype=torch.float64)  # probe at each arm's last play

    def probabilities(self) -> Tensor:
        """Return float64 ``[arms]``: a share 1 - gamma by weight, a share gamma uniform over the arms."""
        return (1.0 - self._gamma) * self._log_weights.softmax(0) + self._gamma / len(self.arms)

    def arm(self, step: int) -> int:
        """Return the arm of ``step``, a pure function of the seed, the step and the weights."""
        rng = torch.Generator().manual_seed(seed_of(self._seed, step, "bandit"))
        return int(torch.multinomial(self.probabilities(), 1, generator=rng))

    def start(self, divergence: float) -> None:
        """Set the probe's divergence before the first update."""
        self._last.fill_(divergence)

    def reward(self, step: int, divergence: float) -> float:
        """Update the arm of ``step`` with the probe's divergence after its update; return the reward."""
        arm = self.arm(step)
        before = self._last[arm].item()
        gained = min(1.0, max(0.0, (before - divergence) / before)) if before > 0 else 0.0
        rate = self._gamma * gained / (self.probabilities()[arm] * len(self.arms))
        self._log_weights[arm] += rate
        self._log_weights -= self._log_weights.max().item()  # only differences matter
        self._last[arm] = divergence
        return gained

    def state_dict(self) -> State:
        return {"log_weights": self._log_weights.clone(), "last": self._last.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._log_weights, self._last = state["log_weights"].clone(), state["last"].clone()


class Selector:
    """Metric, policy, their schedule and their state, as configured under ``positions``.

    Raises ConfigError for a user's metric, policy or weighting that cannot be imported or does not fit.
    """

    def __init__(self, settings: PositionSettings, seed: int, special_ids: Sequence[int] = ()) -> None:
        """Find metric, policy and weighting; ``special_ids``: the special tokens for ``positions.mask_tokens``."""
        self._settings = settings
        self._policy = plugins.find(settings.policy, POLICIES, "positions.policy")
        self._metric = plugins.find(settings.metric, METRICS, "positions.metric")
        self._weighting = plugins.find(settings.weighting, WEIGHTINGS, "positions.weighting")
        masked = [special_ids if token == "special" else [token] for token in settings.mask_tokens]
        self._masked_ids = sorted({i for ids in masked for i in ids})
        if settings.policy == "gls" and self._metric in RANGES:
            raise ConfigError(
                f"positions.metric={settings.metric}, positions.policy=gls: scores scaled within each batch cannot be "
                "compared with earlier batches; accepted: top_k"
            )
        self._queue = ScoreQueue(settings.queue) if settings.policy == "gls" else None
        self.bandit = Bandit(settings.arms, settings.bandit_gamma, seed) if settings.policy == "bandit" else None

    def metric(self, step: int) -> str:
        """Return the name of the metric at ``step``."""
        return self.bandit.arms[self.bandit.arm(step)] if self.bandit else self._settings.metric

    def ranges(self, step: int) -> tuple[str, ...]:
        """Return the signals whose ranges over the whole optimizer batch the scores of ``step`` depend on."""
        return RANGES.get(self._metric_of(step), ())

    def k(self, step: int) -> float:
        """Return the share of positions to select at ``step``."""
        return scheduled_k(self._settings, step)

    def eligible(self, signals: Signals) -> Tensor | None:
        """Return a mask ``[N]`` of the positions that may be selected; None if all may."""
        if not self._masked_ids:
            return None
        return ~torch.isin(signals.targets_N, torch.tensor(self._masked_ids, device=signals.targets_N.device))

    def select(self, signals: Signals, step: int) -> tuple[Tensor, Selection]:
        """Return the scores ``[N]``, NaN where a token is masked, and the positions selected by them."""
        eligible_N = self.eligible(signals)
        if self._settings.policy == "full":  # needs no scores, which may cost a pass over the LM head
            scores_N = torch.zeros(sum(signals.counts), device=signals.device)
        else:
            scores_N = self._metric_of(step)(signals)
        selection = self._apply(self._policy, scores_N, eligible_N, signals, step)
        if eligible_N is not None:
            scores_N = scores_N.masked_fill(~eligible_N, math.nan)
        if self._weighting:
            factors_N = normalized(self._weighting(signals, self._settings), signals.counts, eligible_N)
            weights_K = selection.weights_K * factors_N[selection.indices_K]
            selection = dataclasses.replace(selection, weights_K=weights_K)
        return scores_N, selection

    def preselect(self, signals: Signals, step: int, recorded: bool) -> Selection | None:
        """Return a selection of the positions that ``select`` will select, or None if they depend on the models.

        ``recorded``: the engines recorded the entropies of ``signals``.  The weights may differ from those of
        ``select``.  User functions are not called, because they may cost time or count their calls.
        """
        eligible_N = self.eligible(signals)
        if self._selects_all(step):
            scores_N = torch.zeros(sum(signals.counts), device=signals.device)
            return self._apply(full, scores_N, eligible_N, signals, step)
        metric = self._metric_of(step)
        known = metric in MODEL_FREE or (recorded and metric in FROM_RECORDS)
        if not known or self._settings.policy not in POLICIES:
            return None
        return self._apply(self._policy, metric(signals), eligible_N, signals, step)

    def reads_teacher_rows(self, step: int) -> bool:
        """Return True if the scores of ``step`` read the teacher's hidden rows at all eligible positions."""
        return self._settings.policy != "full" and self._metric_of(step) in FROM_TEACHER_ROWS

    def _selects_all(self, step: int) -> bool:
        policy = self._settings.policy
        return policy in SELECT_ALL or (self.k(step) == 1.0 and policy in SELECT_SHARE)

    def _apply(
        self, policy: Policy, scores_N: Tensor, eligible_N: Tensor | None, signals: Signals, step: int
    ) -> Selection:
        """Return what ``policy`` selects among the eligible positions, as indices into all N."""
        k, counts = self.k(step), signals.counts
        threshold = self._queue.threshold(k) if self._queue else None
        context = Context(k, step, signals.seeds, threshold, self._settings)
        if eligible_N is None:
            return policy(scores_N, counts, context)
        kept = eligible_N.nonzero()[:, 0]
        rest = [int(mask.sum()) for mask in eligible_N.split(list(counts))]
        selection = policy(scores_N[kept], rest, context)
        return dataclasses.replace(selection, indices_K=kept[selection.indices_K])

    def _metric_of(self, step: int) -> Metric:
        return METRICS[self.metric(step)] if self.bandit else self._metric

    def observe(self, scores_N: Tensor) -> None:
        """Record the scores of an optimizer batch, in the order of its trajectories; call once per step."""
        if self._queue:
            self._queue.push(scores_N[~scores_N.isnan()])  # masked tokens have NaN

    def state_dict(self) -> State:
        stateful = self._queue or self.bandit
        return stateful.state_dict() if stateful else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        stateful = self._queue or self.bandit
        if stateful:
            stateful.load_state_dict(state)
