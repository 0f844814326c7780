"""The loss at the selected positions: the divergence in its variants, and terms added to it.

Variants (docs/method.md, section 7): ``full_kd``; ``decoupled_kd``; ``at_kd``, decoupled KD whose weights depend on the
teacher's certainty; ``egad``, a temperature per token and a feature term where the teacher is uncertain.  Any of them
may add a divergence to a moving average of the student (``alignment.ema_weight``) and a reverse KL to the initial
student (``alignment.reference_weight``).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.learner.forward import Forward
from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import HiddenRows, Rows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import RowStatistics
from onpolicy_skd.models.lora import merged_parameters
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.selection.positions import Selection, num_selected
from onpolicy_skd.teacher.teacher import Teacher, TeacherRows
from onpolicy_skd.types import Trajectory, seed_of

TEACHER = "teacher/"  # prefix of a moving teacher's parameters in the state dict
HARD_SHARE = 0.5  # share of a batch's positions that are hard for at_kd (arXiv 2402.11890, section 4)


class Objective:
    """Losses of micro-batches.  The student must be in eval mode, because its moving average starts as a copy.

    ``reference``: the initial student, needed if ``alignment.reference_weight`` is above 0.
    """

    def __init__(
        self,
        settings: Settings,
        student: SplitModel,
        teacher: TeacherRows,
        forward: Forward,
        reference: SplitModel | None = None,
    ) -> None:
        cfg = self._cfg = settings.alignment
        self._classes = settings.classes
        self._student = student
        self._forward = forward
        self._hard: dict[str, Tensor] = {}  # at_kd: mask of the hard positions of each trajectory in the batch
        self._projection: torch.nn.Parameter | None = None
        if cfg.variant == "egad" and cfg.feature_weight:
            self._projection = _projection(student.head_VH, teacher.head().shape[1], settings.run.seed)
        self._average: SplitModel | None = None
        if cfg.ema_weight:
            self._average = frozen_copy(student)
        self._reference = reference
        self._moving_teacher: SplitModel | None = None
        if settings.teacher.ema_decay is not None and isinstance(teacher, Teacher):
            self._moving_teacher, self._teacher_decay = teacher.model, settings.teacher.ema_decay

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters that are not the student's."""
        return {} if self._projection is None else {"objective.projection": self._projection}

    def prepare(self, trajectories: Sequence[Trajectory], teacher: TeacherRows) -> None:
        """Prepare for the micro-batches of ``trajectories``: at_kd ranks all their positions."""
        if self._cfg.variant == "at_kd":
            _, logprob_N = teacher.entropy_and_logprob([t.key for t in trajectories])
            hard_N = hardest(1.0 - logprob_N.exp(), HARD_SHARE)
            masks = hard_N.split([len(t.target_ids) for t in trajectories])
            self._hard = {t.key: mask for t, mask in zip(trajectories, masks, strict=True)}

    def loss(self, micro: MicroBatch, selection: Selection, weights_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over selected positions of weight * loss, and the divergence of each ``[K]``, nats."""
        indices_K = selection.indices_K
        hidden_KH, targets_K = micro.hidden_NH[indices_K], micro.batch.targets[indices_K]
        rows = Rows(weights_K, targets_K, self._temperatures(micro, indices_K), self._decoupled(micro, indices_K))
        teacher = self._teacher(micro, selection)
        plain = rows.temperature_N is None and micro.alignment.temperature == 1.0
        stats = RowStatistics.empty(len(indices_K), indices_K.device) if plain else None
        loss, values_K = distillation_loss(hidden_KH, micro.head, teacher, rows, micro.alignment, stats)
        if stats:
            micro.loss_statistics = (indices_K, stats)
        if self._projection is not None and isinstance(teacher, HiddenRows):
            uncertain = self._share_of_entropy(micro, indices_K) >= self._cfg.feature_entropy
            distance = hidden_KH.float() @ self._projection.T - teacher.hidden_NG.float()
            loss = loss + self._cfg.feature_weight * torch.dot(weights_K * uncertain, distance.square().mean(-1))
        plain_rows = Rows(weights_K, targets_K)
        if self._average is not None:
            exact = micro.alignment.exact(self._cfg.divergence)
            average = self._rows_of(self._average, micro, indices_K)
            added, _ = distillation_loss(hidden_KH, micro.head, average, plain_rows, exact)
            loss = loss + self._cfg.ema_weight * added
        if self._reference is not None:
            reverse = micro.alignment.exact("reverse_kl")
            initial = self._rows_of(self._reference, micro, indices_K)
            added, micro.reference_kl_K = distillation_loss(hidden_KH, micro.head, initial, plain_rows, reverse)
            loss = loss + self._cfg.reference_weight * added
        return loss, values_K

    @torch.no_grad()
    def _rows_of(self, model: SplitModel, micro: MicroBatch, indices_K: Tensor) -> HiddenRows:
        """Return the distributions of another model at the selected positions of a micro-batch."""
        return HiddenRows(self._forward.hidden(model, micro.batch)[indices_K], model.head)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the moving averages with the student's new weights, and drop the state of the batch."""
        self._hard = {}
        if self._moving_teacher is not None:
            means = dict(self._moving_teacher.model.named_parameters())
            for name, merged in merged_parameters(self._student.model, lambda tensor: tensor):
                means[name].lerp_(merged(), 1.0 - self._teacher_decay)
        if self._average is not None:
            for mean, new in zip(self._average.model.parameters(), self._student.model.parameters(), strict=True):
                mean.lerp_(new, 1.0 - self._cfg.ema_decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moving averages; ``parameters`` are saved separately."""
        averages = {"": self._average, TEACHER: self._moving_teacher}
        return {prefix + n: p for prefix, model in averages.items() if model for n, p in model.model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, mean in self.state_dict().items():
            mean.copy_(state[name])

    def _teacher(self, micro: MicroBatch, selection: Selection) -> HiddenRows | SparseTargets:
        return micro.rows(selection) if self._classes.sampler == "none" else micro.classes(selection, self._classes)

    def _temperatures(self, micro: MicroBatch, indices_K: Tensor) -> Tensor | None:
        if self._cfg.variant != "egad":
            return None
        low, high = self._cfg.min_temperature, self._cfg.max_temperature
        return high - (high - low) * self._share_of_entropy(micro, indices_K)

    def _share_of_entropy(self, micro: MicroBatch, indices_K: Tensor) -> Tensor:
        """Return H(p_t) / log V, in [0, 1]."""
        return (micro.entropy_and_logprob[0][indices_K] / math.log(self._student.vocabulary)).clamp(0.0, 1.0)

    def _decoupled(self, micro: MicroBatch, indices_K: Tensor) -> Tensor | None:
        cfg, device = self._cfg, indices_K.device
        if cfg.variant == "decoupled_kd":
            return torch.tensor([cfg.target_weight, cfg.other_weight], device=device).expand(len(indices_K), 2)
        if cfg.variant != "at_kd":
            return None
        hard = torch.cat([self._hard[key] for key in micro.keys]).to(device)[indices_K]
        easy_pair = torch.tensor([0.0, cfg.easy_weight], device=device)
        return torch.where(hard[:, None], 1.0 - cfg.easy_weight, easy_pair)


def frozen_copy(student: SplitModel) -> SplitModel:
    """Return a frozen copy of ``student``, which must not be sharded."""
    return dataclasses.replace(
        student, model=copy.deepcopy(student.model).requires_grad_(False), takes_embeddings=True, checkpointed=()
    )


def hardest(uncertainty_N: Tensor, share: float) -> Tensor:
    """Return a mask of the ceil(share * N) largest of ``uncertainty_N``; ties go to the earlier one."""
    hard_N = torch.zeros(len(uncertainty_N), dtype=torch.bool, device=uncertainty_N.device)
    hard_N[uncertainty_N.argsort(descending=True, stable=True)[: num_selected(share, len(uncertainty_N))]] = True
    return hard_N


def _projection(head_VH: Tensor, teacher_hidden: int, seed: int) -> torch.nn.Parameter:
    """Return a random float32 matrix ``[G, H]`` that keeps the length of a vector in expectation."""
    hidden = head_VH.shape[1]
    rng = torch.Generator().manual_seed(seed_of(seed, "projection"))
    weight = torch.randn(teacher_hidden, hidden, generator=rng) / math.sqrt(hidden)
    return torch.nn.Parameter(weight.to(head_VH.device))
