"""Closed forms of the divergences and their gradients at the logits of one block of rows.

Shapes: b rows, V classes; ``log_q`` and ``log_p`` are the student's and the teacher's log-probabilities ``[b, V]``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from onpolicy_skd.loss.inputs import Alignment
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import largest

LOG_ZERO = -1e4  # stands for log 0 where two such logarithms are subtracted
MAX_LOG_RATIO = 40.0  # bound of log p - log q where a density ratio is formed: exp stays finite in float32


Weigh = Callable[[Tensor, Tensor], Tensor]  # reverse and forward KL [b] each -> their weights [b, 2]


class RowGradients(NamedTuple):
    """Divergences of b rows and their gradients; three tensors that share no memory."""

    values_b: Tensor  # nats
    gradient_bV: Tensor  # at the logits
    q_bV: Tensor  # the student's probabilities


def soften_(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide ``logits`` by the temperature, a number or ``[b, 1]``, **in place**."""
    return logits if isinstance(temperature, float) and temperature == 1.0 else logits.div_(temperature)


def exact(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> RowGradients:
    """Compute the divergence over the full vocabulary; **overwrites** both arguments."""
    if alignment.kind == "forward_kl":
        p = log_p.exp()
        values = torch.linalg.vecdot(p, log_p.sub_(log_q))
        q = log_q.exp_()
        return RowGradients(values, torch.sub(q, p, out=p), q)
    if alignment.kind == "reverse_kl":
        ratio = torch.sub(log_q, log_p, out=log_p)
        q = log_q.exp_()
        values = torch.linalg.vecdot(q, ratio)
        return RowGradients(values, ratio.sub_(values[:, None]).mul_(q), q)
    beta = alignment.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher_kl = torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_m))
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    student_kl = torch.linalg.vecdot(q, ratio)
    gradient = ratio.sub_(student_kl[:, None]).mul_(q).mul_(1.0 - beta)
    return RowGradients(beta * teacher_kl + (1.0 - beta) * student_kl, gradient, q)


def terms(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Return each class's term of the divergence D, and q dD/dq up to a constant times q.

    A column may also be a group of classes with its total probability.
    """
    q, p = log_q.exp(), log_p.exp()
    if alignment.kind == "forward_kl":
        return p * (log_p - log_q), -p
    if alignment.kind == "reverse_kl":
        term = q * (log_q - log_p)
        return term, term
    beta = alignment.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    student_term = (1.0 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + student_term, student_term


def terms_over_q(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """Return ``terms`` divided by q, formed from logarithms: finite also where q is too small for float32.

    The ratio p / q is bounded by exp(MAX_LOG_RATIO), which a target drawn from q does not reach.
    """
    if alignment.kind == "reverse_kl":
        return log_q - log_p, log_q - log_p
    p_over_q = (log_p - log_q).clamp(max=MAX_LOG_RATIO).exp()
    if alignment.kind == "forward_kl":
        return p_over_q * (log_p - log_q), -p_over_q
    beta = alignment.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    student_term = (1.0 - beta) * (log_q - log_m)
    return beta * p_over_q * (log_p - log_m) + student_term, student_term


def mixed(
    log_q: Tensor, log_p: Tensor, skew: float, weigh: Weigh, used: tuple[bool, bool] = (True, True)
) -> tuple[RowGradients, Tensor]:
    """Compute a * KL(q||p) + b * KL(p||q); return it and the weights; **overwrites** ``log_q`` and ``log_p``.

    ``weigh`` maps the two divergences ``[b]`` to the weights (a, b); ``used`` tells which of them can differ from 0.
    With ``skew`` s > 0 each KL's second distribution is mixed with its first: KL(q || (1-s) p + s q) and
    KL(p || (1-s) q + s p) (DistiLLM, arXiv 2402.03898).
    """
    if skew:
        return _mixed_skewed(log_q, log_p, skew, weigh, used)
    p = log_p.exp()
    ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    reverse, forward = torch.linalg.vecdot(q, ratio), -torch.linalg.vecdot(p, ratio)
    pairs = weigh(reverse, forward)
    a, b = pairs.split(1, dim=1)
    gradient = ratio.sub_(reverse[:, None]).mul_(a).add_(b).mul_(q).sub_(p.mul_(b))
    return RowGradients(a[:, 0] * reverse + b[:, 0] * forward, gradient, q), pairs


def _mixed_skewed(
    log_q: Tensor, log_p: Tensor, skew: float, weigh: Weigh, used: tuple[bool, bool]
) -> tuple[RowGradients, Tensor]:
    """Compute ``mixed`` with skew s > 0; a term (reverse, forward) that is not in ``used`` counts as 0.

    With m and n the two mixtures, q dD/dq is q (log q - log m - s q/m) for the reverse and -(1-s) p q/n for the forward
    term, each up to a constant times q; both ratios are bounded.  Where both p and q underflow, m and n count as the
    smallest normal number: such classes add nothing.  Buffers are reused, because new ones cost more than the passes.
    """
    q, p, least = log_q.exp(), log_p.exp(), torch.finfo(log_q.dtype).tiny
    reverse = forward = q.new_zeros(len(q))
    slopes = []  # each with the column of its weight
    if used[1]:
        n = torch.lerp(q, p, skew, out=None if used[0] else log_q).clamp_(min=least)
        slopes.append(((q / n).mul_(p).mul_(skew - 1.0), 1))
        forward = torch.linalg.vecdot(p, log_p.sub_(n.log_()))
    if used[0]:
        m = torch.lerp(p, q, skew, out=p).clamp_(min=least)
        q_over_m = torch.div(q, m, out=log_p)
        ratio = log_q.sub_(m.log_())
        reverse = torch.linalg.vecdot(q, ratio)
        slopes.append((ratio.sub_(q_over_m, alpha=skew).mul_(q), 0))
    pairs = weigh(reverse, forward)
    slope = functools.reduce(Tensor.add_, [slope.mul_(pairs[:, [column]]) for slope, column in slopes])
    gradient = slope.sub_(torch.mul(q, slope.sum(1, keepdim=True), out=log_p))
    return RowGradients(pairs[:, 0] * reverse + pairs[:, 1] * forward, gradient, q), pairs


def trust(log_ratio: Tensor, clip: float, mode: str) -> Tensor:
    """Return the factor of each row's loss, given log p(y) - log q(y): 1 where its size is within ``clip``.

    Beyond that, it is 0 for ``mask``, and ``clip`` over the size for ``scale``.  Sources: TrOPD (arXiv 2606.01249) and
    REOPOLD (arXiv 2603.11137), as we read them.
    """
    size = log_ratio.abs()
    return (size <= clip).float() if mode == "mask" else clip / size.clamp(min=clip)


def topk_tail(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> RowGradients:
    """Compute the divergence over ``top_k`` classes and one group of all others; overwrites ``log_q``.

    The classes are the teacher's most likely ones, or the student's for ``student_topk_tail``.  The classes of the
    group share its gradient in proportion to q.
    """
    ranked = log_q if alignment.estimator == "student_topk_tail" else log_p
    ids = largest(ranked, min(alignment.top_k, log_p.shape[1])).indices
    tail_log_q = without(log_q, ids)
    group_q = torch.cat([log_q.gather(1, ids), log_mass(tail_log_q)], 1)
    group_p = torch.cat([log_p.gather(1, ids), log_mass(without(log_p, ids))], 1)
    term, slope = terms(group_q, group_p, alignment)
    group_gradient = slope - group_q.exp() * slope.sum(1, keepdim=True)
    gradient = tail_log_q.sub_(group_q[:, -1:]).exp_().mul_(group_gradient[:, -1:])
    return RowGradients(term.sum(1), gradient.scatter_(1, ids, group_gradient[:, :-1]), log_q.exp_())


def sampled(log_q: Tensor, log_p: Tensor, targets: Tensor, alignment: Alignment) -> RowGradients:
    """Estimate the divergence from the target y ~ q alone; overwrites ``log_q``.

    D = E[term / q], and its gradient is E[(slope / q) (one-hot of y - q)], with ``terms_over_q`` at y.
    """
    value, slope = terms_over_q(log_q.gather(1, targets), log_p.gather(1, targets), alignment)
    q = log_q.exp_()
    return RowGradients(value[:, 0], (q * -slope).scatter_add_(1, targets, slope), q)


def decoupled(log_q: Tensor, log_p: Tensor, targets: Tensor, weights_b2: Tensor) -> RowGradients:
    """Compute decoupled KD (arXiv 2203.08679, Eq. 7): target class against the rest, and the rest among themselves.

    ``weights_b2`` are the weights of the two terms; overwrites ``log_q``.
    """
    target_weight, other_weight = weights_b2.split(1, dim=1)
    masked_q, masked_p = without(log_q, targets), without(log_p, targets)
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
    return RowGradients((target_weight * binary + other_weight * among)[:, 0], gradient, log_q.exp_())


def sparse(log_q: Tensor, targets: SparseTargets) -> RowGradients:
    """Compute sum t (log t - log q) and the term of ``residual``; overwrites ``log_q``.

    Source: RS-KD (arXiv 2503.16870), sections 3.1-3.4 and appendix A.
    """
    ids, t = targets.ids_NC, targets.probs_NC
    values = (torch.xlogy(t, t) - t * log_q.gather(1, ids)).sum(1)
    mass = t.sum(1, keepdim=True)
    lacking = (1.0 - mass).clamp_(min=0.0)
    if targets.residual == "ghost":
        used = torch.where(t > 0, ids, ids[:, :1])
        outside = without(log_q, used)
        rest = log_mass(outside)
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
    return RowGradients(values, gradient.scatter_add_(1, ids, -t), q)


def without(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return a copy with -inf at ``ids`` ``[b, K]``."""
    return log_probs.scatter(1, ids, -torch.inf)


def log_mass(log_probs: Tensor) -> Tensor:
    """Return the logarithm of each row's total ``[b, 1]``; the finite LOG_ZERO for a total of 0."""
    return log_probs.logsumexp(1, keepdim=True).clamp_(min=LOG_ZERO)
