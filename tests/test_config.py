from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from onpolicy_skd.config import ConfigError, Settings, describe, dump, load_settings, resolve, walk

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


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
        (["data.plain=no placeholder"], ["data.plain", "{question}"]),
        (["rollout.max_tokens=9000"], ["learner.tokens_per_micro_batch=8192", "9512"]),
        (["learner.lr=yes"], ["learner.lr=True", "truth value", "accepted: above 0"]),
        (["run.epochs=.inf"], ["run.epochs=inf", "finite"]),
        (["data.source=demo", "data.path=x"], ["data.path: accepted for data.source=gsm8k only"]),
        (["learner.lr"], ["section.name=value"]),
        (["run.name=[1"], ["not YAML"]),
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


def test_override_beats_file_beats_parent_beats_default(tmp_path):
    (tmp_path / "base.yaml").write_text("learner: {lr: 1e-3, clip: 2.0}\nrun: {seed: 1}\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nlearner: {clip: 3.0}\n")
    settings = load_settings(["--config", str(tmp_path / "own.yaml"), "run.seed=7"])
    assert (settings.learner.lr, settings.learner.clip, settings.run.seed) == (1e-3, 3.0, 7)
    assert settings.learner.beta1 == Settings().learner.beta1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_bundled_config_resolves_and_survives_a_round_trip(path):
    settings = load_settings(["--config", str(path)])
    assert resolve(yaml.safe_load(dump(settings))) == settings


def test_help_names_every_setting_and_every_setting_has_a_meaning(capsys):
    text = describe()
    for key, field in walk():
        assert f"  {key}=" in text
        assert field.description, key
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
    once = resolve({"learner": {"batch_size": batch}, "samples": {"keep": keep, "when": "prefilter"}})
    assert once.rollouts_per_step == batch


def test_config_imports_without_torch_ray_or_vllm():
    import subprocess
    import sys

    code = "import onpolicy_skd.config, sys; print([m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
