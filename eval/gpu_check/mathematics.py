"""Checks of loss, steps, checkpoints, masks and logits against float64 or the CPU, without vLLM and Ray."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.gpu_bench import SHAPES, card, learner_step, predicted_gb, seconds_of
from eval.gpu_check.report import Report
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.learner.learner import GradientOverflowError, Learner
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.loss.divergence import distillation_loss
from onpolicy_skd.loss.inputs import Alignment, HiddenRows, Rows
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.document_attention import document_attention
from onpolicy_skd.models.lm_head import keeps_float32_sums, project
from onpolicy_skd.models.loading import load_model, pick_dtype
from onpolicy_skd.models.split_model import split
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import Trajectory

STUDENT, TEACHER, VOCABULARY = "bundled:demo_student", "bundled:demo_teacher", 512
LEAST_SHARE = 0.3  # least rate of the backbone, as a share of the rate of a large matrix product
HEADROOM = 1.2  # memory of the card over the estimate of a step, for the CUDA context and fragmentation
Gradients = tuple[StepRecord, Tensor, Learner]


def check(report: Report, device: str, small: bool) -> None:
    """Run all checks; ``small`` leaves out the real shapes."""
    with report.guard("loss"):
        check_loss(report, device)
    with report.guard("step"):
        check_steps(report, device)
    with report.guard("padding mask"):
        check_mask(report, device)
    with report.guard("packed documents"):
        check_documents(report, device)
    with report.guard("logits"):
        check_logits(report, device)
    if device == "cpu":
        for name in ("attention without a mask", "step at Qwen3-1.7B's shape", "CUDA IPC"):
            report.skip(name, "needs a GPU")
        return
    with report.guard("attention without a mask"):
        check_attention(report)
    if not small:
        with report.guard("step at Qwen3-1.7B's shape"):
            check_real_shape(report)
    with report.guard("CUDA IPC"):
        check_ipc(report)


# -- the loss --------------------------------------------------------------------------------------------------------


def check_loss(report: Report, device: str) -> None:
    """Compare the loss and its gradients with float64, on inputs rounded to the same dtype."""
    rng = torch.Generator().manual_seed(0)
    vocabulary, student, teacher, rows = 4096, 256, 512, 96
    sizes = ((rows, student), (vocabulary, student), (rows, teacher), (vocabulary, teacher))
    inputs = [torch.randn(*size, dtype=torch.float64, generator=rng) for size in sizes]
    inputs[1] /= 6
    inputs[3] /= 9
    weights, targets = torch.rand(rows, generator=rng), torch.randint(0, vocabulary, (rows,), generator=rng)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        rounded = [x.to(dtype).double() for x in inputs]
        exact = _exact_loss(rounded, weights)
        got = _loss(rounded, weights, targets, device, dtype)
        for name, value in exact.items():
            error = ((got[name] - value).norm() / value.norm()).item()
            report.at_most(f"loss, {str(dtype).removeprefix('torch.')}, {name}: relative error", error, bound)


def _loss(inputs: list[Tensor], weights: Tensor, targets: Tensor, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    hidden = inputs[0].to(device, dtype).requires_grad_()
    head = inputs[1].to(device, torch.float32).requires_grad_()  # masters
    teacher = HiddenRows(inputs[2].to(device, dtype), inputs[3].to(device, dtype))
    rows = Rows(weights.to(device), targets.to(device))
    loss, values = distillation_loss(hidden, head, teacher, rows, Alignment())
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    gradients = {"gradient of hidden states": hidden.grad, "gradient of the head": head.grad}
    return {name: t.double().cpu() for name, t in ({"divergence": values} | gradients).items()}


def _exact_loss(inputs: list[Tensor], weights: Tensor) -> dict[str, Tensor]:
    """Return the reverse KL ``[N]`` of each row, nats, and the gradients of their weighted sum, in float64."""
    hidden, head = (x.clone().requires_grad_() for x in inputs[:2])
    log_q, log_p = (hidden @ head.T).log_softmax(-1), (inputs[2] @ inputs[3].T).log_softmax(-1)
    values = (log_q.exp() * (log_q - log_p)).sum(-1)
    (values * weights).sum().backward()
    assert hidden.grad is not None
    assert head.grad is not None
    gradients = {"gradient of hidden states": hidden.grad, "gradient of the head": head.grad}
    return {"divergence": values.detach()} | gradients


# -- steps -----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, Mapping[str, Any], float]] = {  # dtype, settings, bound of the loss's relative error
    "float32": ("float32", {}, 1e-4),
    "float32, packed": ("float32", {"pipeline": {"packing": True}}, 1e-4),
    "float32, activations recomputed": ("float32", {"student": {"activation_checkpointing": True}}, 1e-4),
    "float32, layers compiled": ("float32", {"learner": {"compile": True}}, 1e-4),
    "float16": ("float16", {}, 1e-2),
    "bfloat16": ("bfloat16", {}, 5e-2),
    "bfloat16, packed": ("bfloat16", {"pipeline": {"packing": True}}, 5e-2),
    "bfloat16, packed, activations recomputed": (
        "bfloat16", {"pipeline": {"packing": True}, "student": {"activation_checkpointing": True}}, 5e-2,
    ),
    "bfloat16, packed, layers compiled": (
        "bfloat16", {"pipeline": {"packing": True}, "learner": {"compile": True}}, 5e-2,
    ),
}  # fmt: skip


def trajectories(lengths: list[tuple[int, int]]) -> list[Trajectory]:
    """Return random trajectories of these prompt and response lengths."""
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            f"t{i}", rng.integers(2, VOCABULARY, prompt), rng.integers(2, VOCABULARY, response),
            np.zeros(response, np.float32), "stop", 0,
        )
        for i, (prompt, response) in enumerate(lengths)
    ]  # fmt: skip


BATCH = trajectories([(9, n) for n in (17, 59, 31, 44, 23, 50, 38, 27)])


def gradients_of_step(device: str, dtype: str, sections: Mapping[str, Any]) -> Gradients:
    """Make one step of the bundled pair; return its record, its gradient before clipping, and the learner."""
    tree: dict[str, Any] = {
        "run": {"device": device, "timeline": None}, "sync": {"max_gap": 1e9},
        "data": {"source": "demo", "max_prompt_tokens": 96}, "rollout": {"max_tokens": 128, "dtype": dtype},
        "student": {"model": STUDENT}, "teacher": {"model": TEACHER, "dtype": dtype},
        "positions": {"k": 1.0},  # with fewer, rounding would change which positions are selected
        "learner": {"compute_dtype": dtype, "warmup_steps": 0, "lr": 1e-3},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    cfg = resolve(tree)
    teacher_model = split(load_model(TEACHER, pick_dtype(dtype, device), device), VOCABULARY)
    teacher = Teacher(teacher_model, 8192, 0, packed=cfg.pipeline.packing)
    student = split(load_model(STUDENT, torch.float32, device), VOCABULARY)
    learner = Learner(student, teacher, cfg, 0, 10)
    teacher.encode(BATCH)
    while True:
        learner.begin_step(float(len(BATCH)))
        learner.add_trajectories(BATCH)
        grads = [p.grad.flatten().double().cpu() for p in learner.state.named.values() if p.grad is not None]
        gradient = torch.cat(grads) / learner.state.loss_scale.value
        try:
            return learner.end_step(), gradient, learner
        except GradientOverflowError:
            continue  # try again with half the loss scale


def check_steps(report: Report, device: str) -> None:
    """Compare a step with the same step on the CPU in float32; run it twice; restore a checkpoint on the device."""
    base, exact, learner = gradients_of_step("cpu", "float32", {})
    for name, (dtype, sections, bound) in VARIANTS.items():
        record, gradient, learner = gradients_of_step(device, dtype, sections)
        report.at_most(f"step, {name}: relative difference of the loss", abs(record.loss / base.loss - 1), bound)
        error = ((gradient - exact).norm() / exact.norm()).item()
        report.at_most(f"step, {name}: relative difference of the gradient", error, 2 * bound)
        report.note(f"step, {name}: visible share of the update", record.update_visible or 0.0)
    first, second = (gradients_of_step(device, "bfloat16", {})[1] for _ in range(2))
    report.note("the same step twice: relative difference", ((first - second).norm() / first.norm()).item())
    state = {name: tensor.cpu() for name, tensor in learner.state.tensors().items()}
    _, _, fresh = gradients_of_step(device, "bfloat16", {})
    with torch.no_grad():  # ``fresh`` has made the same step: change it, so that only a restore makes it equal again
        for parameter in fresh.state.named.values():
            parameter.add_(1.0)
    fresh.state.restore(state, learner.version)
    restored = fresh.state.tensors()
    worst = max((restored[n].cpu().double() - t.double()).abs().max().item() for n, t in state.items() if t.numel())
    report.at_most("a checkpoint restored: largest difference", worst, 0.0)


# -- kernels ---------------------------------------------------------------------------------------------------------


def check_mask(report: Report, device: str) -> None:
    """Compare hidden states with and without the attention mask of padding on the right."""
    model = load_model(STUDENT, torch.float32, device).eval()
    batch = collate(BATCH, 0, device)
    with torch.no_grad():
        out = model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
            use_cache=False,
        )  # fmt: skip
        difference = (split(model, VOCABULARY).hidden(batch) - batch.eligible(out.last_hidden_state)).abs().max()
    report.at_most("the mask of padding on the right left out: largest difference", difference.item(), 1e-4)


def check_logits(report: Report, device: str) -> None:
    """Measure the error of logits, of mean magnitude 36, from bfloat16 rows."""
    rng = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 2048, generator=rng).to(device, torch.bfloat16) for n in (64, 1024))
    exact = hidden.double() @ head.double().T
    logits = project(hidden, head.T, torch.empty(64, 1024, device=device))
    error, rounded = ((x.double() - exact).abs().mean().item() for x in (logits, hidden @ head.T))
    report.note("mean error of logits rounded to bfloat16", rounded)
    if keeps_float32_sums(hidden.device):
        report.at_most("mean error of logits as formed here", error, 1e-2 * rounded)
    else:
        report.skip("mean error of logits as formed here", "products of bfloat16 have no float32 output on a CPU")


def check_attention(report: Report) -> None:
    """Time one layer's attention: with a mask and repeated keys and values, and causal and grouped without a mask."""
    from torch.nn.functional import scaled_dot_product_attention as attention

    q, k, v = (torch.randn(12, heads, 640, 128, device="cuda", dtype=torch.bfloat16) for heads in (16, 8, 8))
    mask = torch.ones(12, 1, 640, 640, dtype=torch.bool, device="cuda").tril()
    mask[:6, :, :, 400:] = False
    mask |= torch.eye(640, dtype=torch.bool, device="cuda")
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    masked = seconds_of(lambda: attention(q, *repeated, attn_mask=mask), "cuda")
    plain = seconds_of(lambda: attention(q, k, v, is_causal=True, enable_gqa=True), "cuda")
    report.note("attention of a layer with a mask, ms", 1e3 * masked)
    report.at_most("attention of a layer without one, share of that time", plain / masked, 1.0)


def check_documents(report: Report, device: str) -> None:
    """Compare attention over packed documents, and its gradients, with a dense mask; on a GPU, also time both."""
    length, size, dtype = (4096, 128, torch.bfloat16) if device == "cuda" else (64, 16, torch.float32)
    lengths = torch.tensor([length // 16 - 3] * 16 + [48], device=device)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    document = torch.repeat_interleave(lengths)
    mask = (document[:, None] == document[None]).tril()[None, None]
    q, k, v = (torch.randn(1, n, length, size, device=device, dtype=dtype).requires_grad_() for n in (16, 8, 8))

    def masked(kind: torch.dtype) -> list[Tensor]:
        keys, values = (x.to(kind).repeat_interleave(2, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q.to(kind), keys, values, attn_mask=mask)
        return [out.transpose(1, 2), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    def packed() -> list[Tensor]:
        longest = int(lengths.max())
        out, _ = document_attention(None, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=longest)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    bound = 2e-2 if device == "cuda" else 1e-5
    for name, actual, exact in zip(("output", "dq", "dk", "dv"), packed(), masked(torch.float32), strict=True):
        error = ((actual.float() - exact.float()).norm() / exact.float().norm()).item()
        report.at_most(f"attention of packed documents, {name}: relative error", error, bound)
    if device == "cuda":
        share = seconds_of(packed, device) / seconds_of(lambda: masked(dtype), device)
        report.at_most("attention of packed documents, forward and backward: share of the time with a mask", share, 1.0)


def check_real_shape(report: Report) -> None:
    """Measure steps of 8,192 tokens at Qwen3-1.7B's shape: rate relative to the card's, memory to the estimate."""
    shape, device = SHAPES["qwen3"], card("cuda")
    for recomputed in (True, False):
        name = f"step of 8,192 tokens, activations {'recomputed' if recomputed else 'kept'}"
        predicted = predicted_gb(shape, 8192, 0.2, recomputed)
        if HEADROOM * predicted > device["gb"]:
            report.skip(name, f"needs about {HEADROOM * predicted:.0f} GB; the card has {device['gb']:.0f}")
            continue
        result = learner_step(shape, 8192, "cuda", checkpointing=recomputed)
        if "error" in result:
            report.true(name, False, result["error"], "fits")
            continue
        report.note(f"{name}: seconds", result["seconds"])
        report.note(f"{name}: TFLOP/s in the backbone", result["computed_flops_per_second"] / 1e12)
        share = result["computed_flops_per_second"] / device["reached"]["flops"]
        report.at_least(f"{name}: share in the backbone of the rate of a large product", share, LEAST_SHARE)
        report.at_most(f"{name}: peak GB", result["extra_gb"], predicted + 3)


READER = """
import pickle, sys, torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
torch.cuda.init()
uuid = str(torch.cuda.get_device_properties(0).uuid)
print(rebuild_cuda_tensor(*pickle.load(open(sys.argv[1], "rb"))[uuid]).long().sum().item())
"""


def check_ipc(report: Report, run: Callable[..., Any] = subprocess.run) -> None:
    """Check that another process reads the bytes that ``exported`` offers through CUDA IPC."""
    from onpolicy_skd.distributed.weight_transfer import WeightSpec, exported

    named = list(load_model(STUDENT, torch.bfloat16, "cuda").named_parameters())
    spec, kept = exported(named, WeightSpec.of((n, p.dtype, p.shape) for n, p in named))
    with tempfile.NamedTemporaryFile() as file:
        pickle.dump(spec.handles, file)
        file.flush()
        done = run([sys.executable, "-c", READER, file.name], capture_output=True, text=True, check=False)
    same = done.stdout.strip() == str(kept.long().sum().item())
    report.true("CUDA IPC: another process reads the same", same, done.stderr[-200:] or str(same), "the same bytes")
