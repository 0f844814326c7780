"""The position axis over a run: which metric, which policy, and what they remember from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config import plugins
from onpolicy_skd.config.schema import PositionSettings
from onpolicy_skd.selection import metrics
from onpolicy_skd.selection.metrics import METRICS, Signals
from onpolicy_skd.selection.positions import POLICIES, Context, Selection, scheduled_k
from onpolicy_skd.types import seed_of

State = dict[str, Tensor]


class ScoreQueue:
    """The last ``size`` scores of the training stream, first in, first out (GLS; Wang et al., 2021)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores = torch.empty(0)

    def threshold(self, k: float) -> float | None:
        """The (1 - k) quantile; None before the first batch."""
        if not len(self._scores):
            return None
        rank = min(len(self._scores), math.ceil(round(k * len(self._scores), 9)))
        return self._scores.topk(rank).values[-1].item()

    def push(self, scores_N: Tensor) -> None:
        """Appends one optimizer batch."""
        self._scores = torch.cat([self._scores, scores_N.detach().float().cpu()])[-self._size :]

    def state_dict(self) -> State:
        return {"scores": self._scores}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._scores = state["scores"].clone()


class Bandit:
    """EXP3 (Auer et al., 2002) over metrics.  Reward: how much of the probe's divergence is gone since the arm's last
    turn (for its first turn: since the start), in [0, 1]; a rise counts as 0 (EKD).
    """

    def __init__(self, arms: Sequence[str], gamma: float, seed: int) -> None:
        self.arms = tuple(arms)
        self._gamma = gamma
        self._seed = seed
        self._log_weights = torch.zeros(len(arms), dtype=torch.float64)
        self._last = torch.full((len(arms),), math.nan, dtype=torch.float64)  # the probe at each arm's last turn

    def probabilities(self) -> Tensor:
        """float64 ``[arms]``: mostly by weight, a share gamma evenly."""
        return (1.0 - self._gamma) * self._log_weights.softmax(0) + self._gamma / len(self.arms)

    def arm(self, step: int) -> int:
        """A function of the seed, the step and the weights: asked again, it answers the same."""
        generator = torch.Generator().manual_seed(seed_of(self._seed, step, "bandit"))
        return int(torch.multinomial(self.probabilities(), 1, generator=generator))

    def start(self, divergence: float) -> None:
        """The probe's divergence before the first update."""
        self._last.fill_(divergence)

    def reward(self, step: int, divergence: float) -> float:
        """Credits the arm of ``step`` with the probe's divergence after its update; returns the reward."""
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
    """Metric, policy, their schedule and their state, as ``positions`` asks.

    Raises ConfigError for a metric or policy of the user's own that cannot be imported.
    """

    def __init__(self, settings: PositionSettings, seed: int) -> None:
        self._settings = settings
        self._policy = plugins.find(settings.policy, POLICIES, "positions.policy")
        self._metric = plugins.find(settings.metric, METRICS, "positions.metric")
        self._queue = ScoreQueue(settings.queue) if settings.policy == "gls" else None
        self.bandit = Bandit(settings.arms, settings.bandit_gamma, seed) if settings.policy == "bandit" else None

    def metric(self, step: int) -> str:
        """Name of the metric in force."""
        return self.bandit.arms[self.bandit.arm(step)] if self.bandit else self._settings.metric

    def needs_ranges(self, step: int) -> bool:
        """Whether the scores of ``step`` depend on the ranges over the whole optimizer batch."""
        return self.metric(step) in metrics.WHOLE_BATCH

    def k(self, step: int) -> float:
        return scheduled_k(self._settings, step)

    def select(self, signals: Signals, step: int) -> tuple[Tensor, Selection]:
        """Scores ``[N]`` and the selection made of them."""
        k = self.k(step)
        metric = METRICS[self.metric(step)] if self.bandit else self._metric
        threshold = self._queue.threshold(k) if self._queue else None
        everything = self._settings.policy == "full"  # needs no scores, which may cost a pass over the LM head
        scores_N = torch.zeros(sum(signals.counts), device=signals.device) if everything else metric(signals)
        return scores_N, self._policy(
            scores_N, signals.counts, Context(k, step, signals.seeds, threshold, self._settings)
        )

    def observe(self, scores_N: Tensor) -> None:
        """What one optimizer batch scored, in the order of its trajectories; call once a step."""
        if self._queue:
            self._queue.push(scores_N)

    def state_dict(self) -> State:
        memory = self._queue or self.bandit
        return memory.state_dict() if memory else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        memory = self._queue or self.bandit
        if memory:
            memory.load_state_dict(state)
