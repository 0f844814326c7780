"""The import rule: every import points down, no circle, and only drivers, ``eval`` and ``actors`` import Ray.

``python tests/unit/test_imports.py`` prints rooms, floors, arrows and circles.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("onpolicy_skd", "actors", "eval")
FLOORS = (  # from the top; a room imports only rooms of lower floors
    ("eval",),
    ("cli",),
    ("train", "compare", "cache"),  # drivers
    ("actors", "comparison"),
    ("run",),
    ("learner",),
    ("teacher", "rollout", "selection"),
    ("loss", "data", "distributed"),
    ("models", "evaluation", "report"),
    ("storage",),
    ("types", "tracing", "config", "siblings"),
)
DRIVERS = FLOORS[2]
FLOOR_OF = {name: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for name in rooms}


def room_of(module: str) -> str | None:
    """The room of a module: its folder in onpolicy_skd, or ``actors`` or ``eval``; None for a package's root."""
    package, _, rest = module.partition(".")
    return package if package != "onpolicy_skd" else rest.partition(".")[0] or None


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its dotted name."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


def imported_names(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, at any depth: ``from a import b`` gives ``a.b``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """The project's modules that each module imports."""
    graph: dict[str, set[str]] = {}
    trees = modules()
    for module, tree in trees.items():
        names = imported_names(tree)
        targets = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = {target for target in targets if target in trees and target != module}
    return graph


def room_arrows(graph: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Imports between rooms, with the module pairs behind each."""
    arrows = defaultdict(list)
    for module, targets in graph.items():
        for target in targets:
            rooms = room_of(module), room_of(target)
            if None not in rooms and rooms[0] != rooms[1]:
                arrows[rooms].append(f"{module} -> {target}")
    return dict(arrows)


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in modules()} - {None, "__main__"}
    assert rooms <= set(FLOOR_OF), f"give these rooms a floor: {sorted(rooms - set(FLOOR_OF))}"


def test_no_import_points_up():
    arrows = room_arrows(import_graph())
    upward = {pair: where for pair, where in arrows.items() if FLOOR_OF[pair[1]] >= FLOOR_OF[pair[0]]}
    assert not upward


def test_no_circle():
    graphlib.TopologicalSorter(import_graph()).prepare()  # raises CycleError with the circle


def test_only_drivers_actors_and_eval_import_ray():
    for module, tree in modules().items():
        if any(name.partition(".")[0] == "ray" for name in imported_names(tree)):
            assert room_of(module) in {*DRIVERS, "actors", "eval"}, f"{module} imports Ray"


def main() -> None:
    graph = import_graph()
    arrows = room_arrows(graph)
    for number, rooms in enumerate(FLOORS):
        names = [name for name in rooms if any(room_of(module) == name for module in graph)]
        counts = ", ".join(f"{name} {sum(room_of(module) == name for module in graph)}" for name in names)
        print(f"floor {len(FLOORS) - number:>2}: {counts}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
        circles = 0
    except graphlib.CycleError as error:
        circles = 1
        print("circle:", " -> ".join(error.args[1]))
    upward = sum(FLOOR_OF[b] >= FLOOR_OF[a] for a, b in arrows)
    print(f"{len(graph)} modules, {len(arrows)} arrows between rooms, {upward} upward, {circles} circles")


if __name__ == "__main__":
    main()
