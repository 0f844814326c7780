"""The logger of a run without its actors: what it writes, and what it takes up again."""

import dataclasses
import json

import pytest
from helpers import make_trajectories, tiny_settings

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.evaluation.evaluate import Evaluation
from onpolicy_skd.learner.learner import GradientOverflowError
from onpolicy_skd.learner.metrics import StepRecord
from onpolicy_skd.report.metrics_log import read
from onpolicy_skd.run.logger import PhaseTimer, RunLogger
from onpolicy_skd.run.prepare import Run
from onpolicy_skd.run.supervisor import Recovery
from onpolicy_skd.selection.samples import validity
from onpolicy_skd.storage.checkpoint import Checkpoint
from onpolicy_skd.storage.files import SaveError

METRICS = StepRecord(
    loss=0.5, divergence_selected=0.5, entropy=0.3, grad_norm=2.0, lr=1e-4, positions=50, positions_selected=10,
    samples=3, response_tokens=17.0, entropy_selected=0.9, train_tokens=90, version=1, student_logprob=-0.4, k=0.2,
    staleness=0.0, padding_share=0.1, teacher_wait_seconds=0.0,
)  # fmt: skip


class Workers:
    """Saves no model, but counts; may refuse."""

    def __init__(self):
        self.saved, self.full = [], False

    def save_pretrained(self, folder):
        if self.full:
            raise SaveError("no space left")
        self.saved.append(folder.name)

    def save(self, folder, step, version, state, keep, rollout_refs=()):
        self.state = state
        self.finished = False

    def finish_saving(self):
        self.finished = True


@pytest.fixture
def run(tmp_path):
    settings = tiny_settings(
        run={"dir": tmp_path, "name": "r", "steps": 9, "keep_best": True, "evaluate_every": 2},
        data={"validation_problems": 4},
    )
    settings.run.folder.mkdir(parents=True)
    return Run(settings, None, 97, [], [])


def evaluation(share):
    rate = {"share": share, "interval": [0.0, 1.0]}
    return Evaluation({"problems": 4, "match": rate, "strict": rate}, [])


def best_on_disk(run):
    return json.loads((run.folder / "best.json").read_text())["step"]


def test_best_step_names_the_student_in_best_after_a_rollback(run):
    workers, checkpoint = Workers(), Checkpoint(run.folder, 3, {"last_eval_step": 2, "version": 3})
    with RunLogger(run, 0, {}) as logger:
        logger.validated(workers, 2, evaluation(0.25))
        logger.validated(workers, 6, evaluation(0.75))
        assert logger.recovered(7, Recovery("killed", ["learner"], True, checkpoint, [], 1.0)) == 3
        assert logger.last_eval_step == 2
        assert logger.best_step == best_on_disk(run) == 6
        logger.validated(workers, 4, evaluation(0.5))  # not better than the student in best/
        assert workers.saved == ["best", "best"]
        logger.conclude("stopped")
    assert json.loads((run.folder / "summary.json").read_text())["best_step"] == best_on_disk(run) == 6


def test_best_step_names_the_student_in_best_after_a_full_disk_and_after_resuming(run):
    workers = Workers()
    with RunLogger(run, 0, {}) as logger:
        logger.validated(workers, 2, evaluation(0.25))
        workers.full = True
        logger.validated(workers, 4, evaluation(0.5))
        assert logger.best_step == best_on_disk(run) == 2
    with RunLogger(run, 2, logger.state()) as logger:
        assert logger.best_step == 2
    with RunLogger(run, 0, {}) as logger:  # resume=never, or nothing to resume from
        assert logger.best_step is None


def test_truncated_is_a_share_of_the_students_rollouts(run):
    """mode=mixed: a batch of two rollouts, one of them cut, and two references."""
    batch = make_trajectories([(2, 3)] * 4)
    batch[1] = dataclasses.replace(batch[1], finish_reason="length")
    batch[2:] = [dataclasses.replace(t, policy_version=None) for t in batch[2:]]
    for drop, kept in ((True, 3), (False, 4)):
        report = validity(batch, 97, drop_truncated=drop)
        assert len(report.kept) == kept
        with RunLogger(run, 0, {}) as logger:
            timer = PhaseTimer()
            timer.record("learn")
            logger.step(0, report, METRICS, timer)
            assert read(run.folder / "metrics.jsonl")[0]["truncated"] == 0.5


def test_the_report_has_losses_times_warnings_and_restarts(run):
    report = validity(make_trajectories([(2, 3)] * 4), 97)
    with RunLogger(run, 0, {}) as logger:
        for step in range(3):
            timer = PhaseTimer()
            timer.record("learn")
            logger.step(step, report, dataclasses.replace(METRICS, loss=0.5 - 0.1 * step, teacher_ending=0.01), timer)
        logger.fault(Recovery("its process ended", ["teacher"], False, None, [], 12.0), 2)
        logger.conclude("failed", "the disk is full")
    page = (run.folder / "report.md").read_text()
    assert "Status: failed (the disk is full)." in page
    assert "| loss, nats per selected token | 0.4500 | 0.3500 |" in page
    assert "| seconds per step |" in page
    assert "Actors restarted: teacher 1. Warnings: 1." in page
    assert "- step 1, ending: the teacher gives" in page
    assert "- step 3: its process ended; restarted teacher in 12 s" in page
    assert "![curves](curves.png)" in page


def test_the_best_student_is_not_chosen_by_the_test_problems():
    with pytest.raises(ConfigError, match=r"run.keep_best=true: .* data.validation_problems"):
        tiny_settings(run={"keep_best": True, "evaluate_every": 2})
    with pytest.raises(ConfigError, match=r"run.keep_best=true: .* set run.evaluate_every"):
        tiny_settings(run={"keep_best": True}, data={"validation_problems": 8})
    assert tiny_settings(run={"keep_best": True, "evaluate_every": 2}, data={"validation_problems": 8}).run.keep_best


def test_overflows_and_start_up_warnings_are_events_that_end_no_run(run):
    report = validity(make_trajectories([(2, 3)] * 4), 97)
    with RunLogger(run, 0, {}) as logger:
        logger.warning(0, "precision", "learner.lr is too small")
        for step in range(9):
            logger.skipped(step, report, GradientOverflowError("the gradient overflowed", []))
        assert logger.state()["skipped"] == 0
        logger.conclude("failed", "a test")
    events = [(r["step"], r["event"]) for r in read(run.folder / "metrics.jsonl")]
    assert events == [(0, "warning"), *((step, "overflow") for step in range(9))]
    page = (run.folder / "report.md").read_text()
    assert "9 with a float16 gradient that overflowed" in page
    assert "- step 1, precision: learner.lr is too small" in page


def test_the_last_checkpoint_is_waited_for_and_the_others_are_not(run):
    workers = Workers()
    with RunLogger(run, 0, {}) as logger:
        logger.save(workers, 2, required=False)
        assert not workers.finished
        logger.save(workers, 4, required=True)
        assert workers.finished
