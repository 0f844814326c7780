"""Teacher caches: what they return, their size in bytes, and detection of damage."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_trajectories, tiny_model, tiny_settings
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd import cache as driver
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import resolve
from onpolicy_skd.config.validation import ASK_TEACHER
from onpolicy_skd.learner.learner import Learner
from onpolicy_skd.loss.sparse_targets import Draws, SparseTargets, rs_kd
from onpolicy_skd.models.loading import load_model
from onpolicy_skd.models.split_model import split
from onpolicy_skd.run.prepare import prepare
from onpolicy_skd.selection.metrics import METRICS, RANGES, Signals
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher import cache_provenance as provenance
from onpolicy_skd.teacher import cache_reader
from onpolicy_skd.teacher.cache_format import CacheError, Layout, Manifest
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.teacher.cached_teacher import CachedClasses, CachedHidden
from onpolicy_skd.teacher.teacher import Teacher
from onpolicy_skd.types import seed_of

LENGTHS = [(5, 9), (3, 20), (12, 4), (7, 1), (2, 15), (9, 11)]
SAMPLERS = ("rs_kd", "top_k", "top_k_normalised", "top_p", "ghost_token", "naive_fix", "label_smoothing")


def settings_for(sampler="none", **sections):
    classes = {"none": {}, "rs_kd": {"draws": 20}}.get(sampler, {"k": 7} | ({"p": 0.6} if sampler == "top_p" else {}))
    tree = {"mode": "off_policy", "classes": {"sampler": sampler, **classes}, **sections}
    return tiny_settings(**tree)


def tiny_teacher(tokens_per_batch=10_000):
    return Teacher(split(tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY), tokens_per_batch, 0)


def make_cache(folder, settings, trajectories, teacher=None, vocabulary=VOCABULARY, per_shard=25):
    """A complete cache of ``trajectories``, without Ray."""
    teacher, folder = teacher or tiny_teacher(), folder / "cache"
    folder.mkdir()
    cut = caches.cut([len(t.response_ids) for t in trajectories], per_shard)
    layout = Layout.of(settings, vocabulary)
    shards = [
        caches.write_shard(folder, i, [trajectories[j] for j in indices], teacher, settings, vocabulary)
        for i, indices in enumerate(cut)
    ]
    head = caches.write_head(folder, teacher.head()) if layout.content == "hidden" else None
    caches.complete(folder, Manifest({}, layout, caches.plan_of([t.digest for t in trajectories], cut), head, shards))
    return folder


@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 30), st.integers(0, 5))
def test_bits_round_trip_at_any_width_and_offset(width, count, skip, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, count + skip)
    packed = caches.pack_bits(values, width)
    assert len(packed) == -(-(count + skip) * width // 8)
    first = skip * width
    tail = packed[first // 8 :]
    assert caches.unpack_bits(tail, width, count, first % 8).tolist() == values[skip:].tolist()


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 100))
def test_shards_are_consecutive_and_full(positions, per_shard):
    shards = caches.cut(positions, per_shard)
    assert [i for shard in shards for i in shard] == list(range(len(positions)))
    sizes = [sum(positions[i] for i in shard) for shard in shards]
    assert all(size >= per_shard for size in sizes[:-1])
    assert all(size - positions[shard[-1]] < per_shard for size, shard in zip(sizes, shards, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_classes_from_a_cache_equal_the_teachers(sampler, tmp_path):
    settings, batch, teacher = settings_for(sampler), make_trajectories(LENGTHS), tiny_teacher()
    cached = CachedClasses(TeacherCache(make_cache(tmp_path, settings, batch, teacher)))
    # Under other keys, in another order and batch, at some of the positions.
    asked = [dataclasses.replace(t, key=f"3:{t.key}/0") for t in reversed(batch)]
    wanted = [(t.key, range(0, len(t.response_ids), 2)) for t in asked]
    seeds = [seed_of(settings.run.seed, "cache", t.digest.hex()) for t in asked]
    cached.encode(asked)
    teacher.encode(asked)
    actual, expected = (who.classes(wanted, seeds, settings.classes) for who in (cached, teacher))
    assert actual.residual == expected.residual
    dense = [torch.zeros(len(x.ids_NC), VOCABULARY).scatter_add(1, x.ids_NC, x.probs_NC) for x in (actual, expected)]
    torch.testing.assert_close(dense[0], dense[1], rtol=0, atol=0 if sampler == "rs_kd" else 1e-6)
    cached.release([t.key for t in asked])
    with pytest.raises(KeyError):
        cached.classes(wanted, seeds, settings.classes)
    for read in (cached.head, lambda: cached.rows(wanted), lambda: cached.entropy_and_logprob([])):
        with pytest.raises(CacheError, match="holds a few classes of the teacher"):
            read()


def test_a_cache_of_more_classes_answers_for_fewer(tmp_path):
    settings, batch, teacher = settings_for("top_k"), make_trajectories(LENGTHS), tiny_teacher()
    cached = CachedClasses(TeacherCache(make_cache(tmp_path, settings, batch, teacher)))
    fewer = settings.classes.model_copy(update={"k": 3})
    wanted = [(t.key, range(len(t.response_ids))) for t in batch]
    cached.encode(batch)
    teacher.encode(batch)
    actual, expected = (who.classes(wanted, [0] * len(batch), fewer) for who in (cached, teacher))
    assert torch.equal(actual.ids_NC, expected.ids_NC)
    torch.testing.assert_close(actual.probs_NC, expected.probs_NC)
    assert Layout.of(settings, 97).is_compatible_with(Layout.of(settings.model_copy(update={"classes": fewer}), 97))
    fewer_draws = settings_for("rs_kd", classes={"sampler": "rs_kd", "draws": 19})
    assert not Layout.of(settings_for("rs_kd"), 97).is_compatible_with(Layout.of(fewer_draws, 97))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_may_be_selected_of_a_sample_or_of_all(sampler, tmp_path):
    settings, batch = settings_for(sampler), make_trajectories(LENGTHS)
    cached = CachedClasses(TeacherCache(make_cache(tmp_path, settings, batch)))
    cached.encode(batch)
    some = cached.classes([(batch[0].key, []), (batch[1].key, [1, 4])], [0, 0], settings.classes)
    assert some.ids_NC.shape[0] == some.probs_NC.shape[0] == 2


def test_hidden_rows_come_back_bit_for_bit(tmp_path):
    settings, batch, teacher = settings_for(), make_trajectories(LENGTHS), tiny_teacher()
    cached = CachedHidden(TeacherCache(make_cache(tmp_path, settings, batch, teacher, per_shard=1)), settings, "cpu")
    for who in (cached, teacher):
        for t in batch:  # each alone, as in the cache's shards: rounding depends on what is multiplied together
            who.encode([t])
    wanted = [(t.key, range(len(t.response_ids))) for t in batch]
    assert torch.equal(cached.rows(wanted), teacher.rows(wanted))
    assert torch.equal(cached.head().weight_VH, teacher.head().weight_VH)
    for a, b in zip(
        cached.entropy_and_logprob([t.key for t in batch]),
        teacher.entropy_and_logprob([t.key for t in batch]),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_cache_answers_for_the_prompt_that_the_teacher_read(tmp_path):
    plain = make_trajectories(LENGTHS)
    batch = [dataclasses.replace(t, teacher_prompt_ids=np.arange(5, 8 + 3 * i)) for i, t in enumerate(plain)]
    settings, teacher = settings_for(), tiny_teacher()
    cached = CachedHidden(TeacherCache(make_cache(tmp_path, settings, batch, teacher, per_shard=1)), settings, "cpu")
    for who in (cached, teacher):
        for t in batch:
            who.encode([t])
    wanted = [(t.key, range(len(t.response_ids))) for t in batch]
    assert torch.equal(cached.rows(wanted), teacher.rows(wanted))
    with pytest.raises(CacheError, match="t0 is not in the cache"):
        cached.encode(plain)


@pytest.mark.parametrize("sampler", ["none", "rs_kd"])
def test_a_step_from_a_cache_is_the_step_with_the_teacher(sampler, tmp_path, monkeypatch):
    """Bit for bit: hidden rows are exact, and rs_kd draws what a teacher with the cache's seeds would."""
    settings = settings_for(sampler, teacher={"tokens_per_batch": 500})
    batch = [dataclasses.replace(t, policy_version=None) for t in make_trajectories(LENGTHS)]
    cache = TeacherCache(make_cache(tmp_path, settings, batch, tiny_teacher(1), per_shard=1))
    cached = CachedHidden(cache, settings, "cpu") if sampler == "none" else CachedClasses(cache)
    by_key = {t.key: seed_of(settings.run.seed, "cache", t.digest.hex()) for t in batch}

    class Seeded(Teacher):
        def classes(self, request, seeds, options):
            return super().classes(request, [by_key[key] for key, _ in request], options)

    online = Seeded(split(tiny_model("qwen3", False, hidden=48, seed=1), VOCABULARY), 1, 0)
    weights = []
    for teacher in (online, cached):
        learner = Learner(split(tiny_model("qwen3", True), VOCABULARY), teacher, settings, 0, 5)
        for _ in range(3):
            teacher.encode(batch)
            learner.step(batch)
        weights.append({n: p.detach().clone() for n, p in learner.state.named.items()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


class RealVocabulary:
    """Stands in for a teacher with Qwen's vocabulary: draws from Zipf-like distributions, rare ids included."""

    vocabulary = 151_936

    def __init__(self, seed=0):
        self._rng = torch.Generator().manual_seed(seed)
        ranks = torch.arange(1, self.vocabulary + 1, dtype=torch.float64)
        self._log_p = (-1.3 * ranks.log()).log_softmax(0).float()[None]
        self._order = torch.randperm(self.vocabulary, generator=self._rng)  # so that drawn ids are spread evenly

    def encode(self, trajectories):
        self._lengths = {t.key: len(t.response_ids) for t in trajectories}

    def classes(self, request, seeds, options):
        count = sum(len(at) for _, at in request)
        uniform = torch.rand(count, options.draws, dtype=torch.float64, generator=self._rng)
        targets = [
            rs_kd(self._log_p, Draws(options, torch.zeros(1, dtype=torch.long), uniform[i : i + 1]))
            for i in range(count)
        ]
        width = max(p.ids_NC.shape[1] for p in targets)
        ids = torch.stack([torch.nn.functional.pad(p.ids_NC[0], (0, width - p.ids_NC.shape[1])) for p in targets])
        probs = torch.stack([torch.nn.functional.pad(p.probs_NC[0], (0, width - p.probs_NC.shape[1])) for p in targets])
        self.last = SparseTargets(self._order[ids], probs)
        return self.last

    def release(self, keys):
        pass


@pytest.mark.parametrize("draws", [12, 64])
def test_bytes_are_those_of_the_information_and_ids_above_17_bits_survive(draws, tmp_path):
    settings = settings_for("rs_kd", classes={"sampler": "rs_kd", "draws": draws})
    batch, teacher = make_trajectories([(10, 300), (10, 200)]), RealVocabulary()
    folder = make_cache(tmp_path, settings, batch, teacher, RealVocabulary.vocabulary, per_shard=1_000)
    manifest, cache = Manifest.read(folder), TeacherCache(folder)
    assert (manifest.layout.id_bits, manifest.layout.count_bits) == (18, {12: 4, 64: 7}[draws])
    on_disk = 8 * sum(f.stat().st_size for f in folder.glob("shard-*"))
    assert on_disk <= 1.05 * manifest.information_bits
    cached = [cache.classes(t) for t in batch]
    ids = torch.cat([c.ids_NC[c.probs_NC > 0] for c in cached])
    assert ids.max() > 131_071
    expected = teacher.last
    rows = torch.arange(500).repeat_interleave(torch.tensor([int((p > 0).sum()) for p in expected.probs_NC]))
    pairs = sorted(zip(rows.tolist(), expected.ids_NC[expected.probs_NC > 0].tolist(),
                       expected.probs_NC[expected.probs_NC > 0].tolist(), strict=True))  # fmt: skip
    read = [
        (start + row, int(i), float(p))
        for start, f in ((0, cached[0]), (300, cached[1]))
        for row in range(len(f.ids_NC))
        for i, p in zip(f.ids_NC[row], f.probs_NC[row], strict=True)
        if p > 0
    ]
    assert sorted(read) == pairs


@pytest.mark.parametrize("sampler", ["none", "rs_kd", "top_k"])
def test_any_flipped_byte_is_found_by_verify_and_refused_by_reading(sampler, tmp_path):
    settings, batch = settings_for(sampler), make_trajectories(LENGTHS)
    good = make_cache(tmp_path, settings, batch)
    assert all(problem is None for _, problem in cache_reader.verify(good))
    rng, bad = np.random.default_rng(0), tmp_path / "bad"
    for file in sorted(good.iterdir()):
        for offset in rng.integers(0, file.stat().st_size, 40):
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            damaged = bytearray(file.read_bytes())
            damaged[offset] ^= 1 << int(rng.integers(0, 8))
            (bad / file.name).write_bytes(damaged)
            assert [name for name, problem in cache_reader.verify(bad) if problem] == [file.name]
            with pytest.raises(CacheError, match=file.name):
                read_all(bad, settings, batch)
        (bad / file.name).unlink()
        assert [name for name, problem in cache_reader.verify(bad) if problem] == [file.name]
        with pytest.raises(CacheError):
            read_all(bad, settings, batch)


def read_all(folder, settings, batch):
    cache = TeacherCache(folder)
    if settings.classes.sampler == "none":
        CachedHidden(cache, settings, "cpu").encode(batch)
    else:
        CachedClasses(cache).encode(batch)


def test_a_text_that_is_not_there_is_refused_by_name(tmp_path):
    settings, batch = settings_for("rs_kd"), make_trajectories(LENGTHS)
    cache = TeacherCache(make_cache(tmp_path, settings, batch))
    other = dataclasses.replace(batch[0], response_ids=batch[0].response_ids[::-1].copy())
    earlier = np.concatenate([batch[0].prompt_ids[-1:], batch[0].response_ids])  # same tokens, one more is eligible
    moved = dataclasses.replace(batch[0], prompt_ids=batch[0].prompt_ids[:-1], response_ids=earlier)
    assert cache.holds(batch[0])
    for t in (other, moved):
        assert not cache.holds(t)
        with pytest.raises(CacheError, match=f"{t.key} is not in the cache"):
            cache.classes(t)


@pytest.mark.parametrize("sampler", ["none", "rs_kd"])
def test_what_a_kill_left_of_a_shard_is_not_taken_for_one(sampler, tmp_path):
    settings, batch = settings_for(sampler), make_trajectories(LENGTHS)
    shard = caches.write_shard(tmp_path, 0, batch, tiny_teacher(), settings, VOCABULARY)
    file, sidecar = tmp_path / shard.file, (tmp_path / shard.file).with_suffix(".json")
    content, record = file.read_bytes(), sidecar.read_text()
    assert caches.finished_shard(tmp_path, 0) == shard
    for broken in (lambda: file.write_bytes(content[:-1]), file.unlink, lambda: sidecar.write_text(record[:-5]),
                   lambda: sidecar.write_text("{}"), sidecar.unlink):  # fmt: skip
        file.write_bytes(content)
        sidecar.write_text(record)
        broken()
        assert caches.finished_shard(tmp_path, 0) is None
    (tmp_path / ".shard-000000.safetensors.123-abc.tmp").write_bytes(content[:9])
    assert caches.write_shard(tmp_path, 0, batch, tiny_teacher(), settings, VOCABULARY) == shard
    assert file.read_bytes() == content
    caches.complete(tmp_path, Manifest({}, Layout.of(settings, VOCABULARY), "p", None, [shard]))
    assert {f.name for f in tmp_path.iterdir()} == {shard.file, caches.MANIFEST}


def test_one_build_at_a_time_may_write_to_a_folder(tmp_path):
    refused = pytest.raises(CacheError, match="another build is writing to it")
    with caches.locked(tmp_path / "c"), refused, caches.locked(tmp_path / "c"):
        raise AssertionError("two builds at once")
    with caches.locked(tmp_path / "c"):
        pass
    assert not list((tmp_path / "c").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"), caches.locked(tmp_path / "file"):
        raise AssertionError("a file is no folder")


def test_another_seed_or_type_does_not_continue_an_incomplete_cache(tmp_path):
    """Draws of two seeds, or hidden states of two types, must not meet in one cache."""

    def plan(**sections):
        settings = demo(tmp_path, **sections)
        return Manifest(provenance.provenance(settings, prepare(settings).tokenizer), Layout.of(settings, 512), "p")

    begun = plan()
    for sections, named in (({"run": {"seed": 7}}, "run.seed: 1340 then, 7 now"),
                            ({"teacher": {"dtype": "bfloat16"}}, "teacher.dtype"),
                            ({"run": {"device": "cuda"}}, "run.device")):  # fmt: skip
        assert not provenance.same_outputs(begun, plan(**sections))
        assert named in provenance.differing(begun, plan(**sections))
    assert provenance.same_outputs(begun, plan(learner={"batch_size": 3}))
    assert provenance.same_outputs(plan(classes={}), plan(classes={}, run={"seed": 7}))  # nothing is drawn


def test_metrics_that_ask_the_teacher_are_those_refused_with_a_few_classes():
    def refuse(*_):
        raise CacheError("asked")

    refused = set()
    for name, metric in METRICS.items():
        ranges = dict.fromkeys(RANGES.get(metric, ()), (0.0, 1.0))
        try:
            metric(Signals(lambda: (torch.ones(4), torch.ones(4)), [4], [0], refuse, refuse, ranges))
        except CacheError:
            refused.add(name)
    assert refused == set(ASK_TEACHER)


def test_an_incomplete_cache_says_how_to_continue(tmp_path):
    with pytest.raises(CacheError, match="so it is no cache"):
        TeacherCache(tmp_path)
    Manifest({}, Layout("hidden", 9, 0, None), "x").write(tmp_path)
    with pytest.raises(CacheError, match="its manifest lists no shards; build the cache again"):
        TeacherCache(tmp_path)
    (tmp_path / caches.MANIFEST).unlink()
    Manifest({}, Layout("hidden", 9, 0, None), "x").write(tmp_path, caches.PLAN)
    with pytest.raises(CacheError, match="is not complete: the same build continues it"):
        TeacherCache(tmp_path)


# -- the settings of a run with a cache ----------------------------------------------------------------------------


def demo(tmp_path, **sections):
    tree = {
        "classes": {"sampler": "rs_kd", "draws": 8},
        "data": {"train_problems": 6},
        "mode": "off_policy",
        **sections,
    }
    return tiny_settings(**tree)


@pytest.fixture
def demo_cache(tmp_path):
    """A cache of the demo task's first problems, made from the bundled teacher with the driver's functions."""
    settings = demo(tmp_path)
    run = prepare(settings)
    teacher = Teacher(split(load_model("bundled:demo_teacher", torch.float32, "cpu"), run.vocabulary), 4096, 0)
    samples = list(run.every_reference(run.train))
    folder = make_cache(tmp_path, settings, samples, teacher, run.vocabulary)
    manifest = dataclasses.replace(Manifest.read(folder), provenance=provenance.provenance(settings, run.tokenizer))
    manifest.write(folder)
    return folder


def test_a_run_is_checked_against_its_cache_before_a_model_loads(demo_cache, tmp_path):
    def attempt(sections):
        run = prepare(demo(tmp_path, **{"cache": {"path": demo_cache}, **sections}))
        run.check_cached(run.train)

    def refused(match, **sections):
        with pytest.raises(ConfigError, match=match):
            attempt(sections)

    run = prepare(demo(tmp_path, cache={"path": demo_cache}))
    run.check_cached(run.train)
    assert run.vocabulary == 512
    prepare(demo(tmp_path, cache={"path": demo_cache}, data={"train_problems": 3})).check_cached(run.train[:3])
    prepare(demo(tmp_path, cache={"path": demo_cache}, run={"seed": 7})).check_cached(run.train)
    refused("teacher: bundled:demo_teacher then, bundled:demo_student now", teacher={"model": "bundled:demo_student"})
    refused("classes.draws: 8 then, 64 now", classes={"sampler": "rs_kd"})
    refused('content: "rs_kd" then, "hidden" now', classes={})
    refused("alignment.temperature: 1.0 then, 2.0 now", alignment={"temperature": 2.0})
    refused('data.instruction: "" then, " Think." now', data={"train_problems": 6, "instruction": " Think."})
    refused(r"demo:train#7 is not in it.*data.train_problems: 6 then, 9 now", data={"train_problems": 9})
    refused("teacher.dtype", teacher={"dtype": "auto"})
    refused(r'references.annotations: "keep" then, "strip" now', references={"annotations": "strip"})
    shutil.copytree(prepare(demo(tmp_path)).tokenizer.name_or_path, tmp_path / "student")
    other = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(other))
    refused("tokenizer: other tokens or ids", student={"model": str(tmp_path / "student")})


def test_the_teacher_need_not_be_there_to_train_from_its_cache(demo_cache, tmp_path):
    manifest = Manifest.read(demo_cache)
    dataclasses.replace(manifest, provenance=manifest.provenance | {"teacher": "/gone/teacher"}).write(demo_cache)
    gone = demo(tmp_path, cache={"path": demo_cache}, teacher={"model": "/gone/teacher"})
    prepare(gone).check_cached(prepare(gone).train)
    with pytest.raises(CacheError, match="teacher: /gone/teacher then, /other/teacher now"):
        prepare(demo(tmp_path, cache={"path": demo_cache}, teacher={"model": "/other/teacher"}))


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"mode": "on_policy"}, "cache.path=somewhere: accepted with mode=off_policy only"),
        (
            {"eval": {"divergence_prompts": 4}},
            "eval.divergence_prompts: the teacher.s outputs on held-out texts are not in a cache",
        ),
        ({"positions": {"metric": "kl"}}, r"positions.metric=kl: needs the teacher's whole distribution"),
        ({"positions": {"policy": "bandit"}}, "positions.policy=bandit: needs"),
        ({"samples": {"metric": "kl", "keep": 0.5}}, "samples.metric=kl: needs"),
        ({"classes": {"sampler": "rs_kd", "proposal": 0.8}}, "classes.proposal=0.8: a cache keeps counts"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(sections, match):
    tree = {"mode": "off_policy", "classes": {"sampler": "rs_kd"}, "alignment": {"divergence": "forward_kl"},
            "cache": {"path": "somewhere"}}  # fmt: skip
    with pytest.raises(ConfigError, match=match):
        resolve({**tree, **sections})


def test_with_a_cache_the_teacher_is_not_evaluated_unless_asked_for():
    tree = {"mode": "off_policy", "cache": {"path": "somewhere"}}
    assert not resolve(tree).eval.teacher
    assert resolve({**tree, "eval": {"teacher": True}}).eval.teacher
    assert resolve({"mode": "off_policy"}).eval.teacher


def test_the_command_line_says_what_it_accepts(tmp_path, capsys):
    assert driver.main([]) == 2
    assert driver.main(["info"]) == 2
    assert driver.main(["info", str(tmp_path / "none")]) == 2
    assert driver.main(["verify", str(tmp_path / "none")]) == 1
    assert driver.main(["build", "mode=off_policy"]) == 2
    assert "cache.path: needed to build a cache" in capsys.readouterr().err
    assert driver.main(["--help"]) == 0


def test_a_complete_cache_is_verified_and_described(demo_cache, capsys):
    assert driver.main(["verify", str(demo_cache)]) == 0
    assert driver.main(["info", str(demo_cache)]) == 0
    printed = capsys.readouterr().out
    assert "all good" in printed
    assert '"teacher": "bundled:demo_teacher"' in printed


def test_json_that_is_nested_too_deeply_is_damage(tmp_path):
    (tmp_path / caches.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(CacheError, match=r"maximum recursion depth"):
        Manifest.read(tmp_path)
    (tmp_path / caches.shard_name(0)).with_suffix(".json").write_text("[" * 100_000)
    assert caches.finished_shard(tmp_path, 0) is None
