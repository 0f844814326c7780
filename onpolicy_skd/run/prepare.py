"""Everything that can be checked and known before a model loads: data, tokenizers, vocabulary, the run's folder."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from onpolicy_skd.config import loading as command_line
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import Settings
from onpolicy_skd.data import references
from onpolicy_skd.data.packed_text import pack
from onpolicy_skd.data.prompts import check_references, hold_out, load_prompts, prompts_of_step
from onpolicy_skd.data.references import Responses
from onpolicy_skd.models import loading as models
from onpolicy_skd.report import metrics_log as metrics
from onpolicy_skd.selection.positions import num_selected
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.storage import checkpoint, files
from onpolicy_skd.teacher import cache_provenance as provenance
from onpolicy_skd.teacher.cache_format import CacheError, Manifest
from onpolicy_skd.teacher.cache_reader import TeacherCache
from onpolicy_skd.types import Prompt, RolloutRequest, SamplingParams, Trajectory, seed_of

# Settings that may change when a run is resumed: they do not touch what is trained.
RESUMABLE = ("resume", "run.dir", "run.name", "run.evaluate_every", "run.checkpoint_every", "run.keep_checkpoints",
             "run.keep_best", "run.timeline",
             "run.tensorboard", "run.max_hours", "learner.max_skipped", "eval.", "faults.", "cluster.",
             "cache.positions_per_shard", "learner.ranks", "learner.threads", "teacher.actors",
             "rollout.actors", "rollout.tensor_parallel", "sync.method", "pipeline.streaming")  # fmt: skip


@dataclass
class Run:
    """What a driver needs to know of its run."""

    settings: Settings
    tokenizer: Any
    vocabulary: int
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    responses: Responses = field(default_factory=dict)  # references by prompt key
    validation: Sequence[Prompt] = ()  # held out of the training data, for evaluations during training

    @property
    def folder(self) -> Path:
        return self.settings.run.folder

    @property
    def steps(self) -> int:
        """Batches of prompts of the whole run; known before a prefilter ran, from counts alone."""
        own = self.settings
        if own.run.steps is not None:
            return own.run.steps
        prefiltered = own.samples.when == "prefilter"
        count = num_selected(own.samples.keep, len(self.train)) if prefiltered else len(self.train)
        return math.ceil(round(own.run.epochs * count / own.prompts_per_step, 9))

    @property
    def sampling(self) -> SamplingParams:
        own = self.settings.rollout
        return SamplingParams(own.max_tokens, own.temperature, own.top_p, own.entropy == "engine", tuple(own.stop))

    @property
    def greedy(self) -> SamplingParams:
        max_tokens = self.settings.eval.max_tokens or self.settings.rollout.max_tokens
        return SamplingParams(max_tokens, 0.0, stop=tuple(self.settings.rollout.stop))

    @property
    def samples_student(self) -> bool:
        """Whether the student generates anything in training."""
        return self.settings.student_rollouts_per_step > 0

    @property
    def validation_prompts(self) -> Sequence[Prompt]:
        """What evaluations during training are of."""
        own = self.settings.eval
        return self.validation or self.held_out[: own.during or own.problems or None]

    def save_validation(self) -> None:
        """Writes which training problems are held out, if any are."""
        if self.validation:
            keys = [p.key for p in self.validation]
            files.write_text(self.folder / "validation.json", json.dumps(keys, indent=0) + "\n")

    @property
    def knows_its_texts(self) -> bool:
        """Whether data and settings alone say what is trained on, before a model has answered or scored anything."""
        own = self.settings
        answered = own.mode != "on_policy" and own.references.source == "teacher"
        return own.samples.when != "prefilter" and not answered

    def requests(self, prompts: Sequence[Prompt], step: int) -> list[RolloutRequest]:
        """The rollouts of ``step``: its first prompts, ``rollout.n`` times each, a seed for each."""
        own, seed = self.settings, self.settings.run.seed
        asked = [
            RolloutRequest(
                f"{place}:{p.key}/{i}",
                p.token_ids,
                seed_of(seed, step, place, p.key, i),
                p.answer if own.judges_rollouts else None,
            )
            for place, p in self._prompts(prompts, step)[: self._rolled_out]
            for i in range(own.rollout.n)
        ]
        return asked[: own.student_rollouts_per_step]

    def references(self, prompts: Sequence[Prompt], step: int) -> list[Trajectory]:
        """The references of ``step``: one for each of its other prompts."""
        own, found = self.settings, []
        for place, prompt in self._prompts(prompts, step)[self._rolled_out :]:
            if prompt.documents is not None:
                found.append(references.of_text(prompt, f"{place}:{prompt.key}/0"))
                continue
            several = self.responses[prompt.key]
            response = several[seed_of(own.run.seed, step, place, "reference") % len(several)]
            found.append(references.trajectory(prompt, response, f"{place}:{prompt.key}/0", own.references.supervise))
        return found

    def every_reference(self, prompts: Sequence[Prompt]) -> Iterator[Trajectory]:
        """All that an off-policy run on ``prompts`` may train on."""
        supervise = self.settings.references.supervise
        for prompt in prompts:
            if prompt.documents is not None:
                yield references.of_text(prompt, prompt.key)
            else:
                for i, response in enumerate(self.responses[prompt.key]):
                    yield references.trajectory(prompt, response, f"{prompt.key}/{i}", supervise)

    def check_cached(self, prompts: Sequence[Prompt]) -> None:
        """Raises CacheError unless the cache of the settings, if there is one, holds all that a run may train on."""
        path = self.settings.cache.path
        if path is None:
            return
        cache = TeacherCache(path)
        for trajectory in self.every_reference(prompts):
            if not cache.holds(trajectory):
                why = provenance.other_texts(cache.manifest, self.settings)
                raise CacheError(f"cache.path={path}: {trajectory.key} is not in it. {why}")

    @property
    def _rolled_out(self) -> int:
        return math.ceil(self.settings.student_rollouts_per_step / self.settings.rollout.n)

    def _prompts(self, prompts: Sequence[Prompt], step: int) -> list[tuple[int, Prompt]]:
        """Each with its place, which keeps keys apart if a small set repeats within a step."""
        own = self.settings
        return list(
            enumerate(prompts[i] for i in prompts_of_step(len(prompts), own.prompts_per_step, step, own.run.seed))
        )


def prepare(settings: Settings, log: Callable[[str], None] = print, generates: bool = True) -> Run:
    """Loads data and tokenizers and checks that they fit; ``generates``: whether a rollout engine may be needed.

    Raises ConfigError (or one of its kinds).
    """
    if settings.rollout.engine == "vllm" and settings.generates and generates:
        from onpolicy_skd.rollout.vllm_engine import require_vllm

        require_vllm()
    Selector(settings.positions, settings.run.seed)  # imports metrics and policies of the user's own
    student = settings.student
    tokenizer = models.load_tokenizer(student.model, student.trust_remote_code)
    vocabulary = _vocabulary(settings, tokenizer)
    if settings.data.source == "text":
        text = pack(settings.data, tokenizer, settings.run.dir / "text", log)
        border = max(0, len(text) - settings.eval.divergence_prompts)
        if not border:
            held = f"eval.divergence_prompts={settings.eval.divergence_prompts}"
            raise ConfigError(f"{held}: so many samples are held out, but the text has {len(text)}; accepted: fewer")
        return Run(settings, tokenizer, vocabulary, text[:border], text[border:])
    train, validation = _train_prompts(settings, tokenizer)
    check_references([*validation, *(train if settings.judges_rollouts else [])])
    responses: Responses = {}
    if settings.mode != "on_policy" and settings.references.source != "teacher":
        train, responses = references.from_text(settings, train, tokenizer)
    has_eval = settings.data.source != "jsonl" or settings.data.eval_file or settings.data.path
    own = settings.eval
    wanted = max(own.problems, own.during, own.divergence_prompts) if own.problems else None
    held_out = load_prompts(settings.data, tokenizer, "eval", wanted) if has_eval else []
    return Run(settings, tokenizer, vocabulary, train, held_out, responses, validation)


def _train_prompts(settings: Settings, tokenizer: Any) -> tuple[list[Prompt], list[Prompt]]:
    """What to train on and what is held out of it; which ones does not depend on ``data.train_problems``."""
    own = settings.data
    if not own.validation_problems:
        return load_prompts(own, tokenizer, "train"), []
    every = load_prompts(own.model_copy(update={"train_problems": None}), tokenizer, "train")
    train, validation = hold_out(every, own.validation_problems)
    return train[: own.train_problems], validation


def _vocabulary(settings: Settings, tokenizer: Any) -> int:
    """Classes that student and teacher share, whose tokenizers must be one.  Raises ConfigError."""
    student, teacher = settings.student, settings.teacher
    config = models.load_config(student.model, student.trust_remote_code)
    models.check_length(config, student.model, settings.max_model_length)
    if settings.cache.path is not None:
        manifest = Manifest.read(settings.cache.path)
        provenance.check(manifest, settings, tokenizer, models.vocabulary_of(config))
        return manifest.layout.vocabulary
    models.check_same_tokenizer(
        tokenizer, models.load_tokenizer(teacher.model, teacher.trust_remote_code), student.model, teacher.model
    )
    teacher_config = models.load_config(teacher.model, teacher.trust_remote_code)
    models.check_length(teacher_config, teacher.model, settings.max_sequence)
    return models.shared_vocabulary(config, teacher_config, len(tokenizer))


def open_folder(settings: Settings) -> checkpoint.Checkpoint | None:
    """Creates the run's folder or, with ``resume=auto``, finds its newest good checkpoint; saves config.yaml.

    The checkpoint comes without its tensors, which only the learner needs.
    Raises ConfigError if the folder holds another run, or one whose settings differ in what is trained.
    """
    folder, saved = settings.run.folder, settings.run.folder / "config.yaml"
    if settings.resume == "never" and (folder / metrics.FILE).exists():
        raise ConfigError(
            f"run.name={settings.run.name}: {folder} already holds a run; give another name, resume=auto to go on with "
            "it, or remove the folder"
        )
    if settings.resume == "auto" and saved.exists():
        _check_resumable(saved, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(saved, command_line.dump(settings))
    except OSError as error:
        raise ConfigError(f"run.dir={settings.run.dir}: {folder} cannot be written ({error.strerror})") from None
    found = checkpoint.newest(folder / "checkpoints") if settings.resume == "auto" else None
    return replace(found, tensors={}) if found else None


def _check_resumable(saved: Path, settings: Settings) -> None:
    tree = yaml.safe_load(saved.read_text(encoding="utf-8"))
    with contextlib.suppress(ConfigError):  # settings that were not there yet had their defaults
        tree = command_line.resolve(tree).model_dump(mode="json")
    before, now = command_line.flat(tree), command_line.flat(settings.model_dump(mode="json"))
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    blocking = [k for k in changed if not k.startswith(RESUMABLE)]
    if blocking:
        listed = ", ".join(f"{k}: {json.dumps(before.get(k))} then, {json.dumps(now.get(k))} now" for k in blocking)
        raise ConfigError(
            f"resume=auto: the run in {saved.parent} was started with other settings ({listed}); "
            "restore them, or start a new run.name"
        )
