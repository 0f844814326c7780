"""The distillation loss over selected rows, chunk by chunk (docs/method.md, sections 2, 6 and 7).

``distillation_loss`` never holds ``[N, V]`` logits.  The gradient at the student's logit j has a closed form::

    reverse_kl   KL(q||p)                                    q_j (log q_j - log p_j - KL(q||p))
    forward_kl   KL(p||q)                                    q_j - p_j
    jsd          beta KL(p||m) + (1 - beta) KL(q||m),        (1 - beta) q_j (log q_j - log m_j - KL(q||m))
                 m = beta p + (1 - beta) q
    decoupled    a KL(p_y, 1-p_y || q_y, 1-q_y)              a (q_y - p_y) at y, elsewhere
                 + b KL(p^||q^), classes other than y        b (q^_j - p^_j) - a (q_y - p_y) q^_j
    mixture      a KL(q||p) + b KL(p||q)                     a q_j (log q_j - log p_j - KL(q||p)) + b (q_j - p_j)
    sparse       sum t_j (log t_j - log q_j)                 (sum t) q_j - t_j
    cross-entropy of the target y                            q_j - [j = y]

so each chunk's gradients to the student's hidden states and LM head are formed in the forward pass, and backward
recomputes nothing.  The formulas hold for distributions at temperature T; the logits' gradient carries 1/T.
As in TRL, jsd at beta = 0 means forward KL and at beta = 1 reverse KL, the limits of JSD/beta and JSD/(1-beta).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onpolicy_skd.loss.formulas import decoupled, exact, mixed, sampled, soften_, sparse, topk_tail, trust
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.loss.mixture import GateRows
from onpolicy_skd.loss.sparse_targets import SparseTargets
from onpolicy_skd.models.lm_head import LMHead, Projector, RowStatistics, blocks, chunk_size, chunks, log_softmax_


def distillation_loss(
    student_hidden_NH: Tensor,
    student_head: Tensor | LMHead,
    teacher: HiddenRows | SparseTargets,
    rows: Rows,
    alignment: Alignment,
    observed: RowStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted loss and the divergence of each row.

    Returns the scalar sum over rows of weight * loss, differentiable in ``student_hidden_NH`` and
    ``student_head``, and the detached divergence per row, float32 ``[N]``, nats.  The two hidden sizes may differ;
    both heads must have the same V.  For sparse targets the alignment's divergence and estimator are not used.  The
    student's entropies and log-probabilities are written to ``observed``; pass it at temperature 1 only.  Only the
    first derivative exists.  Raises ValueError if the vocabularies differ.
    """
    if isinstance(teacher, HiddenRows) and len(student_head) != len(teacher.head):
        raise ValueError(f"vocabularies differ: student {len(student_head)}, teacher {len(teacher.head)}")
    head = LMHead.of(student_head)
    tensors = (student_hidden_NH, head.weight_VH, head.bias_V)
    return _DistillationLoss.apply(*tensors, head.scale, head.cap, teacher, rows, alignment, observed)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NH, weight_VH, bias_V, scale, cap, teacher, rows, alignment, observed):
        inputs = (student_NH, weight_VH, bias_V)
        gradients = [torch.zeros_like(x) if w else None for x, w in zip(inputs, ctx.needs_input_grad, strict=False)]
        grad_hidden, grad_head, grad_bias = gradients
        # One copy per call if compute and master dtypes differ.
        head = LMHead(weight_VH, bias_V, scale, cap).to(student_NH.dtype)
        size = chunk_size(len(student_NH), head, alignment.chunk_rows)
        student_logits = Projector(head, size)
        chunk_of = teacher.__getitem__ if isinstance(teacher, SparseTargets) else teacher.logits(size)
        loss = torch.zeros((), dtype=torch.float32, device=student_NH.device)
        values_N = torch.empty(len(student_NH), dtype=torch.float32, device=student_NH.device)
        for chunk in chunks(len(student_NH), size):
            logits_cV = student_logits(student_NH[chunk])
            derivative = head.derivative(logits_cV)
            teacher_c: Any = chunk_of(chunk)
            for block in blocks(logits_cV):
                stats = None if observed is None else observed[chunk][block]
                loss_b, values_N[chunk][block] = _block(
                    logits_cV[block], teacher_c[block], rows[chunk][block], alignment, stats
                )
                loss += loss_b
            if not isinstance(derivative, float) or derivative != 1.0:
                logits_cV.mul_(derivative)  # the logits were overwritten by their gradient
            grad_products_cV = logits_cV.to(student_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_products_cV @ head.weight_VH
            if grad_head is not None:
                _accumulate(grad_head, grad_products_cV, student_NH[chunk])
            if grad_bias is not None:
                grad_bias += logits_cV.sum(0)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(values_N)
        ctx.set_materialize_grads(False)
        return loss, values_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[override]
        # Nothing else holds the buffers, so they are scaled in place, and autograd takes them without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the distillation loss was already differentiated; its gradients are formed only once")
        if grad_loss != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (*gradients, None, None, None, None, None, None)


def _accumulate(grad_head_VH: Tensor, grad_logits_cV: Tensor, hidden_cH: Tensor) -> None:
    """Add a chunk's gradient to that of the head, without a temporary where the dtypes agree."""
    if grad_head_VH.dtype == hidden_cH.dtype:
        grad_head_VH.addmm_(grad_logits_cV.T, hidden_cH)
    else:
        grad_head_VH += grad_logits_cV.T @ hidden_cH


def _block(
    logits: Tensor, teacher: Tensor | SparseTargets, rows: Rows, alignment: Alignment, stats: RowStatistics | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the divergences ``[b]``; **overwrite** ``logits`` with the gradient at the raw logits.

    The teacher's logits are overwritten too, so that exact divergences allocate at most one scratch tensor.
    """
    temperature = alignment.temperature if rows.temperature_N is None else rows.temperature_N[:, None]
    targets = rows.targets_N[:, None]
    mixture, weights = alignment.mixture, rows.weights_N
    entropy = stats.entropy_N if stats else torch.empty_like(weights) if mixture else None
    log_q = log_softmax_(soften_(logits, temperature), entropy)
    target_log_q = log_q.gather(1, targets)[:, 0]
    if stats:
        stats.logprob_N.copy_(target_log_q)
    if isinstance(teacher, SparseTargets):
        values, gradient, q = sparse(log_q, teacher)
    else:
        teacher_entropy = torch.empty_like(weights) if mixture else None
        log_p = log_softmax_(soften_(teacher, temperature), teacher_entropy)
        log_ratio = log_p.gather(1, targets)[:, 0] - target_log_q
        if alignment.clip is not None:
            weights = weights * trust(log_ratio, alignment.clip, alignment.clip_mode)
        if mixture and entropy is not None and teacher_entropy is not None:
            known = (entropy, teacher_entropy, log_ratio)
            (values, gradient, q), pairs = mixed(
                log_q,
                log_p,
                mixture.options.skew,
                lambda *divergences: mixture.weights(GateRows(*known, *divergences)),
                mixture.used,
            )
            weights = weights * pairs.any(1)  # (0, 0) skips a position, its cross-entropy too
        elif rows.decoupled_N2 is not None:
            values, gradient, q = decoupled(log_q, log_p, targets, rows.decoupled_N2)
        elif alignment.estimator in ("topk_tail", "student_topk_tail"):
            values, gradient, q = topk_tail(log_q, log_p, alignment)
        elif alignment.estimator == "sampled":
            values, gradient, q = sampled(log_q, log_p, targets, alignment)
        else:
            values, gradient, q = exact(log_q, log_p, alignment)  # reuses the storage of log_q and log_p
    kd_weight = alignment.kd_weight
    loss = kd_weight * values
    if kd_weight < 1.0:
        loss = loss - (1.0 - kd_weight) * target_log_q
        cross_entropy = q.scatter_add_(1, targets, -torch.ones_like(targets, dtype=q.dtype))
        gradient = gradient.mul_(kd_weight).add_(cross_entropy, alpha=1.0 - kd_weight)
    torch.mul(gradient, weights[:, None] / temperature, out=logits)
    return torch.dot(loss, weights), values
