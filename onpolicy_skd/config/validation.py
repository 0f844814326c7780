"""All rules between settings.  Each refusal names the setting, the reason, and what is accepted.

The rule ``_unused`` enforces ``only_with`` of the schema; the other rules are below it.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import SAMPLING_POLICIES, Section, Settings, SourceSettings, rules_of, walk

LOOK_AT_TARGET = ("student_ce", "teacher_ce", "ce_ratio", "ce_ratio_plus_entropy")  # metrics that depend on y_t
ASK_TEACHER = (
    *("teacher_entropy", "teacher_ce", "kl", "reverse_kl", "kl_plus_entropy", "ce_ratio", "ce_ratio_plus_entropy"),
    *("tip_soft_or", "tip_q3", "ta_opd", "teacher_mass", "overlap", "margin"),
)  # metrics that need the teacher's full distribution
PLACEHOLDER = re.compile(r"\{(\w+)\}")  # a column's placeholder in teacher.prompt
WHOLE_BATCH = ("tip_soft_or", "tip_q3", "ta_opd")  # metrics of signals that are scaled to [0, 1] over the batch


def check(settings: Settings) -> None:
    """Raise ConfigError for the first combination that is impossible, or in which a setting has no effect."""
    for rule in RULES:
        if message := rule(settings):
            raise ConfigError(message)


def value_of(settings: Section, key: str) -> Any:
    """Return the value of a setting by its dotted key."""
    return functools.reduce(getattr, key.split("."), settings)


def conditions_of(field: Any) -> str:
    """Return the ``only_with`` conditions of a setting in words; empty if there are none."""
    return ", ".join(f"{other}{condition}" for other, condition in rules_of(field)["only_with"].items())


def _unused(settings: Settings) -> str | None:
    """Refuse a setting that was changed although another setting makes it meaningless."""
    for key, field in walk():
        value = value_of(settings, key)
        if value == field.default:
            continue
        for other, condition in rules_of(field)["only_with"].items():
            chosen = value_of(settings, other)
            if chosen not in condition:
                return f"{key}={value}: accepted with {other}{condition} only, not {chosen}"
    return None


def _data(settings: Settings) -> str | None:
    data = settings.data
    if data.source == "hub" and not data.name:
        return "data.name: needed for data.source=hub; give the hub data set, e.g. openai/gsm8k"
    if data.source == "jsonl" and not data.train_file:
        return "data.train_file: needed for data.source=jsonl; give a file with one JSON object per line"
    if data.source == "text" and bool(data.train_file) == bool(data.name):
        return "data.train_file: data.source=text needs that (a file or folder) or data.name, one of them"
    for name in ("messages_column", "teacher_column"):
        if getattr(data, name) == "":
            return f"data.{name}='': no name of a column; accepted: a name, or null for none"
    if "{question}" not in data.plain:
        return "data.plain: must contain {question}"
    return None


def _messages(settings: Settings) -> str | None:
    """Refuse settings for questions and answers if rows are conversations."""
    if settings.data.messages_column is None:
        return None
    data, refs = settings.data, settings.references
    questions_only = {
        "data.shots": data.shots,
        "data.instruction": data.instruction,
        "references.source=file": refs.source == "file",
        "references.annotations=strip": refs.annotations == "strip",
    }
    for name, chosen in questions_only.items():
        if chosen:
            return f"{name}: made for questions and answers; not accepted with data.messages_column"
    return None


def _mix(settings: Settings) -> str | None:
    """Apply the rules for a source to each source of ``data.mix``, and refuse settings of a source outside the mix."""
    data = settings.data
    if not data.mix:
        return None
    for name, field in SourceSettings.model_fields.items():
        if getattr(data, name) != field.default:
            return f"data.{name}={getattr(data, name)}: with data.mix each source has its own; move it there"
    for number, source in enumerate(data.sources):
        if source.source == "text":
            return f"data.mix[{number}]: source=text: packed text asks for no response; accepted: the other sources"
        for rule in (_unused, _data, _messages):
            if message := rule(settings.model_copy(update={"data": source})):
                return f"data.mix[{number}]: {message}"
    return None


def _positions(settings: Settings) -> str | None:
    cfg = settings.positions
    pair = f"positions.metric={cfg.metric}, positions.policy={cfg.policy}: "
    impossible = {
        "-t is negative, so it gives no probabilities or weights; accepted: top_k": (
            cfg.metric == "prefix" and cfg.policy in (*SAMPLING_POLICIES, "weighted")
        ),
        "a threshold on -t is a fixed length, whatever the responses; accepted: top_k": (
            cfg.metric == "prefix" and cfg.policy == "gls"
        ),
        "scores scaled within each batch cannot be compared with earlier batches; accepted: top_k": (
            cfg.metric in WHOLE_BATCH and cfg.policy == "gls"
        ),
        "a bandit chooses among positions.arms; leave positions.metric out": (
            cfg.policy == "bandit" and cfg.metric != "student_entropy"
        ),
    }
    for reason, chosen in impossible.items():
        if chosen:
            return pair + reason
    if cfg.policy == "bandit" and len(set(cfg.arms)) < max(2, len(cfg.arms)):
        return f"positions.arms={cfg.arms}: a bandit needs two or more different metrics"
    return None


def _schedule(settings: Settings) -> str | None:
    cfg = settings.positions
    if cfg.k_start is not None and (cfg.policy in ("full", "weighted") or cfg.k_start > cfg.k):
        reason = f"positions.k={cfg.k} is less" if cfg.k_start > cfg.k else f"{cfg.policy} takes every position"
        return f"positions.k_start={cfg.k_start}: {reason}; k grows from k_start to k"
    return None


def _token_budgets(settings: Settings) -> str | None:
    sum_of = "data.sequence_length" if settings.data.source == "text" else "data.max_prompt_tokens + rollout.max_tokens"
    of_teacher = "teacher.max_prompt_tokens + rollout.max_tokens" if settings.teacher.prompt is not None else sum_of
    learner, teacher = settings.learner.tokens_per_micro_batch, settings.teacher.tokens_per_batch
    budgets = {
        "learner.tokens_per_micro_batch": (learner, settings.max_sequence, sum_of),
        "teacher.tokens_per_batch": (teacher, settings.max_teacher_sequence, of_teacher),
    }
    if settings.teachers:
        del budgets["teacher.tokens_per_batch"]  # checked for each teacher by _teachers
    for key, (budget, longest, sum_of) in budgets.items():
        if longest > budget:
            return f"{key}={budget}: a sample may have {sum_of} = {longest} tokens; accepted: at least that"
    return None


def _alignment(settings: Settings) -> str | None:
    cfg, sampler, forward = settings.alignment, settings.classes.sampler, "set alignment.divergence=forward_kl"
    if sampler != "none" and cfg.divergence != "forward_kl":
        return f"classes.sampler={sampler}: targets of a few classes define a forward KL only; {forward}"
    if sampler != "none" and (cfg.variant != "full_kd" or cfg.estimator != "exact"):
        return f"classes.sampler={sampler}: accepted with alignment.variant=full_kd and alignment.estimator=exact only"
    if cfg.variant in ("decoupled_kd", "at_kd") and (cfg.divergence != "forward_kl" or cfg.estimator != "exact"):
        return f"alignment.variant={cfg.variant}: splits the exact forward KL; {forward}, alignment.estimator=exact"
    if cfg.variant == "egad" and cfg.temperature != 1.0:
        return "alignment.variant=egad: sets each token's temperature; leave alignment.temperature at 1"
    if cfg.min_temperature > cfg.max_temperature:
        return f"alignment.min_temperature={cfg.min_temperature}: must not exceed max_temperature={cfg.max_temperature}"
    return None


def _mixture(settings: Settings) -> str | None:
    cfg, sampler = settings.alignment, settings.classes.sampler
    mixed = cfg.mixture.gate != "none"
    if sampler != "none" and (mixed or cfg.clip is not None):
        key = f"alignment.mixture.gate={cfg.mixture.gate}" if mixed else f"alignment.clip={cfg.clip}"
        return f"{key}: needs the teacher's whole distribution; accepted with classes.sampler=none only"
    if mixed and (cfg.variant != "full_kd" or cfg.estimator != "exact"):
        return (
            f"alignment.mixture.gate={cfg.mixture.gate}: mixes exact divergences; accepted with "
            "alignment.variant=full_kd and alignment.estimator=exact only"
        )
    return None


def _sampled_tokens(settings: Settings) -> str | None:
    """Refuse settings under which the single-token estimator is biased."""
    cfg, rollout, positions = settings.alignment, settings.rollout, settings.positions
    if cfg.estimator != "sampled":
        return None
    if settings.mode != "on_policy" or rollout.temperature != cfg.temperature or rollout.top_p != 1.0:
        return (
            "alignment.estimator=sampled: unbiased only for tokens sampled from the student as it is trained; "
            "accepted: mode=on_policy, rollout.temperature=alignment.temperature, rollout.top_p=1"
        )
    if cfg.variant == "egad":
        return "alignment.estimator=sampled: tokens are sampled at one temperature, alignment.variant=egad sets many"
    metrics = positions.arms if positions.policy == "bandit" else [positions.metric]
    biased = [f"positions metric {name}" for name in metrics if name in LOOK_AT_TARGET]
    if settings.samples.correctness != "any":
        biased.append(f"samples.correctness={settings.samples.correctness}")
    if positions.weighting == "iw":
        biased.append("positions.weighting=iw")
    if biased:
        return (
            f"alignment.estimator=sampled: {biased[0]} selects or weights by the sampled tokens, which biases what is "
            "estimated from them; accepted: a selection that does not look at them"
        )
    return None


def _teacher_prompt(settings: Settings) -> str | None:
    """Refuse a separate teacher prompt if tokens outside the response are supervised or scored."""
    prompt, samples = settings.teacher.prompt, settings.samples
    if prompt is None:
        return None
    if not PLACEHOLDER.search(prompt):
        return "teacher.prompt: must contain {question}, {answer} or another column of the data in braces"
    unaligned = {
        "data.source=text": settings.data.source == "text",
        "references.supervise=all": settings.references.supervise == "all",
        f"samples.metric={samples.metric} with samples.prefilter_text=prompt": (
            samples.metric in ("kl", "ce_ratio") and samples.when == "prefilter" and samples.prefilter_text == "prompt"
        ),
    }
    if any(source.messages_column is not None for source in settings.data.sources):
        return "teacher.prompt: stands for a question, not for a conversation; accepted without data.messages_column"
    for name, chosen in unaligned.items():
        if chosen:
            return f"teacher.prompt: {name} compares prompt tokens too, which differ; accepted: responses alone"
    if settings.mode != "on_policy" and settings.references.source == "teacher":
        return (
            "teacher.prompt: references.source=teacher lets the teacher answer the student's prompt; choose one of them"
        )
    return None


def _moving_teacher(settings: Settings) -> str | None:
    """Refuse a moving average of the student as teacher if the learner cannot update its weights."""
    teacher = settings.teacher
    if teacher.ema_decay is None:
        return None
    fixed = {
        f"teacher.placement={teacher.placement}": teacher.placement != "learner",
        f"learner.ranks={settings.learner.ranks}": settings.learner.ranks > 1,
        f"teacher.dtype={teacher.dtype}": teacher.dtype in ("bfloat16", "float16"),
        "cache.path": settings.cache.path is not None,
        "positions.policy=bandit": settings.positions.policy == "bandit",  # its probe keeps the teacher's hidden states
    }
    for name, chosen in fixed.items():
        if chosen:
            return (
                f"teacher.ema_decay={teacher.ema_decay}: the learner moves the teacher's float32 weights in each step; "
                f"accepted with teacher.placement=learner, learner.ranks=1, no cache and no bandit, not {name}"
            )
    return None


def _vllm_teacher(settings: Settings) -> str | None:
    """Refuse a vLLM teacher whose engine would share a process or a GPU."""
    teacher, cluster = settings.teacher, settings.cluster
    if teacher.engine != "vllm":
        return None
    if teacher.placement != "actor":
        return "teacher.engine=vllm: runs in its actor; accepted with teacher.placement=actor only"
    if cluster.topology == "colocated":
        return "teacher.engine=vllm: keeps the memory of its GPUs; accepted with cluster.topology=split only"
    if cluster.teacher_gpus not in (None, 0, teacher.tensor_parallel):
        return (
            f"cluster.teacher_gpus={cluster.teacher_gpus:g}: with teacher.engine=vllm an actor takes "
            f"teacher.tensor_parallel={teacher.tensor_parallel} GPUs; leave it empty"
        )
    return None


def _teachers(settings: Settings) -> str | None:
    """Apply the rules for one teacher to each of ``teachers``, and refuse settings that need a single teacher."""
    if not settings.teachers:
        return _unnamed_teachers(settings)
    for key, field in walk(type(settings.teacher), "teacher."):
        if (value := value_of(settings, key)) != field.default:
            return f"{key}={value}: with teachers each has its own settings; move it there"
    for name, teacher in settings.teachers.items():
        if "model" not in teacher.model_fields_set:  # otherwise a mistyped name would load the default model
            return f"teachers.{name}.model: missing; accepted: the model of each of several teachers"
        single = {
            "placement=learner": teacher.placement == "learner",
            "prompt": teacher.prompt is not None,
        }
        for key, chosen in single.items():
            if chosen:
                return f"teachers.{name}.{key}: accepted for a single teacher only (teacher.*); leave it out"
        for rule in (_unused, _token_budgets, _moving_teacher, _vllm_teacher):
            if message := rule(settings.of_teacher(name)):
                return f"teachers.{name}: {message}"
    return _single_teacher(settings) or _named_teachers(settings)


def _unnamed_teachers(settings: Settings) -> str | None:
    """Refuse a data source whose rows name a teacher if there are no ``teachers``."""
    for number, source in enumerate(settings.data.sources):
        for key in ("teacher", "teacher_column"):
            if (value := getattr(source, key)) is not None:
                where = f"data.mix[{number}].{key}" if settings.data.mix else f"data.{key}"
                return f"{where}={value}: accepted with teachers only, which gives the settings of each by its name"
    return None


def _named_teachers(settings: Settings) -> str | None:
    """Refuse a data source whose rows cannot name one of ``teachers``."""
    accepted = ", ".join(settings.teachers)
    for number, source in enumerate(settings.data.sources):
        where = f"data.mix[{number}].teacher" if settings.data.mix else "data.teacher"
        if (source.teacher is None) == (source.teacher_column is None):
            return f"{where}: with teachers needs that ({accepted}) or teacher_column, one of them"
        if source.teacher is not None and source.teacher not in settings.teachers:
            return f"{where}={source.teacher}: there is no such teacher; accepted: {accepted}"
    return None


def _single_teacher(settings: Settings) -> str | None:
    """Refuse settings that need a single teacher if there are ``teachers``."""
    if len(sizes := {t.tensor_parallel for t in settings.teachers.values() if t.engine == "vllm"}) > 1:
        return f"teachers: vLLM engines of different tensor_parallel ({sorted(sizes)}); accepted: one number for all"
    alignment, samples = settings.alignment, settings.samples
    single = {
        "cache.path": settings.cache.path is not None,
        "eval.teacher=true": settings.eval.teacher,
        "data.source=text": settings.data.source == "text",
        "references.source=teacher": settings.mode != "on_policy" and settings.references.source == "teacher",
        f"samples.metric={samples.metric} with samples.when=prefilter": (
            samples.metric in ("kl", "ce_ratio") and samples.when == "prefilter"
        ),
        "positions.policy=bandit": settings.positions.policy == "bandit",
        "alignment.variant=egad with alignment.feature_weight above 0": (
            alignment.variant == "egad" and alignment.feature_weight > 0
        ),
    }
    for name, chosen in single.items():
        if chosen:
            return f"teachers: {name} needs a single teacher; accepted with teacher.* only"
    return None


def _placement(settings: Settings) -> str | None:
    rollout = settings.rollout
    if rollout.placement == "learner" and (rollout.engine != "transformers" or rollout.actors != 1):
        return (
            "rollout.placement=learner: the learner's process holds one transformers engine; accepted with "
            f"rollout.engine=transformers and rollout.actors=1, not {rollout.engine} and {rollout.actors}"
        )
    return None


def _ranks(settings: Settings) -> str | None:
    alignment, count = settings.alignment, settings.learner.ranks
    if count == 1:
        return None
    single_process = {
        "rollout.placement=learner": settings.rollout.placement == "learner",
        "positions.policy=bandit": settings.positions.policy == "bandit",
        "alignment.variant=at_kd": alignment.variant == "at_kd",
        "learner.optimizer=adamw_8bit": settings.learner.optimizer == "adamw_8bit",
        "alignment.variant=egad with alignment.feature_weight above 0": (
            alignment.variant == "egad" and alignment.feature_weight > 0
        ),
        f"alignment.ema_weight={alignment.ema_weight}": alignment.ema_weight > 0,
    }
    for name, chosen in single_process.items():
        if chosen:
            return f"learner.ranks={count}: {name} needs the whole batch and student in one process; accepted: 1"
    return None


def _streaming(settings: Settings) -> str | None:
    if not settings.pipeline.streaming:
        return None
    in_turns = settings.rollout.placement == "learner" or settings.cluster.topology == "colocated"
    if settings.mode == "off_policy" or in_turns:
        return (
            "pipeline.streaming: engines generate while the learner works; accepted where the student generates, with "
            "rollout.placement=actor and cluster.topology=split"
        )
    if settings.pipeline.max_staleness:
        return (
            "pipeline.streaming: with pipeline.max_staleness=1 rollouts are ready before the step; choose one of them"
        )
    samples, positions = settings.samples, settings.positions
    needs_batch = {
        f"samples.keep={samples.keep:g}": samples.keep < 1.0 and samples.when == "rollout",
        "samples.weight=paced": samples.weight == "paced",
        f"positions.metric={positions.metric}": positions.metric in WHOLE_BATCH,
        "positions.policy=bandit": positions.policy == "bandit",
        "alignment.variant=at_kd": settings.alignment.variant == "at_kd",
    }
    for name, chosen in needs_batch.items():
        if chosen:
            return f"pipeline.streaming: {name} looks at the whole batch before it chooses; accepted: false"
    return None


def _devices(settings: Settings) -> str | None:
    rollout, sync, cluster = settings.rollout, settings.sync.method, settings.cluster
    if rollout.tensor_parallel > 1 and cluster.rollout_gpus not in (None, 0, rollout.tensor_parallel):
        return (
            f"cluster.rollout_gpus={cluster.rollout_gpus:g}: an engine takes rollout.tensor_parallel="
            f"{rollout.tensor_parallel} GPUs; leave it empty"
        )
    if sync in ("broadcast", "ipc") and rollout.engine != "vllm":
        return f"sync.method={sync}: sends to vLLM's workers; accepted with rollout.engine=vllm only"
    return None


def _topology(settings: Settings) -> str | None:
    rollout, ranks = settings.rollout, settings.learner.ranks
    if settings.cluster.topology != "colocated":
        return None
    if settings.sync.method == "broadcast":
        return "sync.method=broadcast: from GPU to GPU; not accepted with cluster.topology=colocated"
    if rollout.placement == "learner" or rollout.tensor_parallel > 1 or settings.pipeline.max_staleness:
        return (
            "cluster.topology=colocated: engines of one GPU that sleep while the learner works; accepted with "
            "rollout.placement=actor, rollout.tensor_parallel=1, pipeline.max_staleness=0"
        )
    for name, count in (("rollout.actors", rollout.actors), ("teacher.actors", settings.teacher.actors)):
        if count > ranks:
            return f"{name}={count}: each shares a GPU with one of learner.ranks={ranks}; accepted: at most that"
    return None


def _staleness(settings: Settings) -> str | None:
    if not settings.pipeline.max_staleness:
        return None
    if settings.mode == "off_policy" or settings.rollout.placement == "learner":
        return (
            "pipeline.max_staleness=1: generates the next step's rollouts during this update; accepted where the "
            "student generates (not mode=off_policy), in separate processes (rollout.placement=actor)"
        )
    if settings.alignment.estimator == "sampled":
        return "pipeline.max_staleness=1: alignment.estimator=sampled is unbiased on-policy alone; accepted: 0"
    return None


def _entropy(settings: Settings) -> str | None:
    if settings.rollout.entropy == "engine" and (settings.mode != "on_policy" or settings.alignment.temperature != 1.0):
        return (
            "rollout.entropy=engine: engines measure their own rollouts at temperature 1; accepted with mode=on_policy "
            "and alignment.temperature=1"
        )
    return None


def _references(settings: Settings) -> str | None:
    if settings.references.source == "file" and settings.references.file is None:
        return "references.file: needed for references.source=file; give a file with one JSON object per line"
    if settings.mode == "off_policy" and settings.rollout.n > 1:
        return f"rollout.n={settings.rollout.n}: off-policy nothing is rolled out in training; accepted: 1"
    return None


def _growing_length(settings: Settings) -> str | None:
    rollout, samples = settings.rollout, settings.samples
    start = rollout.max_tokens_start
    if start is None:
        return None
    if start > rollout.max_tokens:
        return (
            f"rollout.max_tokens_start={start}: the limit grows to rollout.max_tokens={rollout.max_tokens}, not below"
        )
    if settings.judges_rollouts:
        judge = "samples.weight=paced" if samples.weight == "paced" else f"samples.correctness={samples.correctness}"
        return f"rollout.max_tokens_start={start}: {judge} would judge answers that the limit cuts; choose one of them"
    return None


def _samples(settings: Settings) -> str | None:
    samples, n, rollouts = settings.samples, settings.rollout.n, settings.rollouts_per_step
    if samples.weight == "paced" and (n < 2 or rollouts % n):
        return (
            f"samples.weight=paced: a pass rate needs rollout.n of at least 2 that divides the {rollouts} rollouts of "
            f"a step (learner.batch_size / samples.keep), not {n}"
        )
    return None


def _text(settings: Settings) -> str | None:
    if settings.data.source != "text":
        return None
    if settings.mode != "off_policy":
        return f"data.source=text: asks for no response; accepted with mode=off_policy only, not {settings.mode}"
    if settings.references != type(settings.references)():
        return "references.*: packed text is its own reference; not accepted with data.source=text"
    samples, data = settings.samples, settings.data
    unused = {
        "samples.prefilter_text: whole samples are scored": samples.prefilter_text != type(samples)().prefilter_text,
        "data.train_problems: text has tokens, not problems; use data.tokens": data.train_problems is not None,
        "data.shots: text has no answers": data.shots,
        "data.validation_problems: text has none; eval.divergence_prompts holds out samples": data.validation_problems,
    }
    for reason, changed in unused.items():
        if changed:
            return f"{reason}; not accepted with data.source=text"
    return None


def _cache(settings: Settings) -> str | None:
    if settings.cache.path is None:
        return None
    if settings.eval.divergence_prompts:
        return "eval.divergence_prompts: the teacher's outputs on held-out texts are not in a cache; accepted: 0"
    if settings.classes.proposal != 1.0:
        return f"classes.proposal={settings.classes.proposal}: a cache keeps counts of classes alone; accepted: 1"
    asking = _teacher_question(settings)
    if asking and settings.classes.sampler != "none":
        return (
            f"{asking}: needs the teacher's whole distribution, of which a cache with classes.sampler="
            f"{settings.classes.sampler} holds a few classes; accepted with classes.sampler=none, or without cache.path"
        )
    return None


def _teacher_question(settings: Settings) -> str | None:
    """Return a setting that needs the teacher's whole distribution at all positions, if there is one."""
    positions, samples = settings.positions, settings.samples
    if positions.policy == "bandit":
        return "positions.policy=bandit"
    if positions.metric in ASK_TEACHER:
        return f"positions.metric={positions.metric}"
    if positions.weighting == "iw":
        return "positions.weighting=iw"
    if samples.metric in ("kl", "ce_ratio") and samples.when == "rollout":
        return f"samples.metric={samples.metric}"
    return None


def _resume_with(settings: Settings) -> str | None:
    known = {key for key, _ in walk()} | {key.split(".")[0] for key, _ in walk()}
    for name in settings.resume_with:
        if name not in known and not name.startswith("teachers."):
            return f"resume_with={settings.resume_with}: {name!r} is no setting or section; see --help for all"
    return None


def _keep_best(settings: Settings) -> str | None:
    run = settings.run
    if run.keep_best and not run.evaluate_every:
        return "run.keep_best=true: chooses among evaluations in training; set run.evaluate_every, for example to 50"
    if run.keep_best and settings.generates and not settings.data.validation_problems:
        return (
            "run.keep_best=true: evaluations during training would choose the student by the test problems; set "
            "data.validation_problems, for example to 200"
        )
    return None


RULES = (
    _keep_best,
    _unused,
    _data,
    _messages,
    _mix,
    _positions,
    _schedule,
    _token_budgets,
    _alignment,
    _mixture,
    _sampled_tokens,
    _teacher_prompt,
    _moving_teacher,
    _vllm_teacher,
    _teachers,
    _staleness,
    _placement,
    _ranks,
    _streaming,
    _devices,
    _topology,
    _entropy,
    _references,
    _growing_length,
    _samples,
    _text,
    _cache,
    _resume_with,
)
TRL_ONLY = {
    "mode": "on_policy", "positions.policy": "full", "positions.weighting": "uniform", "positions.mask_tokens": [],
    "samples.keep": 1.0, "samples.correctness": "any",
    "samples.truncated": "keep", "samples.weight": "uniform", "classes.sampler": "none", "alignment.variant": "full_kd",
    "alignment.estimator": "exact", "alignment.kd_weight": 1.0, "alignment.ema_weight": 0.0,
    "alignment.reference_weight": 0.0, "alignment.mixture.gate": "none", "alignment.clip": None,
    "rollout.n": 1, "rollout.stop": [], "student.lora_rank": 0, "rollout.max_tokens_start": None,
    "teacher.prompt": None, "teacher.ema_decay": None, "teacher.engine": "transformers", "teachers": {},
    "run.keep_best": False, "pipeline.max_staleness": 0,
}  # fmt: skip


def check_trl(settings: Settings) -> None:
    """Raise ConfigError for the first setting without a counterpart in TRL's DistillationTrainer."""
    for key, accepted in TRL_ONLY.items():
        value = value_of(settings, key)
        if value != accepted:
            raise ConfigError(f"{key}={value}: TRL's DistillationTrainer has no such choice; accepted: {accepted}")
    temperature, sampled_at = settings.alignment.temperature, settings.rollout.temperature
    if temperature != sampled_at:
        raise ConfigError(
            f"alignment.temperature={temperature}: TRL samples and scores at one temperature; accepted: {sampled_at} "
            "(rollout.temperature)"
        )
    if settings.hub.push:
        raise ConfigError(f"hub.push={settings.hub.push}: the student of this baseline is not uploaded; accepted: null")
