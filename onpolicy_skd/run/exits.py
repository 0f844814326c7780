"""Exit codes of the drivers, and the line they print for an error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from onpolicy_skd.config.errors import ConfigError

EXIT_OK, EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED = 0, 2, 1, 3


class RunError(RuntimeError):
    """A run that cannot continue; the message says why."""


def run_cli(action: Callable[[], int], *failures: type[Exception]) -> int:
    """Run ``action``; return its exit code.  Print bad input and ``failures`` as one line, without a traceback."""
    try:
        return action()
    except (ConfigError, RunError, OSError, *failures) as error:
        cause = cause_of(error)
        print(f"error: {cause}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(cause, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return EXIT_STOPPED


def cause_of(error: Exception) -> Exception:
    """Return the exception that an actor raised, without Ray's wrapper and traceback."""
    return getattr(error, "cause", None) or error
