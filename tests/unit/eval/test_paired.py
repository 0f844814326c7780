"""Paired comparison of two evaluations: the test and the interval against their definitions, the command line."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import paired
from eval.paired import Change

VERDICTS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=80)


@given(VERDICTS)
def test_the_p_value_is_the_two_tails_of_the_binomial(pairs):
    change = Change.of(*zip(*pairs, strict=True))
    n, fewer = change.gained + change.lost, min(change.gained, change.lost)
    tail = sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n
    assert change.p_value == pytest.approx(min(1.0, 2 * tail))


@given(VERDICTS)
def test_the_interval_turns_with_the_direction_and_holds_its_center(pairs):
    before, after = zip(*pairs, strict=True)
    forward, back = Change.of(before, after), Change.of(after, before)
    low, high = forward.interval
    assert back.interval == pytest.approx((-high, -low))
    assert -1 <= low <= (forward.gained - forward.lost) / (forward.problems + 2) <= high <= 1
    assert forward.after - forward.before == pytest.approx((forward.gained - forward.lost) / forward.problems)


def test_an_example_by_hand():
    """Agresti and Min's adjusted Wald interval on 100 problems, of which 20 were gained and 8 lost."""
    change = Change.of([0] * 20 + [1] * 8 + [1] * 32 + [0] * 40, [1] * 20 + [0] * 8 + [1] * 32 + [0] * 40)
    assert (change.before, change.after) == (0.40, 0.52)
    center, spread = 12 / 102, math.sqrt(29 - 144 / 102) / 102
    assert change.interval == pytest.approx((center - 1.959964 * spread, center + 1.959964 * spread))
    assert change.p_value == pytest.approx(0.0357, abs=5e-5)
    assert str(change) == (
        "40.0 % (30.9 to 49.8) -> 52.0 % (42.3 to 61.5), +12.0 points (+1.7 to +21.9); "
        "20 gained, 8 lost, McNemar p = 0.036"
    )


def test_the_interval_covers_the_truth_in_95_of_100_cases():
    """Of 400 draws of 200 problems with a true change of 8 points; four standard errors are allowed."""
    import numpy as np

    rng, covered, draws = np.random.default_rng(0), 0, 400
    for cells in rng.multinomial(200, [0.14, 0.06, 0.30, 0.50], size=draws):
        low, high = Change(200, 0.0, 0.0, *map(int, cells[:2])).interval
        covered += low <= 0.08 <= high
    assert abs(covered / draws - 0.95) < 4 * math.sqrt(0.95 * 0.05 / draws)


def evaluation(folder, verdicts, **changes):
    folder.mkdir()
    rows = [
        {"key": f"p{i}/0", "question": f"q{i}", "tokens": 10 * (i + 1), "finish_reason": "length" if i == 0 else "stop",
         "match": bool(v), "strict": bool(v and i % 2)} | changes
        for i, v in enumerate(verdicts)
    ]  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def test_arms_are_recorded_and_compared_again(tmp_path, capsys):
    before, after = evaluation(tmp_path / "a", [0, 0, 1, 0]), evaluation(tmp_path / "b", [1, 1, 1, 0], tokens=5)
    teacher, record = evaluation(tmp_path / "t", [1, 1, 1, 1]), tmp_path / "docs" / "record.json"
    (tmp_path / "config.yaml").write_text("learner: {lr: 0.5}\n")
    options = ["--record", str(record), "--teacher", teacher, "--config", str(tmp_path / "config.yaml")]
    assert paired.main([before, after, "--arm", "k20", *options]) == 0
    printed = capsys.readouterr().out
    assert "k20: 4 problems" in printed
    assert "25.0 % (4.6 to 69.9) -> 75.0 % (30.1 to 95.4)" in printed
    assert "2 gained, 0 lost, McNemar p = 0.5" in printed
    assert "tokens per answer: 25 -> 5" in printed
    assert "teacher: 100.0 %" in printed
    assert paired.main([before, before, "--arm", "same", "--record", str(record)]) == 0
    saved = json.loads(record.read_text())
    assert saved["teacher"] == [1, 1, 1, 1]
    assert saved["arms"]["k20"]["keys"] == ["p0", "p1", "p2", "p3"]
    assert saved["arms"]["k20"]["before"] == [0, 0, 1, 0]
    assert saved["arms"]["k20"]["strict_after"] == [0, 1, 0, 0]
    assert saved["arms"]["k20"]["settings"] == {"learner": {"lr": 0.5}}
    capsys.readouterr()
    assert paired.main([str(record)]) == 0
    again = capsys.readouterr().out
    assert printed.splitlines()[:-1] == again.splitlines()[:5]
    assert "same: 4 problems" in again


def test_what_cannot_be_paired_is_refused(tmp_path, capsys):
    first = evaluation(tmp_path / "a", [0, 1])

    def refusal(*arguments):
        assert paired.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "do not hold the same problems: p2 differs" in refusal(first, evaluation(tmp_path / "b", [0, 1, 1]))
    assert "do not hold the same problems" in refusal(first, evaluation(tmp_path / "c", [0, 1], question="other"))
    assert "a second answer to p" in refusal(first, evaluation(tmp_path / "d", [0, 1], key="p0/0"))
    assert "no such file" in refusal(first, tmp_path / "nowhere")
    assert "3 files" in refusal(first, first, first)
    assert "not a file of --record" in refusal(tmp_path / "a" / "records.jsonl")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "not a file of --record" in refusal(tmp_path / "deep.json")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "records.jsonl").write_text('{"key": "p0/0"}\n')
    assert "record 1: has no valid question" in refusal(first, tmp_path / "e")
    assert "record 1: has no valid key" in refusal(first, evaluation(tmp_path / "g", [0, 1], key=3))
    assert "record 1: has no valid tokens" in refusal(first, evaluation(tmp_path / "h", [0, 1], tokens="5"))
    assert paired.main([first, first, "--record", str(tmp_path / "r.json")]) == 0
    other = evaluation(tmp_path / "f", [1, 1, 1])
    assert "its arms are of other problems" in refusal(other, other, "--record", tmp_path / "r.json")
