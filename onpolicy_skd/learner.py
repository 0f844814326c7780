"""The learner: one optimizer step from trajectories, a teacher's hidden rows, and nothing of Ray.

A step is, per micro-batch: trunk forward -> entropy by chunks, without gradient -> positions per sequence ->
teacher rows for these alone -> exact divergence by chunks -> backward.  Then clip and step on float32 weights.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd import checkpoint
from onpolicy_skd.config import LearnerSettings, Settings
from onpolicy_skd.divergence import Alignment, distillation_loss
from onpolicy_skd.lm_head import row_statistics
from onpolicy_skd.models import SplitModel, pick_dtype
from onpolicy_skd.selection import metrics, samples
from onpolicy_skd.selection.positions import select
from onpolicy_skd.teacher import TeacherRows
from onpolicy_skd.trajectory import Batch, FilterReport, Trajectory, check_version, collate, micro_batches, seed_of

log = logging.getLogger(__name__)


class SamplerGapError(RuntimeError):
    """The sampler's log-probabilities are not those of the learner's weights."""


@dataclass
class _Totals:
    """Sums over the micro-batches of a step, from which its metrics are formed."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    gap_max: float = 0.0

    def add(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value)


class Learner:
    """Trains ``student`` towards ``teacher``; ``version`` counts the optimizer steps done.

    The student's parameters must be float32: they are the masters that the optimizer updates; forwards run in
    ``learner.compute_dtype``.
    """

    def __init__(self, student: SplitModel, teacher: TeacherRows, settings: Settings, pad_id: int, steps: int) -> None:
        self.student = student
        self.version = 0
        self._teacher = teacher
        self._settings = settings
        self._pad_id = pad_id
        self._steps = steps
        self._alignment = Alignment(
            settings.alignment.divergence,
            settings.alignment.beta,
            settings.alignment.temperature,
            settings.alignment.kd_weight,
            settings.alignment.chunk_rows,
        )
        self._dtype = pick_dtype(settings.learner.compute_dtype, student.device.type)
        self.named = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
        wrong = next((n for n, p in self.named.items() if p.dtype != torch.float32), None)
        if wrong:
            raise ValueError(f"student parameter {wrong} is {self.named[wrong].dtype}; masters must be float32")
        own = settings.learner
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=[p for p in self.named.values() if p.ndim > 1], weight_decay=own.weight_decay),
                dict(params=[p for p in self.named.values() if p.ndim <= 1], weight_decay=0.0),
            ],
            lr=own.lr,
            betas=(own.beta1, own.beta2),
        )
        _no_dropout(student.model)
        student.model.train(settings.student.activation_checkpointing)
        if settings.student.activation_checkpointing:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- samples ---------------------------------------------------------------------------------------------------

    def filter(self, trajectories: Sequence[Trajectory]) -> FilterReport:
        """Validity, then (``samples.when=rollout``) the top share by the ranking metric; counts what was dropped."""
        own = self._settings.samples
        report = samples.validity(trajectories, self.student.vocabulary, own.truncated == "drop")
        if own.keep < 1.0 and own.when == "rollout" and report.kept:
            by_key = {t.key: t for t in trajectories}
            valid = [by_key[key] for key in report.kept]
            best = samples.top_share(self.rank(valid), own.keep)
            report.dropped["not_selected"] = len(valid) - len(best)
            report.kept = [valid[i].key for i in best]
        return report

    def rank(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Score of each sample under ``samples.metric``: mean entropy over eligible positions (nats), or random."""
        seed = self._settings.run.seed
        if self._settings.samples.metric == "random":
            return [seed_of(seed, self.version, "sample", t.key) / 2**31 for t in trajectories]
        return self.mean_entropy(trajectories)

    @torch.no_grad()
    def divergence(self, trajectories: Sequence[Trajectory]) -> float:
        """Mean divergence per eligible position of encoded ``trajectories``, nats; nothing is selected or trained."""
        total, positions = 0.0, 0
        for group in self._groups(trajectories):
            members = [trajectories[i] for i in group]
            batch = self._collate(members)
            hidden_NH = self._hidden(batch)
            teacher_NG = self._teacher.rows([(t.key, range(len(t.response_ids))) for t in members])
            ones = torch.ones(len(hidden_NH), device=hidden_NH.device)
            _, values_N = distillation_loss(
                hidden_NH,
                self.student.head_VH.detach(),
                teacher_NG.to(hidden_NH.device),
                self._teacher.head(),
                ones,
                batch.targets,
                self._alignment,
            )
            total += values_N.sum().item()
            positions += len(values_N)
        return total / positions

    @torch.no_grad()
    def mean_entropy(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Mean of H(q_t) over the eligible positions of each trajectory, nats."""
        scores = [0.0] * len(trajectories)
        for group in self._groups(trajectories):
            batch = self._collate([trajectories[i] for i in group])
            entropy, _ = self._statistics(self._hidden(batch), batch)
            for i, part in zip(group, entropy.split(batch.counts), strict=True):
                scores[i] = part.mean().item()
        return scores

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One optimizer step on ``trajectories``, which the teacher must have encoded; returns its metrics.

        Raises SamplerGapError (weights untouched) if sampler and learner disagree by more than ``sync.max_gap``, and
        RuntimeError for trajectories of another policy version.
        """
        started = time.perf_counter()
        check_version(trajectories, self.version)
        self.optimizer.zero_grad(set_to_none=True)
        totals = self.accumulate(trajectories)
        found = self._summary(totals)
        self._check_gap(found)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self._settings.learner.clip)
        rate = learning_rate(self._settings.learner, self.version, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.version += 1
        found |= {"grad_norm": norm.item(), "lr": rate, "learner_seconds": time.perf_counter() - started}
        return found

    def accumulate(self, trajectories: Sequence[Trajectory]) -> _Totals:
        """Adds the gradient of the batch's objective to the parameters, micro-batch by micro-batch.

        The objective is the mean over ``trajectories`` of the weighted mean over each one's selected positions
        (Eqs. 3-5 of the SE-KD paper), so the gradient does not depend on how the batch is cut.
        """
        totals = _Totals()
        for group in self._groups(trajectories):
            self._micro_batch([trajectories[i] for i in group], len(trajectories), totals)
        return totals

    def _micro_batch(self, members: list[Trajectory], total: int, totals: _Totals) -> None:
        batch = self._collate(members)
        hidden_NH = self._hidden(batch)
        entropy_N, logprob_N = self._statistics(hidden_NH, batch)
        own = self._settings.positions
        seeds = [seed_of(self._settings.run.seed, self.version, "positions", t.key) for t in members]
        scores = metrics.METRICS[own.metric](metrics.Signals(entropy_N, logprob_N, batch.counts, seeds))
        chosen = select(scores, batch.counts, own.policy, own.k)
        waited = time.perf_counter()
        starts = torch.tensor(batch.counts).cumsum(0) - torch.tensor(batch.counts)
        local = [part - start for part, start in zip(chosen.indices_K.cpu().split(chosen.counts), starts, strict=True)]
        teacher_KG = self._teacher.rows([(t.key, part.tolist()) for t, part in zip(members, local, strict=True)])
        waited = time.perf_counter() - waited
        loss, values_K = distillation_loss(
            hidden_NH[chosen.indices_K],
            self.student.head_VH,
            teacher_KG.to(hidden_NH.device),
            self._teacher.head(),
            chosen.weights_K / total,
            batch.targets[chosen.indices_K],
            self._alignment,
        )
        loss.backward()
        sampled = torch.cat([torch.as_tensor(t.sampler_logprobs) for t in members]).to(logprob_N.device)
        gap_N = (sampled - logprob_N).abs()
        totals.gap_max = max(totals.gap_max, gap_N.max().item())
        totals.add(
            loss=loss.item(),
            gap=gap_N.sum(),
            divergence=values_K.sum(),
            entropy=entropy_N.sum(),
            entropy_selected=entropy_N[chosen.indices_K].sum(),
            student_logprob=logprob_N.sum(),
            tokens=sum(t.length for t in members),
            padded_tokens=batch.input_ids.numel(),
            positions=len(entropy_N),
            selected=len(values_K),
            samples=len(members),
            teacher_wait_seconds=waited,
        )

    def _summary(self, totals: _Totals) -> dict[str, float]:
        s = totals.sums
        return {
            "loss": s["loss"],
            "divergence_selected": s["divergence"] / s["selected"],
            "entropy": s["entropy"] / s["positions"],
            "entropy_selected": s["entropy_selected"] / s["selected"],
            "student_logprob": s["student_logprob"] / s["positions"],
            "sampler_gap": s["gap"] / s["positions"],
            "sampler_gap_max": totals.gap_max,
            "samples": s["samples"],
            "positions": s["positions"],
            "positions_selected": s["selected"],
            "response_tokens": s["positions"] / s["samples"],
            "train_tokens": s["tokens"],
            "padding_share": 1.0 - s["tokens"] / s["padded_tokens"],
            "teacher_wait_seconds": s["teacher_wait_seconds"],
        }

    def _check_gap(self, found: dict[str, float]) -> None:
        bound = self._settings.sync.max_gap
        if not found["sampler_gap"] <= bound:
            raise SamplerGapError(
                f"the sampler's log-probabilities differ from the learner's by {found['sampler_gap']:.4g} nats on "
                f"average (at most {found['sampler_gap_max']:.4g}), sync.max_gap={bound}: the rollout engine does not "
                f"hold the weights of policy version {self.version}, or computes in a much coarser type. Check "
                "rollout.dtype and sync.method; raise sync.max_gap only if the difference is understood"
            )

    # -- the pieces of a forward -----------------------------------------------------------------------------------

    def _groups(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        return micro_batches([t.length for t in trajectories], self._settings.learner.tokens_per_micro_batch)

    def _collate(self, members: Sequence[Trajectory]) -> Batch:
        return collate(members, self._pad_id, self.student.device)

    def _hidden(self, batch: Batch) -> Tensor:
        coarse = self._dtype != torch.float32
        with torch.autocast(self.student.device.type, dtype=self._dtype, enabled=coarse):
            return self.student.hidden(batch).to(self._dtype)

    def _statistics(self, hidden_NH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        own = self._settings.alignment
        return row_statistics(
            hidden_NH.detach(), self.student.head_VH.detach(), batch.targets, own.temperature, own.chunk_rows
        )

    # -- state -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the learner that a checkpoint must hold, by name: master weights, optimizer moments."""
        own: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in self.named.items()}
        return own | checkpoint.optimizer_tensors(self.optimizer, self.named)

    def restore(self, tensors: dict[str, Tensor], version: int) -> None:
        """Inverse of ``tensors``.  Raises CheckpointError if the checkpoint belongs to another model."""
        expected, found = set(self.named), {n.partition("/")[2] for n in tensors if n.startswith("model/")}
        if expected != found:
            odd = sorted(expected ^ found)[0]
            raise checkpoint.CheckpointError(f"the checkpoint belongs to another model: parameter {odd} differs")
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model/{name}"])
        checkpoint.load_optimizer_tensors(self.optimizer, self.named, tensors)
        self.version = version

    def save_pretrained(self, folder: Path, tokenizer: Any) -> None:
        """The student as a plain transformers checkpoint, in the compute dtype; written beside and renamed."""
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        model = self.student.model
        kept, model.config.dtype = model.config.dtype, self._dtype
        model.save_pretrained(beside, state_dict={n: t.to(self._dtype) for n, t in model.state_dict().items()})
        model.config.dtype = kept
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as in a transformers checkpoint; a tied LM head is left out."""
        for name, parameter in self.student.model.named_parameters():
            yield name, parameter.detach().to(dtype or parameter.dtype)


def learning_rate(settings: LearnerSettings, step: int, steps: int) -> float:
    """Rate of ``step`` (0-based) of ``steps``: linear warm-up to ``lr``, then down to ``min_lr_ratio * lr``."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    fall = {"constant": 0.0, "linear": done, "cosine": 0.5 * (1.0 - math.cos(math.pi * done))}[settings.schedule]
    return settings.lr * (1.0 - fall * (1.0 - settings.min_lr_ratio))


def _no_dropout(model: Any) -> None:
    """The distribution that is trained must be the one that was sampled from."""
    for module in model.modules():
        name = "p" if isinstance(module, torch.nn.Dropout) else "attention_dropout"
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)
