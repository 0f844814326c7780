"""Store a teacher's outputs on disk: build, info, verify.

build takes the settings of the training run that will use the cache.  After a kill, the same command writes the missing
shards; the cache has the same bytes as one from an uninterrupted build.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from ray.exceptions import RayError

from actors.cache_builders import CacheBuilders, Work
from actors.cluster import connect
from actors.placement import Counts, Resources
from actors.training_set import Log, add_generated_references, engine, selected_prompts
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import load_settings
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.report.progress import ProgressReporter
from onpolicy_skd.run.exits import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, run_cli
from onpolicy_skd.run.preflight import preflight
from onpolicy_skd.run.prepare import Run, prepare
from onpolicy_skd.teacher import cache_format as caches
from onpolicy_skd.teacher import cache_provenance as provenance
from onpolicy_skd.teacher import cache_reader
from onpolicy_skd.teacher.cache_format import CacheError, Layout, Manifest, Shard
from onpolicy_skd.types import Prompt, Trajectory

print_now = functools.partial(print, flush=True)
USAGE = "usage: {} build --config FILE cache.path=DIR [a.b=value ...] | info DIR | verify DIR"


def build(settings: Settings, log: Log = print_now) -> None:
    """Build a complete cache of the run's texts in ``cache.path``.

    Raises ConfigError for settings that cannot be used, and if the folder holds a cache already.
    """
    folder = settings.cache.path
    if folder is None:
        raise ConfigError("cache.path: needed to build a cache; give the folder for it")
    if (folder / caches.MANIFEST).exists():
        if (folder / caches.PLAN).exists():
            caches.clean(folder)
        raise ConfigError(f"cache.path={folder}: already holds a cache; give another folder, or remove it")
    teaching = settings.model_copy(update={"cache": settings.cache.model_copy(update={"path": None})})
    prefilters = settings.samples.when == "prefilter"
    rolls_out = prefilters and settings.samples.prefilter_text == "rollout"
    preflight(teaching)
    run = prepare(teaching, log, generates=rolls_out or settings.generates_references)
    # Actors that run at the same time; the scoring learner queries a builder if its metric needs a teacher.
    counts = Counts(int(prefilters), settings.teacher.actors, int(rolls_out))
    with caches.locked(folder), connect(teaching, counts) as resources, ExitStack() as stack:
        add_generated_references(run, resources, log)
        pad_id = run.tokenizer.pad_token_id
        builders = stack.enter_context(CacheBuilders(teaching, resources, run.vocabulary, pad_id, log))
        write(run, Samples(run, selected(run, resources, builders, log)), builders, folder, log)


def selected(run: Run, resources: Resources, builders: CacheBuilders, log: Log) -> Sequence[Prompt]:
    """Return the prompts to cache; the actors that score them start only if scores are missing on disk."""
    with ExitStack() as stack:
        ranking = functools.cache(lambda: stack.enter_context(builders.sample_scorer()))
        rollouts = functools.cache(lambda: stack.enter_context(engine(run, resources, "student", log)))

        def score_samples(trajectories: Sequence[Trajectory]) -> list[float]:
            return ranking()(trajectories)

        return selected_prompts(run, score_samples, rollouts, log)


class Samples:
    """The samples that a run on ``prompts`` may train on; digests and sizes stay in memory, ``of`` builds samples."""

    def __init__(self, run: Run, prompts: Sequence[Prompt]) -> None:
        self._run = run
        self._prompts = prompts
        self.digests: list[bytes] = []
        self.positions: list[int] = []
        self._first: list[int] = []  # index of each prompt's first sample
        for prompt in prompts:
            self._first.append(len(self.digests))
            for t in run.every_reference([prompt]):
                self.digests.append(t.digest)
                self.positions.append(len(t.target_ids))

    def of(self, indices: range) -> list[Trajectory]:
        """Return the samples at consecutive ``indices``."""
        first = bisect_right(self._first, indices.start) - 1
        last = bisect_right(self._first, indices.stop - 1) - 1
        trajectories = list(self._run.every_reference([self._prompts[i] for i in range(first, last + 1)]))
        return trajectories[indices.start - self._first[first] :][: len(indices)]


def write(run: Run, samples: Samples, builders: CacheBuilders, folder: Path, log: Log) -> None:
    """Write the missing shards of the cache of ``samples``.  Raises CacheError if ``folder`` holds another cache."""
    cut = caches.cut(samples.positions, caches.POSITIONS_PER_SHARD)
    layout = Layout.of(run.settings, run.vocabulary)
    plan = Manifest(provenance.provenance(run.settings, run.tokenizer), layout, caches.plan_of(samples.digests, cut))
    _open_folder(folder, plan, log)
    done: dict[int, Shard] = {}
    for number in range(len(cut)):
        if shard := caches.finished_shard(folder, number):
            done[number] = shard
    if done:
        log(f"cache: {len(done)} of {len(cut)} shards exist already")

    def missing() -> Iterator[Work]:
        return ((number, samples.of(indices)) for number, indices in enumerate(cut) if number not in done)

    with ProgressReporter("cache shards", len(cut), log, completed=len(done)) as progress:
        for number, shard in builders.write(folder, missing()):
            done[number] = shard
            progress.advance()
    log(f"cache: {len(done)}/{len(cut)} shards, {sum(s.positions for s in done.values())} positions")
    head = caches.write_head(folder, builders.head()) if layout.content == "hidden" else None
    shards = [done[number] for number in range(len(cut))]
    caches.complete(folder, Manifest(plan.provenance, layout, plan.plan, head, shards))
    info(folder, log)


def _open_folder(folder: Path, plan: Manifest, log: Log) -> None:
    if not (folder / caches.PLAN).exists():
        plan.write(folder, caches.PLAN)
        return
    begun = Manifest.read(folder, caches.PLAN)
    if not provenance.same_outputs(begun, plan):
        raise CacheError(
            f"cache.path={folder}: holds another, unfinished cache ({provenance.differing(begun, plan)}); build with "
            "its settings, give another folder, or remove it"
        )


def info(folder: Path, log: Log = print_now) -> None:
    """Log the contents and the provenance of a cache.  Raises CacheError."""
    manifest = Manifest.read(folder)
    size, information = sum(s.bytes for s in manifest.shards), manifest.information_bits / 8
    log(f"{folder}: {manifest.layout.content} in {len(manifest.shards)} shards, {manifest.samples} samples")
    log(f"{manifest.positions} positions, {size / manifest.positions:.2f} bytes each, {size} in total; "
        f"records with lengths would be {information / manifest.positions:.2f} bytes a position")  # fmt: skip
    log(json.dumps({"layout": manifest.layout.described(), "provenance": manifest.provenance}, indent=2))


def verify(folder: Path, log: Log = print_now) -> bool:
    """Compare each file with its checksum; return True if all are good."""
    problems = [problem for _, problem in cache_reader.verify(folder)]
    for problem in filter(None, problems):
        log(problem)
    bad = sum(problem is not None for problem in problems)
    log(
        f"{folder}: {bad} of {len(problems)} files are damaged" if bad else f"{folder}: {len(problems)} files, all good"
    )
    return not bad


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.cache") -> int:
    """Run the command line; return the exit code: 0 done, 1 failed or damaged, 2 bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    given = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _run(prog, *given), RayError)


def _run(prog: str, command: str = "", *rest: str) -> int:
    if command == "build":
        build(load_settings(rest, f"{prog} build", "Write a teacher's outputs on a run's texts."))
        return EXIT_OK
    if command == "verify" and len(rest) == 1:
        return EXIT_OK if verify(Path(rest[0])) else EXIT_FAILED
    if command == "info" and len(rest) == 1:
        info(Path(rest[0]))
        return EXIT_OK
    asked = command in ("-h", "--help")
    print(USAGE.format(prog), file=sys.stdout if asked else sys.stderr)
    return EXIT_OK if asked else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
