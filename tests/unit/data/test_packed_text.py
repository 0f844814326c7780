"""General text: what is packed, from which files, and that documents stay apart."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow
import pytest
import torch
from helpers import VOCABULARY, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from onpolicy_skd import train
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.data.packed_text import pack, samples
from onpolicy_skd.data.references import of_text
from onpolicy_skd.data.rows import DataError
from onpolicy_skd.evaluation.diagnostics import PositionDiagnostics
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.learner.probe import Probe
from onpolicy_skd.models import loading as models
from onpolicy_skd.models import split_model
from onpolicy_skd.models.batch import collate
from onpolicy_skd.models.loading import load_tokenizer
from onpolicy_skd.models.split_model import split
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.selection.prefilter import fingerprint
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import Trajectory

TEXTS = ["Tom has 3 red apples.", "  \n", "Ann buys 12 pens and gives 5 away.", "One <|end|> two.", "x" * 300]
FAMILIES = ("qwen3", "llama", "gpt_neox")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled:demo_student")


def text_settings(file=None, **data):
    section = {"source": "text", "sequence_length": 16, **({"train_file": file} if file else {}), **data}
    return tiny_settings(mode="off_policy", data=section)


def write_all(folder):
    """The same documents in every format."""
    rows = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    for i, t in enumerate(TEXTS):
        (folder / "txt").mkdir(exist_ok=True)
        (folder / "txt" / f"{i}.txt").write_text(t)
    (folder / "hub").mkdir()
    (folder / "hub" / "train.jsonl").write_text((folder / "a.jsonl").read_text())


def tokens_of(text):
    return np.concatenate([np.asarray(p.token_ids) for p in text])


@pytest.mark.parametrize("where", ["a.jsonl", "a.parquet", "txt", "hub"])
def test_every_source_gives_the_same_stream(where, tmp_path, tokenizer):
    write_all(tmp_path)
    data = {"name": str(tmp_path / "hub")} if where == "hub" else {"train_file": tmp_path / where}
    text = pack(text_settings(**data).data, tokenizer, tmp_path / "packed", lambda _: None)
    end = tokenizer.eos_token_id
    expected = [end]
    for document in (TEXTS[0], *TEXTS[2:]):  # blank ones are left out
        expected += [*tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]
    assert tokens_of(text).tolist() == expected[: len(expected) // 16 * 16]
    assert expected.count(end) == 5  # what a document spells out is no end of it


def test_packed_once_and_reused_until_something_changes(tmp_path, tokenizer):
    write_all(tmp_path)
    said = []
    for settings in (text_settings(tmp_path / "a.jsonl"), text_settings(tmp_path / "a.jsonl", sequence_length=8)):
        pack(settings.data, tokenizer, tmp_path / "packed", said.append)
    assert "reused" in said[-1]
    assert len(list((tmp_path / "packed").glob("*.tokens"))) == 1
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "More."}) + "\n")
    pack(text_settings(tmp_path / "a.jsonl").data, tokenizer, tmp_path / "packed", said.append)
    assert len(list((tmp_path / "packed").glob("*.tokens"))) == 2


def test_a_token_budget_ends_the_text(tmp_path, tokenizer):
    write_all(tmp_path)
    said = []
    assert len(pack(text_settings(tmp_path / "a.jsonl", tokens=70).data, tokenizer, tmp_path / "p", said.append)) == 4
    pack(text_settings(tmp_path / "a.jsonl", tokens=10**6).data, tokenizer, tmp_path / "p", said.append)
    assert any("data.tokens=1000000, but there are only" in line for line in said)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"id": 1}\n', r"a.jsonl row 1: column 'text' is missing or not text; this row has 'id'"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', r"a.jsonl row 2: column 'text' is missing or not text"),
        ("a.jsonl", "nonsense\n", r"a.jsonl line 1: not JSON"),
        ("a.parquet", "nonsense", r"a.parquet: not a readable parquet file"),
        ("a.txt", b"\xff\xfe\xff", r"a.txt: cannot be read as UTF-8 text"),
        ("a.txt", "x" * 70_000_000, r"a.txt: over 64 MiB, and a .txt file is one document"),
        ("a.txt", "short", r"a.txt: holds \d+ tokens, less than data.sequence_length"),
        ("a.csv", "x", r"no text there; accepted: .jsonl, .parquet, .txt or a folder of them"),
        ("none.txt", None, r"no text there"),
    ],
)
def test_bad_text_is_refused_by_file_and_row(name, content, match, tmp_path, tokenizer):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=match):
        pack(text_settings(tmp_path / name).data, tokenizer, tmp_path / "packed", lambda _: None)
    assert not list((tmp_path / "packed").glob("*.tokens")) or "less than" in match


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"source": "text"}}, "data.source=text needs that"),
        ({"data": {"source": "text", "name": "a", "train_file": "b"}}, "one of them"),
        ({"mode": "on_policy"}, "accepted with mode=off_policy only, not on_policy"),
        ({"references": {"supervise": "all"}}, "packed text is its own reference"),
        ({"samples": {"keep": 0.5, "when": "prefilter", "prefilter_text": "rollout"}}, "whole samples are scored"),
        (
            {"data": {"source": "text", "name": "a", "train_problems": 9}},
            "text has tokens, not problems; use data.tokens",
        ),
        ({"data": {"source": "text", "name": "a", "validation_problems": 9}}, "holds out samples; not accepted"),
        ({"data": {"source": "demo", "sequence_length": 9}}, "data.sequence_length=9: accepted with data.source=text"),
        ({"data": {"source": "text", "name": "a", "sequence_length": 9_999}}, "data.sequence_length = 9999 tokens"),
    ],
)
def test_impossible_settings_of_text_are_refused(sections, match):
    tree = {"mode": "off_policy", "data": {"source": "text", "name": "some"}, **sections}
    with pytest.raises(ConfigError, match=match):
        resolve(tree)


# -- documents stay apart ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=32, max_size=32), st.integers(4, 16))
def test_a_document_starts_at_the_token_that_ended_the_one_before(tokens, length):
    text = samples("t", np.array(tokens, "<u4"), length, 0, separate=True)
    assert len(text) == 32 // length
    for sample in text:
        expected = [i for i, token in enumerate(sample.token_ids) if token == 0 and i > 0]
        assert sample.documents.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents_are_computed_as_if_each_were_alone(family, attention, masked):
    model = tiny_model(family, tied=False)
    model.set_attn_implementation(attention)
    student, rng = split(model, VOCABULARY), np.random.default_rng(0)
    assert student.reads_documents
    student = dataclasses.replace(student, reads_documents=not masked)
    pieces = [rng.integers(2, VOCABULARY, n) for n in (5, 1, 9, 4)]
    packed = of_pieces("a", pieces)
    other = of_pieces("b", [rng.integers(2, VOCABULARY, 30)])  # longer, so that the other row is padded
    for side in ("right", "left"):
        batch = collate([packed, other], 0, padding_side=side)
        together = student.hidden(batch).split([18, 29])[0]
        starts = [0, 5, 6, 15, 19, 30, 60] if side == "right" else [0, 11, 16, 17, 26, 30, 60]  # padding is a document
        assert batch.cu_seq_lens.tolist() == starts
        assert batch.max_length == 30
        alone = [model.base_model(input_ids=torch.as_tensor(p)[None]).last_hidden_state[0] for p in pieces]
        torch.testing.assert_close(together, torch.cat(alone)[:-1], rtol=1e-4, atol=1e-5)
    split_model.check_documents(student, 0, 30)


def of_pieces(key, pieces):
    ids = np.concatenate(pieces)
    starts = np.cumsum([len(p) for p in pieces])[:-1]
    return Trajectory(key, ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), "stop", None, documents=starts)


def test_a_sliding_window_is_not_overridden_silently():
    student = split(tiny_model("qwen3", False), VOCABULARY)
    student.model.config.use_sliding_window, student.model.config.sliding_window = True, 16
    split_model.check_documents(student, 0, 16)
    with pytest.raises(models.ModelError, match="reaches 16 tokens back"):
        split_model.check_documents(student, 0, 17)
    student.model.config.use_sliding_window = False
    split_model.check_documents(student, 0, 17)


def test_prefilter_scores_know_whether_documents_are_joined(tmp_path, tokenizer):
    write_all(tmp_path)
    fingerprints = set()
    for documents in ("separate", "joined"):
        settings = text_settings(tmp_path / "a.jsonl", documents=documents)
        fingerprints.add(fingerprint(settings, pack(settings.data, tokenizer, tmp_path / "packed", lambda _: None)))
    assert len(fingerprints) == 2


def test_the_bandits_probe_keeps_documents_apart():
    """Teacher = student: no divergence, also after a checkpoint."""
    model = split(tiny_model("qwen3", False), VOCABULARY)
    teacher = Teacher(model, 10_000, 0)
    sample = of_pieces("a", [np.arange(2, 9), np.arange(20, 31), np.arange(40, 44)])
    learner = Learner(
        split(tiny_model("qwen3", False), VOCABULARY), teacher, text_settings("a", sequence_length=22), 0, 9
    )
    teacher.encode([sample])
    probe = Probe.of([sample], teacher)
    for again in (probe, Probe.from_state_dict(probe.state_dict())):
        assert learner.scorer.divergence(again.trajectories, again.rows) == pytest.approx(0.0, abs=1e-6)


def test_two_runs_may_pack_the_same_text_at_once(tmp_path, tokenizer):
    write_all(tmp_path)
    settings = text_settings(tmp_path / "a.jsonl")

    def again(text):  # a second run starts and finishes while the first is in the middle of it
        if "packed" in text and not list((tmp_path / "packed").glob("*.tokens")):
            again.second = pack(settings.data, tokenizer, tmp_path / "packed", lambda _: None)

    first = pack(settings.data, tokenizer, tmp_path / "packed", again)
    assert tokens_of(first).tolist() == tokens_of(again.second).tolist()
    assert not list((tmp_path / "packed").glob(".*"))


def test_joined_documents_are_read_as_one_text(tmp_path, tokenizer):
    write_all(tmp_path)
    batches = {}
    for documents in ("separate", "joined"):
        settings = text_settings(tmp_path / "a.jsonl", documents=documents, sequence_length=32)
        sample = pack(settings.data, tokenizer, tmp_path / "packed", lambda _: None)[0]
        batches[documents] = collate([of_text(sample, "a")], 0)
    assert batches["joined"].cu_seq_lens is None
    assert batches["separate"].cu_seq_lens is not None
    assert batches["joined"].position_ids[0].tolist() == list(range(32))
    assert batches["separate"].position_ids.max() < 31


def test_a_model_that_looks_across_documents_is_refused():
    student = split(tiny_model("qwen3", False), VOCABULARY)
    layer = student.model.base_model.layers[1]
    forward = layer.forward

    def smearing(hidden, *arguments, **options):
        return forward(hidden, *arguments, **options) + hidden.cumsum(1)

    layer.forward = smearing
    with pytest.raises(models.ModelError, match="does not keep packed documents apart"):
        split_model.check_documents(student, 0, 30)
    student.model.config._attn_implementation = "flash_attention_2"
    student = dataclasses.replace(student, reads_documents=False)
    with pytest.raises(models.ModelError, match="takes no mask of documents"):
        split_model.check_documents(student, 0, 30)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_text_and_holds_out_its_end(tmp_path, tokenizer):
    write_all(tmp_path)
    settings = tiny_settings(
        mode="off_policy", data={"source": "text", "train_file": tmp_path / "a.jsonl", "sequence_length": 8},
        run={"dir": tmp_path}, eval={"divergence_prompts": 3}, learner={"batch_size": 4},
    )  # fmt: skip
    run = prepare(settings, lambda _: None)
    text = pack(settings.data, tokenizer, tmp_path / "text", lambda _: None)
    assert [p.key for p in run.held_out] == [p.key for p in text[len(text) - 3 :]]
    assert len(run.train) == len(text) - 3
    step = run.references(run.train, 0)
    assert len(step) == 4
    for t in step:
        assert t.policy_version is None
        assert len(t.response_ids) == 7
        number = int(t.prompt_key.rpartition("#")[2]) - 1
        assert [*t.prompt_ids, *t.response_ids] == run.train[number].token_ids
    assert not run.samples_student
    with pytest.raises(ConfigError, match=r"eval\.divergence_prompts=500: so many samples are held out"):
        prepare(settings.model_copy(update={"eval": settings.eval.model_copy(update={"divergence_prompts": 500})}))


def test_held_out_text_is_evaluated_by_its_divergence_alone(tmp_path, tokenizer):
    write_all(tmp_path)
    settings = tiny_settings(
        mode="off_policy", data={"source": "text", "train_file": tmp_path / "a.jsonl", "sequence_length": 8},
        run={"dir": tmp_path}, eval={"divergence_prompts": 3},
    )  # fmt: skip
    run = prepare(settings, lambda _: None)

    class Workers:
        def diagnose_positions(self, trajectories):
            assert [t.length for t in trajectories] == [8, 8, 8]
            return [PositionDiagnostics(t.key, np.ones(7), np.full(7, 0.25), np.ones(7, bool)) for t in trajectories]

    done = train.student_evaluation(run, Workers())
    assert done.result == {"problems": 0, "divergence_reference": 0.25}
    run.paths.final.mkdir(parents=True)
    with train.RunLogger(run, 0, {}) as book:
        book.evaluation("before", 0, done)
        book.evaluation("after", 2, done)
        book.conclude("finished")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["divergence_reference"] == {"before": 0.25, "after": 0.25, "teacher": None}
    page = (run.folder / "report.md").read_text()
    assert "Held-out forward_kl per token of reference texts: 0.2500 nats before, 0.2500 after." in page
    assert "held-out problems" not in page


@pytest.mark.slow
def test_half_a_million_tokens_stream_through_in_constant_memory(tmp_path):
    """Peak memory of packing and reading 500k tokens is within a few MiB of that for a tenth."""
    script = textwrap.dedent("""
        import json, resource, sys
        from pathlib import Path
        from onpolicy_skd.config.loading import resolve
        from onpolicy_skd.data.packed_text import pack
        from onpolicy_skd.models.loading import load_tokenizer
        from onpolicy_skd.data.references import of_text
        folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
        data = resolve({"mode": "off_policy", "data": {"source": "text", "train_file": folder / "a.jsonl",
                        "tokens": tokens}}).data
        text = pack(data, load_tokenizer("bundled:demo_student"), folder / "packed", lambda _: None)
        seen = sum(len(of_text(p, p.key).response_ids) for p in text)
        print(seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """)
    line = json.dumps({"text": "Ann has 12 pens and Tom has 7 more than she does, which makes 19 pens in all. " * 40})
    (tmp_path / "a.jsonl").write_text((line + "\n") * 3_000)

    def peak(tokens):
        command = [sys.executable, "-c", script, str(tmp_path), str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seen, mebibytes = done.stdout.split()
        assert int(seen) == tokens // 512 * 511
        return float(mebibytes)

    assert peak(500_000) - peak(50_000) < 12  # the mapped file itself is 1.9 MiB
