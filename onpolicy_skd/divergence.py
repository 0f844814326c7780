"""What is minimised at a position, over selected rows, chunk by chunk (docs/method.md, sections 2, 6 and 7).

``distillation_loss`` never holds ``[N, V]`` logits.  The gradient at the student's logit j has a closed form::

    reverse_kl   KL(q||p)                                    q_j (log q_j - log p_j - KL(q||p))
    forward_kl   KL(p||q)                                    q_j - p_j
    jsd          beta KL(p||m) + (1 - beta) KL(q||m),        (1 - beta) q_j (log q_j - log m_j - KL(q||m))
                 m = beta p + (1 - beta) q
    decoupled    a KL(p_y, 1-p_y || q_y, 1-q_y)              a (q_y - p_y) at y, elsewhere
                 + b KL(p^||q^), classes other than y        b (q^_j - p^_j) - a (q_y - p_y) q^_j
    sparse       sum t_j (log t_j - log q_j)                 (sum t) q_j - t_j
    cross-entropy of the target y                            q_j - [j = y]

so each chunk's gradients to the student's hidden states and LM head are formed in the forward pass and nothing is
recomputed in backward.  The formulas hold for distributions at temperature T; the logits' gradient carries 1/T.
As in TRL, jsd at beta = 0 means forward KL and at beta = 1 reverse KL, the limits of JSD/beta and JSD/(1-beta).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.lm_head import Projector, RowStatistics, blocks, chunk_size, chunks, log_softmax_
from onpolicy_skd.trajectory import SparseTargets

KINDS = ("reverse_kl", "forward_kl", "jsd")
ESTIMATORS = ("exact", "topk_tail", "sampled")
NOTHING = -1e4  # stands for log 0 where two such logarithms are subtracted

Parts = tuple[Tensor, Tensor, Tensor]  # value per row, gradient at the logits, q: three tensors of their own


@dataclass(frozen=True, slots=True)
class Alignment:
    """What is minimised at a position: kd_weight * divergence + (1 - kd_weight) * cross-entropy.

    ``estimator`` of the divergence: ``exact``; ``topk_tail``, over the teacher's ``top_k`` classes and one more that
    holds the rest of both distributions; ``sampled``, from the target alone, whose value and gradient are unbiased if
    the target was drawn from q.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_weight: float = 1.0
    chunk_rows: int | None = None
    estimator: str = "exact"
    top_k: int = 64
    compiled: bool = False  # exact divergences by torch.compile, else by ``_block``

    def __post_init__(self) -> None:
        if self.divergence not in KINDS:
            raise ValueError(f"unknown divergence {self.divergence!r}; accepted: {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; accepted: {', '.join(ESTIMATORS)}")

    @property
    def kind(self) -> str:
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return limits.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """The teacher's full distributions at N positions, as last hidden states and LM head."""

    hidden_NG: Tensor
    head_VG: Tensor

    def logits(self, size: int) -> Callable[[slice], Tensor]:
        """Gives the logits of a chunk of up to ``size`` rows; what it gave before is overwritten."""
        project = Projector(self.head_VG.to(self.hidden_NG.dtype), size)
        return lambda part: project(self.hidden_NG[part])


@dataclass(frozen=True, slots=True)
class Rows:
    """N supervised positions."""

    weights_N: Tensor  # float32; of each row in the sum
    targets_N: Tensor  # int64; y
    temperature_N: Tensor | None = None  # float32; instead of the alignment's, of both models
    decoupled_N2: Tensor | None = None  # float32; a and b of decoupled KD, instead of the divergence

    def __getitem__(self, part: slice) -> Rows:
        temperature = None if self.temperature_N is None else self.temperature_N[part]
        decoupled = None if self.decoupled_N2 is None else self.decoupled_N2[part]
        return Rows(self.weights_N[part], self.targets_N[part], temperature, decoupled)


def distillation_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher: HiddenRows | SparseTargets,
    rows: Rows,
    alignment: Alignment,
    observed: RowStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted loss and the divergence of each row; fills ``observed`` with the student's statistics on the way
    (at temperature 1 alone).

    Returns the scalar sum over rows of weight * loss, differentiable in ``student_hidden_NH`` and
    ``student_head_VH``, and the detached divergence per row, float32 ``[N]``, nats.  The two hidden sizes may differ;
    both heads must have the same V.  Sparse targets mean their own loss: the alignment's divergence and estimator do
    not matter then.  Only the first derivative exists.  Raises ValueError if the vocabularies differ.
    """
    if isinstance(teacher, HiddenRows) and len(student_head_VH) != len(teacher.head_VG):
        raise ValueError(f"vocabularies differ: student {len(student_head_VH)}, teacher {len(teacher.head_VG)}")
    return _Loss.apply(student_hidden_NH, student_head_VH, teacher, rows, alignment, observed)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NH, student_head, teacher, asked, alignment, observed):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(student_NH) if wants_hidden else None
        grad_head = torch.zeros_like(student_head) if wants_head else None
        head = student_head.to(student_NH.dtype)  # one copy a call where compute and master dtypes differ
        size = chunk_size(len(student_NH), head, alignment.chunk_rows)
        student_logits = Projector(head, size)
        chunk_of = teacher.__getitem__ if isinstance(teacher, SparseTargets) else teacher.logits(size)
        loss = torch.zeros((), dtype=torch.float32, device=student_NH.device)
        values_N = torch.empty(len(student_NH), dtype=torch.float32, device=student_NH.device)
        fused = alignment.compiled and alignment.estimator == "exact" and isinstance(teacher, HiddenRows)
        fused = fused and asked.temperature_N is None and asked.decoupled_N2 is None
        for part in chunks(len(student_NH), size):
            logits_cV = student_logits(student_NH[part])
            teacher_c: Any = chunk_of(part)
            if fused:
                seen = None if observed is None else observed[part]
                loss_c, values_N[part] = _compiled_chunk(logits_cV, teacher_c, asked[part], alignment, seen)
                loss += loss_c
            for block in () if fused else blocks(logits_cV):
                seen = None if observed is None else observed[part][block]
                loss_b, values_N[part][block] = _block(
                    logits_cV[block], teacher_c[block], asked[part][block], alignment, seen
                )
                loss += loss_b
            grad_logits_cV = logits_cV.to(student_NH.dtype)  # _block turned the logits into their gradient
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits_cV @ head
            if grad_head is not None:
                _accumulate(grad_head, grad_logits_cV, student_NH[part])
        ctx.gradients = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(values_N)
        ctx.set_materialize_grads(False)
        return loss, values_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[override]
        # The buffers belong to this call alone: scaled in place, and handed over so that autograd need not copy them.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the distillation loss was already differentiated; its gradients are formed only once")
        if grad_loss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (*gradients, None, None, None, None)


def _accumulate(grad_head_VH: Tensor, grad_logits_cV: Tensor, hidden_cH: Tensor) -> None:
    if grad_head_VH.dtype == hidden_cH.dtype:
        grad_head_VH.addmm_(grad_logits_cV.T, hidden_cH)
    else:
        grad_head_VH += grad_logits_cV.T @ hidden_cH


def _block(
    logits: Tensor, teacher: Tensor | SparseTargets, rows: Rows, alignment: Alignment, seen: RowStatistics | None
) -> tuple[Tensor, Tensor]:
    """Loss and divergences of a few rows; **overwrites** ``logits`` with the gradient of the loss at the raw logits.

    The teacher's logits are overwritten too: for exact divergences at most a scratch is allocated here.
    """
    temperature = alignment.temperature if rows.temperature_N is None else rows.temperature_N[:, None]
    targets = rows.targets_N[:, None]
    log_q = log_softmax_(_soften_(logits, temperature), seen and seen.entropy_N)
    target_log_q = log_q.gather(1, targets)[:, 0]
    if seen:
        seen.logprob_N.copy_(target_log_q)
    if isinstance(teacher, SparseTargets):
        values, gradient, q = _sparse(log_q, teacher)
    else:
        log_p = log_softmax_(_soften_(teacher, temperature))
        if rows.decoupled_N2 is not None:
            values, gradient, q = _decoupled(log_q, log_p, targets, rows.decoupled_N2)
        elif alignment.estimator == "topk_tail":
            values, gradient, q = _topk_tail(log_q, log_p, alignment)
        elif alignment.estimator == "sampled":
            values, gradient, q = _sampled(log_q, log_p, targets, alignment)
        else:
            values, gradient, q = _exact(log_q, log_p, alignment)  # reuses the storage of log_q and log_p
    kd = alignment.kd_weight
    loss = kd * values
    if kd < 1.0:
        loss = loss - (1.0 - kd) * target_log_q
        cross_entropy = q.scatter_add_(1, targets, -torch.ones_like(targets, dtype=q.dtype))
        gradient = gradient.mul_(kd).add_(cross_entropy, alpha=1.0 - kd)
    torch.mul(gradient, rows.weights_N[:, None] / temperature, out=logits)
    return torch.dot(loss, rows.weights_N), values


def _compiled_chunk(
    logits: Tensor, teacher: Tensor, rows: Rows, alignment: Alignment, seen: RowStatistics | None
) -> tuple[Tensor, Tensor]:
    """As ``_block``, of a whole chunk."""
    own = alignment
    loss, values, gradient, entropy, target_log_q = _compiled()(
        logits, teacher, rows.targets_N, own.kind, own.beta, own.temperature, own.kd_weight, rows.weights_N
    )
    logits.copy_(gradient)
    if seen:
        seen.entropy_N.copy_(entropy)
        seen.logprob_N.copy_(target_log_q)
    return loss, values


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(_fused, dynamic=True)


def _fused(
    logits: Tensor,
    teacher: Tensor,
    targets: Tensor,
    kind: str,
    beta: float,
    temperature: float,
    kd: float,
    weights: Tensor,
) -> tuple[Tensor, ...]:
    """Loss, divergences, gradient at the logits, entropies and log-probabilities of the targets, in few passes."""
    log_q, log_p = (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    q = log_q.exp()
    if kind == "forward_kl":
        p = log_p.exp()
        values, gradient = (p * (log_p - log_q)).sum(-1), q - p
    elif kind == "reverse_kl":
        ratio = log_q - log_p
        values = (q * ratio).sum(-1)
        gradient = q * (ratio - values[:, None])
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        student = (q * (log_q - log_m)).sum(-1)
        values = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1.0 - beta) * student
        gradient = (1.0 - beta) * q * (log_q - log_m - student[:, None])
    target_log_q = log_q.gather(1, targets[:, None])[:, 0]
    loss = kd * values - (1.0 - kd) * target_log_q
    own = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = kd * gradient + (1.0 - kd) * (q - own.to(q.dtype))
    return (
        (loss * weights).sum(),
        values,
        gradient * (weights[:, None] / temperature),
        -(q * log_q).sum(-1),
        target_log_q,
    )


def _soften_(logits: Tensor, temperature: float | Tensor) -> Tensor:
    return logits if isinstance(temperature, float) and temperature == 1.0 else logits.div_(temperature)


def _exact(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> Parts:
    """Over the full vocabulary; both arguments may be overwritten."""
    if alignment.kind == "forward_kl":
        p = log_p.exp()
        values = torch.linalg.vecdot(p, log_p.sub_(log_q))
        q = log_q.exp_()
        return values, torch.sub(q, p, out=p), q
    if alignment.kind == "reverse_kl":
        ratio = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        values = torch.linalg.vecdot(q, ratio)
        gradient = ratio.sub_(values[:, None]).mul_(q)
        return values, gradient, q
    beta = alignment.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher_part = torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_m))
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    student_part = torch.linalg.vecdot(q, ratio)
    gradient = ratio.sub_(student_part[:, None]).mul_(q).mul_(1.0 - beta)
    return beta * teacher_part + (1.0 - beta) * student_part, gradient, q


def _terms(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Of each class (or group of classes): its part of the divergence D, and q dD/dq up to a constant times q."""
    q, p = log_q.exp(), log_p.exp()
    if alignment.kind == "forward_kl":
        return p * (log_p - log_q), -p
    if alignment.kind == "reverse_kl":
        part = q * (log_q - log_p)
        return part, part
    beta = alignment.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    student_part = (1.0 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + student_part, student_part


def _topk_tail(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> Parts:
    """Over the teacher's top classes and one group of all others; a group's gradient is shared out by q."""
    ids = log_p.topk(min(alignment.top_k, log_p.shape[1])).indices
    tail_log_q = _without(log_q, ids)
    group_q = torch.cat([log_q.gather(1, ids), _log_mass(tail_log_q)], 1)
    group_p = torch.cat([log_p.gather(1, ids), _log_mass(_without(log_p, ids))], 1)
    part, slope = _terms(group_q, group_p, alignment)
    group_gradient = slope - group_q.exp() * slope.sum(1, keepdim=True)
    gradient = tail_log_q.sub_(group_q[:, -1:]).exp_().mul_(group_gradient[:, -1:])
    return part.sum(1), gradient.scatter_(1, ids, group_gradient[:, :-1]), log_q.exp_()


def _sampled(log_q: Tensor, log_p: Tensor, targets: Tensor, alignment: Alignment) -> Parts:
    """From the target y ~ q alone: D = E[part / q], gradient = E[(slope / q) (one-hot of y - q)]."""
    own = log_q.gather(1, targets)
    part, slope = _terms(own, log_p.gather(1, targets), alignment)
    slope = slope / own.exp()
    q = log_q.exp_()
    return (part / own.exp())[:, 0], (q * -slope).scatter_add_(1, targets, slope), q


def _decoupled(log_q: Tensor, log_p: Tensor, targets: Tensor, weights_b2: Tensor) -> Parts:
    """Decoupled KD (arXiv 2203.08679, Eq. 7): target class against the rest, and the rest among themselves."""
    target_weight, other_weight = weights_b2.split(1, dim=1)
    masked_q, masked_p = _without(log_q, targets), _without(log_p, targets)
    rest_q, rest_p = masked_q.logsumexp(1, keepdim=True), masked_p.logsumexp(1, keepdim=True)
    p_y, p_rest = log_p.gather(1, targets).exp(), rest_p.exp()
    binary = p_y * (log_p.gather(1, targets) - log_q.gather(1, targets)) + p_rest * (rest_p - rest_q)
    other_q, other_p = masked_q.sub_(rest_q), masked_p.sub_(rest_p)  # logarithms; -inf at y
    p_hat = other_p.exp()
    among = torch.linalg.vecdot(p_hat, (other_p - other_q).scatter_(1, targets, 0.0))[:, None]
    target_gradient = target_weight * (log_q.gather(1, targets).exp() - p_y)
    q_hat = other_q.exp_()
    gradient = (
        q_hat.mul(other_weight - target_gradient).sub_(other_weight * p_hat).scatter_(1, targets, target_gradient)
    )
    return (target_weight * binary + other_weight * among)[:, 0], gradient, log_q.exp_()


def _sparse(log_q: Tensor, targets: SparseTargets) -> Parts:
    """sum t (log t - log q) and what ``residual`` adds (RS-KD, arXiv 2503.16870, sections 3.1-3.4 and appendix A)."""
    ids, t = targets.ids_NC, targets.probs_NC
    own = log_q.gather(1, ids)
    values = (torch.xlogy(t, t) - t * own).sum(1)
    mass = t.sum(1, keepdim=True)
    lacking = (1.0 - mass).clamp_(min=0.0)
    if targets.residual == "ghost":
        used = torch.where(t > 0, ids, ids[:, :1])
        outside = _without(log_q, used)
        rest = _log_mass(outside)
        values += (torch.xlogy(lacking, lacking) - lacking * rest)[:, 0]
        q = log_q.exp_()
        gradient = torch.sub(q, outside.sub_(rest).exp_().mul_(lacking), out=outside)
    elif targets.residual == "smooth":
        share = lacking / log_q.shape[1]
        at_ids = torch.where(
            t > 0, torch.xlogy(t + share, t + share) - torch.xlogy(t, t) - torch.xlogy(share, share), 0
        )
        values += at_ids.sum(1)
        values += (log_q.shape[1] * torch.xlogy(share, share))[:, 0] - share[:, 0] * log_q.sum(1)
        q = log_q.exp_()
        gradient = q - share
    else:
        q = log_q.exp_()
        gradient = q * mass
    return values, gradient.scatter_add_(1, ids, -t), q


def _without(log_probs: Tensor, ids: Tensor) -> Tensor:
    """A copy with -inf at ``ids`` ``[b, K]``."""
    return log_probs.scatter(1, ids, -torch.inf)


def _log_mass(log_probs: Tensor) -> Tensor:
    """``[b, 1]``; of nothing a number whose exponential is 0, but which can be subtracted from itself."""
    return log_probs.logsumexp(1, keepdim=True).clamp_(min=NOTHING)
