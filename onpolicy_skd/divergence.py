"""Exact divergences between student and teacher over selected rows, chunk by chunk (docs/method.md, section 2).

``distillation_loss`` never holds ``[N, V]`` logits.  The gradient at the student's logit j has a closed form::

    reverse_kl   KL(q||p)                                    q_j (log q_j - log p_j - KL(q||p))
    forward_kl   KL(p||q)                                    q_j - p_j
    jsd          beta KL(p||m) + (1 - beta) KL(q||m),        (1 - beta) q_j (log q_j - log m_j - KL(q||m))
                 m = beta p + (1 - beta) q
    cross-entropy of the target y                            q_j - [j = y]

so each chunk's gradients to the student's hidden states and LM head are formed in the forward pass and nothing is
recomputed in backward.  The formulas hold for distributions at temperature T; the logits' gradient carries 1/T.
As in TRL, jsd at beta = 0 means forward KL and at beta = 1 reverse KL, the limits of JSD/beta and JSD/(1-beta).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from onpolicy_skd.lm_head import Projector, blocks, chunk_size, chunks, log_softmax_

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True, slots=True)
class Alignment:
    """What is minimised at a position: kd_weight * divergence + (1 - kd_weight) * cross-entropy."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_weight: float = 1.0
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in KINDS:
            raise ValueError(f"unknown divergence {self.divergence!r}; accepted: {', '.join(KINDS)}")

    @property
    def kind(self) -> str:
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return limits.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence


def distillation_loss(
    student_hidden_NH: Tensor,
    student_head_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_head_VG: Tensor,
    weights_N: Tensor,
    targets_N: Tensor,
    alignment: Alignment,
) -> tuple[Tensor, Tensor]:
    """The weighted loss and the divergence of each row.

    Returns the scalar sum over rows of weight * loss, differentiable in ``student_hidden_NH`` and
    ``student_head_VH``, and the detached divergence per row, float32 ``[N]``, nats.  The two hidden sizes may differ;
    both heads must have the same V.  Only the first derivative exists.  Raises ValueError if the vocabularies differ.
    """
    if len(student_head_VH) != len(teacher_head_VG):
        raise ValueError(f"vocabularies differ: student {len(student_head_VH)}, teacher {len(teacher_head_VG)}")
    return _Loss.apply(
        student_hidden_NH, student_head_VH, teacher_hidden_NG, teacher_head_VG, weights_N, targets_N, alignment
    )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NH, student_head, teacher_NG, teacher_head, weights_N, targets_N, alignment):
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(student_NH) if wants_hidden else None
        grad_head = torch.zeros_like(student_head) if wants_head else None
        head = student_head.to(student_NH.dtype)  # one copy a call where compute and master dtypes differ
        other = teacher_head.to(teacher_NG.dtype)
        size = chunk_size(len(student_NH), head, alignment.chunk_rows)
        student_logits = Projector(head, size, alignment.temperature)
        teacher_logits = Projector(other, size, alignment.temperature)
        loss = torch.zeros((), dtype=torch.float32, device=student_NH.device)
        values_N = torch.empty(len(student_NH), dtype=torch.float32, device=student_NH.device)
        for rows in chunks(len(student_NH), size):
            logits_cV = student_logits(student_NH[rows])
            teacher_cV = teacher_logits(teacher_NG[rows])
            for block in blocks(logits_cV):
                loss_b, values_N[rows][block] = _block(
                    logits_cV[block], teacher_cV[block], weights_N[rows][block], targets_N[rows][block], alignment
                )
                loss += loss_b
            grad_logits_cV = logits_cV.to(student_NH.dtype)  # _block turned the logits into their gradient
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits_cV @ head
            if grad_head is not None:
                _accumulate(grad_head, grad_logits_cV, student_NH[rows])
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
        return (*gradients, None, None, None, None, None)


def _accumulate(grad_head_VH: Tensor, grad_logits_cV: Tensor, hidden_cH: Tensor) -> None:
    if grad_head_VH.dtype == hidden_cH.dtype:
        grad_head_VH.addmm_(grad_logits_cV.T, hidden_cH)
    else:
        grad_head_VH += grad_logits_cV.T @ hidden_cH


def _block(logits: Tensor, teacher: Tensor, weights: Tensor, targets: Tensor, alignment: Alignment):
    """Loss and divergences of a few rows; **overwrites** ``logits`` with the gradient of the loss at the raw logits.

    ``teacher`` is overwritten too: at most a scratch is allocated here.
    """
    log_q, log_p = log_softmax_(logits), log_softmax_(teacher)
    target_log_q = log_q.gather(1, targets[:, None])[:, 0]
    values, gradient, q = _divergence(log_q, log_p, alignment)  # reuses the storage of log_q and log_p
    kd = alignment.kd_weight
    loss = kd * values
    if kd < 1.0:
        loss = loss - (1.0 - kd) * target_log_q
        cross_entropy = q.scatter_add_(1, targets[:, None], -torch.ones_like(targets[:, None], dtype=q.dtype))
        gradient = gradient.mul_(kd).add_(cross_entropy, alpha=1.0 - kd)
    torch.mul(gradient, (weights / alignment.temperature)[:, None], out=logits)
    return torch.dot(loss, weights), values


def _divergence(log_q: Tensor, log_p: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor, Tensor]:
    """Value per row, gradient at the logits, and q; both arguments may be overwritten."""
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
