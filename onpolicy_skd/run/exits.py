"""How a driver ends: its exit codes, and what it prints of an error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from onpolicy_skd.config.errors import ConfigError

EXIT_OK, EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED = 0, 2, 1, 3


class RunError(RuntimeError):
    """A run that cannot go on; the message says why."""


def run_cli(action: Callable[[], int], *failures: type[Exception]) -> int:
    """The exit code of ``action``; of bad input or a failed actor one line on stderr, without a traceback."""
    try:
        return action()
    except (ConfigError, RunError, OSError, *failures) as error:
        cause = cause_of(error)
        print(f"error: {cause}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(cause, ConfigError) else EXIT_FAILED


def first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0]


def cause_of(error: Exception) -> Exception:
    """What an actor raised, without Ray's wrapping and its traceback."""
    return getattr(error, "cause", None) or error
