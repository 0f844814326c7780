"""The tree of settings and the only home of their defaults.

``setting`` declares a field with its meaning, the other settings it needs (``only_with``), and whether it may change
when a run is resumed.  ``validation.py`` enforces ``only_with`` and every other rule between settings; ``loading.py``
builds the tree from files and arguments.  None of the three imports torch, Ray or vLLM.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from onpolicy_skd.config.plugins import BuiltinOrPlugin

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PositionMetric = Literal[
    "student_entropy", "teacher_entropy", "student_ce", "teacher_ce", "kl", "reverse_kl", "kl_plus_entropy",
    "ce_ratio", "ce_ratio_plus_entropy", "tip_soft_or", "tip_q3", "ta_opd", "teacher_mass", "overlap", "margin",
    "random", "prefix",
]  # fmt: skip
PositionPolicy = Literal[
    "top_k", "gls", "curriculum", "sampled", "sampled_unbiased", "weighted", "full", "bandit"
]  # fmt: skip

PositionWeighting = Literal["uniform", "iw", "ramp"]
MixtureGate = Literal["none", "constant", "eopd", "zones"]

SAMPLING_POLICIES = ("sampled", "sampled_unbiased")  # policies that sample positions
TRUNCATIONS = ("top_k", "top_k_normalised", "top_p", "ghost_token", "naive_fix", "label_smoothing")  # class samplers


class Condition(Protocol):
    """Set of values of another setting: ``value in condition``."""

    def __contains__(self, value: Any, /) -> bool: ...


class Choices(tuple[str, ...]):
    """Choices of a setting; ``module:function`` counts as all of them, because a plugin may read any option."""

    def __contains__(self, value: Any, /) -> bool:
        return super().__contains__(value) or (isinstance(value, str) and ":" in value)

    def __str__(self) -> str:
        return "=" + " or ".join(self)


class Above(float):
    """Numbers above this one."""

    def __contains__(self, value: Any, /) -> bool:
        return value > float(self)

    def __str__(self) -> str:
        return f" above {float(self):g}"


class Given:
    """Any value except None."""

    def __contains__(self, value: Any, /) -> bool:
        return value is not None

    def __str__(self) -> str:
        return ""


class Below(float):
    """Numbers below this one."""

    def __contains__(self, value: Any, /) -> bool:
        return value < float(self)

    def __str__(self) -> str:
        return f" below {float(self):g}"


def setting(
    default: Any,
    description: str,
    only_with: Mapping[str, tuple[str, ...] | str | Condition] | None = None,
    affects_result: bool = True,
    resumable: bool | None = None,
) -> Any:
    """Return the pydantic field of a setting.

    ``only_with`` maps other settings to the choices under which this one may differ from its default.
    ``affects_result=False`` marks settings that change only memory use, time, paths or reports.  ``resumable``
    settings may change when a run is resumed; by default these are the ones that do not affect the result.
    """
    conditions = {
        key: Choices((choices,))
        if isinstance(choices, str)
        else Choices(choices)
        if type(choices) is tuple
        else choices
        for key, choices in (only_with or {}).items()
    }
    rules: dict[str, Any] = {
        "only_with": conditions,
        "affects_result": affects_result,
        "resumable": not affects_result if resumable is None else resumable,
    }
    return Field(default=default, description=description, json_schema_extra=rules)


def rules_of(field: FieldInfo) -> dict[str, Any]:
    """Return the rules that ``setting`` declared: ``only_with``, ``affects_result``, ``resumable``."""
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def is_text(annotation: Any) -> bool:
    """Return True if a setting of this type holds text or a path, never a number, Boolean or list."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(a is types.NoneType or is_text(a) for a in get_args(annotation))
    return annotation in (str, Path) or (get_origin(annotation) is Literal)


def _expand_home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError("names a home directory that does not exist") from None


def _expand_model(name: str) -> str:
    """Return a model's or data set's name; ``~/folder`` with the home directory in place of ``~``."""
    return str(_expand_home(name)) if name.startswith("~") else name


def _plain_name(name: str) -> str:
    """Return the name of a run (also the name of its folder) or of a teacher.  Raises ValueError if it is not plain."""
    if (
        not name.strip()
        or name[0] in ".~-"
        or len(name) > 200
        or set(name) & set("/\\:*?\"<>|[]{}'")
        or not name.isprintable()
    ):
        raise ValueError("must be a plain name: letters, digits and .-_+= but no path, at most 200 characters")
    return name


def _repository(name: str) -> str:
    """Return the name of a hub repository.  Raises ValueError if it is not valid."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError("must be OWNER/NAME or NAME: letters, digits and -_. , at most 96 characters") from None
    return name


ModelName = Annotated[str, AfterValidator(_expand_model)]
FilePath = Annotated[Path, AfterValidator(_expand_home)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_scalar(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse Booleans for numbers and text (YAML reads yes and on as Booleans), and text that is not Unicode."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value (YAML reads yes, on and true as one) is not accepted here")
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
            raise ValueError("holds a character that is not text (a null or half of a surrogate pair)")
        return value


class RunSettings(Section):
    name: Annotated[str, AfterValidator(_plain_name)] = setting(
        "run", "name of the run; its folder is run.dir/run.name", affects_result=False
    )
    dir: FilePath = setting(Path("runs"), "folder that holds all runs", affects_result=False)
    seed: NonNegative = setting(1340, "seed of the prompt order, of sampling and of random selection")
    steps: NonNegative | None = setting(None, "optimizer steps; overrides run.epochs", resumable=True)
    epochs: Annotated[float, Field(gt=0)] = setting(1.0, "passes over the (filtered) prompts", resumable=True)
    evaluate_every: NonNegative = setting(
        0, "steps between evaluations; 0: only before and after training", resumable=True
    )
    checkpoint_every: NonNegative = setting(50, "steps between checkpoints; 0: only at the end", affects_result=False)
    keep_checkpoints: Positive = setting(2, "number of newest checkpoints to keep on disk", affects_result=False)
    keep_best: bool = setting(
        False, "also save the student with the best evaluation during training, as a plain model in best/",
        affects_result=False,
    )  # fmt: skip
    max_hours: Annotated[float, Field(gt=0)] | None = setting(
        None, "wall-clock limit of this process, hours; it then saves a checkpoint and stops, as after a signal",
        affects_result=False,
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device of all models; auto: cuda if available")
    timeline: NonNegative | None = setting(
        2, "step, counted from 0, whose activity per process timeline.json and timeline.png show; empty: none",
        affects_result=False,
    )  # fmt: skip
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = setting(
        ["tensorboard"], "experiment trackers that get metrics, settings, plots and token views, e.g. "
        "[tensorboard,wandb]; []: none", affects_result=False,
    )  # fmt: skip

    @property
    def folder(self) -> Path:
        return self.dir / self.name


TEXT = {"data.source": "text"}


class SourceSettings(Section):
    """A data source: the origin of its rows and the names of their columns."""

    source: Literal["gsm8k", "demo", "jsonl", "hub", "text"] = setting(
        "gsm8k",
        "gsm8k: openai/gsm8k or local files under data.path; demo: the generated task; jsonl: data.train_file and "
        "data.eval_file; hub: the data set data.name; text: packed documents of data.train_file or data.name",
    )
    path: FilePath | None = setting(
        None, "folder with GSM8K's train.jsonl and test.jsonl; empty: the hub", {"data.source": "gsm8k"},
        resumable=True,
    )  # fmt: skip
    name: ModelName | None = setting(None, "hub data set", {"data.source": ("hub", "text")})
    subset: str | None = setting(None, "configuration name of the hub data set", {"data.source": ("hub", "text")})
    train_file: FilePath | None = setting(
        None, "training questions; for data.source=text a .jsonl, .parquet or .txt file, or a folder of them",
        {"data.source": ("jsonl", "text")}, resumable=True,
    )  # fmt: skip
    eval_file: FilePath | None = setting(None, "evaluation questions", {"data.source": "jsonl"}, resumable=True)
    train_split: str = setting("train", "split to train on", {"data.source": ("gsm8k", "demo", "hub", "text")})
    eval_split: str = setting("test", "split to evaluate on", {"data.source": ("gsm8k", "demo", "hub")}, resumable=True)
    question_column: str = setting("question", "column with the question")
    answer_column: str = setting("answer", "column with the reference answer; empty: rows have none")
    messages_column: str | None = setting(
        None, "column with a conversation (role, content, tool_calls), in place of a question, e.g. messages",
        {"data.source": ("jsonl", "hub"), "data.template": "chat"},
    )  # fmt: skip
    tools_column: str = setting("tools", "column with the tools of a conversation", {"data.messages_column": Given()})
    teacher: str | None = setting(None, "name of the teacher of these rows, with several teachers")
    teacher_column: str | None = setting(None, "column with the name of each row's teacher, with several teachers")
    train_problems: Positive | None = setting(None, "use only the first N training problems")
    shots: NonNegative = setting(
        0, "few-shot examples in every prompt: the first N rows of the training split, which are not trained on"
    )
    instruction: str = setting("", "text to append to every question")


class MixSource(SourceSettings):
    weight: Annotated[float, Field(gt=0, le=1e12)] = setting(1.0, "relative frequency of this source's prompts")


class DataSettings(SourceSettings):
    mix: list[MixSource] = setting(
        [], "sources to mix, each a mapping of data.* settings (without this prefix) and a weight, for example "
        "[{source: demo, weight: 2}, {source: jsonl, train_file: chats.jsonl, messages_column: messages}]",
    )  # fmt: skip
    text_column: str = setting("text", "column with the document", TEXT)
    sequence_length: Annotated[int, Field(ge=2)] = setting(512, "tokens per sample", TEXT)
    tokens: Positive | None = setting(None, "token budget, held-out samples included; empty: all", TEXT)
    documents: Literal["separate", "joined"] = setting(
        "separate", "separate: attention and positions restart at each document; joined: they continue, as published",
        TEXT,
    )  # fmt: skip
    validation_problems: NonNegative = setting(
        0, "training problems to hold out for evaluations during training, chosen by a hash of their text"
    )
    template: Literal["chat", "plain"] = setting("chat", "chat: the tokenizer's template; plain: data.plain")
    plain: str = setting(
        "Question: {question}\nAnswer:", "prompt for base models; must contain {question}", {"data.template": "plain"}
    )
    system: str | None = setting(
        None, "system message; conversations that have one keep theirs", {"data.template": "chat"}
    )
    thinking: bool = setting(False, "thinking mode of templates that have one (Qwen3)", {"data.template": "chat"})
    max_prompt_tokens: Positive = setting(512, "longest prompt, tokens")
    overlong: Literal["error", "drop"] = setting("error", "error: refuse longer prompts; drop: leave them out")

    @property
    def sources(self) -> list[DataSettings]:
        """Settings of each source of ``mix``; without a mix, these settings alone."""
        shared = self.model_dump(exclude={"mix", *SourceSettings.model_fields})
        by_source = [{name: getattr(source, name) for name in SourceSettings.model_fields} for source in self.mix]
        return [DataSettings.model_construct(**shared, **fields) for fields in by_source] or [self]

    @property
    def has_eval(self) -> bool:
        """True if there is a split to evaluate on."""
        return any(source.source != "jsonl" or source.eval_file for source in self.sources)


class StudentSettings(Section):
    model: ModelName = setting("Qwen/Qwen3-1.7B", "hub name, folder, or bundled:demo_student")
    lora_rank: NonNegative = setting(
        0, "rank of LoRA adapters on all linear layers of the backbone (peft); 0: train all weights"
    )
    lora_alpha: Positive = setting(
        32, "numerator of the adapters' scale, lora_alpha / lora_rank", {"student.lora_rank": Above(0)}
    )
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass to save memory", affects_result=False
    )
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the model; only if you trust it", affects_result=False
    )


class TeacherSettings(Section):
    model: ModelName = setting(
        "Qwen/Qwen3-8B", "hub name, folder, or bundled:demo_teacher; student: the initial student itself"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = setting(
        None, "decay per step of a moving average of the student, which is the teacher; empty: the initial student",
        {"teacher.model": "student"},
    )  # fmt: skip
    prompt: str | None = setting(
        None, "text that the teacher reads in place of the question, before the same response: with {question}, "
        "{answer} or another column of the data in braces; empty: the student's prompt",
    )  # fmt: skip
    max_prompt_tokens: Positive = setting(1_024, "longest prompt of the teacher, tokens", {"teacher.prompt": Given()})
    dtype: Dtype = setting("auto", "dtype of the teacher; auto: bfloat16 on cuda, else float32")
    engine: Literal["transformers", "vllm"] = setting(
        "transformers", "library that runs the teacher; vllm: for teachers on several GPUs or with quantized weights"
    )
    tensor_parallel: Positive = setting(
        1, "GPUs over which each teacher actor splits the model", {"teacher.engine": "vllm"}, affects_result=False
    )
    quantization: Literal["fp8", "fp8_per_block", "fp8_per_channel"] | None = setting(
        None, "quantize 16-bit weights while vLLM loads them; empty: as the checkpoint says (FP8, AWQ, GPTQ ...)",
        {"teacher.engine": "vllm"},
    )  # fmt: skip
    gpu_memory: Share = setting(
        0.7, "fraction of the GPU memory that vLLM takes; LM head, kept hidden states and logits need the rest",
        {"teacher.engine": "vllm"}, affects_result=False,
    )  # fmt: skip
    placement: Literal["actor", "learner"] = setting(
        "actor", "actor: in separate processes (and devices); learner: in the learner's process", affects_result=False
    )
    actors: Positive = setting(
        1, "teacher actors, which share every batch or the build of a cache", {"teacher.placement": "actor"},
        affects_result=False,
    )  # fmt: skip
    tokens_per_batch: Positive = setting(16_384, "tokens per teacher forward, padding included", affects_result=False)
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the model; only if you trust it", affects_result=False
    )
    threads: Positive | None = setting(
        None, "CPU threads of each actor; empty: its share of the node's cores, or 1 if roles work at the same time "
        "(pipeline.*)", {"teacher.placement": "actor"}, affects_result=False,
    )  # fmt: skip


class RolloutSettings(Section):
    engine: Literal["vllm", "transformers"] = setting("vllm", "engine that generates rollouts")
    placement: Literal["actor", "learner"] = setting(
        "actor", "actor: in separate processes (and devices); learner: in the learner's process, with its weights "
        "(rollout.engine=transformers)", affects_result=False,
    )  # fmt: skip
    actors: Positive = setting(1, "rollout actors, which share every batch", affects_result=False)
    tensor_parallel: Positive = setting(
        1, "GPUs over which one engine splits the model", {"rollout.engine": "vllm"}, affects_result=False
    )
    n: Positive = setting(1, "rollouts per prompt")
    share: Annotated[float, Field(gt=0, lt=1)] = setting(
        0.5, "share of rollouts in each batch (GKD's lambda)", {"mode": "mixed"}
    )
    max_tokens: Positive = setting(512, "longest response, tokens")
    max_tokens_start: Positive | None = setting(
        None, "length limit at the first step; it grows to max_tokens, and responses that it cuts count as complete",
        {"mode": ("on_policy", "mixed")},
    )  # fmt: skip
    max_tokens_steps: Positive = setting(
        1_000, "steps from max_tokens_start to max_tokens", {"rollout.max_tokens_start": Given()}
    )
    temperature: Annotated[float, Field(gt=0)] = setting(1.0, "sampling temperature")
    top_p: Share = setting(1.0, "nucleus of the sampling distribution")
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        [], "texts that end a response, in evaluations too, e.g. ['Question:']"
    )
    dtype: Dtype = setting("auto", "dtype of the engine; auto: bfloat16 on cuda, else float32")
    entropy: Literal["learner", "engine"] = setting(
        "learner",
        "source of the student's entropy; engine: recorded while sampling, which saves the learner "
        "a pass on CPUs; on GPUs it forces vLLM's V1 model runner",
    )
    max_sequences: Positive = setting(256, "sequences that one engine generates at once", affects_result=False)
    gpu_memory: Share = setting(
        0.85, "fraction of the GPU memory that a vLLM engine takes; with cluster.topology=colocated 0.3",
        affects_result=False,
    )  # fmt: skip
    threads: Positive | None = setting(
        None, "CPU threads of each actor; empty: its share of the node's cores, or 1 if roles work at the same time "
        "(pipeline.*)", {"rollout.placement": "actor"}, affects_result=False,
    )  # fmt: skip
    kv_cache_mib: Positive = setting(256, "KV cache of a vLLM engine on CPU, MiB", affects_result=False)


REFERENCES = {"mode": ("off_policy", "mixed")}
ROLLED_OUT = ("teacher", "student")  # references that a model generates


class ReferenceSettings(Section):
    source: Literal["answers", "file", "teacher", "student"] = setting(
        "answers", "answers: of the data; file: references.file; teacher, student: rollouts of the teacher or of the "
        "initial student, generated once", REFERENCES,
    )  # fmt: skip
    file: FilePath | None = setting(
        None, "file with one JSON object per line, with question and answer",
        REFERENCES | {"references.source": "file"}, resumable=True,
    )  # fmt: skip
    annotations: Literal["keep", "strip"] = setting(
        "keep", "keep or strip GSM8K's calculator annotations, such as <<48/2=24>>",
        REFERENCES | {"references.source": ("answers", "file")},
    )  # fmt: skip
    supervise: Literal["response", "last", "all"] = setting(
        "response", "tokens to supervise. response: the answer, in conversations all turns of the assistant; last: its "
        "last turn; all: the question's tokens too, as in the SE-KD paper's code", REFERENCES,
    )  # fmt: skip
    samples: Positive = setting(
        1, "rollouts per prompt; each use of a prompt draws one", REFERENCES | {"references.source": ROLLED_OUT}
    )
    temperature: Annotated[float, Field(ge=0)] = setting(
        1.0, "sampling temperature of these rollouts; 0: greedy", REFERENCES | {"references.source": ROLLED_OUT}
    )


class SampleSettings(Section):
    metric: Literal["student_entropy", "kl", "ce_ratio", "random"] = setting(
        "student_entropy", "score that ranks samples; kl and ce_ratio need a teacher forward of every sample",
        {"samples.keep": Below(1)},
    )  # fmt: skip
    keep: Share = setting(1.0, "share l of the samples to keep")
    when: Literal["rollout", "prefilter"] = setting(
        "rollout", "rollout: rank the rollouts of each step; prefilter: rank all prompts once, before training",
        {"samples.keep": Below(1)},
    )  # fmt: skip
    prefilter_text: Literal["prompt", "prompt+answer", "rollout"] = setting(
        "prompt+answer", "text whose score ranks a prompt", {"samples.when": "prefilter"}
    )
    truncated: Literal["drop", "keep"] = setting("drop", "drop or keep responses that rollout.max_tokens cuts")
    correctness: Literal["any", "right", "wrong"] = setting(
        "any", "keep only rollouts with a right, or a wrong, answer (math-verify)", {"mode": "on_policy"}
    )
    weight: Literal["uniform", "paced"] = setting(
        "uniform", "weight of a sample in the loss; paced: p(1-p), p the pass rate of its prompt (rollout.n > 1)",
        {"mode": "on_policy"},
    )  # fmt: skip


SAMPLED = {"positions.policy": SAMPLING_POLICIES}
BANDIT = {"positions.policy": "bandit"}


class PositionSettings(Section):
    metric: Annotated[str, AfterValidator(BuiltinOrPlugin(PositionMetric))] = setting(
        "student_entropy", "score u(t) of a position"
    )
    policy: Annotated[str, AfterValidator(BuiltinOrPlugin(PositionPolicy))] = setting(
        "top_k", "rule that selects positions by their scores"
    )
    top_classes: Annotated[int, Field(ge=2)] = setting(
        16, "K: number of the student's most likely classes that teacher_mass, overlap and margin compare"
    )
    weighting: Annotated[str, AfterValidator(BuiltinOrPlugin(PositionWeighting))] = setting(
        "uniform", "factor of a position's weight along its response. iw: larger before teacher and student drift "
        "apart; ramp: linear in t/n",
    )  # fmt: skip
    weighting_gamma: Annotated[float, Field(gt=-1)] = setting(
        1.0, "gamma of the factor: iw 1 + gamma (1 - share of the drift so far); ramp 1 + gamma t/n, falling below 0",
        {"positions.weighting": ("iw", "ramp")},
    )  # fmt: skip
    mask_tokens: list[NonNegative | Literal["special"]] = setting(
        [], "token ids that are never selected as targets; special: all special tokens, the end of sequence too"
    )
    k: Share = setting(0.2, "share of each response's positions to supervise")
    k_start: Share | None = setting(None, "first value of k, which then grows over schedule_steps")
    schedule_steps: Positive = setting(1_000, "steps from k_start to k", {"positions.k_start": Given()})
    queue: Positive = setting(30_000, "number of recent scores whose quantile is the threshold",
                              {"positions.policy": "gls"})  # fmt: skip
    curriculum_steps: Positive = setting(
        4_000, "steps over which selection moves from lowest to highest scores", {"positions.policy": "curriculum"}
    )
    arms: list[PositionMetric] = setting(
        ["student_entropy", "reverse_kl", "random"], "metrics that the bandit chooses from", BANDIT
    )
    bandit_gamma: Share = setting(0.1, "share of the bandit's choices that is uniform over the arms", BANDIT)
    smoothing: Annotated[float, Field(ge=1)] = setting(1.0, "sample positions by u^(1/smoothing)", SAMPLED)
    skip_first: NonNegative = setting(0, "number of first positions of a response that are never sampled", SAMPLED)
    clip: Annotated[float, Field(gt=0)] | None = setting(None, "upper bound of a score", SAMPLED)
    coverage: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "share of the budget for the highest scores, without sampling", SAMPLED
    )


class ClassSettings(Section):
    sampler: Literal[
        "none", "rs_kd", "top_k", "top_k_normalised", "top_p", "ghost_token", "naive_fix", "label_smoothing"
    ] = setting("none", "rule that reduces the teacher's distribution to a few classes; none: all classes, exact")
    draws: Positive = setting(64, "draws U per position", {"classes.sampler": "rs_kd"})
    proposal: Annotated[float, Field(gt=0)] = setting(
        1.0, "exponent tau of the proposal p^tau", {"classes.sampler": "rs_kd"}
    )
    k: Positive = setting(50, "number of classes to keep; with top_p the maximum", {"classes.sampler": TRUNCATIONS})
    p: Share = setting(0.98, "probability mass to keep", {"classes.sampler": "top_p"})


MIXED = {"alignment.mixture.gate": ("constant", "eopd", "zones")}
ENTROPIES = {"alignment.mixture.gate": ("eopd", "zones")}
ZONES = {"alignment.mixture.gate": "zones"}
SCHEDULED = MIXED | {"alignment.mixture.start": Given()}
Weights = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)]  # of reverse and forward KL


class MixtureSettings(Section):
    gate: Annotated[str, AfterValidator(BuiltinOrPlugin(MixtureGate))] = setting(
        "none", "weights a, b of each position's loss a * reverse KL + b * forward KL. none: alignment.divergence "
        "alone; constant: the same everywhere; eopd: forward KL added where the teacher is unsure; zones: by the "
        "entropies of both",
    )  # fmt: skip
    reverse_weight: Annotated[float, Field(ge=0, le=1)] = setting(
        0.5, "lambda: the weights are lambda and 1 - lambda", {"alignment.mixture.gate": "constant"}
    )
    forward_weight: Annotated[float, Field(ge=0)] = setting(
        1.0, "weight b where the teacher is unsure; a is 1", {"alignment.mixture.gate": "eopd"}
    )
    student_threshold: Annotated[float, Field(ge=0)] = setting(
        1.0, "entropy above which the student counts as unsure, nats", ZONES
    )
    teacher_threshold: Annotated[float, Field(ge=0)] = setting(
        1.0, "entropy above which the teacher counts as unsure, nats", ENTROPIES
    )
    both_sure: Weights = setting([0.0, 0.0], "weights [a, b] where both are sure; [0, 0] skips a position", ZONES)
    student_sure: Weights = setting([0.0, 1.0], "weights [a, b] where the student alone is sure", ZONES)
    teacher_sure: Weights = setting([1.0, 0.0], "weights [a, b] where the teacher alone is sure", ZONES)
    both_unsure: Weights = setting([1.0, 1.0], "weights [a, b] where both are unsure", ZONES)
    start: Weights | None = setting(None, "weights [a, b] at the first step, unless the gate's are [0, 0]", MIXED)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "curve from start to the gate's weights; constant: start holds until the steps are over", SCHEDULED
    )
    steps: Positive = setting(1_000, "optimizer steps from start to the gate's weights", SCHEDULED)
    skew: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "share of the first distribution that each KL mixes into its second, as in DistiLLM; 0: plain KLs", MIXED
    )


DECOUPLED, EGAD = {"alignment.variant": "decoupled_kd"}, {"alignment.variant": "egad"}


class AlignmentSettings(Section):
    variant: Literal["full_kd", "decoupled_kd", "at_kd", "egad"] = setting(
        "full_kd", "form of the loss at each position (docs/method.md)"
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = setting(
        "reverse_kl",
        "divergence to minimize; the default with mode=off_policy is forward_kl, except for references.source=student",
    )
    mixture: MixtureSettings = MixtureSettings()
    clip: Annotated[float, Field(gt=0)] | None = setting(
        None, "bound of |log p(y) - log q(y)| of the response token y, nats; empty: none"
    )
    clip_mode: Literal["mask", "scale"] = setting(
        "mask", "treatment of positions beyond the bound. mask: no loss; scale: loss times bound / |difference|",
        {"alignment.clip": Given()},
    )  # fmt: skip
    estimator: Literal["exact", "topk_tail", "student_topk_tail", "sampled"] = setting(
        "exact", "exact: all classes; topk_tail: the teacher's top_k classes and the rest; student_topk_tail: the "
        "student's and the rest; sampled: the sampled token",
    )  # fmt: skip
    top_k: Positive = setting(
        64, "number of classes with a separate entry", {"alignment.estimator": ("topk_tail", "student_topk_tail")}
    )
    target_weight: Annotated[float, Field(ge=0)] = setting(1.0, "weight alpha of the target class", DECOUPLED)
    other_weight: Annotated[float, Field(ge=0)] = setting(1.0, "weight beta of the other classes", DECOUPLED)
    easy_weight: Annotated[float, Field(ge=0, le=1)] = setting(
        0.2, "lambda: weight of easy positions; hard ones have 1 - lambda", {"alignment.variant": "at_kd"}
    )
    min_temperature: Annotated[float, Field(gt=0)] = setting(
        1.0, "temperature where the teacher is least certain", EGAD
    )
    max_temperature: Annotated[float, Field(gt=0)] = setting(2.0, "temperature where the teacher is most certain", EGAD)
    feature_weight: Annotated[float, Field(ge=0)] = setting(
        0.1, "weight of the squared distance between projected student and teacher hidden states", EGAD
    )
    feature_entropy: Annotated[float, Field(ge=0, le=1)] = setting(
        0.05, "share of the largest entropy, log V, above which hidden states are compared", EGAD
    )
    ema_weight: Annotated[float, Field(ge=0)] = setting(
        0.0, "weight of an added divergence from a moving average of the student; 0: none"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.999, "decay of the moving average per step", {"alignment.ema_weight": Above(0)}
    )
    reference_weight: Annotated[float, Field(ge=0)] = setting(
        0.0, "weight of an added reverse KL from the frozen initial student, at the same positions; 0: none"
    )
    beta: Annotated[float, Field(ge=0, le=1)] = setting(
        0.5, "weight of the teacher in the mixture of jsd", {"alignment.divergence": "jsd"}
    )
    temperature: Annotated[float, Field(gt=0)] = setting(1.0, "distillation temperature T of both models")
    kd_weight: Annotated[float, Field(ge=0, le=1)] = setting(
        1.0, "lambda: loss = lambda * divergence + (1 - lambda) * cross-entropy of the sampled token"
    )
    chunk_rows: Positive | None = setting(
        None, "rows of logits in memory at once; empty: chosen from V and free memory", affects_result=False
    )


class LearnerSettings(Section):
    batch_size: Positive = setting(16, "trajectories per optimizer step, after the sample filter")
    tokens_per_micro_batch: Positive = setting(
        8_192, "tokens per forward and backward, padding included", affects_result=False
    )
    lr: Annotated[float, Field(gt=0)] = setting(1e-5, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = setting("cosine", "decay of the learning rate after warm-up")
    warmup_steps: NonNegative = setting(10, "steps of linear warm-up")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = setting(
        0.1, "final learning rate of the schedule, as a share of the peak", {"learner.schedule": ("linear", "cosine")}
    )
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw", "adamw_8bit: both moments of each weight in 8 bits instead of 32, by bitsandbytes"
    )
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.0, "decoupled weight decay of AdamW")
    beta1: Annotated[float, Field(ge=0, lt=1)] = setting(0.9, "beta1 of AdamW")
    beta2: Annotated[float, Field(ge=0, lt=1)] = setting(0.95, "beta2 of AdamW")
    clip: Annotated[float, Field(gt=0)] = setting(1.0, "largest gradient norm")
    compute_dtype: Dtype = setting(
        "auto", "dtype of the forward pass over float32 master weights; auto: bfloat16 on cuda, else float32; float16 "
        "resolves weight updates eight times smaller than bfloat16 does, and uses loss scaling",
    )  # fmt: skip
    compile: bool = setting(
        False, "compile the student's decoder layers (torch.compile): the first steps take a minute longer, later ones "
        "are faster; needs a C compiler on the learner's nodes", {"rollout.placement": "actor"}, affects_result=False,
    )  # fmt: skip
    max_skipped: NonNegative = setting(
        5, "steps that a run may skip because loss or gradient is not finite; one more ends it", affects_result=False
    )
    threads: Positive | None = setting(
        None,
        "CPU threads of each rank; empty: its share of all cores, minus one core if roles work at the same time",
        affects_result=False,
    )
    ranks: Positive = setting(
        1, "processes (and devices) that share the student, its optimizer and each batch (FSDP2)",
        affects_result=False,
    )  # fmt: skip


class PipelineSettings(Section):
    packing: bool = setting(
        False, "pack several sequences into a row, with separate attention, instead of padding each one",
        affects_result=False,
    )  # fmt: skip
    streaming: bool = setting(
        False, "train on rollouts as they finish, while the engines generate the others", affects_result=False
    )
    max_staleness: Annotated[int, Field(ge=0, le=1)] = setting(
        0, "0: strictly on-policy; 1: generate the next step's rollouts during this update, with weights one step old"
    )

    @property
    def overlaps(self) -> bool:
        """True if engines, teacher and learner work at the same time."""
        return self.streaming or self.max_staleness > 0


class CacheSettings(Section):
    path: FilePath | None = setting(
        None, "folder of a cache made by onpolicy_skd.cache build: training reads it and loads no teacher",
        {"mode": "off_policy"},
    )  # fmt: skip


class SyncSettings(Section):
    method: Literal["auto", "object_store", "broadcast", "ipc"] = setting(
        "auto",
        "transport of new weights to the engines. object_store: through Ray, anywhere; broadcast: from rank 0 to "
        "vLLM's workers, by NCCL (on CPU gloo); ipc: in the memory of a GPU that learner and engine share "
        "(cluster.topology=colocated, or shares of one GPU). auto: on GPUs ipc or broadcast where possible, else "
        "object_store",
        affects_result=False,
    )
    max_gap: Annotated[float, Field(gt=0)] = setting(
        0.03, "bound on the mean |log-probability of sampler - of learner| of the sampled tokens, nats; above it the "
        "run stops; mixture-of-experts students in bfloat16 need more", affects_result=False,
    )  # fmt: skip


class EvalSettings(Section):
    problems: NonNegative = setting(0, "problems per evaluation; 0: the full split", resumable=True)
    during: NonNegative = setting(
        200, "problems per evaluation during training; 0: eval.problems. data.validation_problems replaces it",
        resumable=True,
    )  # fmt: skip
    before: bool = setting(True, "evaluate the student before training", resumable=True)
    after: bool = setting(True, "evaluate the student after training", resumable=True)
    teacher: bool = setting(
        True, "evaluate the teacher once (needs room for its engine); the default with cache.path, "
        "teacher.engine=vllm, teacher.model=student or teachers is false", resumable=True,
    )  # fmt: skip
    max_tokens: Positive | None = setting(
        None, "longest response in evaluation, tokens; empty: rollout.max_tokens", resumable=True
    )
    judge: Annotated[str, AfterValidator(BuiltinOrPlugin(Literal["exact_match"]))] = setting(
        "exact_match", "judge of answers whose row has no reference answer; exact_match: every row needs one"
    )
    divergence_prompts: NonNegative = setting(
        0, "held-out prompts on which each evaluation measures the divergence", resumable=True
    )


class HubSettings(Section):
    push: Annotated[str, AfterValidator(_repository)] | None = setting(
        None, "repository on the Hugging Face hub, OWNER/NAME or NAME, that receives final/ at the end of the run",
        affects_result=False,
    )  # fmt: skip
    private: bool = setting(True, "make a new repository private", {"hub.push": Given()}, affects_result=False)


class FaultSettings(Section):
    restarts: NonNegative = setting(
        5, "failures of a role's actors within an hour that a restart may repair; one more ends the run, with a "
        "checkpoint", affects_result=False,
    )  # fmt: skip
    backoff_seconds: Annotated[float, Field(ge=0)] = setting(
        1.0, "wait before a role's first restart; doubles with each further failure, up to a minute",
        affects_result=False,
    )  # fmt: skip
    deadline_minutes: Annotated[float, Field(gt=0)] = setting(
        60.0, "longest time for an actor to start, or for its work in one step, before it counts as hung; in "
        "evaluations in proportion to the work", affects_result=False,
    )  # fmt: skip

    def timeout_s(self, size: float = 1.0) -> float:
        """Return the seconds after which a call counts as hung; ``size`` is its work over that of one step."""
        return 60 * self.deadline_minutes * max(1.0, size)


class ClusterSettings(Section):
    address: str | None = setting(
        None, "Ray address; empty: the running cluster, else a local one", affects_result=False
    )
    topology: Literal["split", "colocated"] = setting(
        "split", "split: separate GPUs (or shares) per actor; colocated: each learner rank shares its GPU with an "
        "engine, which sleeps while the learner works, and a teacher", affects_result=False,
    )  # fmt: skip
    learner_gpus: Annotated[float, Field(ge=0)] | None = setting(
        None, "GPUs per rank; empty: 1 on cuda, 0 on cpu; colocated: equal shares", affects_result=False
    )
    teacher_gpus: Annotated[float, Field(ge=0)] | None = setting(
        None, "GPUs per teacher actor; empty: as for the learner, or teacher.tensor_parallel", affects_result=False
    )
    rollout_gpus: Annotated[float, Field(ge=0)] | None = setting(
        None, "GPUs per engine; empty: rollout.tensor_parallel on cuda; colocated: equal shares", affects_result=False
    )


class Settings(Section):
    """All settings of a run."""

    mode: Literal["on_policy", "off_policy", "mixed"] = setting(
        "on_policy", "source of trajectories: the student (on_policy), references.* (off_policy), or both (mixed)"
    )
    resume: Literal["never", "auto"] = setting(
        "never", "auto: continue from the run's newest good checkpoint, if there is one", affects_result=False
    )
    resume_with: list[str] = setting(
        [], "settings or sections that may differ from the resumed run although they affect the result, for example "
        "[learner.lr, data]", {"resume": "auto"}, affects_result=False,
    )  # fmt: skip
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    teachers: dict[Annotated[str, AfterValidator(_plain_name)], TeacherSettings] = setting(
        {}, "several teachers in place of teacher.*: the settings of each by its name, for example {maths: {model: A}, "
        "code: {model: B}}; each row names its teacher (data.teacher, data.teacher_column)",
    )  # fmt: skip
    rollout: RolloutSettings = RolloutSettings()
    references: ReferenceSettings = ReferenceSettings()
    samples: SampleSettings = SampleSettings()
    positions: PositionSettings = PositionSettings()
    classes: ClassSettings = ClassSettings()
    alignment: AlignmentSettings = AlignmentSettings()
    learner: LearnerSettings = LearnerSettings()
    pipeline: PipelineSettings = PipelineSettings()
    cache: CacheSettings = CacheSettings()
    sync: SyncSettings = SyncSettings()
    eval: EvalSettings = EvalSettings()
    hub: HubSettings = HubSettings()
    faults: FaultSettings = FaultSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _dependent_defaults(cls, tree: Any) -> Any:
        """Fill in the defaults that depend on another setting."""

        def section(name: str) -> dict[str, Any]:
            given = tree.get(name)
            return given if isinstance(given, dict) else {}

        defaults: dict[str, dict[str, Any]] = {}
        if tree.get("mode") == "off_policy" and section("references").get("source") != "student":
            defaults["alignment"] = {"divergence": "forward_kl"}
        teacher, elsewhere = section("teacher"), section("cache").get("path") or tree.get("teachers")
        if elsewhere or teacher.get("model") == "student" or teacher.get("engine") == "vllm":
            defaults["eval"] = {"teacher": False}
        if section("cluster").get("topology") == "colocated":
            defaults["rollout"] = {"gpu_memory": 0.3}
        return tree | {
            name: default | section(name)
            for name, default in defaults.items()
            if tree.get(name) is None or isinstance(tree[name], dict)
        }

    @property
    def generates(self) -> bool:
        """True if responses are generated, in training or evaluation."""
        return self.data.source != "text"

    @property
    def needs_engines(self) -> bool:
        """True if the student generates during the run: in training, evaluations, or to score prompts."""
        evaluates = self.eval.before or self.eval.after or self.run.evaluate_every > 0
        scores = self.samples.when == "prefilter" and self.samples.prefilter_text == "rollout"
        return self.generates and (self.mode != "off_policy" or evaluates or scores)

    @property
    def generates_references(self) -> bool:
        """True if a model generates the references, once, before training."""
        return self.mode != "on_policy" and self.references.source in ROLLED_OUT

    @property
    def judges_rollouts(self) -> bool:
        """True if training needs to know which rollouts are right."""
        return self.samples.correctness != "any" or self.samples.weight == "paced"

    @property
    def teacher_model(self) -> StudentSettings | TeacherSettings:
        """The section that names the teacher's model: the student's with ``teacher.model=student``."""
        return self.student if self.teacher.model == "student" else self.teacher

    def of_teacher(self, name: str) -> Settings:
        """Return these settings with the teacher ``name`` of ``teachers`` as the only one."""
        return self.model_copy(update={"teacher": self.teachers[name], "teachers": {}})

    @property
    def by_teacher(self) -> list[Settings]:
        """A copy of these settings for each teacher, with that teacher under ``teacher``."""
        return [self.of_teacher(name) for name in self.teachers] or [self]

    @property
    def teacher_models(self) -> str:
        """The teacher's model as the settings name it, or those of all teachers, for reports."""
        return ", ".join(settings.teacher.model for settings in self.by_teacher)

    @property
    def max_sequence(self) -> int:
        """Tokens of the longest prompt plus the longest response, or of a sample of packed text."""
        if self.data.source == "text":
            return self.data.sequence_length
        return self.data.max_prompt_tokens + self.rollout.max_tokens

    @property
    def max_teacher_sequence(self) -> int:
        """Tokens of the longest sequence that the teacher reads."""
        if self.teacher.prompt is None:
            return self.max_sequence
        return self.teacher.max_prompt_tokens + self.rollout.max_tokens

    @property
    def max_model_length(self) -> int:
        """Longest sequence of an engine, tokens: ``max_sequence``, or more for longer responses in evaluation."""
        if not self.generates:
            return self.max_sequence
        return self.data.max_prompt_tokens + max(self.rollout.max_tokens, self.eval.max_tokens or 0)

    @property
    def rollouts_per_step(self) -> int:
        """Trajectories generated for one optimizer step: batch_size / l if each step's rollouts are ranked."""
        ranked = self.samples.when == "rollout"
        return math.ceil(round(self.learner.batch_size / self.samples.keep, 9)) if ranked else self.learner.batch_size

    @property
    def student_rollouts_per_step(self) -> int:
        """Number of ``rollouts_per_step`` that the student generates; the others are references."""
        shares = {"on_policy": 1.0, "off_policy": 0.0, "mixed": self.rollout.share}
        return math.ceil(round(shares[self.mode] * self.rollouts_per_step, 9))

    @property
    def prompts_per_step(self) -> int:
        """Number of prompts per step: those with ``rollout.n`` rollouts each plus those with references."""
        return (
            math.ceil(self.student_rollouts_per_step / self.rollout.n)
            + self.rollouts_per_step
            - self.student_rollouts_per_step
        )


def walk(section: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield each setting as (dotted key, pydantic field)."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field
