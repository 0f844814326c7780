"""Encoding on one thread while another thread answers requests for trajectories that are encoded already."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from onpolicy_skd.teacher.teacher import HiddenRowsTeacher
from onpolicy_skd.types import Trajectory


class Encoder:
    """Encoder of batches with ``teacher``; other threads wait for single trajectories, not for the batch."""

    def __init__(self, teacher: HiddenRowsTeacher) -> None:
        self._teacher = teacher
        self._changed = threading.Condition()
        self._errors: dict[bytes, Exception] = {}  # by digest of a trajectory that could not be encoded

    def encode(self, trajectories: Sequence[Trajectory]) -> None:
        """Encode ``trajectories``, longest first.  Raises what the teacher raises, here and in ``wait_for``."""
        with self._changed:
            for t in trajectories:
                self._errors.pop(t.digest, None)
        try:
            self._teacher.encode(trajectories, self._notify)
        except Exception as error:
            with self._changed:
                self._errors |= {t.digest: error for t in trajectories}
                self._changed.notify_all()
            raise

    def wait_for(self, digests: Mapping[str, bytes]) -> None:
        """Block until the trajectories of these keys and digests are encoded.

        Raises the error of the batch that should have encoded them.
        """
        with self._changed:
            while missing := [d for key, d in digests.items() if not self._teacher.holds(key, d)]:
                if error := next((self._errors[d] for d in missing if d in self._errors), None):
                    raise error
                self._changed.wait()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
