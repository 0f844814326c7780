"""Shared fixtures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import ROOT
from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)  # the time of one example depends on the machine
settings.load_profile("no_deadline")
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; children would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gsm8k() -> Path:
    """The folder of the real GSM8K; tests that read it say so when it is not beside the checkout."""
    folder = Path(os.environ.get("GSM8K_DIR", GSM8K))
    if not (folder / "test.jsonl").exists():
        pytest.skip("GSM8K's train.jsonl and test.jsonl are not here; set GSM8K_DIR to the folder that holds them")
    return folder
