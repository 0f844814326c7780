"""Which settings go together.  Every refusal names the setting, the reason, and what is accepted."""

from __future__ import annotations

import functools

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import DRAWING, Settings

LOOK_AT_TARGET = ("student_ce", "teacher_ce", "ce_ratio", "ce_ratio_plus_entropy")  # metrics that know y_t
ASK_TEACHER = (
    *("teacher_entropy", "teacher_ce", "kl", "reverse_kl", "kl_plus_entropy", "ce_ratio", "ce_ratio_plus_entropy"),
    "tip_soft_or",
)  # metrics that the teacher's whole distribution is needed for
WHOLE_BATCH = ("tip_soft_or",)  # metrics scaled by their ranges over the batch
_EGAD = ("alignment.variant", "egad")
_TRUNCATED = ("top_k", "top_k_normalised", "top_p", "ghost_token", "naive_fix", "label_smoothing")
USED_BY = {  # setting: the other setting that decides whether it matters, and the choices under which it does
    "positions.queue": ("positions.policy", "gls"),
    "positions.curriculum_steps": ("positions.policy", "curriculum"),
    "positions.arms": ("positions.policy", "bandit"),
    "positions.bandit_gamma": ("positions.policy", "bandit"),
    "positions.bandit_probe": ("positions.policy", "bandit"),
    "positions.smoothing": ("positions.policy", *DRAWING),
    "positions.skip_first": ("positions.policy", *DRAWING),
    "positions.clip": ("positions.policy", *DRAWING),
    "positions.coverage": ("positions.policy", *DRAWING),
    "data.text_column": ("data.source", "text"),
    "data.sequence_length": ("data.source", "text"),
    "data.tokens": ("data.source", "text"),
    "data.documents": ("data.source", "text"),
    "references.file": ("references.source", "file"),
    "references.samples": ("references.source", "teacher"),
    "references.temperature": ("references.source", "teacher"),
    "classes.draws": ("classes.sampler", "rs_kd"),
    "classes.proposal": ("classes.sampler", "rs_kd"),
    "classes.k": ("classes.sampler", *_TRUNCATED),
    "classes.p": ("classes.sampler", "top_p"),
    "alignment.beta": ("alignment.divergence", "jsd"),
    "alignment.top_k": ("alignment.estimator", "topk_tail"),
    "alignment.target_weight": ("alignment.variant", "decoupled_kd"),
    "alignment.other_weight": ("alignment.variant", "decoupled_kd"),
    "alignment.easy_weight": ("alignment.variant", "at_kd"),
    "alignment.min_temperature": _EGAD,
    "alignment.max_temperature": _EGAD,
    "alignment.feature_weight": _EGAD,
    "alignment.feature_entropy": _EGAD,
}


def check(settings: Settings) -> None:
    """Raises ConfigError for the first combination that is impossible, or would do something else than it says."""
    for problem in PROBLEMS:
        if message := problem(settings):
            raise ConfigError(message)


def _unused(settings: Settings) -> str | None:
    """Settings that were changed but belong to another choice than the one made."""
    for key, (chooser, *choices) in USED_BY.items():
        section, name = key.split(".")
        group = getattr(settings, section)
        made, value = getattr(group, chooser.split(".")[1]), getattr(group, name)
        own = ":" in made  # a policy of the user's own may read any option
        if value != type(group).model_fields[name].default and made not in choices and not own:
            return f"{key}={value}: accepted with {chooser}={' or '.join(choices)} only, not {made}"
    return None


def _room(settings: Settings) -> str | None:
    longest = settings.max_sequence
    sum_of = "data.sequence_length" if settings.data.source == "text" else "data.max_prompt_tokens + rollout.max_tokens"
    if longest > settings.learner.tokens_per_micro_batch:
        return (
            f"learner.tokens_per_micro_batch={settings.learner.tokens_per_micro_batch}: one sample may have "
            f"{sum_of} = {longest} tokens; accepted: at least that"
        )
    if longest > settings.teacher.tokens_per_batch:
        return (
            f"teacher.tokens_per_batch={settings.teacher.tokens_per_batch}: one sample may have {longest} tokens; "
            "accepted: at least that"
        )
    return None


def _alignment(settings: Settings) -> str | None:
    own, sampler, forward = settings.alignment, settings.classes.sampler, "set alignment.divergence=forward_kl"
    if sampler != "none" and own.divergence != "forward_kl":
        return f"classes.sampler={sampler}: targets of a few classes define a forward KL only; {forward}"
    if sampler != "none" and (own.variant != "full_kd" or own.estimator != "exact"):
        return f"classes.sampler={sampler}: accepted with alignment.variant=full_kd and alignment.estimator=exact only"
    if own.variant in ("decoupled_kd", "at_kd") and (own.divergence != "forward_kl" or own.estimator != "exact"):
        return f"alignment.variant={own.variant}: splits the exact forward KL; {forward}, alignment.estimator=exact"
    if own.variant == "egad" and own.temperature != 1.0:
        return "alignment.variant=egad: sets each token's temperature; leave alignment.temperature at 1"
    if own.min_temperature > own.max_temperature:
        return f"alignment.min_temperature={own.min_temperature}: must not exceed max_temperature={own.max_temperature}"
    return None


def _sampled_tokens(settings: Settings) -> str | None:
    """What the single-token estimator needs to be unbiased."""
    own, rollout, positions = settings.alignment, settings.rollout, settings.positions
    if own.estimator != "sampled":
        return None
    if settings.mode != "on_policy" or rollout.temperature != own.temperature or rollout.top_p != 1.0:
        return (
            "alignment.estimator=sampled: unbiased only for tokens drawn from the student as it is trained; "
            "accepted: mode=on_policy, rollout.temperature=alignment.temperature, rollout.top_p=1"
        )
    if own.variant == "egad":
        return "alignment.estimator=sampled: tokens are drawn at one temperature, alignment.variant=egad sets many"
    metrics = positions.arms if positions.policy == "bandit" else [positions.metric]
    looking = [f"positions metric {name}" for name in metrics if name in LOOK_AT_TARGET]
    if settings.samples.correctness != "any":
        looking.append(f"samples.correctness={settings.samples.correctness}")
    if looking:
        return (
            f"alignment.estimator=sampled: {looking[0]} selects by the very tokens that are drawn, which biases what "
            "is estimated from them; accepted: a selection that does not look at them"
        )
    return None


def _placement(settings: Settings) -> str | None:
    own = settings.rollout
    if own.placement == "learner" and (own.engine != "transformers" or own.actors != 1):
        return (
            f"rollout.placement=learner: in the learner's process there is one engine, of transformers; accepted with "
            f"rollout.engine=transformers and rollout.actors=1, not {own.engine} and {own.actors}"
        )
    return None


def _ranks(settings: Settings) -> str | None:
    own, count = settings.alignment, settings.learner.ranks
    if settings.teacher.actors > 1 and settings.teacher.placement == "learner":
        return f"teacher.actors={settings.teacher.actors}: accepted with teacher.placement=actor only"
    if count == 1:
        return None
    alone = {
        "rollout.placement=learner": settings.rollout.placement == "learner",
        "positions.policy=bandit": settings.positions.policy == "bandit",
        "alignment.variant=at_kd": own.variant == "at_kd",
        "alignment.variant=egad with alignment.feature_weight above 0": own.variant == "egad" and own.feature_weight,
        f"alignment.ema_weight={own.ema_weight}": own.ema_weight,
    }
    for name, chosen in alone.items():
        if chosen:
            return f"learner.ranks={count}: {name} needs the whole batch and student in one process; accepted: 1"
    return None


def _streaming(settings: Settings) -> str | None:
    own = settings
    if not own.pipeline.streaming:
        return None
    if own.mode == "off_policy" or own.rollout.placement == "learner" or own.cluster.topology == "colocated":
        return (
            "pipeline.streaming: engines go on while the learner works; accepted where the student generates, with "
            "rollout.placement=actor and cluster.topology=split"
        )
    if own.pipeline.max_staleness:
        return (
            "pipeline.streaming: with pipeline.max_staleness=1 rollouts are ready before the step; choose one of them"
        )
    ranked = own.samples.keep < 1.0 and own.samples.when == "rollout"
    whole = {
        f"samples.keep={own.samples.keep:g}": ranked,
        "samples.weight=paced": own.samples.weight == "paced",
        f"positions.metric={own.positions.metric}": own.positions.metric in WHOLE_BATCH,
        "positions.policy=bandit": own.positions.policy == "bandit",
        "alignment.variant=at_kd": own.alignment.variant == "at_kd",
    }
    for name, chosen in whole.items():
        if chosen:
            return f"pipeline.streaming: {name} looks at the whole batch before it chooses; accepted: false"
    return None


def _lora(settings: Settings) -> str | None:
    own = settings.student
    if not own.lora_rank and own.lora_alpha != type(own)().lora_alpha:
        return f"student.lora_alpha={own.lora_alpha}: accepted with student.lora_rank above 0 only"
    return None


def _devices(settings: Settings) -> str | None:
    rollout, sync, own = settings.rollout, settings.sync.method, settings.cluster
    if rollout.engine != "vllm" and rollout.tensor_parallel > 1:
        return f"rollout.tensor_parallel={rollout.tensor_parallel}: accepted with rollout.engine=vllm only"
    if rollout.tensor_parallel > 1 and own.rollout_gpus not in (None, 0, rollout.tensor_parallel):
        return (
            f"cluster.rollout_gpus={own.rollout_gpus:g}: an engine takes rollout.tensor_parallel="
            f"{rollout.tensor_parallel} GPUs; leave it empty"
        )
    if sync in ("broadcast", "ipc") and rollout.engine != "vllm":
        return f"sync.method={sync}: goes to vLLM's workers; accepted with rollout.engine=vllm only"
    if sync == "ipc" and own.topology != "colocated":
        return "sync.method=ipc: in the memory of a GPU that both use; accepted with cluster.topology=colocated only"
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
            "pipeline.max_staleness=1: rollouts of the next step during this update; accepted where the student "
            "generates (not mode=off_policy), in processes of its own (rollout.placement=actor)"
        )
    if settings.alignment.estimator == "sampled":
        return "pipeline.max_staleness=1: alignment.estimator=sampled is unbiased on-policy alone; accepted: 0"
    return None


def _entropy(settings: Settings) -> str | None:
    if settings.rollout.entropy == "engine" and (settings.mode != "on_policy" or settings.alignment.temperature != 1.0):
        return (
            "rollout.entropy=engine: of what the engine samples, at temperature 1; accepted with mode=on_policy and "
            "alignment.temperature=1"
        )
    return None


def _references(settings: Settings) -> str | None:
    references = settings.references
    if settings.mode == "on_policy" and references != type(references)():
        return "references.*: mode=on_policy has none; accepted with mode=off_policy or mixed"
    if references.source == "file" and references.file is None:
        return "references.file: needed for references.source=file; give a file with one JSON object a line"
    if references.source == "teacher" and references.annotations == "strip":
        return "references.annotations=strip: the teacher's tokens are kept as it wrote them; accepted: keep"
    if settings.mode == "off_policy" and settings.rollout.n > 1:
        return f"rollout.n={settings.rollout.n}: off-policy nothing is rolled out in training; accepted: 1"
    if settings.mode != "mixed" and settings.rollout.share != type(settings.rollout)().share:
        return f"rollout.share={settings.rollout.share}: accepted with mode=mixed only, not {settings.mode}"
    return None


def _samples(settings: Settings) -> str | None:
    own, n, rollouts = settings.samples, settings.rollout.n, settings.rollouts_per_step
    if settings.mode != "on_policy" and settings.judges_rollouts:
        name = "weight=paced" if own.weight == "paced" else f"correctness={own.correctness}"
        return f"samples.{name}: only the student's own rollouts are right or wrong; needs mode=on_policy"
    if own.weight == "paced" and (n < 2 or rollouts % n):
        return (
            f"samples.weight=paced: a pass rate needs rollout.n of at least 2 that divides the {rollouts} rollouts of "
            f"a step (learner.batch_size / samples.keep), not {n}"
        )
    if own.keep == 1.0 and (own.when == "prefilter" or own.metric != "student_entropy"):
        return "samples.keep=1.0: nothing is dropped, so samples.when and samples.metric do nothing; accepted: below 1"
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
        "data.validation_problems: text has none; eval.divergence_prompts holds out samples": data.validation_problems,
    }
    for reason, changed in unused.items():
        if changed:
            return f"{reason}; not accepted with data.source=text"
    return None


def _cache(settings: Settings) -> str | None:
    if settings.cache.path is None:
        return None
    if settings.mode != "off_policy":
        return f"cache.path: holds texts known beforehand; accepted with mode=off_policy only, not {settings.mode}"
    if settings.eval.divergence_prompts:
        return "eval.divergence_prompts: the teacher's outputs on held-out texts are not in a cache; accepted: 0"
    if settings.classes.proposal != 1.0:
        return f"classes.proposal={settings.classes.proposal}: a cache keeps counts of classes alone; accepted: 1"
    asking = _asks_teacher(settings)
    if asking and settings.classes.sampler != "none":
        return (
            f"{asking}: needs the teacher's whole distribution, of which a cache with classes.sampler="
            f"{settings.classes.sampler} holds a few classes; accepted with classes.sampler=none, or without cache.path"
        )
    return None


def _asks_teacher(settings: Settings) -> str | None:
    """A setting under which the teacher's whole distribution is asked for at every position, if there is one."""
    positions, samples = settings.positions, settings.samples
    if positions.policy == "bandit":
        return "positions.policy=bandit"
    if positions.metric in ASK_TEACHER:
        return f"positions.metric={positions.metric}"
    if samples.metric in ("kl", "ce_ratio") and samples.when == "rollout":
        return f"samples.metric={samples.metric}"
    return None


PROBLEMS = (
    _unused,
    _room,
    _alignment,
    _sampled_tokens,
    _staleness,
    _placement,
    _ranks,
    _streaming,
    _lora,
    _devices,
    _topology,
    _entropy,
    _references,
    _samples,
    _text,
    _cache,
)
TRL_ONLY = {
    "mode": "on_policy", "positions.policy": "full", "samples.keep": 1.0, "samples.correctness": "any",
    "samples.truncated": "keep", "samples.weight": "uniform", "classes.sampler": "none", "alignment.variant": "full_kd",
    "alignment.estimator": "exact", "alignment.kd_weight": 1.0, "alignment.ema_weight": 0.0, "rollout.n": 1,
    "student.lora_rank": 0,
}  # fmt: skip


def check_trl(settings: Settings) -> None:
    """Raises ConfigError for the first setting of which TRL's DistillationTrainer has no counterpart."""
    for key, accepted in TRL_ONLY.items():
        value = functools.reduce(getattr, key.split("."), settings)
        if value != accepted:
            raise ConfigError(f"{key}={value}: TRL's DistillationTrainer has no such choice; accepted: {accepted}")
    own, sampled = settings.alignment.temperature, settings.rollout.temperature
    if own != sampled:
        raise ConfigError(
            f"alignment.temperature={own}: TRL samples and scores at one temperature; accepted: {sampled} "
            "(rollout.temperature)"
        )
