"""`skd chat` at a real terminal of 80 columns."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

from helpers import ROOT

from onpolicy_skd.data.demo_task import problems

QUESTION = "Mia has 30 stamps. She buys 17 more stamps. How many stamps does Mia have now?"


def read_until(terminal, needle, timeout_s=90.0):
    """Return what the terminal shows up to ``needle``."""
    shown, deadline = b"", time.monotonic() + timeout_s
    while needle not in shown:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536)
    return shown.decode()


def test_a_question_is_answered_side_by_side_and_control_d_ends():
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "onpolicy_skd.cli", "chat", "--model", "bundled:demo_teacher", "--versus",
               "bundled:demo_student", "--config", "demo"]  # fmt: skip
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        try:
            hint = read_until(outer, b"> ")
            assert "Type a question" in hint
            assert next(problems("test"))["question"] in hint
            os.write(outer, QUESTION.encode() + b"\n")
            shown = read_until(outer, "┘\r\n> ".encode())
            os.write(outer, b"\x04")
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(outer)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rpartition("\r")[2] for line in shown.split("\r\n")]
    top = max(number for number, line in enumerate(lines) if line.startswith("┏"))
    table = lines[top:-1]
    assert {len(line) for line in table} == {80}
    assert re.fullmatch(r"┃ bundled:demo_student +┃ bundled:demo_teacher +┃", table[1])
    assert any("#### 47" in line.rpartition("│ ")[2] for line in table)
