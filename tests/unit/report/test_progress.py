"""Progress of long work: lines in a plain log, a bar on a terminal."""

import io
import re
import time

from rich.console import Console

from onpolicy_skd.report import progress
from onpolicy_skd.report.progress import ProgressReporter


def test_a_plain_log_gets_a_line_now_and_then_with_rate_and_remaining_time():
    lines = []
    with ProgressReporter("evaluation", 40, lines.append, completed=20, interval_s=0.05) as reporter:
        for _ in range(5):
            time.sleep(0.03)
            reporter.advance(2)
    assert re.fullmatch(r"evaluation: 2\d/40, [\d.]+/s, 0:00:0\d remaining", lines[0])
    assert lines[-1].startswith("evaluation: 30/40, ")
    rate = float(re.search(r"([\d.]+)/s", lines[-1]).group(1))
    assert rate < 10 / 0.15 + 1  # what was there before does not count


def test_lines_come_while_nothing_advances_and_slow_work_shows_seconds_each():
    lines = []
    with ProgressReporter("scoring", 3, lines.append, interval_s=0.02) as reporter:
        time.sleep(0.05)
        reporter._start -= 60  # a minute ago
        reporter.advance(3)
    assert lines[0] == "scoring: 0/3 after 0:00:00"
    assert lines[-1] == "scoring: 3/3, 20.0 s each, 0:01:00"


def test_quick_work_logs_nothing():
    lines = []
    with ProgressReporter("evaluation", 2, lines.append) as reporter:
        reporter.advance(2)
    assert lines == []


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    lines, terminal = [], io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "shared_console", lambda: console)
    with ProgressReporter("evaluation", 4, lines.append, interval_s=0.01) as reporter:
        reporter.advance(3)
        reporter._bar.refresh()
        time.sleep(0.03)
    assert lines == []
    assert "evaluation" in terminal.getvalue()
    assert "3/4" in terminal.getvalue()
