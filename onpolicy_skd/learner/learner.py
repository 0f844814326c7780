"""The learner: one optimizer step from trajectories and a teacher's hidden rows, without Ray.

A step is, per micro-batch: backbone forward -> entropy by chunks, without gradient -> positions per sequence ->
teacher rows for these only -> divergence by chunks -> backward.  Then clip and step on float32 weights.  If the
positions do not depend on the forward, the rows are requested from a teacher in another process before the forward.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.ranks import Ranks, full_scalar
from onpolicy_skd.evaluation.diagnostics import repetition
from onpolicy_skd.learner.forward import Forward
from onpolicy_skd.learner.metrics import StepRecord, StepSums
from onpolicy_skd.learner.micro_batch import MicroBatch
from onpolicy_skd.learner.objective import Objective, frozen_copy
from onpolicy_skd.learner.optimizer import build_optimizer, learning_rate
from onpolicy_skd.learner.precision import UpdateSums, precision_warning, sampled_weights, update_sums
from onpolicy_skd.learner.prefetch import Prefetcher
from onpolicy_skd.learner.probe import PROBE_SAMPLES, Probe
from onpolicy_skd.learner.scoring import Scorer
from onpolicy_skd.learner.state import LearnerState
from onpolicy_skd.models.compilation import compile_layers
from onpolicy_skd.models.lm_head import reserve
from onpolicy_skd.models.split_model import SplitModel, checkpoint_activations
from onpolicy_skd.selection.metrics import Ranges
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.tracing import Spans
from onpolicy_skd.types import Trajectory, check_version

BYTES_TO_COME = {"adamw": 12, "adamw_8bit": 6}  # per trained weight, allocated in the first step: gradient, two moments
ENDINGS = 4  # responses per measurement of the teacher's probability of the last token
ENDINGS_INTERVAL = 4  # steps between these measurements, which score all positions of the responses
SIGNALS_INTERVAL = 8  # steps between measurements of teacher mass and overlap, which need the teacher's rows everywhere


class SamplerGapError(RuntimeError):
    """A mean gap between the sampler's and the learner's log-probabilities that exceeds ``sync.max_gap``."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not finite; nothing was updated.  ``samples``: keys of the samples that caused it."""

    def __init__(self, message: str, samples: Sequence[str]) -> None:
        super().__init__(message, samples)
        self.message, self.samples = message, list(samples)

    def __str__(self) -> str:
        return self.message


class GradientOverflowError(NonFiniteLossError):
    """A float16 gradient that overflowed; nothing was updated, and the loss scale was halved."""


@dataclass
class _OpenStep:
    """A step that has begun and not yet ended; ``weight``: the expected sum of its samples' weights."""

    weight: float
    trajectories: list[Trajectory] = field(default_factory=list)
    local_trajectories: list[Trajectory] = field(default_factory=list)
    sums: StepSums = field(default_factory=StepSums)
    seconds: float = 0.0


class Learner:
    """Trainer of ``student`` towards ``teacher``; ``scorer`` computes scores, ``state`` has checkpoints and weights.

    Trainable parameters must be float32: they are the masters that the optimizer updates; forwards run in
    ``learner.compute_dtype``.  With several ``ranks`` each has a Learner; every method must be called on all of them,
    with the same arguments, and returns the same result.  ``special_ids``: ids of the tokenizer's special tokens, for
    ``positions.mask_tokens``.  Raises ValueError for trainable parameters that are not float32.
    """

    def __init__(
        self,
        student: SplitModel,
        teacher: TeacherRows,
        settings: Settings,
        pad_id: int,
        steps: int,
        ranks: Ranks | None = None,
        special_ids: Sequence[int] = (),
    ) -> None:
        ranks = ranks or Ranks()
        self._teacher = teacher
        self._settings = settings
        self._steps = steps
        student.model.eval()  # the distribution that is trained must be the one that was sampled from
        reference = frozen_copy(student) if settings.alignment.reference_weight else None  # each rank holds all of it
        if settings.learner.compile:
            compile_layers(student.model)  # before sharding, as torch recommends
        student = ranks.shard(student, settings.learner.compute_dtype)
        if reference:
            reference.model.to(student.device)
        if settings.student.activation_checkpointing:
            student = dataclasses.replace(student, checkpointed=checkpoint_activations(student.model))
        self.spans = Spans()
        self._forward = Forward(student, teacher, settings, pad_id, ranks, self.spans)
        objective = Objective(settings, student, teacher, self._forward, reference)
        named = {n: p for n, p in student.model.named_parameters() if p.requires_grad} | objective.parameters
        for name, parameter in named.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"student parameter {name} is {parameter.dtype}; masters must be float32")
        local = [p.to_local() if isinstance(p, DTensor) else p for p in named.values()]
        reserve(student.device, BYTES_TO_COME[settings.learner.optimizer] * sum(p.numel() for p in local))
        selector = Selector(settings.positions, settings.run.seed, special_ids)
        optimizer = build_optimizer(named, settings.learner)
        self.state = LearnerState(student, named, optimizer, selector, objective, ranks, self._forward.dtype)
        self.scorer = Scorer(self.state, self._forward, teacher, settings)
        self._open: _OpenStep | None = None

    @property
    def version(self) -> int:
        """Optimizer steps done."""
        return self.state.version

    @property
    def student(self) -> SplitModel:
        return self.state.student

    def local_trajectories(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Return the trajectories that this rank works on; a teacher in its process must have encoded them."""
        return self.state.ranks.local(trajectories)

    def step(self, trajectories: Sequence[Trajectory]) -> StepRecord:
        """Make one optimizer step on ``trajectories``, which the teacher must have encoded; return its metrics.

        Raises, with nothing updated, NonFiniteLossError for a loss or gradient that is not finite
        (GradientOverflowError if a smaller loss scale may help), SamplerGapError if sampler and learner disagree by
        more than ``sync.max_gap``, and RuntimeError for trajectories of another policy version.
        """
        self.begin_step(sum(t.weight for t in trajectories))
        self.add_trajectories(trajectories)
        return self.end_step()

    def begin_step(self, weight: float) -> None:
        """Begin a step whose trajectories are added in batches; ``weight``: the expected sum of their weights."""
        self._open = _OpenStep(weight)
        in_timeline = self.version == self._settings.run.timeline and self.student.device.type == "cuda"
        self.spans.wait = torch.cuda.synchronize if in_timeline else None
        self.state.optimizer.zero_grad(set_to_none=True)

    def add_trajectories(self, trajectories: Sequence[Trajectory]) -> None:
        """Accumulate the gradient of a batch of the step that has begun; raise what ``step`` raises."""
        start, opened = time.perf_counter(), self._opened()
        check_version(trajectories, self.version, self._settings.pipeline.max_staleness)
        opened.sums = StepSums.merge([opened.sums, self.accumulate(trajectories, opened.weight)])
        opened.trajectories += trajectories
        opened.local_trajectories += self.local_trajectories(trajectories)
        opened.seconds += time.perf_counter() - start

    def end_step(self) -> StepRecord:
        """Update the weights after all trajectories of the step have been added; return and raise as ``step`` does."""
        start, opened, self._open = time.perf_counter(), self._opened(), None  # nothing of the batch outlives the step
        state, trajectories, sums = self.state, opened.trajectories, opened.sums
        self._rescale(sums, opened.weight / sum(t.weight for t in trajectories))  # some may have been dropped
        norm = full_scalar(torch.nn.utils.clip_grad_norm_(state.named.values(), self._settings.learner.clip))
        self._check_finite(sums, norm, trajectories)
        record = sums.record(state.selector.k(self.version))
        if self._settings.alignment.reference_weight:
            record.reference_kl = sums.reference_kl / max(1, sums.selected)
        self._check_gap(record)
        self._add_response_metrics(record, trajectories, opened.local_trajectories)
        record.grad_norm, record.lr = norm, learning_rate(self._settings.learner, self.version, self._steps)
        for group in state.optimizer.param_groups:
            group["lr"] = record.lr
        self._start_bandit(trajectories)
        before = sampled_weights(state.named)
        with self.spans("optimizer"):
            state.optimizer.step()
        self._add_precision_metrics(record, before)
        state.version += 1
        state.optimizer.zero_grad(set_to_none=True)
        state.objective.after_step()
        state.selector.observe(torch.cat([sums.scores[t.key] for t in trajectories]))
        self._reward_bandit(record)
        record.version = self.version
        record.learner_seconds = opened.seconds + time.perf_counter() - start
        return record

    def accumulate(self, trajectories: Sequence[Trajectory], weight: float | None = None) -> StepSums:
        """Add the gradient of the batch's objective to the parameters; return the sums over all ranks.

        The objective is the (weighted) mean over ``trajectories`` of the weighted mean over each one's selected
        positions (Eqs. 3-5 of the SE-KD paper), so the gradient does not depend on the micro-batches.  ``weight``:
        sum of the weights of all trajectories of the step, if these are only some of them.
        """
        sums = StepSums()
        ranges = self.scorer.ranges(trajectories)
        start = time.perf_counter()
        self.state.objective.prepare(trajectories, self._teacher)
        sums.teacher_wait_seconds += time.perf_counter() - start
        total = weight or sum(t.weight for t in trajectories)
        prefetcher = self._prefetcher(trajectories)
        prefetcher.request_next()
        for _, micro in self._forward.micro_batches(trajectories, self.version):
            self._backward(micro, ranges, total, sums, prefetcher)
            del micro
        by_rank = self.state.ranks.gather(sums)
        merged = StepSums.merge(by_rank)
        merged.teacher_wait_seconds /= len(by_rank)  # ranks wait at the same time
        return merged

    def _prefetcher(self, trajectories: Sequence[Trajectory]) -> Prefetcher:
        selector = self.state.selector
        all_rows = self._measures_signals or selector.reads_teacher_rows(self.version)
        members = self._forward.members(trajectories)
        return Prefetcher(members, self._teacher, selector, self._settings, self.version, all_rows)

    @property
    def _measures_signals(self) -> bool:
        """True if the open step measures teacher mass and overlap."""
        return self.version % SIGNALS_INTERVAL == 0 and self._settings.classes.sampler == "none"

    def _backward(
        self, micro: MicroBatch, ranges: Ranges | None, total: float, sums: StepSums, prefetcher: Prefetcher
    ) -> None:
        """Select positions, compute the loss and add its gradient; ``total``: sum of all samples' weights."""
        scores_N, selection = micro.select_positions(self.state.selector, self.version, ranges)
        if self._measures_signals:
            sums.add_teacher_signals(micro)
        shares = torch.tensor([t.weight / total for t in micro.members])
        shares_K = shares.repeat_interleave(torch.tensor(selection.counts)).to(selection.weights_K.device)
        with self.spans("loss"):
            weights_K = selection.weights_K * (shares_K * self.state.loss_scale.value)  # factors of every gradient
            loss, values_K = self.state.objective.loss(micro, selection, weights_K)
        sums.add_student_statistics(micro, selection, self.version)  # before backward reshards the head
        prefetcher.request_next()
        with self.spans("backward"):
            loss.backward()
            if micro.embedded_BLH is not None:
                self.student.add_embedding_gradient(micro.batch, micro.embedded_BLH)
        finite = torch.isfinite(values_K).cpu().split(selection.counts)
        sums.non_finite += [key for key, finite_k in zip(micro.keys, finite, strict=True) if not finite_k.all()]
        sums.scores |= dict(zip(micro.keys, micro.split(scores_N.detach()), strict=True))
        if micro.reference_kl_K is not None:
            sums.reference_kl += float(micro.reference_kl_K.sum())
        sums.loss += loss.item() / self.state.loss_scale.value
        divergence, teacher = float(values_K.sum()), micro.members[0].teacher
        sums.divergence += divergence
        if teacher is not None:
            sums.add_to_teacher(teacher, divergence, len(values_K))
        sums.tokens += sum(t.length for t in micro.members)
        sums.padded_tokens += micro.batch.input_ids.numel()
        sums.positions += len(scores_N)
        sums.selected += len(values_K)
        sums.samples += len(micro.members)
        sums.teacher_wait_seconds += micro.teacher_wait_seconds

    def _opened(self) -> _OpenStep:
        if self._open is None:
            raise RuntimeError("no step has begun")
        return self._open

    def _rescale(self, sums: StepSums, factor: float) -> None:
        """Scale loss and gradients from the expected to the actual sum of weights; undo the loss scale."""
        sums.loss *= factor
        factor /= self.state.loss_scale.value
        if factor == 1.0:
            return
        for parameter in self.state.named.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _start_bandit(self, trajectories: Sequence[Trajectory]) -> None:
        state, bandit = self.state, self.state.selector.bandit
        if bandit and state.probe is None:
            state.probe = Probe.of(trajectories[:PROBE_SAMPLES], self._teacher)
            bandit.start(self.scorer.divergence(state.probe.trajectories, state.probe.rows))

    def _reward_bandit(self, record: StepRecord) -> None:
        state, bandit, step = self.state, self.state.selector.bandit, self.version - 1
        if bandit and state.probe:
            record.arm = bandit.arm(step)
            record.probe_divergence = self.scorer.divergence(state.probe.trajectories, state.probe.rows)
            record.reward = bandit.reward(step, record.probe_divergence)

    @torch.no_grad()
    def _add_response_metrics(
        self, record: StepRecord, trajectories: Sequence[Trajectory], local: Sequence[Trajectory]
    ) -> None:
        """Add the health metrics of the student's rollouts; this rank's teacher must have encoded ``local``."""
        student = [t for t in trajectories if t.policy_version is not None]
        if not student:
            return
        record.repetition = sum(repetition(t.response_ids) for t in student) / len(student)
        if self._settings.rollout.stop:  # a response may end without an end-of-sequence token
            return
        ended = {t.key for t in [t for t in student if t.finish_reason == "stop"][:ENDINGS]}
        if ended and self.version % ENDINGS_INTERVAL == 0:
            local_ended = [t for t in local if t.key in ended]
            endings = self.state.ranks.gather(self._ending_probabilities(local_ended))
            record.teacher_ending = sum(map(sum, endings)) / len(ended)

    def _ending_probabilities(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Return the teacher's probability of the last target of each trajectory."""
        if not trajectories:
            return []
        last_B = torch.tensor([len(t.target_ids) for t in trajectories]).cumsum(0) - 1
        _, logprob_N = self._teacher.entropy_and_logprob([t.key for t in trajectories])
        return logprob_N.cpu()[last_B].exp().tolist()

    def _check_finite(self, sums: StepSums, norm: float, trajectories: Sequence[Trajectory]) -> None:
        if math.isfinite(sums.loss) and math.isfinite(norm) and not sums.non_finite:
            return
        self.state.optimizer.zero_grad(set_to_none=True)
        samples, scale = sums.non_finite or [t.key for t in trajectories], self.state.loss_scale
        if math.isfinite(sums.loss) and not sums.non_finite and scale.can_halve():
            scale.overflowed()
            raise GradientOverflowError(f"the gradient overflowed; the loss scale is {scale.value:g} from now on", [])
        shown = ", ".join(samples[:3]) + (", ..." if len(samples) > 3 else "")
        raise NonFiniteLossError(
            f"loss {sums.loss:g}, gradient norm {norm:g}, from {len(samples)} samples ({shown})", samples
        )

    def _add_precision_metrics(self, record: StepRecord, before: Tensor) -> None:
        """Record how much of the update the compute dtype keeps; ``before``: ``sampled_weights`` before the update."""
        state = self.state
        shares = state.ranks.gather(update_sums(before, sampled_weights(state.named), state.dtype))
        sums = UpdateSums(*map(sum, zip(*shares, strict=True)))
        record.update_changed = sums.changed / sums.weights
        record.update_visible = sums.visible / sums.intended if sums.intended else None
        if state.loss_scale.active:
            record.loss_scale, record.overflows = state.loss_scale.value, state.loss_scale.overflows
        state.loss_scale.stepped()

    def precision_warning(self) -> str | None:
        """Return a warning if the compute dtype rounds away updates as small as ``learner.lr``."""
        return precision_warning(sampled_weights(self.state.named), self._settings.learner.lr, self.state.dtype)

    def _check_gap(self, record: StepRecord) -> None:
        bound, gap = self._settings.sync.max_gap, record.sampler_gap
        if gap is not None and not gap <= bound:
            raise SamplerGapError(
                f"the sampler's log-probabilities differ from the learner's by {gap:.4g} nats on average (at most "
                f"{record.sampler_gap_max:.4g}), sync.max_gap={bound}: the rollout engine does not hold the weights of "
                f"policy version {self.version}, or computes in a much coarser type. Check rollout.dtype and "
                "sync.method; raise sync.max_gap only if the difference is understood (in a mixture of experts engine "
                "and learner may choose different experts for a token)"
            )
