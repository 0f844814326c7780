"""The one tree of settings and the only home of defaults.

``command_line.py`` makes it of files and arguments, ``compatibility.py`` knows which settings go together.  None of the
three imports torch, Ray or vLLM.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from onpolicy_skd.config.plugins import BuiltinOrPlugin

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositionMetric = Literal[
    "student_entropy", "teacher_entropy", "student_ce", "teacher_ce", "kl", "reverse_kl", "kl_plus_entropy",
    "ce_ratio", "ce_ratio_plus_entropy", "tip_soft_or", "random", "prefix",
]  # fmt: skip
PositionPolicy = Literal[
    "top_k", "gls", "curriculum", "sampled", "sampled_unbiased", "weighted", "full", "bandit"
]  # fmt: skip

DRAWING = ("sampled", "sampled_unbiased")  # policies that draw positions


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, on and true as truth values, which pydantic would take for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value (YAML reads yes, on and true as one) is not accepted here")
        return value


class RunSettings(Section):
    name: str = Field(default="run", description="name of the run; its folder is DIR/NAME")
    dir: Path = Field(default=Path("runs"), description="folder that holds all runs")
    seed: NonNegative = Field(default=1340, description="seed of prompts order, sampling and random selection")
    steps: NonNegative | None = Field(default=None, description="optimizer steps; overrides run.epochs")
    epochs: Annotated[float, Field(gt=0)] = Field(default=1.0, description="passes over the (filtered) prompts")
    evaluate_every: NonNegative = Field(default=0, description="steps between evaluations; 0: only before and after")
    checkpoint_every: NonNegative = Field(default=50, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: Positive = Field(default=2, description="how many of the newest checkpoints stay on disk")
    keep_best: bool = Field(
        default=False,
        description="also save the student of the best evaluation during training, as a plain model: best/",
    )
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="wall-clock limit of this process; then it stops as by a signal, with a checkpoint"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where models live; auto: cuda when present"
    )
    timeline: NonNegative | None = Field(
        default=2, description="step of which timeline.json and timeline.png show who was busy when; empty: none"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard events into the run's folder")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class DataSettings(Section):
    source: Literal["gsm8k", "demo", "jsonl", "hub", "text"] = Field(
        default="gsm8k", description="gsm8k: openai/gsm8k or local files under data.path; demo: the generated task; "
        "jsonl: data.train_file and data.eval_file; hub: the data set data.name; text: packed documents of "
        "data.train_file or data.name, for mode=off_policy"
    )  # fmt: skip
    path: Path | None = Field(
        default=None, description="folder with GSM8K's train.jsonl and test.jsonl; empty: the hub"
    )
    name: str | None = Field(default=None, description="hub data set, for source hub or text")
    subset: str | None = Field(default=None, description="hub configuration name, for source hub or text")
    train_file: Path | None = Field(
        default=None, description="training questions, for source jsonl; for source text a .jsonl, .parquet or .txt "
        "file, or a folder of them"
    )  # fmt: skip
    eval_file: Path | None = Field(default=None, description="evaluation questions, for source jsonl")
    train_split: str = Field(default="train", description="split to train on")
    eval_split: str = Field(default="test", description="split to evaluate on")
    question_column: str = Field(default="question", description="column that holds the question")
    answer_column: str = Field(default="answer", description="column that holds the reference answer")
    text_column: str = Field(default="text", description="text: column that holds a document")
    sequence_length: Annotated[int, Field(ge=2)] = Field(default=512, description="text: tokens of one sample")
    tokens: Positive | None = Field(
        default=None, description="text: token budget, held-out samples included; empty: all"
    )
    documents: Literal["separate", "joined"] = Field(
        default="separate",
        description="text: attention and positions start anew at each document; joined: they run on, as published",
    )
    train_problems: Positive | None = Field(default=None, description="use only the first N training problems")
    validation_problems: NonNegative = Field(
        default=0, description="training problems held out, always the same ones, for evaluations during training"
    )
    template: Literal["chat", "plain"] = Field(
        default="chat", description="chat: the tokenizer's template; plain: data.plain"
    )
    plain: str = Field(
        default="Question: {question}\nAnswer:", description="prompt of base models; must contain {question}"
    )
    system: str | None = Field(default=None, description="system message of the chat template")
    instruction: str = Field(default="", description="text appended to every question")
    thinking: bool = Field(default=False, description="thinking mode of templates that have one (Qwen3)")
    max_prompt_tokens: Positive = Field(default=512, description="longest prompt, tokens")
    overlong: Literal["error", "drop"] = Field(default="error", description="what becomes of longer prompts")

    @model_validator(mode="after")
    def _complete(self) -> DataSettings:
        if self.source == "hub" and not self.name:
            raise ValueError("data.name: needed for data.source=hub; give the hub data set, e.g. openai/gsm8k")
        if self.source == "jsonl" and not self.train_file:
            raise ValueError("data.train_file: needed for data.source=jsonl; give a file with one JSON object a line")
        if self.source == "text" and not (bool(self.train_file) ^ bool(self.name)):
            raise ValueError(
                "data.train_file: data.source=text needs that (a file or folder) or data.name, one of them"
            )
        if self.path and self.source != "gsm8k":
            raise ValueError(f"data.path: accepted for data.source=gsm8k only, not {self.source}")
        if "{question}" not in self.plain:
            raise ValueError("data.plain: must contain {question}")
        return self


class StudentSettings(Section):
    model: str = Field(default="Qwen/Qwen3-1.7B", description="hub name, folder, or bundled:demo_student")
    lora_rank: NonNegative = Field(
        default=0,
        description="train low-rank additions to all linear layers of the backbone, by peft; 0: train everything",
    )
    lora_alpha: Positive = Field(default=32, description="the additions are scaled by lora_alpha / lora_rank")
    activation_checkpointing: bool = Field(default=False, description="recompute activations in backward; saves memory")
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with the model: only if you trust it"
    )


class TeacherSettings(Section):
    model: str = Field(default="Qwen/Qwen3-8B", description="hub name, folder, or bundled:demo_teacher")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on cuda, else float32"
    )
    placement: Literal["actor", "learner"] = Field(
        default="actor", description="actor: a process (and device) of its own; learner: in the learner's process"
    )
    actors: Positive = Field(default=1, description="teacher actors that share every batch")
    tokens_per_batch: Positive = Field(
        default=16_384, description="token budget of one teacher forward, padding included"
    )
    trust_remote_code: bool = Field(
        default=False, description="run code that comes with the model: only if you trust it"
    )


class RolloutSettings(Section):
    engine: Literal["vllm", "transformers"] = Field(default="vllm", description="what generates")
    placement: Literal["actor", "learner"] = Field(
        default="actor",
        description="actor: processes (and devices) of their own; learner: in the learner's, with its very weights "
        "(rollout.engine=transformers)",
    )
    actors: Positive = Field(default=1, description="rollout actors that share every batch")
    tensor_parallel: Positive = Field(default=1, description="vllm: devices that one engine's model is cut over")
    n: Positive = Field(default=1, description="rollouts per prompt")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="mode=mixed: share of each batch that is rollouts (GKD's lambda)"
    )
    max_tokens: Positive = Field(default=512, description="longest response, tokens")
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="sampling temperature")
    top_p: Share = Field(default=1.0, description="nucleus of the sampling distribution")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on cuda, else float32"
    )
    entropy: Literal["learner", "engine"] = Field(
        default="learner",
        description="who measures the student's entropy; engine: while it samples, which saves the learner a pass",
    )
    max_sequences: Positive = Field(default=256, description="sequences generated at the same time by one engine")
    gpu_memory: Share = Field(default=0.85, description="share of a GPU that a vLLM engine takes; colocated: 0.3")
    kv_cache_mib: Positive = Field(default=256, description="KV cache of a vLLM engine on CPU, MiB")


class ReferenceSettings(Section):
    source: Literal["answers", "file", "teacher"] = Field(
        default="answers", description="the data's answers; references.file; or the teacher's own rollouts, made once"
    )
    file: Path | None = Field(default=None, description="file: one JSON object a line, with question and answer")
    annotations: Literal["keep", "strip"] = Field(default="keep", description="GSM8K's calculations, <<48/2=24>>")
    supervise: Literal["response", "all"] = Field(
        default="response", description="all: question tokens too, as the SE-KD paper's code does"
    )
    samples: Positive = Field(default=1, description="teacher: its rollouts per prompt, used in turn")
    temperature: Annotated[float, Field(ge=0)] = Field(default=1.0, description="teacher: 0 is greedy")


class SampleSettings(Section):
    metric: Literal["student_entropy", "kl", "ce_ratio", "random"] = Field(
        default="student_entropy", description="what ranks samples; kl and ce_ratio cost a teacher forward of all"
    )
    keep: Share = Field(default=1.0, description="share l of the samples that is kept")
    when: Literal["rollout", "prefilter"] = Field(
        default="rollout",
        description="rollout: rank each step's rollouts; prefilter: rank all prompts once, before training",
    )
    prefilter_text: Literal["prompt", "prompt+answer", "rollout"] = Field(
        default="prompt+answer", description="text whose mean student entropy ranks a prompt"
    )
    truncated: Literal["drop", "keep"] = Field(
        default="drop", description="responses without an end within rollout.max_tokens"
    )
    correctness: Literal["any", "right", "wrong"] = Field(
        default="any", description="keep only rollouts whose answer is right, or wrong, by math-verify"
    )
    weight: Literal["uniform", "paced"] = Field(
        default="uniform",
        description="of a sample in the loss; paced: p(1-p), p its prompt's pass rate (rollout.n > 1)",
    )


class PositionSettings(Section):
    metric: Annotated[str, AfterValidator(BuiltinOrPlugin(PositionMetric))] = Field(
        default="student_entropy", description="score u(t) of a position"
    )
    policy: Annotated[str, AfterValidator(BuiltinOrPlugin(PositionPolicy))] = Field(
        default="top_k", description="how scores become a selection"
    )
    k: Share = Field(default=0.2, description="share of each response's positions that is supervised")
    k_start: Share | None = Field(default=None, description="first value of k, which then grows over schedule_steps")
    schedule_steps: Positive = Field(default=1_000, description="steps from k_start to k")
    queue: Positive = Field(default=30_000, description="gls: scores whose quantile is the threshold")
    curriculum_steps: Positive = Field(default=4_000, description="curriculum: steps from lowest to highest scores")
    arms: list[PositionMetric] = Field(
        default=["student_entropy", "reverse_kl", "random"], description="bandit: the metrics it chooses from"
    )
    bandit_gamma: Share = Field(default=0.1, description="bandit: share of its choices that is even over the arms")
    bandit_probe: Positive = Field(default=8, description="bandit: samples of the first batch that measure progress")
    smoothing: Annotated[float, Field(ge=1)] = Field(default=1.0, description="sampled*: draw by u^(1/smoothing)")
    skip_first: NonNegative = Field(default=0, description="sampled*: never draw the first positions of a response")
    clip: Annotated[float, Field(gt=0)] | None = Field(default=None, description="sampled*: largest score that counts")
    coverage: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="sampled*: share of the budget that goes to the highest scores without a draw"
    )

    @model_validator(mode="after")
    def _possible(self) -> PositionSettings:
        pair = f"positions.metric={self.metric}, positions.policy={self.policy}: "
        if self.metric == "prefix" and self.policy in (*DRAWING, "weighted"):
            raise ValueError(pair + "-t is negative, so no probabilities or weights can be made of it; accepted: top_k")
        if self.metric == "prefix" and self.policy == "gls":
            raise ValueError(pair + "a threshold on -t is a fixed length, whatever the responses; accepted: top_k")
        if self.metric == "tip_soft_or" and self.policy == "gls":
            raise ValueError(
                pair + "scores scaled within each batch cannot be compared with earlier batches; accepted: top_k"
            )
        if self.policy == "bandit" and self.metric != "student_entropy":
            raise ValueError(pair + "a bandit chooses among positions.arms; leave positions.metric out")
        if self.policy == "bandit" and len(set(self.arms)) < max(2, len(self.arms)):
            raise ValueError(f"positions.arms={self.arms}: a bandit needs two or more different metrics")
        if self.k_start is not None and (self.policy in ("full", "weighted") or self.k_start > self.k):
            reason = f"positions.k={self.k} is less" if self.k_start > self.k else f"{self.policy} takes every position"
            raise ValueError(f"positions.k_start={self.k_start}: {reason}; k grows from k_start to k")
        return self


class ClassSettings(Section):
    sampler: Literal[
        "none", "rs_kd", "top_k", "top_k_normalised", "top_p", "ghost_token", "naive_fix", "label_smoothing"
    ] = Field(default="none", description="how the teacher's distribution is cut to a few classes; none: exact, whole")
    draws: Positive = Field(default=64, description="rs_kd: draws U per position")
    proposal: Annotated[float, Field(gt=0)] = Field(default=1.0, description="rs_kd: tau of the proposal p^tau")
    k: Positive = Field(default=50, description="classes of the truncations; the most of top_p")
    p: Share = Field(default=0.98, description="top_p: mass that is kept")


class AlignmentSettings(Section):
    variant: Literal["full_kd", "decoupled_kd", "at_kd", "egad"] = Field(
        default="full_kd", description="what is done with the divergence at each position"
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = Field(
        default="reverse_kl", description="what is minimised; the default off-policy is forward_kl"
    )
    estimator: Literal["exact", "topk_tail", "sampled"] = Field(
        default="exact",
        description="exact; over the teacher's top_k classes and the rest; from the sampled token alone",
    )
    top_k: Positive = Field(default=64, description="topk_tail: the teacher's classes that are told apart")
    target_weight: Annotated[float, Field(ge=0)] = Field(default=1.0, description="decoupled_kd: alpha, of the target")
    other_weight: Annotated[float, Field(ge=0)] = Field(default=1.0, description="decoupled_kd: beta, of the others")
    easy_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2, description="at_kd: lambda; easy positions weigh lambda, hard ones 1 - lambda"
    )
    min_temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="egad: where the teacher is least sure"
    )
    max_temperature: Annotated[float, Field(gt=0)] = Field(default=2.0, description="egad: where it is surest")
    feature_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="egad: of the squared distance between projected student and teacher hidden states"
    )
    feature_entropy: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05, description="egad: share of the largest entropy, log V, from which hidden states are compared"
    )
    ema_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="of an added divergence to a moving average of the student; 0: none"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.999, description="of that average, per step")
    beta: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="weight of the teacher in jsd's mixture")
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="distillation temperature T of both models"
    )
    kd_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="lambda: loss = lambda * divergence + (1 - lambda) * cross-entropy of the sampled token",
    )
    compiled: bool = Field(
        default=False,
        description="exact divergences by torch.compile (a C++ compiler, on GPUs Triton) in place of our own passes",
    )
    chunk_rows: Positive | None = Field(
        default=None, description="rows of logits that exist at once; empty: from V and memory"
    )


class LearnerSettings(Section):
    batch_size: Positive = Field(
        default=16, description="trajectories of one optimizer step, after the sample filter's share"
    )
    tokens_per_micro_batch: Positive = Field(default=8_192, description="token budget of one forward, padding included")
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-5, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="after warm-up, to min_lr_ratio"
    )
    warmup_steps: NonNegative = Field(default=10, description="steps of linear warm-up")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="last learning rate over the peak"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's decoupled weight decay")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="AdamW")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.95, description="AdamW")
    clip: Annotated[float, Field(gt=0)] = Field(default=1.0, description="largest gradient norm")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the forward; weights stay float32 masters; auto: bfloat16 on cuda, else float32"
    )
    max_skipped: NonNegative = Field(
        default=5, description="steps skipped for a loss or gradient that is not finite, before the run stops"
    )
    threads: Positive | None = Field(
        default=None, description="CPU threads of each rank; empty: its part of all cores but one"
    )
    ranks: Positive = Field(
        default=1, description="processes (and devices) that share the student, its optimizer and each batch (FSDP2)"
    )


class PipelineSettings(Section):
    packing: bool = Field(
        default=False,
        description="learner and teacher read several responses in one row, kept apart by the attention mask, in place "
        "of padding",
    )
    streaming: bool = Field(
        default=False,
        description="the learner works on rollouts as they end, while the engines go on with the others",
    )
    max_staleness: Annotated[int, Field(ge=0, le=1)] = Field(
        default=0,
        description="0: strictly on-policy; 1: the next step's rollouts are made during this update, by weights that "
        "are then one step old",
    )


class CacheSettings(Section):
    path: Path | None = Field(
        default=None,
        description="folder of a cache made by onpolicy_skd.cache build: training reads it and loads no teacher",
    )
    positions_per_shard: Positive = Field(default=65_536, description="positions of one file of a new cache")
    builders: Positive = Field(default=1, description="teacher actors that build a cache at the same time")


class SyncSettings(Section):
    method: Literal["auto", "object_store", "broadcast", "ipc"] = Field(
        default="auto",
        description="how new weights reach the engines. object_store: through Ray, anywhere; broadcast: from rank 0 "
        "straight to vLLM's workers, by NCCL (on CPU gloo); ipc: in the memory of the shared GPU, for "
        "topology=colocated. auto: on GPUs broadcast or ipc where they are possible, else object_store",
    )
    max_gap: Annotated[float, Field(gt=0)] = Field(
        default=0.1, description="largest mean |log-probability of sampler - of learner| on the sampled tokens, nats"
    )


class EvalSettings(Section):
    problems: NonNegative = Field(default=0, description="problems of an evaluation; 0: the whole split")
    during: NonNegative = Field(default=200, description="problems of an evaluation during training; 0: eval.problems")
    before: bool = Field(default=True, description="evaluate the student before training")
    teacher: bool = Field(
        default=True,
        description="evaluate the teacher once (needs room for its engine); the default with a cache is false",
    )
    max_tokens: Positive | None = Field(
        default=None, description="longest response in evaluation; empty: rollout.max_tokens"
    )
    divergence_prompts: NonNegative = Field(
        default=0, description="held-out prompts on which each evaluation measures the divergence"
    )


class FaultSettings(Section):
    restarts: NonNegative = Field(
        default=5, description="failures of a role's actors within faults.window_hours that are mended; one more ends "
        "the run, with a checkpoint"
    )  # fmt: skip
    window_hours: Annotated[float, Field(gt=0)] = Field(default=1.0, description="how long a failure counts")
    backoff_seconds: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="wait before a role's first restart; doubles with each that still counts, to a minute"
    )
    deadline_minutes: Annotated[float, Field(gt=0)] = Field(
        default=60.0, description="longest that an actor may take to start or for its part of a step before it counts "
        "as hung; for more work, as in an evaluation, more in proportion"
    )  # fmt: skip

    def timeout_s(self, size: float = 1.0) -> float:
        """Seconds after which a call counts as hung; ``size``: its work over that of one step."""
        return 60 * self.deadline_minutes * max(1.0, size)


class ClusterSettings(Section):
    address: str | None = Field(default=None, description="Ray address; empty: the running cluster, else a local one")
    topology: Literal["split", "colocated"] = Field(
        default="split",
        description="split: actors on GPUs (or shares) of their own; colocated: every rank of the learner shares its "
        "GPU with an engine, which sleeps while the learner works, and a teacher",
    )
    learner_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of each rank; empty: 1 on cuda, 0 on cpu; colocated: equal shares"
    )
    teacher_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of each teacher; empty: as for the learner"
    )
    rollout_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of each engine; empty: rollout.tensor_parallel on cuda; colocated: equal shares"
    )


class Settings(Section):
    """Every setting of a run."""

    mode: Literal["on_policy", "off_policy", "mixed"] = Field(
        default="on_policy", description="where trajectories come from: the student itself, references.*, or both"
    )
    resume: Literal["never", "auto"] = Field(
        default="never", description="auto: go on from the run's newest good checkpoint, if there is one"
    )
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
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
    faults: FaultSettings = FaultSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _dependent_defaults(cls, tree: Any) -> Any:
        """The defaults that depend on another setting."""

        def section(name: str) -> dict[str, Any]:
            found = tree.get(name) or {}
            return found if isinstance(found, dict) else {}

        defaults: dict[str, dict[str, Any]] = {}
        if tree.get("mode") == "off_policy":
            defaults["alignment"] = {"divergence": "forward_kl"}
        if section("cache").get("path"):
            defaults["eval"] = {"teacher": False}
        if section("cluster").get("topology") == "colocated":
            defaults["rollout"] = {"gpu_memory": 0.3}
        given = {name: tree.get(name) for name in defaults}
        return tree | {
            name: default | section(name)
            for name, default in defaults.items()
            if given[name] is None or isinstance(given[name], dict)
        }

    @property
    def generates(self) -> bool:
        """Whether anything is generated, in training or evaluation."""
        return self.data.source != "text"

    @property
    def judges_rollouts(self) -> bool:
        """Whether training needs to know which rollouts are right."""
        return self.samples.correctness != "any" or self.samples.weight == "paced"

    @property
    def max_sequence(self) -> int:
        """Longest prompt plus longest response, or a stretch of text; tokens."""
        if self.data.source == "text":
            return self.data.sequence_length
        return self.data.max_prompt_tokens + self.rollout.max_tokens

    @property
    def max_model_length(self) -> int:
        """What an engine must have room for: ``max_sequence``, or longer responses in evaluation."""
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
        """Of these, how many the student generates; the others are references."""
        shares = {"on_policy": 1.0, "off_policy": 0.0, "mixed": self.rollout.share}
        return math.ceil(round(shares[self.mode] * self.rollouts_per_step, 9))

    @property
    def prompts_per_step(self) -> int:
        """Prompts that are rolled out, ``rollout.n`` times each, and then prompts with references."""
        return (
            math.ceil(self.student_rollouts_per_step / self.rollout.n)
            + self.rollouts_per_step
            - self.student_rollouts_per_step
        )
