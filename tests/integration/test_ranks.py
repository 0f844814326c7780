"""A learner of two ranks (two processes, gloo) beside one: the same gradient, losses, metrics and checkpoints."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from learner_helpers import FAMILIES, LENGTHS, build, gradients, relative

from onpolicy_skd.distributed import ranks, rendezvous
from onpolicy_skd.learner.learner import NonFiniteLossError
from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split

STEPS = 20
UNEVEN = [*LENGTHS, (8, 60)]  # nine sequences, one of which fills a micro-batch: the ranks' shares differ in number
SELECTIONS = {
    "top_k": {"k": 0.2},
    "tip": {"metric": "tip_soft_or", "k": 0.3},  # scaled over the whole batch
    "teacher": {"metric": "teacher_entropy", "k": 0.3},  # asks nothing of the student
    "full": {"policy": "full"},
    "gls": {"policy": "gls", "k": 0.3, "queue": 100},  # remembers every score
    "drawn": {"policy": "sampled", "k": 0.3},
}


def trained(learner, teacher, steps, first=0):
    """Metrics of so many steps, the batch of each its own."""
    found = []
    for step in range(first, first + steps):
        batch = make_trajectories(UNEVEN, seed=step, version=learner.version)
        teacher.encode(batch)
        found.append(learner.step(batch))
        teacher.release([t.key for t in batch])
    return found


def report(own: ranks.Ranks, folder: Path) -> dict:
    """Everything that must not depend on the number of ranks; ``folder`` holds a checkpoint that one rank has made."""
    batch, found = make_trajectories(UNEVEN), {}

    def made(family="qwen3", tied=False, **options):
        return build(family, tied, ranks=own, budget=80, steps=STEPS, **options)

    for family, tied in FAMILIES:
        learner, teacher = made(family, tied)
        found["gradient", family, tied] = {n: own.full_tensor(g) for n, g in gradients(learner, teacher, batch).items()}
    learner, teacher = made(student={"activation_checkpointing": True})
    found["gradient", "qwen3", "again"] = {n: own.full_tensor(g) for n, g in gradients(learner, teacher, batch).items()}
    learner, teacher = made(lora=4, learner={"lr": 1e-2})
    found["lora"], found["merged"] = trained(learner, teacher, 3), dict(learner.weights())
    for name, positions in SELECTIONS.items():
        learner, teacher = made(positions=positions, learner={"lr": 1e-3})
        found["steps", name] = trained(learner, teacher, STEPS if name == "top_k" else 5)
        if name == "gls":
            found["checkpoint"] = {n: t.clone() for n, t in learner.tensors().items()}
            learner.save_pretrained(folder / f"model-{own.count}", load_tokenizer("bundled:demo_student"))
            teacher.encode(batch)
            found["weights"] = dict(learner.weights(torch.bfloat16))
            found["inspection"] = [dataclasses.asdict(i) for i in learner.diagnose_positions(batch)]
            found["divergence"] = learner.divergence(batch)
            learner.restore(torch.load(folder / "checkpoint.pt"), 5)
            found["resumed"] = trained(learner, teacher, 5, first=5)
    learner, teacher = made()
    learner.begin(5.0)
    for part in (batch[:3], batch[3:4], batch[4:]):
        teacher.encode(learner.local_trajectories(part))  # as a rank with a teacher of its own does
        learner.add(part)
    found["streamed"] = learner.finish()
    for metric in ("student_entropy", "kl"):
        learner, teacher = made(samples={"metric": metric, "keep": 0.5})
        found["filter", metric] = [t.key for t in learner.filter(batch)[1]]
        found["rank", metric] = learner.score_samples(batch)
    wrong = [dataclasses.replace(batch[0], weight=math.nan), *batch[1:]]
    teacher.encode(wrong)
    with pytest.raises(NonFiniteLossError) as caught:
        learner.step(wrong)
    found["unsound"] = caught.value.samples
    return found


def work(rank: int, count: int, address: tuple[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(
        report(rendezvous.init_process_group(address, rank, count, "cpu", 120), folder), folder / f"rank-{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of one rank, and of both of two."""
    folder = tmp_path_factory.mktemp("ranks")
    learner, teacher = build(budget=80, steps=STEPS, positions=SELECTIONS["gls"], learner={"lr": 1e-3})
    trained(learner, teacher, 5)
    torch.save(learner.tensors(), folder / "checkpoint.pt")
    alone = report(ranks.Ranks(), folder)
    meeting = rendezvous.Rendezvous("127.0.0.1")
    torch.multiprocessing.spawn(work, (2, meeting.address, folder), nprocs=2)
    return alone, *(torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)), folder


@pytest.mark.parametrize(("family", "tied"), [*FAMILIES, ("qwen3", "again")])
def test_two_ranks_have_the_gradient_of_one(reports, family, tied):
    alone, first, *_ = reports
    assert relative(first["gradient", family, tied], alone["gradient", family, tied]) < 1e-5


@pytest.mark.parametrize("name", SELECTIONS)
def test_two_ranks_have_the_losses_and_metrics_of_one(reports, name):
    alone, first, second, _ = reports
    for step, expected in enumerate(alone["steps", name]):
        for found in (first["steps", name][step], second["steps", name][step]):
            assert found.keys() == expected.keys()
            for key in expected.keys() - {"learner_seconds", "teacher_wait_seconds", "padding_share"}:
                assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (step, key)


def test_rank_0_has_the_whole_state_and_a_run_goes_on_with_another_number_of_ranks(reports):
    alone, first, second, folder = reports
    assert first["checkpoint"].keys() == alone["checkpoint"].keys()
    for name, expected in alone["checkpoint"].items():
        assert torch.allclose(first["checkpoint"][name], expected, rtol=1e-3, atol=1e-5), name
    assert all(not second["weights"][name].numel() for name in alone["weights"])
    for name, expected in alone["weights"].items():
        assert first["weights"][name].dtype == torch.bfloat16
        assert torch.allclose(first["weights"][name], expected, rtol=2e-2, atol=1e-3), name
    for step, expected in enumerate(alone["lora"]):
        assert first["lora"][step]["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for name, expected in alone["merged"].items():
        assert torch.allclose(first["merged"][name], expected, rtol=1e-2, atol=1e-3), name
    for step, expected in enumerate(alone["resumed"]):
        assert first["resumed"][step]["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    one, other = ((folder / f"model-{count}") for count in (1, 2))
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    expected = load_model(str(one), torch.float32, "cpu").state_dict()
    for name, tensor in load_model(str(other), torch.float32, "cpu").state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), name


def test_two_ranks_make_the_same_step_of_parts(reports):
    alone, *both, _ = reports
    assert alone["streamed"]["teacher_ending"] > 0
    for found in both:
        for key in ("loss", "grad_norm", "teacher_ending", "positions_selected"):
            assert found["streamed"][key] == pytest.approx(alone["streamed"][key], rel=1e-3), key


def test_two_ranks_rank_inspect_and_refuse_as_one(reports):
    alone, *both, _ = reports
    for found in both:
        assert found["unsound"] == alone["unsound"]
        assert found["divergence"] == pytest.approx(alone["divergence"], rel=1e-3)
        for metric in ("student_entropy", "kl"):
            assert found["filter", metric] == alone["filter", metric]
            assert found["rank", metric] == pytest.approx(alone["rank", metric], rel=1e-4)
        for one, expected in zip(found["inspection"], alone["inspection"], strict=True):
            assert one["key"] == expected["key"]
            assert np.allclose(one["divergence"], expected["divergence"], rtol=1e-2, atol=1e-4)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_dealing_gives_each_to_one_hand_and_like_sums_to_all(lengths, hands):
    dealt = balance_by_tokens(lengths, hands)
    assert sorted(i for hand in dealt for i in hand) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in hand) for hand in dealt]
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_one_rank_is_the_model_as_it_is():
    student = split(tiny_model("qwen3", True), VOCABULARY)
    assert ranks.Ranks().shard(student) is student
    assert ranks.Ranks().gather("x") == ["x"]
