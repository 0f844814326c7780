"""Preparation of a run before a model loads: data, tokenizers, vocabulary, and the run's folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import dump, flat, read_yaml, resolve
from onpolicy_skd.config.schema import Settings, rules_of, walk
from onpolicy_skd.data import references
from onpolicy_skd.data.packed_text import pack
from onpolicy_skd.data.prompts import (
    check_judged,
    check_references,
    hold_out,
    load_prompts,
    mixed_prompts_of_step,
    prompts_of_step,
)
from onpolicy_skd.data.references import Responses
from onpolicy_skd.data.teacher_prompts import with_teacher_prompts
from onpolicy_skd.evaluation.judge import find_judge
from onpolicy_skd.loss.mixture import Mixture
from onpolicy_skd.models import loading as models
from onpolicy_skd.models.vllm_setup import require_vllm
from onpolicy_skd.run.model_checks import models_of_teachers, naming
from onpolicy_skd.selection.positions import num_selected
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.storage.checkpoint import Checkpoint
from onpolicy_skd.storage.files import RunPaths
from onpolicy_skd.teacher import cache_provenance as provenance
from onpolicy_skd.teacher.cache_format import CacheError, Manifest
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.types import Prompt, RolloutRequest, SamplingParams, Trajectory, seed_of

RESUMABLE = frozenset(key for key, field in walk() if rules_of(field)["resumable"])
DATA_SECTIONS = ("mode", "data", "references", "eval")  # sections whose settings decide which samples are trained on
Changes = dict[str, list[Any]]  # setting: [value before, value now]


@dataclass
class Run:
    """Settings and data of a run, and what its driver derives from them."""

    settings: Settings
    tokenizer: Any
    vocabulary: int
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    responses: Responses = field(default_factory=dict)  # references by prompt key
    validation: Sequence[Prompt] = ()  # held out of the training data, for evaluations during training
    data_digest: str = ""  # changes with the training data
    _indices: tuple[Sequence[Prompt], list[list[int]]] | None = None  # prompts and their indices by source of a mix

    @property
    def scored(self) -> list[Prompt]:
        """The prompts whose responses a teacher may score, held-out ones only if the divergence is measured on them."""
        held_out = self.held_out if self.settings.eval.divergence_prompts and not self.validation else ()
        return [*self.train, *self.validation, *held_out]

    @property
    def worker_settings(self) -> Settings:
        """The settings without the teachers that no prompt names, so that these are not started."""
        idle = idle_teachers(self.settings, self.scored)
        teachers = {name: teacher for name, teacher in self.settings.teachers.items() if name not in idle}
        return self.settings.model_copy(update={"teachers": teachers})

    @property
    def folder(self) -> Path:
        return self.settings.run.folder

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.folder)

    @property
    def steps(self) -> int:
        """Number of steps of the run, known from counts alone, before a prefilter has run."""
        run, samples = self.settings.run, self.settings.samples
        if run.steps is not None:
            return run.steps
        prefiltered = samples.when == "prefilter"
        count = num_selected(samples.keep, len(self.train)) if prefiltered else len(self.train)
        return math.ceil(round(run.epochs * count / self.settings.prompts_per_step, 9))

    @property
    def sampling(self) -> SamplingParams:
        rollout = self.settings.rollout
        return SamplingParams(
            rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.entropy == "engine", tuple(rollout.stop)
        )

    def max_tokens(self, step: int) -> int:
        """Return the length limit of the rollouts of ``step``, which may grow (``rollout.max_tokens_start``)."""
        cfg = self.settings.rollout
        start = cfg.max_tokens_start or cfg.max_tokens
        return start + math.floor((cfg.max_tokens - start) * min(1.0, step / cfg.max_tokens_steps))

    def sampling_at(self, step: int) -> SamplingParams:
        return replace(self.sampling, max_tokens=self.max_tokens(step))

    @property
    def greedy(self) -> SamplingParams:
        max_tokens = self.settings.eval.max_tokens or self.settings.rollout.max_tokens
        return SamplingParams(max_tokens, 0.0, stop=tuple(self.settings.rollout.stop))

    @property
    def samples_student(self) -> bool:
        """True if the student generates in training."""
        return self.settings.student_rollouts_per_step > 0

    @property
    def validation_prompts(self) -> Sequence[Prompt]:
        """The prompts of evaluations during training."""
        cfg = self.settings.eval
        return self.validation or self.held_out[: cfg.during or cfg.problems or None]

    def save_validation(self) -> None:
        """Write keys and rows of the training problems that are held out, if any are."""
        if self.validation:
            rows = {p.key: p.row for p in self.validation}
            files.write_text(self.paths.validation, json.dumps(rows, indent=0) + "\n")

    @property
    def knows_its_texts(self) -> bool:
        """True if data and settings alone decide the training texts, without a model's answers or scores."""
        return self.settings.samples.when != "prefilter" and not self.settings.generates_references

    def requests(self, prompts: Sequence[Prompt], step: int) -> list[RolloutRequest]:
        """Return the rollouts of ``step``: its first prompts, ``rollout.n`` times each, with a seed for each."""
        settings, seed = self.settings, self.settings.run.seed
        requests = [
            RolloutRequest(
                f"{place}:{p.key}/{i}",
                p.token_ids,
                seed_of(seed, step, place, p.key, i),
                p.answer if settings.judges_rollouts else None,
                p.columns if settings.judges_rollouts and not p.answer else None,
                p.teacher_ids,
                p.teacher,
            )
            for place, p in self._prompts(prompts, step)[: self._rolled_out]
            for i in range(settings.rollout.n)
        ]
        return requests[: settings.student_rollouts_per_step]

    def references(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """Return the references of ``step``: one for each of its prompts without rollouts."""
        seed, supervise, trajectories = self.settings.run.seed, self.settings.references.supervise, []
        for place, prompt in self._prompts(prompts, step)[self._rolled_out :]:
            key = f"{place}:{prompt.key}/0"
            if prompt.documents is not None:
                trajectories.append(references.of_text(prompt, key))
                continue
            responses = self.responses[prompt.key]
            response = responses[seed_of(seed, step, place, "reference") % len(responses)]
            trajectories.append(references.trajectory(prompt, response, key, supervise))
        return trajectories

    def every_reference(self, prompts: Sequence[Prompt]) -> Iterator[Trajectory]:
        """Yield all trajectories that an off-policy run on ``prompts`` may train on."""
        supervise = self.settings.references.supervise
        for prompt in prompts:
            if prompt.documents is not None:
                yield references.of_text(prompt, prompt.key)
            else:
                for i, response in enumerate(self.responses[prompt.key]):
                    yield references.trajectory(prompt, response, f"{prompt.key}/{i}", supervise)

    def check_cached(self, prompts: Sequence[Prompt]) -> None:
        """Raise CacheError unless the cache of the settings, if there is one, holds all that a run may train on."""
        path = self.settings.cache.path
        if path is None:
            return
        cache = TeacherCache(path)
        for prompt in prompts:
            if not all(cache.holds(trajectory) for trajectory in self.every_reference([prompt])):
                why = provenance.other_texts(cache.manifest, self.settings)
                raise CacheError(f"cache.path={path}: {prompt.row} is not in it. {why}")

    @property
    def _rolled_out(self) -> int:
        return math.ceil(self.settings.student_rollouts_per_step / self.settings.rollout.n)

    def _prompts(self, prompts: Sequence[Prompt], step: int) -> list[tuple[int, Prompt]]:
        """Return the prompts of ``step`` with numbers, which keep keys unique if a small set repeats within a step."""
        per_step, seed, mix = self.settings.prompts_per_step, self.settings.run.seed, self.settings.data.mix
        if mix:
            indices = mixed_prompts_of_step(self._by_source(prompts), [s.weight for s in mix], per_step, step, seed)
        else:
            indices = prompts_of_step(len(prompts), per_step, step, seed)
        return list(enumerate(prompts[i] for i in indices))

    def _by_source(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the indices of the prompts of each source of ``data.mix``.  Raises ConfigError if one has none."""
        if self._indices is None or self._indices[0] is not prompts:
            members: list[list[int]] = [[] for _ in self.settings.data.mix]
            for index, prompt in enumerate(prompts):
                members[prompt.source].append(index)
            if not all(members):
                raise ConfigError(
                    f"data.mix[{members.index([])}]: none of its prompts is left after data.validation_problems, "
                    "data.overlong=drop and samples.when=prefilter; leave it out of the mix, or change these"
                )
            self._indices = prompts, members
        return self._indices[1]


def prepare(settings: Settings, log: Callable[[str], None] = print, generates: bool = True) -> Run:
    """Load data and tokenizers and check that they fit; ``generates``: a rollout engine may be needed.

    Raises ConfigError (or a subclass).
    """
    if settings.rollout.engine == "vllm" and generates and (settings.needs_engines or settings.generates_references):
        require_vllm(settings.run.device)
    if settings.cache.path is None and any(s.teacher.engine == "vllm" for s in settings.by_teacher):
        require_vllm(settings.run.device, "teacher.engine")
    check_plugins(settings)
    find_judge(settings.eval.judge)
    student = settings.student
    with naming("student.model"):
        tokenizer = models.load_tokenizer(student.model, student.trust_remote_code)
    vocabulary = _vocabulary(settings, tokenizer)
    check_mask_tokens(settings, vocabulary)
    if settings.data.source == "text":
        return _text_run(settings, tokenizer, vocabulary, log)
    train, validation = (with_teacher_prompts(settings, tokenizer, p) for p in _train_prompts(settings, tokenizer))
    to_judge = [*validation, *(train if settings.judges_rollouts else [])]
    check_references(p for p in to_judge if p.answer)
    if settings.samples.when == "prefilter" and settings.samples.prefilter_text == "prompt+answer":
        _check_scored(train, tokenizer)
    responses: Responses = {}
    if settings.mode != "on_policy" and not settings.generates_references:
        train, responses = references.from_text(settings, train, tokenizer)
    cfg = settings.eval
    limit = max(cfg.problems, cfg.during, cfg.divergence_prompts) if cfg.problems else None
    held_out = load_prompts(settings.data, tokenizer, "eval", limit) if settings.data.has_eval else []
    if cfg.divergence_prompts and not validation:  # in other evaluations the teacher reads the student's prompt
        held_out = with_teacher_prompts(settings, tokenizer, held_out)
    check_judged([*to_judge, *held_out], settings.eval.judge)
    run = Run(settings, tokenizer, vocabulary, train, held_out, responses, validation, _data_digest(train, responses))
    for name in idle_teachers(settings, run.scored):
        log(f"teachers.{name}: no row names it; it is not started")
    return run


def _check_scored(prompts: Sequence[Prompt], tokenizer: Any) -> None:
    """Raise ConfigError, naming the row, for a prompt without the text that the prefilter scores."""
    for prompt in prompts:
        if not prompt.has_reference:
            raise ConfigError(
                f"{prompt.row}: has no reference answer to score; accepted: samples.prefilter_text=prompt or rollout"
            )
        if prompt.chat:
            references.of_data(prompt, tokenizer)


def check_mask_tokens(settings: Settings, vocabulary: int) -> None:
    """Raise ConfigError for a masked token that no response can have."""
    for token in settings.positions.mask_tokens:
        if token != "special" and token >= vocabulary:
            raise ConfigError(
                f"positions.mask_tokens={settings.positions.mask_tokens}: {token} is no token; accepted: ids below "
                f"{vocabulary}, or special"
            )


def idle_teachers(settings: Settings, prompts: Sequence[Prompt]) -> list[str]:
    """Return the names of ``teachers`` that no prompt names.

    Raises ConfigError, naming the row, for a prompt without a known name.
    """
    if settings.teachers:
        for prompt in prompts:
            if prompt.teacher not in settings.teachers:
                column = settings.data.sources[prompt.source].teacher_column
                raise ConfigError(
                    f"{prompt.row}: column {column!r} (data.teacher_column) is {prompt.teacher!r}; accepted: "
                    f"{', '.join(settings.teachers)}"
                )
    asked = {prompt.teacher for prompt in prompts}
    return [name for name in settings.teachers if name not in asked]


def check_plugins(settings: Settings) -> None:
    """Import the user's metric, policy, weighting and gate.  Raises ConfigError for one that does not fit."""
    selector = Selector(settings.positions, settings.run.seed)
    Mixture.from_settings(settings.alignment.mixture)
    if settings.pipeline.streaming and selector.ranges(0):
        raise ConfigError(
            f"pipeline.streaming: positions.metric={settings.positions.metric} looks at the whole batch before it "
            "chooses; accepted: false"
        )


def _text_run(settings: Settings, tokenizer: Any, vocabulary: int, log: Callable[[str], None]) -> Run:
    """Return a run on packed text, whose last samples are held out."""
    text = pack(settings.data, tokenizer, RunPaths(settings.run.folder).packed_text, log)
    border = max(0, len(text) - settings.eval.divergence_prompts)
    if not border:
        count = f"eval.divergence_prompts={settings.eval.divergence_prompts}"
        raise ConfigError(f"{count}: so many samples are held out, but the text has {len(text)}; accepted: fewer")
    digest = f"{text.digest}, {border} samples"
    return Run(settings, tokenizer, vocabulary, text[:border], text[border:], data_digest=digest)


def _data_digest(prompts: Sequence[Prompt], responses: Responses) -> str:
    """Return a digest that changes with any prompt, answer or reference, and with their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        ids = [r.ids if r.mask is None else [r.ids, r.mask.tolist()] for r in responses.get(prompt.key, ())]
        teacher_ids = () if prompt.teacher_ids is None else (prompt.teacher_ids,)
        digest.update(json.dumps([prompt.token_ids, prompt.answer, ids, *teacher_ids]).encode())
        if prompt.teacher:
            digest.update(f"teacher {prompt.teacher}".encode())
        if prompt.source:
            digest.update(f"source {prompt.source}".encode())
    return digest.hexdigest()


def _train_prompts(settings: Settings, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on and those held out, which do not depend on ``data.train_problems``."""
    data = settings.data
    if not data.validation_problems:
        return load_prompts(data, tokenizer, "train"), []
    unlimited = {"train_problems": None}
    mix = [source.model_copy(update=unlimited) for source in data.mix]
    prompts = load_prompts(data.model_copy(update=unlimited | {"mix": mix}), tokenizer, "train")
    train, validation = hold_out(prompts, data.validation_problems)
    by_source = [[p for p in train if p.source == number] for number in range(len(data.sources))]
    limits = [source.train_problems for source in data.sources]
    return [p for prompts, limit in zip(by_source, limits, strict=True) for p in prompts[:limit]], validation


def _vocabulary(settings: Settings, tokenizer: Any) -> int:
    """Return the number of classes that student and teachers share.  Raises ConfigError for different tokenizers."""
    student = settings.student
    with naming("student.model"):
        config = models.load_config(student.model, student.trust_remote_code)
        models.check_length(config, student.model, settings.max_model_length)
        models.check_weights(student.model)
    if settings.cache.path is not None:
        manifest = Manifest.read(settings.cache.path)
        provenance.check(manifest, settings, tokenizer, models.vocabulary_of(config))
        return manifest.layout.vocabulary
    shared = []
    for key, each in models_of_teachers(settings):
        teacher = each.teacher_model
        with naming(key):
            teachers_tokenizer = models.load_tokenizer(teacher.model, teacher.trust_remote_code)
            models.check_same_tokenizer(tokenizer, teachers_tokenizer, student.model, teacher.model)
            teacher_config = models.load_config(teacher.model, teacher.trust_remote_code)
            models.check_length(teacher_config, teacher.model, each.max_teacher_sequence)
            models.check_weights(teacher.model)
            shared.append(models.shared_vocabulary(config, teacher_config, len(tokenizer)))
    return min(shared)


@contextmanager
def open_folder(run: Run, log: Callable[[str], None] = print) -> Iterator[Checkpoint | None]:
    """Create or reopen the run's folder and keep it locked; yield the checkpoint to continue from, if there is one.

    Raises ConfigError, with nothing replaced, if another process uses the folder, if it holds another run or data, if
    settings differ that affect the result, or if none of its checkpoints can be read.
    """
    settings, paths = run.settings, run.paths
    with ExitStack() as stack:
        try:
            paths.folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.lock(paths.lock, f"run.name={settings.run.name}: {paths.folder}"))
        except OSError as error:
            raise _unwritable(settings, error) from None
        changes = check_resume(run)
        loaded = _newest(run) if settings.resume == "auto" else None
        for key, (before, now) in changes.items():
            log(f"resume: {key} is {json.dumps(now)} from here on, was {json.dumps(before)}")
        if loaded is None and paths.metrics.exists():
            log(f"resume: no checkpoint in {paths.checkpoints} yet; the run starts over")
        try:
            _write_record(run, changes, loaded.step if loaded else 0)
            files.write_text(paths.config, dump(settings))
        except OSError as error:
            raise _unwritable(settings, error) from None
        yield loaded


def check_resume(run: Run) -> Changes:
    """Return the settings that differ from those of the run to resume; nothing is written.

    Raises ConfigError if the folder holds another run, or if data or settings differ that affect the result.
    """
    settings, paths = run.settings, run.paths
    if settings.resume == "never" and paths.metrics.exists():
        raise ConfigError(
            f"run.name={settings.run.name}: {paths.folder} already holds a run; give another name, resume=auto to "
            "continue it, or remove the folder"
        )
    return _changes(run) if settings.resume == "auto" and paths.config.exists() else {}


def _unwritable(settings: Settings, error: OSError) -> ConfigError:
    folder = settings.run.folder
    return ConfigError(f"run.dir={settings.run.dir}: {folder} cannot be written ({error.strerror})")


def _newest(run: Run) -> Checkpoint | None:
    """Return the newest good checkpoint; None if there never was one.  Raises ConfigError if none can be read."""
    folder = run.paths.checkpoints
    loaded = checkpoint.newest(folder)
    if loaded is None and (damaged := checkpoint.damaged(folder)):
        raise ConfigError(
            f"resume=auto: nothing readable, {len(damaged)} damaged checkpoints in {folder}; to start over, give "
            f"another run.name, or remove {run.folder} and set resume=never"
        )
    return loaded


def _changes(run: Run) -> Changes:
    """Return what differs from the run to resume.

    Raises ConfigError for a difference that affects the result, unless ``resume_with`` names it.
    """
    settings, paths = run.settings, run.paths
    tree = read_yaml(paths.config)
    with suppress(ConfigError):  # gives settings that did not exist then their defaults
        tree = resolve(tree).model_dump(mode="json")
    before, now = flat(tree), flat(settings.model_dump(mode="json"))
    keys = sorted((before.keys() | now.keys()) - {"resume", "resume_with"})
    changes = {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}
    allowed = settings.resume_with
    blocking = {
        key: values
        for key, values in changes.items()
        if _plain(key) not in RESUMABLE and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    }
    if blocking:
        listed = ", ".join(f"{k}: {json.dumps(old)} then, {json.dumps(new)} now" for k, (old, new) in blocking.items())
        raise ConfigError(
            f"resume=auto: the run in {paths.folder} was started with other settings ({listed}); restore them, start "
            f"a new run.name, or accept the change with resume_with=[{', '.join(blocking)}]"
        )
    digest = _read_record(paths).get("data", run.data_digest)
    if digest != run.data_digest and not any(name.split(".")[0] in DATA_SECTIONS for name in allowed):
        raise ConfigError(
            f"resume=auto: the training data of the run in {paths.folder} has changed since its start; restore it, "
            "start a new run.name, or accept the change with resume_with=[data]"
        )
    return changes | ({"data": [digest, run.data_digest]} if digest != run.data_digest else {})


def _plain(key: str) -> str:
    """Return the setting whose rules apply to a key: ``teacher.actors`` for ``teachers.maths.actors``."""
    section, *_, name = key.split(".")
    return f"teacher.{name}" if section == "teachers" else key


def _read_record(paths: RunPaths) -> dict[str, Any]:
    try:
        return json.loads(paths.record.read_text(encoding="utf-8")) if paths.record.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{paths.record}: damaged ({error}); remove it to skip the check of the data") from None


def _write_record(run: Run, changes: Changes, step: int) -> None:
    """Write the digest of the data, and append ``changes`` with their step to the history."""
    history = _read_record(run.paths).get("changes", []) if run.settings.resume == "auto" else []
    history += [{"step": step, "changed": changes}] if changes else []
    record = {"data": run.data_digest, "changes": history}
    files.write_text(run.paths.record, json.dumps(record, indent=1) + "\n")
