"""What is minimised at the selected positions: the divergence in its variants, and what is added to it.

Variants (docs/method.md, section 7): ``full_kd``; ``decoupled_kd``; ``at_kd``, decoupled KD whose weights depend on how
sure the teacher is; ``egad``, a temperature for every token and, where the teacher is unsure, a feature term.  Any of
them may add a divergence to a moving average of the student (``alignment.ema_weight``).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.batch import Batch
from onpolicy_skd.models.lm_head import RowStatistics
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.selection.positions import Selection, num_selected
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.types import Trajectory, seed_of

HARD_SHARE = 0.5  # of a batch's positions are hard for at_kd (arXiv 2402.11890, section 4)
Forward = Callable[[SplitModel, Batch], Tensor]  # last hidden states [N, H] at the eligible positions


class Objective:
    """Losses of micro-batches.  ``forward`` runs a model as the learner runs its student."""

    def __init__(self, settings: Settings, student: SplitModel, teacher: TeacherRows, forward: Forward) -> None:
        own = settings.alignment
        self.alignment = Alignment(
            own.divergence, own.beta, own.temperature, own.kd_weight, own.chunk_rows, own.estimator, own.top_k,
            own.compiled,
        )  # fmt: skip
        self._own = own
        self._classes = settings.classes
        self._student = student
        self._forward = forward
        self._hard: dict[str, Tensor] = {}  # at_kd: which positions of each trajectory of the batch are hard
        self._projection: torch.nn.Parameter | None = None
        if own.variant == "egad" and own.feature_weight:
            self._projection = _projection(student.head_VH, teacher.head().shape[1], settings.run.seed)
        self._average: SplitModel | None = None
        if own.ema_weight:
            self._average = SplitModel(copy.deepcopy(student.model).requires_grad_(False), student.vocabulary)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained besides the student."""
        return {} if self._projection is None else {"objective.projection": self._projection}

    def survey(self, trajectories: Sequence[Trajectory], teacher: TeacherRows) -> None:
        """Looks at the whole optimizer batch before its micro-batches: at_kd ranks all its positions."""
        if self._own.variant == "at_kd":
            _, logprob_N = teacher.entropy_and_logprob([t.key for t in trajectories])
            hard_N = hardest(1.0 - logprob_N.exp(), HARD_SHARE)
            parts = hard_N.split([len(t.response_ids) for t in trajectories])
            self._hard = {t.key: part for t, part in zip(trajectories, parts, strict=True)}

    def loss(self, micro: MicroBatch, chosen: Selection, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over chosen positions of weight * loss, and the divergence of each ``[K]``, nats."""
        at = chosen.indices_K
        hidden_KH, targets_K = micro.hidden_NH[at], micro.batch.targets[at]
        rows = Rows(weights_K, targets_K, self._temperatures(micro, at), self._decoupled(micro, at))
        teacher = self._teacher(micro, chosen)
        plain = rows.temperature_N is None and self.alignment.temperature == 1.0
        observed = RowStatistics.empty(len(at), at.device) if plain else None
        loss, values_K = distillation_loss(hidden_KH, micro.head_VH, teacher, rows, self.alignment, observed)
        if observed:
            micro.observed = (at, observed)
        if self._projection is not None and isinstance(teacher, HiddenRows):
            unsure = self._share_of_entropy(micro, at) >= self._own.feature_entropy
            distance = hidden_KH.float() @ self._projection.T - teacher.hidden_NG.float()
            loss = loss + self._own.feature_weight * torch.dot(weights_K * unsure, distance.square().mean(-1))
        if self._average is not None:
            with torch.no_grad():
                average = HiddenRows(self._forward(self._average, micro.batch)[at], self._average.head_VH)
            exact = dataclasses.replace(self.alignment, kd_weight=1.0, estimator="exact")
            added, _ = distillation_loss(hidden_KH, micro.head_VH, average, Rows(weights_K, targets_K), exact)
            loss = loss + self._own.ema_weight * added
        return loss, values_K

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the average of the student towards its new weights."""
        if self._average is not None:
            for mean, new in zip(self._average.model.parameters(), self._student.model.parameters(), strict=True):
                mean.lerp_(new, 1.0 - self._own.ema_decay)

    def state_dict(self) -> dict[str, Tensor]:
        """What ``parameters`` does not hold."""
        return {} if self._average is None else dict(self._average.model.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._average is not None:
            for name, mean in self._average.model.named_parameters():
                mean.copy_(state[name])

    def _teacher(self, micro: MicroBatch, chosen: Selection) -> HiddenRows | SparseTargets:
        if self._classes.sampler == "none":
            return micro.rows(chosen)
        seeds = [seed_of(seed, "classes") for seed in micro.seeds]
        return micro.teacher.classes(micro.wanted(chosen), seeds, self._classes).to(micro.hidden_NH.device)

    def _temperatures(self, micro: MicroBatch, at: Tensor) -> Tensor | None:
        if self._own.variant != "egad":
            return None
        low, high = self._own.min_temperature, self._own.max_temperature
        return high - (high - low) * self._share_of_entropy(micro, at)

    def _share_of_entropy(self, micro: MicroBatch, at: Tensor) -> Tensor:
        """H(p_t) / log V, in [0, 1]."""
        return (micro.entropy_and_logprob[0][at] / math.log(self._student.vocabulary)).clamp(0.0, 1.0)

    def _decoupled(self, micro: MicroBatch, at: Tensor) -> Tensor | None:
        own = self._own
        if own.variant == "decoupled_kd":
            return torch.tensor([own.target_weight, own.other_weight], device=at.device).expand(len(at), 2)
        if own.variant != "at_kd":
            return None
        hard = torch.cat([self._hard[key] for key in micro.keys]).to(at.device)[at]
        easy_pair = torch.tensor([0.0, own.easy_weight], device=at.device)
        return torch.where(hard[:, None], 1.0 - own.easy_weight, easy_pair)


def hardest(uncertainty_N: Tensor, share: float) -> Tensor:
    """Marks the ceil(share * N) largest of ``uncertainty_N``; ties go to the earlier one."""
    hard_N = torch.zeros(len(uncertainty_N), dtype=torch.bool, device=uncertainty_N.device)
    hard_N[uncertainty_N.argsort(descending=True, stable=True)[: num_selected(share, len(uncertainty_N))]] = True
    return hard_N


def _projection(head_VH: Tensor, teacher_hidden: int, seed: int) -> torch.nn.Parameter:
    """``[G, H]``, float32: keeps the length of a vector in expectation."""
    hidden = head_VH.shape[1]
    draw = torch.Generator().manual_seed(seed_of(seed, "projection"))
    return torch.nn.Parameter(
        (torch.randn(teacher_hidden, hidden, generator=draw) / math.sqrt(hidden)).to(head_VH.device)
    )
