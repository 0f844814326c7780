"""The learner: one optimizer step from trajectories, a teacher's hidden rows, and nothing of Ray.

A step is, per micro-batch: backbone forward -> entropy by chunks, without gradient -> positions per sequence ->
teacher rows for these alone -> divergence by chunks -> backward.  Then clip and step on float32 weights.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.distributed.ranks import Ranks, full_scalar, shard_like
from onpolicy_skd.distributed.weight_transfer import WeightSpec
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics, repetition
from onpolicy_skd.learner import optimizer
from onpolicy_skd.learner.metrics import Totals
from onpolicy_skd.learner.micro_batch import SAMPLE_SCORES, MicroBatch, SampleScore
from onpolicy_skd.learner.objective import Objective
from onpolicy_skd.learner.optimizer import adamw, learning_rate
from onpolicy_skd.learner.probe import Probe
from onpolicy_skd.models.batch import Batch, collate, micro_batches
from onpolicy_skd.models.lm_head import RowStatistics, row_statistics
from onpolicy_skd.models.loading import pick_dtype
from onpolicy_skd.models.lora import merged_parameters
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.selection import samples
from onpolicy_skd.selection.metrics import Ranges
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.teacher.teacher import TeacherRows
from onpolicy_skd.tracing import Spans
from onpolicy_skd.types import FilterReport, Trajectory, check_version, seed_of

logger = logging.getLogger(__name__)
T = TypeVar("T")
ENDINGS = 4  # responses whose end is shown to the teacher ...
ENDINGS_EVERY = 4  # ... once in so many steps: it reads all their positions for it


class SamplerGapError(RuntimeError):
    """The sampler's log-probabilities are not those of the learner's weights."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not finite; nothing was updated.  ``samples``: keys of those it comes from."""

    def __init__(self, message: str, samples: Sequence[str]) -> None:
        super().__init__(message, samples)
        self.message, self.samples = message, list(samples)

    def __str__(self) -> str:
        return self.message


@dataclass
class _Open:
    """A step that has begun."""

    weight: float
    trajectories: list[Trajectory] = field(default_factory=list)
    mine: list[Trajectory] = field(default_factory=list)  # of this rank's shares of the parts
    totals: Totals = field(default_factory=Totals)
    seconds: float = 0.0


class Learner:
    """Trains ``student`` towards ``teacher``; ``version`` counts the optimizer steps done.

    What is trained of the student must be float32: the masters that the optimizer updates; forwards run in
    ``learner.compute_dtype``.  With several ``ranks`` each is such an object; every method is called on all of them,
    with the same arguments, and gives the same result.
    """

    def __init__(
        self,
        student: SplitModel,
        teacher: TeacherRows,
        settings: Settings,
        pad_id: int,
        steps: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self.student = student = self._ranks.shard(student)
        self.version = 0
        self._teacher = teacher
        self._settings = settings
        self._pad_id = pad_id
        self._steps = steps
        self._dtype = pick_dtype(settings.learner.compute_dtype, student.device.type)
        self._selector = Selector(settings.positions, settings.run.seed)
        self._probe: Probe | None = None  # of the bandit
        self.spans = Spans()
        self._objective = Objective(settings, student, teacher, self._hidden)
        self.named = {n: p for n, p in student.model.named_parameters() if p.requires_grad} | self._objective.parameters
        wrong = next((n for n, p in self.named.items() if p.dtype != torch.float32), None)
        if wrong:
            raise ValueError(f"student parameter {wrong} is {self.named[wrong].dtype}; masters must be float32")
        self.optimizer = adamw(self.named, settings.learner)
        _no_dropout(student.model)
        student.model.train(settings.student.activation_checkpointing)
        if settings.student.activation_checkpointing:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def local_trajectories(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those that this rank works on: the teacher in its process must know them."""
        return [trajectories[i] for i in self._ranks.shares([t.length for t in trajectories])[self._ranks.rank]]

    # -- samples ---------------------------------------------------------------------------------------------------

    def filter(self, trajectories: Sequence[Trajectory]) -> tuple[FilterReport, list[Trajectory]]:
        """Validity, then (``samples.when=rollout``) the top share by the ranking metric; counts what was dropped.

        Returns the report and the kept trajectories, with their weights.
        """
        own = self._settings.samples
        report = samples.validity(trajectories, self.student.vocabulary, own.truncated == "drop", own.correctness)
        kept_keys = set(report.kept)
        kept = [t for t in trajectories if t.key in kept_keys]
        if own.weight == "paced":
            weights = samples.paced(trajectories)
            paced = [dataclasses.replace(t, weight=weights[t.key]) for t in kept if weights[t.key]]
            report.count("no_pace", len(kept) - len(paced))
            kept = paced
        if own.keep < 1.0 and own.when == "rollout" and kept:
            best = [kept[i] for i in samples.top_share(self._score_samples(kept), own.keep)]
            report.count("not_selected", len(kept) - len(best))
            if own.metric in samples.TEACHER_METRICS:
                self._teacher.release(sorted({t.key for t in kept} - {t.key for t in best}))
            kept = best
        report.kept = [t.key for t in kept]
        return report, kept

    def score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Score of each sample under ``samples.metric``: a mean over its positions (nats), a ratio, or random.

        -inf for samples that no model here could read: empty ones, or with ids outside the shared vocabulary.
        """
        usable = set(samples.validity(trajectories, self.student.vocabulary, drop_truncated=False).kept)
        valid = [t for t in trajectories if t.key in usable]
        scores = dict(zip((t.key for t in valid), self._score_samples(valid), strict=True))
        if self._settings.samples.metric in samples.TEACHER_METRICS:
            self._teacher.release(list(usable))
        return [scores.get(t.key, -math.inf) for t in trajectories]

    def _score_samples(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See ``score_samples``; leaves ``trajectories`` encoded, if the metric needs the teacher."""
        own = self._settings.samples
        if own.metric == "random":
            seed = self._settings.run.seed
            return [seed_of(seed, self.version, "sample", t.key) / 2**31 for t in trajectories]
        if own.metric in samples.TEACHER_METRICS:
            self._teacher.encode(self.local_trajectories(trajectories))
        recorded = [t.sampler_entropy for t in trajectories]
        if own.metric == "student_entropy" and all(e is not None for e in recorded):
            return [float(np.mean(e)) for e in recorded]  # type: ignore[arg-type]
        return self._each(trajectories, SAMPLE_SCORES[own.metric])

    def divergence(self, trajectories: Sequence[Trajectory], rows: Mapping[str, Tensor] | None = None) -> float:
        """Mean divergence per eligible position of ``trajectories``, nats; nothing is selected or trained.

        The teacher must have encoded them, or ``rows`` hold its hidden states ``[n, G]`` by trajectory key.
        """
        kind = self._settings.alignment.divergence

        def total(micro: MicroBatch) -> list[Tensor]:
            known = torch.cat([rows[key] for key in micro.keys]).to(self.student.device) if rows else None
            return [part.sum() for part in micro.split(micro.divergence(kind, known))]

        return sum(self._each(trajectories, total)) / sum(len(t.response_ids) for t in trajectories)

    @torch.no_grad()
    def diagnose_positions(self, trajectories: Sequence[Trajectory]) -> list[PositionDiagnostics]:
        """Entropy, divergence and selection at every eligible position, in the order of ``trajectories``.

        The teacher must have encoded them.
        """
        kind, found = self._settings.alignment.divergence, {}
        ranges = self._ranges(trajectories) if self._selector.needs_ranges(self.version) else None
        for group, micro in self._micro_batches(trajectories):
            entropy_N, divergence_N = micro.statistics.entropy_N, micro.divergence(kind)
            _, chosen = self._selector.select(micro.signals(ranges), self.version)
            selected_N = torch.zeros(len(entropy_N), dtype=torch.bool)
            selected_N[chosen.indices_K.cpu()] = True
            parts = (micro.split(values.cpu()) for values in (entropy_N, divergence_N, selected_N))
            for place, *own in zip(group, *parts, strict=True):
                found[place] = PositionDiagnostics(trajectories[place].key, *(values.numpy() for values in own))
        return self._of_all(found)

    @torch.no_grad()
    def _each(self, trajectories: Sequence[Trajectory], score: SampleScore) -> list[float]:
        """``score`` of every trajectory, in their order."""
        found = {}
        for group, micro in self._micro_batches(trajectories):
            found |= zip(group, map(float, score(micro)), strict=True)
        return self._of_all(found)

    def _of_all(self, found: dict[int, T]) -> list[T]:
        """What the ranks have found of each trajectory, in the order of these."""
        every = {place: value for part in self._ranks.gather(found) for place, value in part.items()}
        return [every[place] for place in range(len(every))]

    # -- one step --------------------------------------------------------------------------------------------------

    def step(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """One optimizer step on ``trajectories``, which the teacher must have encoded; returns its metrics.

        Raises, with nothing updated, NonFiniteLossError for a loss or gradient that is not finite, SamplerGapError if
        sampler and learner disagree by more than ``sync.max_gap``, and RuntimeError for trajectories of another policy
        version.
        """
        self.begin(sum(t.weight for t in trajectories))
        self.add(trajectories)
        return self.finish()

    def begin(self, weight: float) -> None:
        """A step whose trajectories come in parts; ``weight``: what theirs are expected to come to."""
        self._open = _Open(weight)
        self.optimizer.zero_grad(set_to_none=True)

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Some trajectories of the step that has begun; raises as ``step`` does."""
        started, own = time.perf_counter(), self._open
        check_version(trajectories, self.version, self._settings.pipeline.max_staleness)
        own.totals = Totals.of([own.totals, self.accumulate(trajectories, own.weight)])
        own.trajectories += trajectories
        own.mine += self.local_trajectories(trajectories)
        own.seconds += time.perf_counter() - started

    def finish(self) -> dict[str, float]:
        """The update of the step whose trajectories have all been added; as ``step``."""
        started, own = time.perf_counter(), self._open
        trajectories, totals = own.trajectories, own.totals
        factor = own.weight / sum(t.weight for t in trajectories)  # some may have been dropped
        if factor != 1.0:
            totals.sums["loss"] *= factor
            for parameter in self.named.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        norm = full_scalar(torch.nn.utils.clip_grad_norm_(self.named.values(), self._settings.learner.clip))
        self._check_sound(totals, norm, trajectories)
        found = totals.summary(self._selector.k(self.version))
        self._check_gap(found)
        found |= self._responses(trajectories, own.mine)
        rate = learning_rate(self._settings.learner, self.version, self._steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        bandit = self._selector.bandit
        if bandit and self._probe is None:
            self._probe = Probe.of(trajectories[: self._settings.positions.bandit_probe], self._teacher)
            bandit.start(self.divergence(self._probe.trajectories, self._probe.rows))
        with self.spans("optimizer"):
            self.optimizer.step()
        self.version += 1
        self.optimizer.zero_grad(set_to_none=True)
        self._objective.after_step()
        self._selector.observe(torch.cat([totals.scores[t.key] for t in trajectories]))
        if bandit and self._probe:
            step = self.version - 1
            found["arm"] = bandit.arm(step)
            found["probe_divergence"] = self.divergence(self._probe.trajectories, self._probe.rows)
            found["reward"] = bandit.reward(step, found["probe_divergence"])
        found |= {"grad_norm": norm, "lr": rate, "learner_seconds": own.seconds + time.perf_counter() - started}
        return found

    def accumulate(self, trajectories: Sequence[Trajectory], weight: float | None = None) -> Totals:
        """Adds the gradient of the batch's objective to the parameters, micro-batch by micro-batch; sums of all ranks.

        The objective is the (weighted) mean over ``trajectories`` of the weighted mean over each one's selected
        positions (Eqs. 3-5 of the SE-KD paper), so the gradient does not depend on how the batch is cut.  ``weight``:
        of all trajectories of the mean, if these are some of them.
        """
        totals = Totals()
        ranges = self._ranges(trajectories) if self._selector.needs_ranges(self.version) else None
        self._objective.survey(trajectories, self._teacher)
        total = weight or sum(t.weight for t in trajectories)
        for _, micro in self._micro_batches(trajectories):
            self._backward(micro, ranges, total, totals)
        parts = self._ranks.gather(totals)
        found = Totals.of(parts)
        found.sums["teacher_wait_seconds"] /= len(parts)  # they wait at the same time
        return found

    def _backward(self, micro: MicroBatch, ranges: Ranges | None, total: float, totals: Totals) -> None:
        scores_N, chosen = self._selector.select(micro.signals(ranges), self.version)
        shares = torch.tensor([t.weight / total for t in micro.members]).repeat_interleave(torch.tensor(chosen.counts))
        with self.spans("loss"):
            loss, values_K = self._objective.loss(micro, chosen, chosen.weights_K * shares.to(chosen.weights_K.device))
        totals.compare(micro, chosen, self.version)  # while a head that is cut among ranks is still whole
        with self.spans("backward"):
            loss.backward()
            if micro.embedded_BLH is not None:
                self.student.add_embedding_gradient(micro.batch, micro.embedded_BLH)
        sound = torch.isfinite(values_K).cpu().split(chosen.counts)
        totals.unsound += [key for key, own in zip(micro.keys, sound, strict=True) if not own.all()]
        totals.scores |= dict(zip(micro.keys, scores_N.detach().split(micro.batch.counts), strict=True))
        totals.add(
            loss=loss.item(),
            divergence=values_K.sum(),
            tokens=sum(t.length for t in micro.members),
            padded_tokens=micro.batch.input_ids.numel(),
            positions=len(scores_N),
            selected=len(values_K),
            samples=len(micro.members),
            teacher_wait_seconds=micro.waited,
        )

    @torch.no_grad()
    def _ranges(self, trajectories: Sequence[Trajectory]) -> Ranges:
        """Of student entropy and KL over the whole batch, in a forward of its own."""
        found = []
        for _, micro in self._micro_batches(trajectories):
            signals = micro.signals()
            found.append(torch.stack([*signals.entropy_N.aminmax(), *signals.kl_N.aminmax()]).cpu())
        low_h, high_h, low_d, high_d = torch.stack([row for part in self._ranks.gather(found) for row in part]).T
        return Ranges((low_h.min().item(), high_h.max().item()), (low_d.min().item(), high_d.max().item()))

    @torch.no_grad()
    def _responses(self, trajectories: Sequence[Trajectory], mine: Sequence[Trajectory]) -> dict[str, float]:
        """What guards look at beside the sums: of the student's own responses; this rank's teacher has ``mine``."""
        own = [t for t in trajectories if t.policy_version is not None]
        if not own:
            return {}
        found = {"repetition": sum(repetition(t.response_ids) for t in own) / len(own)}
        ended = {t.key for t in [t for t in own if t.finish_reason == "stop"][:ENDINGS]}
        if ended and self.version % ENDINGS_EVERY == 0:
            endings = self._ranks.gather(self._endings([t for t in mine if t.key in ended]))
            found["teacher_ending"] = sum(map(sum, endings)) / len(ended)
        return found

    def _endings(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """The teacher's probability of the last token of each."""
        if not trajectories:
            return []
        last_B = torch.tensor([len(t.response_ids) for t in trajectories]).cumsum(0) - 1
        _, logprob_N = self._teacher.entropy_and_logprob([t.key for t in trajectories])
        return logprob_N.cpu()[last_B].exp().tolist()

    def _check_sound(self, totals: Totals, norm: float, trajectories: Sequence[Trajectory]) -> None:
        loss = totals.sums["loss"]
        if math.isfinite(loss) and math.isfinite(norm) and not totals.unsound:
            return
        self.optimizer.zero_grad(set_to_none=True)
        samples = totals.unsound or [t.key for t in trajectories]
        shown = ", ".join(samples[:3]) + (", ..." if len(samples) > 3 else "")
        raise NonFiniteLossError(
            f"loss {loss:g}, gradient norm {norm:g}, from {len(samples)} samples ({shown})", samples
        )

    def _check_gap(self, found: dict[str, float]) -> None:
        bound = self._settings.sync.max_gap
        if not found.get("sampler_gap", 0.0) <= bound:
            raise SamplerGapError(
                f"the sampler's log-probabilities differ from the learner's by {found['sampler_gap']:.4g} nats on "
                f"average (at most {found['sampler_gap_max']:.4g}), sync.max_gap={bound}: the rollout engine does not "
                f"hold the weights of policy version {self.version}, or computes in a much coarser type. Check "
                "rollout.dtype and sync.method; raise sync.max_gap only if the difference is understood"
            )

    # -- the pieces of a forward -----------------------------------------------------------------------------------

    def _micro_batches(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[list[int], MicroBatch]]:
        """This rank's, each with the places of its members in ``trajectories``."""
        lengths, own = [t.length for t in trajectories], self._settings
        every = []
        for share in self._ranks.shares(lengths):
            cut = micro_batches([lengths[i] for i in share], own.learner.tokens_per_micro_batch, own.pipeline.packing)
            every.append([[share[i] for i in group] for group in cut])
        mine = every[self._ranks.rank]
        for group in mine:
            yield group, self._micro_batch([trajectories[i] for i in group])
        for _ in range(max(map(len, every)) - len(mine)):
            self._keep_step()

    def _keep_step(self) -> None:
        """A micro-batch that adds nothing, while other ranks, which cannot do without this one, have one more."""
        empty = Trajectory("none", np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32), "stop", None)
        hidden = self._hidden(self.student, collate([empty], self._pad_id, self.student.device))
        if torch.is_grad_enabled():
            (0.0 * (hidden.sum() + self.student.head_VH[:1].sum())).backward()

    def _micro_batch(self, members: Sequence[Trajectory]) -> MicroBatch:
        """The student's forward of ``members``; with gradient unless that is switched off."""
        packed, own = self._settings.pipeline.packing, self._settings.alignment
        batch = collate(members, self._pad_id, self.student.device, packed=packed)
        leaf_BLH = self.student.embedded(batch) if torch.is_grad_enabled() else None
        with self.spans("backbone"):
            hidden_NH, head_VH = self._hidden(self.student, batch, leaf_BLH), self.student.head_VH

        def measure() -> RowStatistics:
            with self.spans("entropy"):
                return row_statistics(
                    hidden_NH.detach(), head_VH.detach(), batch.targets, own.temperature, own.chunk_rows
                )

        seeds = [seed_of(self._settings.run.seed, self.version, "positions", t.key) for t in members]
        alignment = self._objective.alignment
        return MicroBatch(
            members, batch, leaf_BLH, hidden_NH, head_VH, measure, self._teacher, alignment, seeds, self.spans
        )

    def _hidden(self, model: SplitModel, batch: Batch, embedded_BLH: Tensor | None = None) -> Tensor:
        coarse = self._dtype != torch.float32
        # Its cache would keep a coarse copy of every weight for the length of a forward.
        with torch.autocast(model.device.type, dtype=self._dtype, enabled=coarse, cache_enabled=False):
            return model.hidden(batch, embedded_BLH).to(self._dtype)

    # -- state -----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the learner that a checkpoint must hold, by name: masters, optimizer moments, selectors.

        Whole on rank 0, so that it does not matter how many ranks go on from there; what the others get is of no use.
        """
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.named,
            "selector": self._selector.state_dict(),
            "objective": self._objective.state_dict(),
            "probe": self._probe.state_dict() if self._probe else {},
        }
        own = {f"{part}/{name}": t.detach() for part, tensors in parts.items() for name, t in tensors.items()}
        own |= optimizer.optimizer_tensors(self.optimizer, self.named)
        self._ranks.reshard(self.student)
        return {name: self._kept(tensor) for name, tensor in own.items()}

    def _kept(self, tensor: Tensor) -> Tensor:
        """Whole and, if it had to be gathered, out of the way of the next."""
        found = self._ranks.full_tensor(tensor)
        return found if found is tensor else found.cpu()

    def restore(self, tensors: dict[str, Tensor], version: int) -> None:
        """Inverse of ``tensors``.  Raises CheckpointError if the checkpoint belongs to another model."""
        parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for full, tensor in tensors.items():
            part, _, name = full.partition("/")
            parts[part][name] = tensor
        expected, found = set(self.named), set(parts["model"])
        if expected != found:
            odd = sorted(expected ^ found)[0]
            raise checkpoint.CheckpointError(f"the checkpoint belongs to another model: parameter {odd} differs")
        self._ranks.reshard(self.student)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(shard_like(parts["model"][name], parameter))
        optimizer.load_optimizer_tensors(self.optimizer, self.named, tensors, shard_like)
        self.version = version
        if version:  # a checkpoint from before the first step has nothing to remember
            self._selector.load_state_dict(parts["selector"])
            self._objective.load_state_dict(parts["objective"])
            self._probe = Probe.from_state_dict(parts["probe"]) if parts["probe"] else None

    def save_pretrained(self, folder: Path, tokenizer: Any) -> None:
        """The student as a plain transformers checkpoint, written beside and renamed, by rank 0.

        In the compute dtype, but with low-rank additions in float32: these may be finer than a bfloat16 weight's steps.

        Raises SaveError, with nothing changed, if the disk is full or refuses.
        """
        dtype = torch.float32 if self._settings.student.lora_rank else self._dtype
        state = {name: tensor.cpu() for name, tensor in self.weights(dtype)}
        if self._ranks.rank:
            return
        kept_buffers = self.student.model.state_dict().keys()
        state |= {name: buffer for name, buffer in self.student.model.named_buffers() if name in kept_buffers}
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        model = self.student.model
        kept, model.config.dtype = model.config.dtype, dtype
        try:
            model.save_pretrained(beside, state_dict=state)
            tokenizer.save_pretrained(beside)
            files.replace_folder(folder, beside)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise files.SaveError(f"the student cannot be written to {folder}: {error}") from error
        finally:
            model.config.dtype = kept

    def weights(self, dtype: torch.dtype | None = None, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as in a transformers checkpoint; a tied LM head is left out.

        Whole on rank 0, and with ``everywhere`` on the others too.
        """
        self._ranks.reshard(self.student)
        for name, compute in merged_parameters(
            self.student.model, partial(self._ranks.full_tensor, everywhere=everywhere)
        ):
            tensor = compute()
            yield name, tensor.to(dtype or tensor.dtype)

    def weight_spec(self, dtype: torch.dtype) -> WeightSpec:
        """What ``weights`` will give."""
        shapes = merged_parameters(self.student.model, lambda tensor: torch.empty(tensor.shape, device="meta"))
        return WeightSpec.of((name, dtype, compute().shape) for name, compute in shapes)


def _no_dropout(model: Any) -> None:
    """The distribution that is trained must be the one that was sampled from."""
    for module in model.modules():
        name = "p" if isinstance(module, torch.nn.Dropout) else "attention_dropout"
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)
