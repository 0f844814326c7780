"""A grid of runs: what is in it, what is refused, and what its numbers can tell."""

import dataclasses
import json
import math

import numpy as np
import pytest
from comparison_helpers import CONFIGS, recorded, write_finished_run, write_grid
from helpers import make_trajectories
from matplotlib.colors import to_hex

from onpolicy_skd import compare
from onpolicy_skd.comparison import figures, grid, results
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.evaluation.statistics import estimate, paired_difference, significant
from onpolicy_skd.run.logger import step_counts
from onpolicy_skd.selection import samples

# -- statistics ----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_students():
    interval = estimate([69.0, 70.0, 74.0])
    assert interval.mean == pytest.approx(71.0)
    assert interval.std == pytest.approx(math.sqrt(7.0))
    assert interval.high - interval.mean == pytest.approx(
        4.302653 * math.sqrt(7.0 / 3)
    )  # t at 0.975, 2 degrees of freedom
    assert estimate([5.0]) == dataclasses.replace(estimate([5.0]), std=None, low=None, high=None, count=1)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_the_paired_difference_has_the_spread_of_theory():
    """One seed each and independent problems: the bootstrap's interval is the normal one of the mean difference."""
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 4_000)) < 0.5, rng.random((1, 4_000)) < 0.45
    difference = paired_difference(first, second, draws=4_000)
    gaps = first[0].astype(float) - second[0]
    assert difference.mean == pytest.approx(gaps.mean())
    half = 1.96 * gaps.std() / math.sqrt(4_000)
    assert difference.high - difference.mean == pytest.approx(half, rel=0.06)
    assert difference.mean - difference.low == pytest.approx(half, rel=0.06)


def test_pairing_sees_what_separate_intervals_cannot():
    """Two methods that agree on hard and easy problems and differ on a few: the difference is clear."""
    base = np.random.default_rng(1).random(1_000) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[:20]] = True
    difference = paired_difference(np.stack([better] * 3), np.stack([base] * 3), draws=2_000)
    assert difference.mean == pytest.approx(0.02)
    assert difference.low > 0
    assert difference.p < 0.01


def test_the_same_method_does_not_differ_and_seeds_count_as_noise():
    rng = np.random.default_rng(2)
    same = rng.random((3, 300)) < 0.6
    assert paired_difference(same, same, draws=500).mean == 0
    assert paired_difference(same, same, draws=500).p == 1.0
    wild = np.stack([np.ones(300), np.zeros(300), np.ones(300)])  # a method whose seeds disagree entirely
    assert paired_difference(wild, same, draws=500).high - paired_difference(wild, same, draws=500).low > 0.5
    with pytest.raises(ValueError, match="not the same problems"):
        paired_difference(same, same[:, :-1])


def test_noise_is_called_a_difference_as_seldom_as_promised():
    """Two methods that do not differ, whose seeds do by 10 points: without widening 15 to 20 % would be called one."""
    rng = np.random.default_rng(3)

    def method():
        shares = 0.5 + rng.normal(0, 0.1, 3)
        return rng.random((3, 400)) < shares[:, None]

    p = [paired_difference(method(), method(), draws=200, seed=i).p for i in range(200)]
    assert 1 <= sum(x <= 0.05 for x in p) <= 16  # 10 expected, if the level is kept exactly
    assert sum(x <= 0.5 for x in p) >= 60


def test_many_comparisons_ask_for_smaller_p_values():
    assert significant({"a": 0.001, "b": 0.02, "c": 0.04, "d": 0.5}) == {"a"}
    assert significant({"a": 0.01, "b": 0.02}) == {"a", "b"}
    assert significant({}) == set()


# -- the grid ------------------------------------------------------------------------------------------------------


def test_every_row_mode_and_seed_is_a_run_of_its_own(tmp_path):
    comparison = grid.load(write_grid(tmp_path))
    assert len(comparison.trained) == 2 * (2 + 2 + 1)
    assert len({r.settings.run.name for r in comparison.runs}) == len(comparison.runs)
    assert [r.seed for r in comparison.trained] == [1] * 5 + [2] * 5  # seed by seed
    assert {r.settings.mode for r in comparison.trained if "off_policy" in r.settings.run.name} == {"off_policy"}
    assert comparison.untrained.settings.run.steps == 0
    assert comparison.untrained.settings.eval.teacher
    assert all(r.status == "waiting" for r in comparison.runs)
    fewer = grid.load(write_grid(tmp_path), {"seeds": [7]})
    assert {r.seed for r in fewer.trained} == {7}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"baseline": "nobody"}, "baseline: 'nobody' is no row; accepted: Full KD, SE-KD, Forward"),
        ({"seeds": []}, "must differ"),
        ({"seeds": [1, 1]}, "must differ"),
        ({"rows": [{"name": "A"}, {"name": "a"}], "baseline": "A"}, "must differ"),
        ({"rows": [{"nam": "A"}]}, r"rows\.0"),
        ({"unknown": 1}, "unknown"),
        ({"settings": {"hub": {"push": "me/r"}}}, "hub.push=me/r: all runs would go to one repository"),
        (
            {"rows": [{"name": "Full KD", "settings": {"positions": {"k": 7}}}]},
            "row 'Full KD', off_policy: positions.k=7",
        ),
        (
            {"rows": [{"name": "Full KD"}, {"name": "B", "settings": {"learner": {"lr": 1}}}]},
            r"row 'B', off_policy: sets learner.lr to 1.0, row 'Full KD' has 0.001; rows of one mode may",
        ),
    ],
)
def test_an_unfair_or_broken_grid_is_refused_by_row(changes, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        grid.load(write_grid(tmp_path, **changes))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compare_*.yaml")), ids=lambda p: p.name)
def test_bundled_grids_resolve(path):
    comparison = grid.load(path)
    published = {(r.name, mode) for r in comparison.grid.rows for mode in r.published}
    assert len(published) == 15  # the rows of the SE-KD paper's Table 5
    assert {r.seed for r in comparison.trained} == {1340, 1341, 1342}


def test_the_report_says_what_is_more_than_noise_and_which_orderings_hold(tmp_path):
    comparison, rng = grid.load(write_grid(tmp_path)), np.random.default_rng(0)
    base = rng.random(400) < 0.5
    worse = base & (rng.random(400) < 0.7)
    for run in comparison.trained:
        write_finished_run(run, worse if run.row.name == "SE-KD" else base)
    rows = {(r.row, r.mode): r for r in results.results(comparison)}
    assert rows["SE-KD", "on_policy"].significant
    assert not rows["Forward", "on_policy"].significant
    assert rows["Full KD", "on_policy"].difference is None
    assert rows["SE-KD", "on_policy"].exact_match.mean == pytest.approx(100 * worse.mean())
    assert rows["SE-KD", "on_policy"].cost["teacher_tokens"] == 500
    page = results.page(comparison, list(rows.values()), results.between_modes(comparison))
    assert "1 of 11 runs have not finished" in page  # the untrained models
    assert "- SE-KD below Full KD (70.0 v 70.6): holds" in page
    assert "- Forward: +0.0 points (95 % +0.0 to +0.0): within noise." in page
    line = next(x for x in page.splitlines() if x.startswith("| SE-KD"))
    assert "**-" in line
    assert " 20 (20 %) " in line  # positions supervised
    assert "## Off-policy minus on-policy" in page
    assert "- SE-KD: +0.0 points (95 % +0.0 to +0.0): not more than noise." in page  # the same answers in both modes
    record = json.loads(results.record(comparison, list(rows.values()), results.between_modes(comparison)))
    assert [m["row"] for m in record["off_minus_on"]] == ["Full KD", "SE-KD"]
    assert len(record["runs"]) == 11
    assert {r["status"] for r in record["runs"]} == {"finished", "waiting"}


def test_finished_runs_with_other_settings_are_refused(tmp_path):
    comparison = grid.load(write_grid(tmp_path))
    write_finished_run(comparison.trained[0], [True, False])
    assert grid.load(write_grid(tmp_path)).trained[0].status == "finished"
    with pytest.raises(ConfigError, match=r"finished with run.steps=2, the comparison now asks for 3"):
        grid.load(write_grid(tmp_path, settings={"run": {"steps": 3}}))


def test_a_dry_run_lists_every_run_with_its_cost(tmp_path, capsys):
    assert compare.main(["--config", str(write_grid(tmp_path)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "waiting  se_kd-on_policy-1: 2 steps, 128 rollouts, 128 samples to the teacher, 20 % of their" in printed
    assert "full_kd-off_policy-2: 2 steps, 0 rollouts, 128 samples to the teacher, 100 %" in printed
    assert "11 runs" in printed
    assert compare.main(["--config", str(tmp_path / "none.yaml")]) == 2


def test_the_page_is_one_file_and_shows_what_a_model_wrote_as_text(tmp_path):
    comparison, rng = grid.load(write_grid(tmp_path)), np.random.default_rng(0)
    for run in comparison.trained:
        write_finished_run(run, rng.random(50) < 0.5)
        recorded(run)
    page = compare.write_report(comparison, tmp_path / "out").read_text()
    for name in ("learning_curves", "accuracy_and_cost", "entropy_of_positions", "divergence_of_positions",
                 "response_length", "truncation"):  # fmt: skip
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in (tmp_path / "out" / "report.md").read_text()
    assert page.count("<svg") == 6
    made = figures.figures(comparison, results.results(comparison))["entropy_of_positions"]
    drawn = [line.get_ydata().max() for axis in made.axes for line in axis.lines]
    assert drawn  # evaluations alone: 9.0 is of a training batch
    assert max(drawn) == 1.0
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in page
    assert (
        'class="t s" style="--a:0.50" title="entropy 1.000 nats, divergence 0.200 nats, selected" tabindex="0"' in page
    )
    assert 'style="--a:1.00"' in page
    assert "(cut off)" in page
    for outside in ('src="http', 'href="http', "url(http", "@import"):
        assert outside not in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_a_row_has_its_color_in_every_figure_also_while_others_are_not_finished(tmp_path):
    comparison = grid.load(write_grid(tmp_path))
    for run in comparison.trained:
        if run.row.name == "SE-KD":
            write_finished_run(run, [True, False])
            recorded(run)
    made = figures.figures(comparison, results.results(comparison))
    curve = made["response_length"].axes[0].lines[0].get_color()
    assert curve == figures.COLORS[1]
    for points in made["accuracy_and_cost"].axes[0].collections:
        assert to_hex(points.get_edgecolor()[0]) == curve.lower()


def truncation(tmp_path, **record):
    comparison = grid.load(write_grid(tmp_path))
    for run in comparison.trained:
        write_finished_run(run, [True, False], response_tokens=3.0)
        step = json.loads((run.folder / "metrics.jsonl").read_text())
        empty = {"step": 1, "event": "empty_batch", "generated": 4, "dropped": {"truncated": 4}, "truncated": 1.0}
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (step | record, empty)))
    axes = figures.figures(comparison, results.results(comparison))["truncation"].axes
    return {tuple(line.get_ydata()) for axis in axes for line in axis.lines}


def test_the_truncation_figure_shows_rollouts_that_the_filter_dropped(tmp_path):
    """``truncated`` is a share of the student's rollouts before the filter; all kept samples are complete here."""
    report = samples.validity(make_trajectories([(2, 3)] * 4), 97)
    assert report.dropped == {}
    cut = [dataclasses.replace(t, finish_reason="length") for t in make_trajectories([(2, 3)])]
    report.add(samples.validity(cut, 97))
    counts = step_counts(report)
    assert counts == {"generated": 5, "dropped": {"truncated": 1}, "truncated": 0.2}
    assert truncation(tmp_path, **counts) == {(20.0, 100.0)}


def test_a_page_of_nothing_finished_says_so(tmp_path):
    page = compare.write_report(grid.load(write_grid(tmp_path)), tmp_path / "new").read_text()
    assert "11 of 11 runs have not finished" in page
    assert "<svg" not in page
