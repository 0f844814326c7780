import io
import os
import signal
import sys

import pytest

from onpolicy_skd.run.stop import Stopped, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_within_the_steps_a_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop, stop.orderly():
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert "ending after this step, with a checkpoint" in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_outside_the_steps_a_signal_ends_the_run():
    with StopSignal() as stop:
        with pytest.raises(Stopped, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_the_second_signal_ends_at_once():
    child = os.fork()
    if child == 0:
        with StopSignal() as stop, stop.orderly():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_a_deadline_is_a_request_too(capfd):
    now = [100.0]
    with StopSignal(hours=0.5, clock=lambda: now[0]) as stop, stop.orderly():
        now[0] += 1_799
        assert not stop.requested
        now[0] += 1
        assert stop.requested
        assert stop.requested
    assert capfd.readouterr().err == "run.max_hours=0.5: ending after this step, with a checkpoint\n"


def test_a_signal_after_the_deadline_is_the_first_signal(capfd):
    with StopSignal(hours=1e-9) as stop, stop.orderly():
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # is no reason to lose the checkpoint
    assert "SIGTERM: ending after this step, with a checkpoint; a second signal exits at once" in capfd.readouterr().err


def test_a_signal_in_the_middle_of_a_print_is_a_request(monkeypatch):
    """A handler that printed to the buffer in use would raise RuntimeError: reentrant call."""

    class Interrupted(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            signal.raise_signal(signal.SIGTERM)
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Interrupted()), write_through=True))
    with StopSignal() as stop, stop.orderly():
        print("a long line", file=sys.stderr, flush=True)
        assert stop.requested


def test_a_signal_that_rays_c_code_wrapped_is_raised_as_itself():
    """``ray.wait`` reports an exception of a signal handler as the cause of a SystemError."""
    with pytest.raises(Stopped, match="SIGTERM"), StopSignal():
        raise SystemError("returned a result with an exception set") from Stopped("SIGTERM")
    with pytest.raises(SystemError, match="another"), StopSignal():
        raise SystemError("another")
