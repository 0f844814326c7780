"""The configs that ship with the package, found by name: ``demo``, ``paper/table5/on_se_kd``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from onpolicy_skd.config.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
# Inside the package in a wheel, next to it in a checkout.
FOLDER = next((f for f in (PACKAGE / "configs", PACKAGE.parent / "configs") if f.is_dir()), PACKAGE / "configs")


def shipped() -> dict[str, Path]:
    """Return the shipped files by name: the path below FOLDER without its suffix."""
    return {f.relative_to(FOLDER).with_suffix("").as_posix(): f for f in sorted(FOLDER.rglob("*.yaml"))}


def find(config: Path) -> Path:
    """Return ``config`` if it is a file, else the shipped config of that name.

    Raises ConfigError, which suggests the nearest names.
    """
    if config.exists() and not config.is_dir():
        return config
    files, name = shipped(), config.as_posix().removesuffix(".yaml")
    if name in files:
        return files[name]
    near = [n for n in files if n.rsplit("/")[-1] == name.rsplit("/")[-1]]
    near = (near or difflib.get_close_matches(name, files, n=3))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else "`skd configs` lists the shipped ones"
    raise ConfigError(f"--config {config}: neither a file nor a shipped config; {hint}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.config.shipped") -> int:
    """Print the shipped configs' names with the first comment of each; return exit code 0."""
    parser = argparse.ArgumentParser(prog=prog, description="List the names that --config accepts besides files.")
    parser.parse_args(argv)
    files = shipped()
    print(f"in {FOLDER}:")
    for name, file in files.items():
        first = file.read_text(encoding="utf-8").split("\n", 1)[0]
        print(f"{name:<{max(map(len, files))}}  {first.removeprefix('#').strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
