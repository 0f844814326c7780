"""Import of the packages ``actors`` and ``eval`` next to this one, even if others on sys.path have the same names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("actors", "eval")


def bind() -> None:
    """Import the siblings from ROOT, so that an ``eval.py`` in the working directory does not hide them."""
    sys.path.insert(0, str(ROOT))
    try:
        for name in NAMES:
            importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT))


def hidden_in(folder: Path) -> bool:
    """Return True if ``folder`` holds other files or folders with the siblings' names."""
    return folder.resolve() != ROOT and any(
        (folder / name).is_dir() or (folder / f"{name}.py").exists() for name in NAMES
    )


def worker_setup() -> Callable[[], None]:
    """Return a function that binds the siblings in a Ray worker.

    Ray puts the driver's working directory first on a worker's sys.path. The function is nested so that Ray pickles
    its code: a worker could not import it by name before it has run.
    """
    root = str(ROOT)

    def bind_in_worker() -> None:
        import sys

        sys.path.insert(0, root)
        try:
            from onpolicy_skd import siblings  # noqa: PLW0406 (the code runs elsewhere)
        finally:
            sys.path.remove(root)
        siblings.bind()

    return bind_in_worker
