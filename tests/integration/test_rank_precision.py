"""A learner of two ranks in bfloat16 and float16 against one rank: what is gathered in which type, and the results.

Each sequence is a micro-batch by itself, so that one rank and two round the same numbers; only float32 sums have
another order.  Norms have weights that bfloat16 cannot hold, so that a rounding too many shows.
"""

from pathlib import Path

import pytest
import torch
from helpers import make_trajectories, tiny_model
from learner_helpers import LENGTHS, build, gradients, relative
from torch.distributed.tensor import DTensor

from onpolicy_skd.distributed import ranks, rendezvous
from onpolicy_skd.learner.learner import GradientOverflowError

pytestmark = pytest.mark.slow

BLOCKS = ("Qwen3DecoderLayer", "LlamaDecoderLayer", "GPTNeoXLayer")
CASES = {
    "qwen3": dict(family="qwen3"),
    "tied": dict(family="llama", tied=True),
    "biases": dict(family="gpt_neox"),
    "checkpointed": dict(family="qwen3", student={"activation_checkpointing": True}),
    "float16": dict(family="qwen3", dtype="float16"),
    "lora": dict(family="qwen3", lora=4),
}
STEPS = 4


def make(process, family="qwen3", tied=False, dtype="bfloat16", lora=0, **sections):
    model = tiny_model(family, tied)
    rng = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    if lora:
        model = model.to(getattr(torch, dtype))  # as load_student does: only adapters have float32 masters
    learner = {"compute_dtype": dtype, "lr": 1e-3}
    learner, teacher = build(
        family, tied, ranks=process, budget=1, steps=STEPS, lora=lora, model=model, learner=learner, **sections
    )
    learner.state.loss_scale.value = min(learner.state.loss_scale.value, 2.0**8)  # no overflow
    return learner, teacher


def gathered_types(learner, family):
    """Return a dict that a forward fills: (in a block, kind of module) to the types of its gathered weights."""
    types = {}
    blocks = [m for m in learner.student.model.modules() if any(name in type(m).__name__ for name in BLOCKS)]
    inside = {m for block in blocks for m in block.modules()}
    for module in learner.student.model.modules():
        if list(module.parameters(recurse=False)):
            key = (module in inside, "linear" if isinstance(module, torch.nn.Linear) else "other")

            def hook(module, *_, key=key):
                for p in module.parameters(recurse=False):
                    types.setdefault(key, set()).add((str(p.dtype), isinstance(p, DTensor)))

            module.register_forward_hook(hook)
    return types


def losses(learner, teacher):
    """Return the losses of some steps, each on another batch."""
    learner.state.optimizer.zero_grad()
    values = []
    for step in range(STEPS):
        batch = make_trajectories(LENGTHS, seed=step, version=learner.version)
        teacher.release([t.key for t in batch])
        teacher.encode(batch)
        values.append(learner.step(batch).as_dict()["loss"])
    return values


def report(process: ranks.Ranks) -> dict:
    batch, result = make_trajectories(LENGTHS), {}
    for name, options in CASES.items():
        learner, teacher = make(process, **options)
        types = gathered_types(learner, options["family"])
        result["gradient", name] = {n: process.full_tensor(g) for n, g in gradients(learner, teacher, batch).items()}
        result["types", name] = types
        result["masters", name] = {str(p.dtype) for p in learner.state.named.values()}
        result["gradients", name] = {str(p.grad.dtype) for p in learner.state.named.values()}
        result["losses", name] = losses(learner, teacher)
    learner, teacher = make(process, dtype="float16")
    learner.state.loss_scale.value = 2.0**40
    teacher.encode(batch)
    with pytest.raises(GradientOverflowError):
        learner.step(batch)
    result["scale"] = learner.state.loss_scale.value
    return result


def work(rank: int, count: int, address: tuple[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(report(rendezvous.init_process_group(address, rank, count, "cpu", 120)), folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return the reports of a single rank and of both of two."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = report(ranks.Ranks())
    meeting = rendezvous.Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (2, meeting.address, folder), nprocs=2)
    return alone, *(torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1))


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_gathered_in_the_compute_type_and_nothing_else_is(reports, name):
    _, *both = reports
    coarse = f"torch.{CASES[name].get('dtype', 'bfloat16')}"
    rest = coarse if name == "lora" else "torch.float32"  # the frozen weights of adapters are coarse everywhere
    for report in both:
        types = report["types", name]
        assert types[True, "linear"] == {(coarse, False)}
        assert types[True, "other"] == types[False, "other"] == {(rest, False)}
        assert report["masters", name] == report["gradients", name] == {"torch.float32"}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_round_what_one_rank_rounds(reports, name):
    """A rounding too many would be 2e-3 of the gradient (half a step of bfloat16), or 2e-4 in float16."""
    alone, first, _ = reports
    assert relative(first["gradient", name], alone["gradient", name]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(reports, name):
    """After an update weights differ by float32 rounding, which bfloat16 turns into a step of 2^-8 here and there."""
    alone, *both = reports
    for report in both:
        assert report["losses", name][0] == pytest.approx(alone["losses", name][0], rel=1e-5)
        assert report["losses", name] == pytest.approx(alone["losses", name], rel=1e-2)


def test_an_overflow_on_one_rank_is_one_on_all(reports):
    assert {report["scale"] for report in reports} == {2.0**39}
