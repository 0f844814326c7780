"""A learner of two ranks (processes, gloo) against one of a single rank: gradient, losses, metrics, checkpoints."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from learner_helpers import FAMILIES, LENGTHS, build, compiled_graphs, gradients, graphs_without_code, relative

from onpolicy_skd.distributed import ranks, rendezvous
from onpolicy_skd.learner.learner import NonFiniteLossError
from onpolicy_skd.models.batch import balance_by_tokens
from onpolicy_skd.models.loading import load_model, load_tokenizer
from onpolicy_skd.models.split_model import split

pytestmark = pytest.mark.slow

STEPS = 20
UNEVEN = [*LENGTHS, (8, 60)]  # one fills a micro-batch: the ranks have different numbers of them
SELECTIONS = {
    "top_k": {"k": 0.2},
    "tip": {"metric": "tip_soft_or", "k": 0.3},  # scaled over the batch
    "ta_opd": {"metric": "ta_opd", "k": 0.3, "top_classes": 5},
    "teacher": {"metric": "teacher_entropy", "k": 0.3},  # needs no scores of the student
    "full": {"policy": "full"},
    "gls": {"policy": "gls", "k": 0.3, "queue": 100},  # keeps all scores
    "ramp": {"metric": "tip_q3", "k": 0.3, "weighting": "ramp"},
    "masked": {"metric": "ta_opd", "k": 0.3, "weighting": "iw", "mask_tokens": list(range(30, 60))},
    "drawn": {"policy": "sampled", "k": 0.3},
}
ALIGNMENTS = {
    "reference": {"reference_weight": 0.5},
    "zones": {
        "mixture": {
            "gate": "zones",
            "student_threshold": 3.0,
            "teacher_threshold": 3.0,
            "start": [0.0, 1.0],
            "steps": 2,
        }
    },
    "skewed": {"mixture": {"gate": "constant", "reverse_weight": 1.0, "skew": 0.1}, "kd_weight": 0.5},
    "clip": {"clip": 1.0, "clip_mode": "mask"},
    "student_topk_tail": {"estimator": "student_topk_tail", "top_k": 5},
}


def trained(learner, teacher, steps, first=0):
    """Return the metrics of so many steps, each on another batch."""
    records = []
    for step in range(first, first + steps):
        batch = make_trajectories(UNEVEN, seed=step, version=learner.version)
        teacher.encode(batch)
        records.append(learner.step(batch).as_dict())
        teacher.release([t.key for t in batch])
    return records


def report(process: ranks.Ranks, folder: Path) -> dict:
    """Return all that must not depend on the number of ranks; ``folder`` holds a checkpoint of a single rank."""
    batch, result = make_trajectories(UNEVEN), {}

    def full_gradients(learner, teacher):
        return {n: process.full_tensor(g) for n, g in gradients(learner, teacher, batch).items()}

    def make(family="qwen3", tied=False, **options):
        return build(family, tied, ranks=process, budget=80, steps=STEPS, **options)

    for family, tied in FAMILIES:
        learner, teacher = make(family, tied)
        result["gradient", family, tied] = full_gradients(learner, teacher)
    learner, teacher = make(student={"activation_checkpointing": True})
    result["gradient", "qwen3", "checkpointed"] = full_gradients(learner, teacher)
    learner, teacher = make(pipeline={"packing": True}, student={"activation_checkpointing": True})
    result["gradient", "qwen3", "packed"] = full_gradients(learner, teacher)
    with graphs_without_code():
        learner, teacher = make(learner={"compile": True}, student={"activation_checkpointing": True})
    result["gradient", "qwen3", "compiled"] = full_gradients(learner, teacher)
    assert compiled_graphs() > 0
    result["names"] = [list(learner.state.named), list(dict(learner.state.weights()))]
    learner, teacher = make(lora=4, learner={"lr": 1e-2})
    result["lora"], result["merged"] = trained(learner, teacher, 3), dict(learner.state.weights())
    for name, positions in SELECTIONS.items():
        learner, teacher = make(positions=positions, learner={"lr": 1e-3})
        result["steps", name] = trained(learner, teacher, STEPS if name == "top_k" else 5)
        if name == "gls":
            result["checkpoint"] = {n: t.clone() for n, t in learner.state.tensors().items()}
            learner.state.save_pretrained(folder / f"model-{process.count}", load_tokenizer("bundled:demo_student"))
            teacher.encode(batch)
            result["weights"] = dict(learner.state.weights(torch.bfloat16))
            result["diagnostics"] = [dataclasses.asdict(i) for i in learner.scorer.diagnose_positions(batch)]
            result["divergence"] = learner.scorer.divergence(batch)
            learner.state.restore(torch.load(folder / "checkpoint.pt"), 5)
            result["resumed"] = trained(learner, teacher, 5, first=5)
    for name, alignment in ALIGNMENTS.items():
        learner, teacher = make(alignment=alignment, learner={"lr": 1e-2})
        result["steps", name] = trained(learner, teacher, 3)
    learner, teacher = make()
    learner.begin_step(5.0)
    for arrived in (batch[:3], batch[3:4], batch[4:]):
        teacher.encode(learner.local_trajectories(arrived))  # as a rank with a teacher in its process does
        learner.add_trajectories(arrived)
    result["streamed"] = learner.end_step().as_dict()
    for metric in ("student_entropy", "kl"):
        learner, teacher = make(samples={"metric": metric, "keep": 0.5})
        result["filter", metric] = [t.key for t in learner.scorer.filter(batch)[1]]
        result["scores", metric] = learner.scorer.score_samples(batch)
    wrong = [dataclasses.replace(batch[0], weight=math.nan), *batch[1:]]
    teacher.encode(wrong)
    with pytest.raises(NonFiniteLossError) as caught:
        learner.step(wrong)
    result["non_finite"] = caught.value.samples
    return result


def work(rank: int, count: int, address: tuple[str, int], folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(
        report(rendezvous.init_process_group(address, rank, count, "cpu", 120), folder), folder / f"rank-{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return the reports of a single rank and of both of two, and the folder of their files."""
    folder = tmp_path_factory.mktemp("ranks")
    learner, teacher = build(budget=80, steps=STEPS, positions=SELECTIONS["gls"], learner={"lr": 1e-3})
    trained(learner, teacher, 5)
    torch.save(learner.state.tensors(), folder / "checkpoint.pt")
    meeting = rendezvous.Rendezvous("127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_COMPILE_DISABLE", raising=False)  # which vLLM's tests in this process have set
        pair = torch.multiprocessing.spawn(work, (2, meeting.address, folder), nprocs=2, join=False)
    alone = report(ranks.Ranks(), folder)
    while not pair.join():
        pass
    return alone, *(torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)), folder


@pytest.mark.parametrize(("family", "tied"), [*FAMILIES, ("qwen3", "checkpointed"), ("qwen3", "packed")])
def test_two_ranks_have_the_gradient_of_one(reports, family, tied):
    alone, first, *_ = reports
    assert relative(first["gradient", family, tied], alone["gradient", family, tied]) < 1e-5


def test_two_ranks_with_compiled_layers_have_the_gradient_of_eager_layers_and_their_names(reports):
    alone, first, *_ = reports
    for report in (alone, first):
        assert relative(report["gradient", "qwen3", "compiled"], alone["gradient", "qwen3", False]) < 1e-5
    names = list(alone["gradient", "qwen3", False])
    assert alone["names"] == first["names"] == [names, names]


@pytest.mark.parametrize("name", [*SELECTIONS, *ALIGNMENTS])
def test_two_ranks_have_the_losses_and_metrics_of_one(reports, name):
    alone, first, second, _ = reports
    for step, expected in enumerate(alone["steps", name]):
        for record in (first["steps", name][step], second["steps", name][step]):
            assert record.keys() == expected.keys()
            for key in expected.keys() - {"learner_seconds", "teacher_wait_seconds", "padding_share"}:
                assert record[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (step, key)


def test_rank_0_has_the_full_state_and_a_run_resumes_with_another_number_of_ranks(reports):
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
    single, sharded = ((folder / f"model-{count}") for count in (1, 2))
    assert (single / "config.json").read_text() == (sharded / "config.json").read_text()
    expected = load_model(str(single), torch.float32, "cpu").state_dict()
    for name, tensor in load_model(str(sharded), torch.float32, "cpu").state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=1e-5), name


def test_two_ranks_make_the_same_streamed_step(reports):
    alone, *both, _ = reports
    assert alone["streamed"]["teacher_ending"] > 0
    for report in both:
        for key in ("loss", "grad_norm", "teacher_ending", "positions_selected"):
            assert report["streamed"][key] == pytest.approx(alone["streamed"][key], rel=1e-3), key


def test_two_ranks_score_diagnose_and_refuse_as_one(reports):
    alone, *both, _ = reports
    for report in both:
        assert report["non_finite"] == alone["non_finite"]
        assert report["divergence"] == pytest.approx(alone["divergence"], rel=1e-3)
        for metric in ("student_entropy", "kl"):
            assert report["filter", metric] == alone["filter", metric]
            assert report["scores", metric] == pytest.approx(alone["scores", metric], rel=1e-4)
        for d, expected in zip(report["diagnostics"], alone["diagnostics"], strict=True):
            assert d["key"] == expected["key"]
            assert np.allclose(d["divergence"], expected["divergence"], rtol=1e-2, atol=1e-4)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_balancing_gives_each_to_one_share_and_similar_sums_to_all(lengths, count):
    shares = balance_by_tokens(lengths, count)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)


def test_one_rank_is_the_model_as_it_is():
    student = split(tiny_model("qwen3", True), VOCABULARY)
    assert ranks.Ranks().shard(student) is student
    assert ranks.Ranks().gather("x") == ["x"]
