"""Build a cache and train from it as a user does: real Ray, the bundled pair."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from onpolicy_skd import cache, train
from onpolicy_skd.data.demo_task import problems
from onpolicy_skd.report.metrics_log import read
from onpolicy_skd.teacher import cache_format as caches

pytestmark = pytest.mark.slow

DEMO = ["--config", str(ROOT / "configs" / "demo.yaml"), "mode=off_policy", "data.train_problems=600"]
TRAIN = [*DEMO, "learner.batch_size=8", "run.trackers=[]", "run.evaluate_every=0", "eval.problems=8",
         "eval.before=false", "rollout.engine=transformers", "run.steps=3"]  # fmt: skip
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
SHARD = 1_500  # positions, so that these small caches have several shards
SMALL_SHARDS = f"""import sys
from onpolicy_skd import cache
cache.caches.POSITIONS_PER_SHARD = {SHARD}
sys.exit(cache.main(sys.argv[1:]))"""


@pytest.fixture(scope="module")
def run(address):
    """Run a program in this process, on the Ray that this module shares."""

    def run(program, *arguments):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(caches, "POSITIONS_PER_SHARD", SHARD)
            with contextlib.redirect_stderr(out):
                code = program.main([*map(str, arguments), f"cluster.address={address}"])
        return code, out.getvalue()

    return run


def build(tmp_path, folder, *arguments):
    return ("build", *DEMO, f"run.dir={tmp_path}", f"cache.path={folder}", *arguments)


@pytest.fixture(scope="module")
def complete_cache(tmp_path_factory, run):
    """A cache built without interruption, by two builders."""
    folder = tmp_path_factory.mktemp("cache")
    code, said = run(cache, *build(folder, folder / "cache", "classes.sampler=rs_kd", "teacher.actors=2"))
    assert code == 0, said
    return folder / "cache"


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_a_build_killed_at_a_random_moment_continues_and_ends_with_the_same_bytes(complete_cache, run, tmp_path):
    folder, rng = tmp_path / "cache", random.Random(0)
    command = [sys.executable, "-c", SMALL_SHARDS, *build(tmp_path, folder, "classes.sampler=rs_kd")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=ENVIRONMENT)
    while process.poll() is None and not any(folder.glob("shard-*.json")):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    process.wait()
    assert not (folder / caches.MANIFEST).exists()
    code, said = run(train, *TRAIN, f"run.dir={tmp_path}", f"cache.path={folder}", "classes.sampler=rs_kd")
    assert code == 2
    assert "is not complete: the same build continues it" in said
    code, said = run(cache, *build(tmp_path, folder, "classes.sampler=rs_kd", "classes.draws=5"))
    assert code == 2
    assert "holds another, unfinished cache (classes.draws: 64 then, 5 now)" in said
    code, said = run(cache, *build(tmp_path, folder, "classes.sampler=rs_kd"))
    assert code == 0, said
    assert "shards exist already" in said
    assert contents(folder) == contents(complete_cache)
    code, said = run(cache, *build(tmp_path, folder, "classes.sampler=rs_kd"))
    assert code == 2
    assert "already holds a cache" in said


def test_training_from_a_cache_loads_no_teacher_and_refuses_damage(complete_cache, run, tmp_path):
    arguments = [*TRAIN, f"run.dir={tmp_path}", "classes.sampler=rs_kd"]
    code, said = run(train, *arguments, f"cache.path={complete_cache}")
    assert code == 0, said
    assert "starting 1 x learner, 1 x rollout\n" in said
    assert "exact match   after" in said
    assert len([r for r in read(tmp_path / "demo" / "metrics.jsonl") if "loss" in r]) == 3
    bad = tmp_path / "bad"
    shutil.copytree(complete_cache, bad)
    for shard in bad.glob("shard-*"):  # every payload, so that the first batch meets one
        damaged = bytearray(shard.read_bytes())
        damaged[-1] ^= 1
        shard.write_bytes(damaged)
    code, said = run(train, *arguments, f"cache.path={bad}", "run.name=bad")
    assert code == 2
    assert "is damaged" in said
    assert "shard-0000" in said
    assert cache.main(["verify", str(bad)]) == 1


def test_only_what_the_sample_filter_keeps_is_cached(run, tmp_path):
    """SE-KD_3X: the scores that the build leaves behind are what training keeps by."""
    kept = ["samples.keep=0.2", "samples.when=prefilter", "classes.sampler=rs_kd"]
    code, said = run(cache, *build(tmp_path, tmp_path / "cache", *kept))
    assert code == 0, said
    assert caches.Manifest.read(tmp_path / "cache").samples == 120
    code, said = run(train, *TRAIN, *kept, f"run.dir={tmp_path}", f"cache.path={tmp_path / 'cache'}")
    assert code == 0, said
    assert "scores of 600 prompts reused" in said


def test_offline_on_policy_training_loads_the_student_alone(run, tmp_path):
    """Rollouts of the initial student and the teacher's rows on them come from disk, so no teacher and no engine."""
    offline = ["references.source=student", "rollout.engine=transformers", "rollout.max_tokens=60"]
    code, said = run(cache, *build(tmp_path, tmp_path / "cache", *offline))
    assert code == 0, said
    assert "references: the student has answered 600/600 prompts" in said
    no_engine = ["eval.after=false", f"run.dir={tmp_path}", f"cache.path={tmp_path / 'cache'}"]
    code, said = run(train, *TRAIN, *offline, *no_engine)
    assert code == 0, said
    assert "answers of the student to 600 prompts reused" in said
    assert "starting 1 x learner\n" in said
    assert len([r for r in read(tmp_path / "demo" / "metrics.jsonl") if "loss" in r]) == 3


def test_packed_text_is_distilled_with_a_teacher_and_from_a_cache(run, tmp_path):
    """No rollout engine starts; the cache is of hidden states, so that the runs differ by rounding alone."""
    rows = (json.dumps({"text": f"{p['question']}\n{p['answer']}"}) for p in itertools.islice(problems("train"), 400))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), "mode=off_policy", "data.source=text", "run.steps=3",
           f"data.train_file={tmp_path / 'a.jsonl'}", "data.sequence_length=64", "learner.batch_size=8",
           "run.evaluate_every=0", f"run.dir={tmp_path}"]  # fmt: skip
    code, said = run(cache, "build", *arguments, f"cache.path={tmp_path / 'cache'}")
    assert code == 0, said
    for name, more in (("teacher", []), ("cache", [f"cache.path={tmp_path / 'cache'}"])):
        code, said = run(train, *arguments, f"run.name={name}", *more)
        assert code == 0, said
        assert f"starting 1 x learner{', 1 x teacher' * (not more)}\n" in said
    assert "held-out problems" not in (tmp_path / "teacher" / "report.md").read_text()
    losses = [
        [r["loss"] for r in read(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in ("teacher", "cache")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
