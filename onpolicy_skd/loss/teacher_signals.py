"""Numbers that compare the full distributions of student and teacher at each position, in one pass over both heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onpolicy_skd.loss.formulas import soften_
from onpolicy_skd.loss.inputs import HiddenRows
from onpolicy_skd.models.lm_head import LMHead, Projector, blocks, chunk_size, chunks, largest, log_softmax_


class TeacherSignals(NamedTuple):
    """Float32 ``[N]`` each; S are the student's K most likely classes."""

    forward_kl_N: Tensor  # KL(p || q), nats
    reverse_kl_N: Tensor  # KL(q || p), nats
    teacher_mass_N: Tensor  # the teacher's probability of S
    overlap_N: Tensor  # share of S among the teacher's K most likely classes, ties with the K-th included
    margin_N: Tensor  # the teacher's largest minus second largest probability within S


@torch.no_grad()
def teacher_signals(
    student_hidden_NH: Tensor,
    student_head: Tensor | LMHead,
    teacher: HiddenRows,
    top_classes: int,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> TeacherSignals:
    """Compare both distributions at N positions; ``top_classes`` is K, of at most V.

    No ``[N, V]`` tensor exists: logits live for one chunk of rows.
    """
    student_head = student_head.to(student_hidden_NH.dtype)
    size = chunk_size(len(student_hidden_NH), student_head, chunk_rows)
    student_logits, teacher_logits = Projector(student_head, size), teacher.logits(size)
    values_5N = torch.empty(5, len(student_hidden_NH), dtype=torch.float32, device=student_hidden_NH.device)
    for chunk in chunks(len(student_hidden_NH), size):
        q_logits_cV, p_logits_cV = student_logits(student_hidden_NH[chunk]), teacher_logits(chunk)
        for block in blocks(q_logits_cV):
            log_q = log_softmax_(soften_(q_logits_cV[block], temperature))
            log_p = log_softmax_(soften_(p_logits_cV[block], temperature))
            values_5N[:, chunk][:, block] = _compare_block(log_q, log_p, min(top_classes, log_q.shape[1]))
    return TeacherSignals(*values_5N)


def _compare_block(log_q: Tensor, log_p: Tensor, top_classes: int) -> Tensor:
    """Return the signals of b rows ``[5, b]``; **overwrites** both arguments."""
    log_p_bK = log_p.gather(1, largest(log_q, top_classes).indices)  # the teacher at the student's top classes
    least_b1 = largest(log_p, top_classes).values[:, -1:]
    overlap = (log_p_bK >= least_b1).float().mean(1)
    first, second = log_p_bK.topk(2).values.exp().unbind(1)
    p = log_p.exp()
    ratio = log_p.sub_(log_q)
    forward_kl = torch.linalg.vecdot(p, ratio)
    reverse_kl = -torch.linalg.vecdot(log_q.exp_(), ratio)
    return torch.stack([forward_kl, reverse_kl, log_p_bK.exp().sum(1), overlap, first - second])
