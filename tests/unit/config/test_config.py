import math

import pytest
import yaml
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.config import validation
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.loading import build_settings, describe, dump, fields_by_key, load_settings, resolve, walk
from onpolicy_skd.config.schema import Settings, rules_of
from onpolicy_skd.selection import metrics

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "compare" not in p.name)


@pytest.mark.parametrize(
    ("argv", "needles"),
    [
        (["learner.lrr=1"], ["unknown setting 'learner.lrr'", "did you mean 'learner.lr'"]),
        (["lr=1"], ["unknown setting 'lr'", "learner.lr"]),
        (["positions.k=0"], ["positions.k=0", "accepted: above 0, at most 1"]),
        (["positions.k=1.5"], ["positions.k=1.5", "less than or equal to 1"]),
        (["learner.lr=fast"], ["learner.lr='fast'", "valid number"]),
        (["rollout.engine=tgi"], ["rollout.engine='tgi'", "'vllm' or 'transformers'"]),
        (["data.source=hub"], ["data.name"]),
        (["data.source=jsonl"], ["data.train_file"]),
        (["data.template=plain", "data.plain=no placeholder"], ["data.plain", "{question}"]),
        (["rollout.max_tokens=9000"], ["learner.tokens_per_micro_batch=8192", "9512"]),
        (["learner.lr=yes"], ["learner.lr=True", "truth value", "accepted: above 0"]),
        (["run.epochs=.inf"], ["run.epochs=inf", "finite"]),
        (["data.plain={question}"], ["data.plain={question}", "data.template=plain only, not chat"]),
        (["data.template=plain", "data.system=Hi"], ["data.system=Hi", "data.template=chat only, not plain"]),
        (["data.name=openai/gsm8k"], ["data.name=openai/gsm8k", "data.source=hub or text only, not gsm8k"]),
        (["data.eval_file=a.jsonl"], ["data.eval_file=a.jsonl", "data.source=jsonl only, not gsm8k"]),
        (["positions.schedule_steps=9"], ["positions.schedule_steps=9", "positions.k_start"]),
        (["alignment.ema_decay=0.5"], ["alignment.ema_decay=0.5", "alignment.ema_weight above 0 only, not 0.0"]),
        (["learner.schedule=constant", "learner.min_lr_ratio=0.5"], ["min_lr_ratio=0.5", "linear or cosine only"]),
        (["samples.prefilter_text=prompt"], ["samples.prefilter_text=prompt", "samples.when=prefilter only"]),
        (["resume_with=[learner.lr]"], ["resume_with=['learner.lr']", "resume=auto only, not never"]),
        (["resume=auto", "resume_with=[learner.rate]"], ["'learner.rate' is no setting or section"]),
        (["data.source=demo", "data.path=x"], ["data.path=x: accepted with data.source=gsm8k only, not demo"]),
        (
            ["positions.metric=entropy"],
            ["positions.metric='entropy'", "did you mean 'teacher_entropy'", "module:function"],
        ),
        (["positions.metric=prefix", "positions.policy=sampled"], ["positions.policy=sampled", "negative"]),
        (["positions.metric=prefix", "positions.policy=gls"], ["positions.metric=prefix", "fixed length"]),
        (["positions.metric=tip_soft_or", "positions.policy=gls"], ["tip_soft_or", "earlier batches"]),
        (["positions.policy=bandit", "positions.arms=[kl]"], ["positions.arms=['kl']", "two or more"]),
        (["positions.policy=bandit", "positions.arms=[kl, kl]"], ["positions.arms", "two or more different"]),
        (["positions.arms=[kl, entropy]"], ["positions.arms.1='entropy'", "'student_entropy'"]),
        (["positions.policy=full", "positions.k_start=0.1"], ["positions.k_start=0.1", "takes every position"]),
        (["positions.k_start=0.5"], ["positions.k_start=0.5", "positions.k=0.2 is less"]),
        (["positions.clip=1.0"], ["positions.clip", "sampled or sampled_unbiased only, not top_k"]),
        (["classes.draws=5"], ["classes.draws=5", "classes.sampler=rs_kd only, not none"]),
        (["alignment.ema_weight=0.5", "alignment.beta=0.1"], ["alignment.beta=0.1", "jsd only, not reverse_kl"]),
        (["positions.policy=bandit", "positions.metric=kl"], ["positions.metric=kl", "positions.arms"]),
        (["alignment.estimator=sampled", "positions.metric=student_ce"], ["student_ce", "biases"]),
        (["alignment.estimator=sampled", "samples.correctness=right"], ["samples.correctness=right", "biases"]),
        (["alignment.estimator=sampled", "positions.policy=bandit", "positions.arms=[kl, ce_ratio]"], ["ce_ratio"]),
        (["alignment.estimator=sampled", "positions.weighting=iw"], ["positions.weighting=iw", "biases"]),
        (["positions.weighting_gamma=2"], ["positions.weighting_gamma=2.0", "positions.weighting=iw or ramp only"]),
        (["positions.weighting=rampp"], ["positions.weighting", "did you mean 'ramp'", "module:function"]),
        (["positions.mask_tokens=[eos]"], ["positions.mask_tokens"]),
        (["positions.top_classes=1"], ["positions.top_classes=1", "at least 2"]),
        (["positions.metric=ta_opd", "positions.policy=gls"], ["positions.metric=ta_opd", "accepted: top_k"]),
        (
            ["alignment.mixture.gate=eopd", "alignment.estimator=topk_tail"],
            ["mixture.gate=eopd", "estimator=exact"],
        ),
        (["alignment.mixture.gate=a:b", "alignment.variant=egad"], ["mixture.gate=a:b", "variant=full_kd"]),
        (
            ["alignment.clip=2", "mode=off_policy", "classes.sampler=rs_kd"],
            ["alignment.clip=2.0", "sampler=none"],
        ),
        (["alignment.clip_mode=scale"], ["alignment.clip_mode=scale", "alignment.clip only, not None"]),
        (["alignment.mixture.skew=0.1"], ["alignment.mixture.skew=0.1", "gate=constant or eopd or zones only"]),
        (["alignment.mixture.gate=zones", "alignment.mixture.steps=5"], ["mixture.steps=5", "mixture.start only"]),
        (["alignment.mixture.gate=zones", "alignment.mixture.both_sure=[1]"], ["both_sure"]),
        (
            ["alignment.mixture.gate=zones", "alignment.mixture.start=[1, -1]"],
            ["mixture.start", "greater than"],
        ),
        (["samples.weight=paced", "rollout.n=3"], ["samples.weight=paced", "divides the 16 rollouts", "not 3"]),
        (["samples.metric=kl"], ["samples.metric=kl", "samples.keep below 1 only, not 1.0"]),
        (["samples.when=prefilter"], ["samples.when=prefilter", "samples.keep below 1 only, not 1.0"]),
        (["mode=off_policy", "rollout.n=4"], ["rollout.n=4", "nothing is rolled out"]),
        (["classes.sampler=rs_kd"], ["classes.sampler=rs_kd", "alignment.divergence=forward_kl"]),
        (["mode=off_policy", "classes.sampler=top_k", "alignment.variant=egad"], ["classes.sampler=top_k", "full_kd"]),
        (["alignment.variant=at_kd"], ["alignment.variant=at_kd", "alignment.divergence=forward_kl"]),
        (["alignment.variant=egad", "alignment.temperature=2"], ["egad", "alignment.temperature"]),
        (["alignment.variant=egad", "alignment.estimator=sampled"], ["alignment.estimator=sampled", "egad"]),
        (["alignment.variant=egad", "alignment.min_temperature=3"], ["alignment.min_temperature=3", "max_temperature"]),
        (
            ["alignment.estimator=sampled", "rollout.temperature=0.7"],
            ["alignment.estimator=sampled", "rollout.temperature"],
        ),
        (["alignment.estimator=sampled", "mode=off_policy"], ["alignment.estimator=sampled", "mode=on_policy"]),
        (["samples.weight=paced"], ["samples.weight=paced", "rollout.n"]),
        (["samples.correctness=wrong", "mode=off_policy"], ["samples.correctness=wrong", "mode=on_policy"]),
        (
            ["references.annotations=strip"],
            ["references.annotations=strip", "mode=off_policy or mixed only, not on_policy"],
        ),
        (["mode=off_policy", "references.source=file"], ["references.file: needed"]),
        (["mode=off_policy", "references.samples=3"], ["references.samples=3", "teacher or student only, not answers"]),
        (["mode=off_policy", "references.source=teacher", "references.annotations=strip"], ["annotations=strip"]),
        (["mode=off_policy", "rollout.share=0.3"], ["rollout.share=0.3", "mode=mixed only"]),
        (["learner.ranks=2", "positions.policy=bandit"], ["learner.ranks=2", "positions.policy=bandit", "accepted: 1"]),
        (["teacher.tensor_parallel=2"], ["teacher.tensor_parallel=2", "teacher.engine=vllm only, not transformers"]),
        (["teacher.quantization=fp8"], ["teacher.quantization=fp8", "teacher.engine=vllm only, not transformers"]),
        (["teacher.engine=vllm", "teacher.quantization=awq"], ["teacher.quantization", "fp8_per_block"]),
        (["teacher.engine=vllm", "teacher.placement=learner"], ["teacher.engine=vllm", "placement=actor only"]),
        (["teacher.engine=vllm", "cluster.topology=colocated"], ["teacher.engine=vllm", "topology=split only"]),
        (["teacher.engine=vllm", "cluster.teacher_gpus=0.5"], ["teacher_gpus=0.5", "leave it empty"]),
        (["student.lora_alpha=8"], ["student.lora_alpha=8", "lora_rank above 0"]),
        (["pipeline.streaming=true", "pipeline.max_staleness=1"], ["pipeline.streaming", "choose one"]),
        (["pipeline.streaming=true", "samples.keep=0.5"], ["pipeline.streaming", "samples.keep=0.5", "whole batch"]),
        (["pipeline.streaming=true", "positions.metric=tip_soft_or"], ["pipeline.streaming", "tip_soft_or"]),
        (["pipeline.streaming=true", "cluster.topology=colocated"], ["pipeline.streaming", "topology=split"]),
        (["sync.method=ipc", "rollout.engine=transformers"], ["sync.method=ipc", "engine=vllm"]),
        (["sync.method=broadcast", "rollout.engine=transformers"], ["sync.method=broadcast", "engine=vllm"]),
        (["rollout.tensor_parallel=2", "rollout.engine=transformers"], ["tensor_parallel=2", "engine=vllm"]),
        (["rollout.tensor_parallel=2", "cluster.rollout_gpus=1"], ["rollout_gpus=1", "leave it empty"]),
        (["cluster.topology=colocated", "sync.method=broadcast"], ["sync.method=broadcast", "colocated"]),
        (["cluster.topology=colocated", "pipeline.max_staleness=1"], ["colocated", "max_staleness=0"]),
        (["cluster.topology=colocated", "rollout.actors=2"], ["rollout.actors=2", "learner.ranks=1"]),
        (["teacher.actors=2", "teacher.placement=learner"], ["teacher.actors=2", "teacher.placement=actor"]),
        (["rollout.placement=learner"], ["rollout.placement=learner", "engine=transformers", "not vllm"]),
        (["pipeline.max_staleness=2"], ["pipeline.max_staleness=2", "less than or equal to 1"]),
        (["pipeline.max_staleness=1", "mode=off_policy"], ["pipeline.max_staleness=1", "not mode=off_policy"]),
        (
            ["pipeline.max_staleness=1", "rollout.placement=learner", "rollout.engine=transformers"],
            ["pipeline.max_staleness=1", "rollout.placement=actor"],
        ),
        (["pipeline.max_staleness=1", "alignment.estimator=sampled"], ["unbiased on-policy alone"]),
        (["rollout.entropy=engine", "mode=off_policy"], ["rollout.entropy=engine", "mode=on_policy"]),
        (["rollout.entropy=engine", "alignment.temperature=2"], ["rollout.entropy=engine", "alignment.temperature=1"]),
        (["mode=mixed", "samples.correctness=wrong"], ["samples.correctness=wrong", "mode=on_policy"]),
        (["teacher.prompt=Think."], ["teacher.prompt: must contain {question}"]),
        (["teacher.max_prompt_tokens=9"], ["teacher.max_prompt_tokens=9", "teacher.prompt only, not None"]),
        (
            ["teacher.prompt={answer}", "data.source=hub", "data.name=x", "data.messages_column=messages"],
            ["teacher.prompt", "data.messages_column"],
        ),
        (["teacher.prompt={answer}", "mode=off_policy", "references.supervise=all"], ["references.supervise=all"]),
        (["teacher.prompt={answer}", "mode=off_policy", "references.source=teacher"], ["choose one"]),
        (
            [
                "teacher.prompt={answer}",
                "samples.keep=0.5",
                "samples.when=prefilter",
                "samples.prefilter_text=prompt",
                "samples.metric=kl",
            ],
            ["teacher.prompt: samples.metric=kl with samples.prefilter_text=prompt"],
        ),
        (["teacher.ema_decay=0.9"], ["teacher.ema_decay=0.9", "teacher.model=student only, not Qwen/Qwen3-8B"]),
        (["teacher.ema_decay=0.9", "teacher.model=student"], ["ema_decay=0.9", "not teacher.placement=actor"]),
        (
            ["teacher.ema_decay=0.9", "teacher.model=student", "teacher.placement=learner", "learner.ranks=2"],
            ["accepted with teacher.placement=learner, learner.ranks=1, no cache and no bandit, not learner.ranks=2"],
        ),
        (
            ["teacher.ema_decay=0.9", "teacher.model=student", "teacher.placement=learner", "positions.policy=bandit"],
            ["no bandit, not positions.policy=bandit"],
        ),
        (["rollout.max_tokens_start=600"], ["rollout.max_tokens_start=600", "rollout.max_tokens=512"]),
        (["rollout.max_tokens_steps=9"], ["rollout.max_tokens_steps=9", "rollout.max_tokens_start only"]),
        (["rollout.max_tokens_start=9", "mode=off_policy"], ["max_tokens_start=9", "mode=on_policy or mixed only"]),
        (["rollout.max_tokens_start=9", "samples.correctness=right"], ["samples.correctness=right would judge"]),
        (["rollout.max_tokens_start=9", "samples.weight=paced", "rollout.n=2"], ["samples.weight=paced would judge"]),
        (["learner.lr"], ["section.name=value"]),
        (["learner.lr=[1"], ["not YAML"]),
    ],
)
def test_bad_settings_are_refused_with_their_name(argv, needles):
    with pytest.raises(ConfigError) as error:
        load_settings(argv)
    for needle in needles:
        assert needle in str(error.value)


@pytest.mark.parametrize(
    ("text", "needle"), [("- a\n- b\n", "mapping"), ("a: [", "not YAML"), ("extends: gone.yaml\n", "cannot be read")]
)
def test_bad_files_are_refused(tmp_path, text, needle):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=needle):
        load_settings(["--config", str(file)])


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("run: {seed: 1}\ndata: {}\nrun: {steps: 3}\n", r"line 3: 'run' is there twice, the first time in line 1"),
        ("run:\n  steps: 1\n  seed: 2\n  'steps': 3\n", "line 4: 'steps' is there twice, the first time in line 2"),
        ("run: {steps: 0100}", "YAML reads 0100 as the number 64; write 64, or quote"),
        ("run: {steps: -0100}", "YAML reads -0100 as the number -64"),
        ("run: {steps: 10:00}", "YAML reads 10:00 as the number 600"),
        ("run: {max_hours: 1:30.5}", r"YAML reads 1:30\.5 as the number 90\.5"),
        ("run: {steps: 1_}", "YAML reads 1_ as the number 1"),
        ("learner: {lr: 010}", "YAML reads 010 as the number 8"),
        ("data: {instruction: a: b}", r"not YAML.*quote text that holds ': ' or ' #'"),
        (
            "data:\n  instruction: End with #### ANSWER\n",
            r"line 2: data.instruction: a comment starts at '#### ANSWER'",
        ),
        ("data:\n  system: #### ANSWER\n", r"line 2: data.system: a comment starts at '#### ANSWER'"),
        (
            "data:\n  mix:\n  - {source: demo}\n  - source: demo\n    instruction: Think # hard\n",
            r"line 5: data.mix.1.instruction: a comment starts at '# hard'",
        ),
        ("teacher:\n  prompt: Answer {answer} # hint\n", r"line 2: teacher.prompt: a comment starts at '# hint'"),
        ("run: {name: 2024-01-01}", r"run.name=.*quote what YAML reads as a number or date"),
        ("run: {name: no}", "run.name=False: a truth value"),
        ('data: {instruction: "\\0"}', "data.instruction=.*not text"),
        ('data: {instruction: "\\ud800"}', "data.instruction=.*not text"),
    ],
)
def test_yaml_that_reads_otherwise_than_it_looks_is_refused(tmp_path, text, needle):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=needle):
        build_settings(file)


def test_yaml_that_looks_alike_is_accepted(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "\ufeff# comment\nrun: {steps: 1_000, name: '0100'}  # comment\nlearner: {lr: 1e-3, clip: 0.5}\n"
        "data:\n  instruction: 'End with #### ANSWER'  # comment\n  system: |\n    a: b #c\n"
        "student: {model: a}  # comment\n"
    )
    settings = build_settings(file)
    assert (settings.run.steps, settings.run.name, settings.learner.clip) == (1000, "0100", 0.5)
    assert (settings.data.instruction, settings.data.system) == ("End with #### ANSWER", "a: b #c\n")


@pytest.mark.parametrize("value", ["0100", "10:00", "0o1_", "1__0"])
def test_odd_numbers_are_refused_on_the_command_line(value):
    with pytest.raises(ConfigError, match=r"run\.steps"):
        load_settings([f"run.steps={value}"])


@pytest.mark.parametrize(
    "value", ["Put it after #### and nothing else", "\n Answer: number", "[a", "0100", "no", "{x}", "- a", "'a'", " "]
)
def test_text_on_the_command_line_is_taken_as_given(value):
    settings = load_settings([f"data.instruction={value}", f"data.system={value}", "run.dir=0100"])
    assert settings.data.instruction == settings.data.system == value
    assert str(settings.run.dir) == "0100"
    assert resolve(yaml.safe_load(dump(settings))) == settings


def test_an_optional_text_may_be_left_empty():
    assert load_settings(["data.system=", "data.path=null"]).data == Settings().data


@pytest.mark.parametrize(
    "name", ["../../escape", "a/b", ".", "..", ".hidden", "~", "", " ", "a\nb", "a\\b", "x" * 201, "/tmp/x", "-x"]
)
def test_a_run_has_a_plain_name(name):
    with pytest.raises(ConfigError, match=r"run\.name=.*plain name"):
        resolve({"run": {"name": name}})


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    settings = load_settings(["run.dir=~/runs", "data.path=~/gsm8k", "student.model=~/m", "teacher.model=a/~b"])
    assert (str(settings.run.dir), str(settings.data.path)) == ("/home/ann/runs", "/home/ann/gsm8k")
    assert (settings.student.model, settings.teacher.model) == ("/home/ann/m", "a/~b")
    with pytest.raises(ConfigError, match=r"run\.dir='~nobody-of-this-name/x'.*home directory that does not exist"):
        load_settings(["run.dir=~nobody-of-this-name/x"])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize("text", [BOMB + "run: *a11\n", BOMB.replace("[", "{<<: [").replace("]", "]}"), BOMB])
def test_aliases_cannot_blow_up_a_config(tmp_path, text):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"expand to more than 10000 values|not YAML") as error:
        build_settings(tmp_path / "bomb.yaml")
    assert len(str(error.value)) < 1000


def test_errors_do_not_print_whole_inputs(tmp_path):
    (tmp_path / "c.yaml").write_text(f"run: [{', '.join(['long'] * 5000)}]\n" + f"{'k' * 5000}: 1\n")
    with pytest.raises(ConfigError) as error:
        build_settings(tmp_path / "c.yaml")
    assert len(str(error.value)) < 1000
    with pytest.raises(ConfigError, match="and 4980 more") as error:
        resolve({"positions": {"arms": ["nonsense"] * 5000}})
    assert len(str(error.value)) < 20_000


def test_override_beats_file_beats_parent_beats_default(tmp_path):
    (tmp_path / "base.yaml").write_text("learner: {lr: 1e-3, clip: 2.0}\nrun: {seed: 1}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nlearner: {clip: 3.0}\n")
    settings = load_settings(["--config", str(tmp_path / "child.yaml"), "run.seed=7"])
    assert (settings.learner.lr, settings.learner.clip, settings.run.seed) == (1e-3, 3.0, 7)
    assert settings.learner.beta1 == Settings().learner.beta1


def test_metrics_that_look_at_the_whole_batch_are_the_same_in_both_places():
    """Settings are checked where torch is not imported."""
    assert set(validation.WHOLE_BATCH) == {name for name, metric in metrics.METRICS.items() if metric in metrics.RANGES}


def test_settings_that_trls_trainer_would_ignore_are_refused():
    same = ["positions.policy=full", "samples.truncated=keep", "data.validation_problems=5", "run.evaluate_every=1"]
    validation.check_trl(load_settings(same))
    for changed in ("run.keep_best=true", "pipeline.max_staleness=1"):
        with pytest.raises(ConfigError, match=rf"(?i){changed}: TRL's DistillationTrainer has no such choice"):
            validation.check_trl(load_settings([*same, changed]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_bundled_config_resolves_and_survives_a_round_trip(path):
    settings = load_settings(["--config", str(path)])
    assert resolve(yaml.safe_load(dump(settings))) == settings


PAPER = sorted((CONFIGS[0].parent / "paper").rglob("table*/*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_rows_of_the_paper_differ_in_their_method_alone(path):
    shared = "base.yaml" if path.parent.name == "table5" else "general.yaml"
    settings, base = (load_settings(["--config", str(p)]) for p in (path, path.parents[1] / shared))
    assert settings.run.name == f"{path.parent.name}_{path.stem}"
    assert settings.mode == ("on_policy" if path.stem.startswith("on_") else "off_policy")
    assert settings.alignment.divergence == ("reverse_kl" if settings.mode == "on_policy" else "forward_kl")
    for section in ("data", "student", "teacher", "rollout", "learner", "sync", "eval", "cluster"):
        assert getattr(settings, section) == getattr(base, section)
    assert settings.run.model_copy(update={"name": base.run.name}) == base.run


def test_every_row_of_the_published_tables_is_there():
    count = {table: sum(p.parent.name == table for p in PAPER) for table in {p.parent.name for p in PAPER}}
    assert count == {"table2": 12, "table3": 5, "table4": 10, "table5": 15, "table7": 3}
    methods = [load_settings(["--config", str(p)]).model_dump(exclude={"run"}) for p in PAPER if "table5" in str(p)]
    assert all(a != b for i, a in enumerate(methods) for b in methods[:i])


def test_off_policy_means_forward_kl_unless_something_else_is_asked_for():
    assert resolve({}).alignment.divergence == "reverse_kl"
    assert resolve({"mode": "off_policy"}).alignment.divergence == "forward_kl"
    asked = resolve({"mode": "off_policy", "alignment": {"divergence": "reverse_kl"}})
    assert asked.alignment.divergence == "reverse_kl"


def test_only_a_run_that_generates_needs_engines():
    offline = {"mode": "off_policy", "references": {"source": "student"}}
    no_evaluation = {"before": False, "after": False}
    assert resolve({}).needs_engines
    assert resolve(offline).needs_engines
    assert not resolve(offline | {"eval": no_evaluation}).needs_engines
    assert resolve({"mode": "mixed", "eval": no_evaluation}).needs_engines
    assert resolve(offline | {"eval": no_evaluation, "run": {"evaluate_every": 5}}).needs_engines
    prefilter = {"keep": 0.5, "when": "prefilter", "prefilter_text": "rollout"}
    assert resolve(offline | {"eval": no_evaluation, "samples": prefilter}).needs_engines
    assert resolve(offline).alignment.divergence == "reverse_kl"
    assert resolve({"mode": "off_policy", "references": {"source": "teacher"}}).alignment.divergence == "forward_kl"


def test_a_student_that_teaches_itself_is_evaluated_once():
    settings = resolve({"teacher": {"model": "student"}})
    assert settings.teacher_model is settings.student
    assert not settings.eval.teacher
    assert resolve({"teacher": {"model": "student"}, "eval": {"teacher": True}}).eval.teacher
    assert not resolve({"teacher": {"engine": "vllm"}}).eval.teacher
    assert resolve({}).teacher_model.model == "Qwen/Qwen3-8B"


def test_help_names_every_setting_and_every_setting_has_a_meaning(capsys):
    text = describe()
    for key, field in walk():
        assert f"  {key}=" in text
        assert field.description, key
        for other, condition in rules_of(field)["only_with"].items():
            assert other in fields_by_key()
            assert f"only with {other}{condition}" in text or f", {other}{condition}" in text
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    assert stop.value.code == 0
    assert "positions.k=0.2" in capsys.readouterr().out


@given(st.integers(1, 64), st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 1.0]), st.integers(1, 4))
def test_enough_rollouts_are_made_for_the_share_that_is_kept(batch, keep, n):
    settings = resolve({"learner": {"batch_size": batch}, "samples": {"keep": keep}, "rollout": {"n": n}})
    assert settings.rollouts_per_step * keep >= batch - 1e-6
    assert (settings.rollouts_per_step - 1) * keep < batch
    assert settings.prompts_per_step * n >= settings.rollouts_per_step
    if keep < 1.0:
        once = resolve({"learner": {"batch_size": batch}, "samples": {"keep": keep, "when": "prefilter"}})
        assert once.rollouts_per_step == batch


@given(
    st.integers(1, 40), st.floats(0.05, 0.95), st.integers(1, 4), st.sampled_from(["on_policy", "off_policy", "mixed"])
)
def test_a_step_has_its_trajectories_whatever_their_source(batch, share, n, mode):
    tree = {"mode": mode, "learner": {"batch_size": batch}, "rollout": {"n": 1 if mode == "off_policy" else n}}
    if mode == "mixed":
        tree["rollout"]["share"] = share
    settings = resolve(tree)
    rollouts = settings.student_rollouts_per_step
    assert rollouts == {"on_policy": batch, "off_policy": 0, "mixed": math.ceil(round(share * batch, 9))}[mode]
    assert settings.prompts_per_step == math.ceil(rollouts / settings.rollout.n) + batch - rollouts


def test_config_imports_without_torch_ray_or_vllm():
    import subprocess
    import sys

    code = "import onpolicy_skd.config.loading, sys; print([m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("extends: loop.yaml", "extends goes round"),
        ("extends: [1]", "extends=\\[1\\]; accepted"),
        ("run: " + "[" * 5000, "not YAML"),
        ("run: &a {run: *a}", "run"),
        ("run: {seed: 2001-99-99}", "not YAML"),
    ],
)
def test_files_without_an_end_are_refused(tmp_path, text, needle):
    (tmp_path / "loop.yaml").write_text(text)
    with pytest.raises(ConfigError, match=needle):
        build_settings(tmp_path / "loop.yaml")


@pytest.mark.parametrize("name", ["messages_column", "teacher_column"])
def test_an_empty_name_is_no_column(name):
    with pytest.raises(ConfigError, match=rf"data\.{name}='': no name of a column; accepted: a name, or null"):
        resolve({"data": {"source": "jsonl", "train_file": "a.jsonl", name: ""}})
    assert load_settings([f"data.{name}="]).data == Settings().data
