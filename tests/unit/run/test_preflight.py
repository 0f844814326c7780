"""What is refused before Ray starts, each with one line that names setting, file or row."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_settings
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from eval import gsm8k
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.config.schema import TeacherSettings
from onpolicy_skd.models.generation_config import savable_generation_config
from onpolicy_skd.models.loading import ModelError, resolve_path
from onpolicy_skd.run import model_checks
from onpolicy_skd.run import preflight as checks
from onpolicy_skd.run.preflight import preflight
from onpolicy_skd.run.prepare import prepare


@pytest.fixture
def student(tmp_path):
    return Path(shutil.copytree(resolve_path("bundled:demo_student"), tmp_path / "student"))


def set_json(file, **values):
    tree = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (tree | values).items() if v is not None}))


def set_template(folder, text):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    set_json(folder / "tokenizer_config.json", chat_template=text)


def refusal(student, tmp_path, **sections):
    settings = tiny_settings(run={"dir": tmp_path / "runs"}, student={"model": str(student)}, **sections)
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        preflight(settings)
    assert time.process_time() - start < 10  # CPU seconds, which a busy machine does not change
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_that_can_start_is_not_refused(student, tmp_path):
    preflight(tiny_settings(run={"dir": tmp_path / "runs"}, student={"model": str(student)}))
    assert not (tmp_path / "runs").exists()


# A second or two: its thread outlives the test, and would slow all that follow.
BUSY = "{% for a in range(3000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "data", "needle"),
    [
        ("{{ raise_exception('no system role') }}", {"system": "Be brief."}, "no system role (data.system is set"),
        ("{{ raise_exception('roles must alternate') }}", {}, "TemplateError: roles must alternate"),
        ("{% for message in messages %}{{ message.content }}", {}, "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", {}, "TypeError"),
        ("{{ messages[7].content.strip() }}", {}, "UndefinedError"),
        (BUSY, {}, "took more than 0.05 s"),
        ("{% if false %}{{ messages }}{% endif %}", {}, "has no tokens"),
    ],
)
def test_a_template_is_tried_on_a_row(student, tmp_path, monkeypatch, template, data, needle):
    monkeypatch.setattr(checks, "TEMPLATE_TIMEOUT_S", 0.05 if "took" in needle else 60)
    set_template(student, template)
    text = refusal(student, tmp_path, data=data)
    assert needle in text
    assert "data.template=chat" in text
    assert "demo:train#1" in text


@pytest.mark.parametrize(
    ("template", "system", "needle"),
    [
        ("hello", None, "does not show the question"),
        ("{{ messages[-1].content }}", "Be brief.", "does not show data.system"),
        ("{{ messages[0].content }}", "Be brief.", "does not show the question"),
    ],
)
def test_a_template_that_leaves_out_a_text_is_refused(student, tmp_path, template, system, needle):
    set_template(student, template)
    assert needle in refusal(student, tmp_path, data={"system": system})


def test_a_template_that_leaves_out_a_turn_is_refused(student, tmp_path):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*turns, *turns]}))
    data = {"source": "jsonl", "train_file": str(tmp_path / "a.jsonl"), "messages_column": "messages",
            "answer_column": ""}  # fmt: skip
    set_template(student, "{{ messages[-1].content }}")
    assert "does not show message 1 (user)" in refusal(student, tmp_path, data=data)


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("{{ messages | tojson }}", 'Be "brief".'),
        ("{% for m in messages %}{{ m.content | trim | upper }}{% endfor %}", "  Be brief. "),
        ("{% for m in messages %}{{ m.content.replace('/no_think', '') }}{% endfor %}", "/no_think"),
        ("{{ messages[-1].content }}", ""),
        ("{% if 'brief' not in messages[0].content %}{{ 1 / 0 }}{% endif %}{{ messages[-1].content }}", "brief"),
    ],
)
def test_a_template_may_change_the_texts(student, tmp_path, template, system):
    set_template(student, template)
    data = {"system": system}
    preflight(tiny_settings(run={"dir": tmp_path / "runs"}, student={"model": str(student)}, data=data))


@pytest.mark.parametrize("index", [[], {"weight_map": {}}, {"weight_map": {"a": 1}}, {}])
def test_an_index_names_the_files_of_the_weights(student, tmp_path, index):
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in refusal(student, tmp_path)


def test_an_index_that_is_nested_too_deeply_is_refused(student, tmp_path):
    (student / "model.safetensors.index.json").write_text("[" * 100_000)
    assert "its weights cannot be read" in refusal(student, tmp_path)


@pytest.mark.parametrize("base", [False, True])
def test_names_and_shapes_of_the_weights_are_those_of_the_model(student, tmp_path, base):
    weights = load_file(student / "model.safetensors")
    if base:  # transformers adds the prefix
        save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()},
                  student / "model.safetensors", {"format": "pt"})  # fmt: skip
    preflight(tiny_settings(run={"dir": tmp_path / "runs"}, student={"model": str(student)}))
    set_json(student / "config.json", intermediate_size=48)
    assert "has shape" in refusal(student, tmp_path)
    save_file({"x": torch.zeros(3)}, student / "model.safetensors", {"format": "pt"})
    assert "its files lack" in refusal(student, tmp_path)


@pytest.mark.parametrize("token", [99_999, [1, 99_999], "end"])
def test_an_end_of_sequence_beyond_the_vocabulary_is_refused(student, tmp_path, token):
    set_json(student / "generation_config.json", eos_token_id=token)
    text = refusal(student, tmp_path)
    assert "its generation_config.json cannot be used" in text
    assert "eos_token_id" in text


@pytest.mark.parametrize("saved", ["configuration", "tokenizer"])
def test_what_the_end_of_a_run_saves_is_saved_on_trial(student, tmp_path, monkeypatch, saved):
    def fail(self, folder, **_):
        raise TypeError("not JSON")

    kind = PretrainedConfig if saved == "configuration" else PreTrainedTokenizerBase
    monkeypatch.setattr(kind, "save_pretrained", fail)
    assert f"its {saved} cannot be saved: TypeError: not JSON" in refusal(student, tmp_path)


@pytest.mark.parametrize(
    ("break_it", "needle"),
    [
        (lambda folder: set_template(folder, "hello"), "demo:test#1: data.template=chat: the template does not show"),
        (lambda folder: set_json(folder / "config.json", intermediate_size=48), "has shape"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234"), "its weights cannot be read"),
    ],
)
def test_an_evaluation_makes_the_same_checks(student, capsys, break_it, needle):
    break_it(student)
    options = ["data.source=demo", "data.max_prompt_tokens=96", "rollout.max_tokens=16", "rollout.engine=transformers"]
    assert gsm8k.main(["--model", str(student), "--problems", "2", *options, "run.device=cpu"]) == 2
    error = capsys.readouterr().err
    assert needle in error
    assert error.count("\n") == 1


def test_a_tokenizer_without_an_end_is_refused(student, tmp_path):
    set_json(student / "tokenizer_config.json", eos_token=None, pad_token=None)
    (student / "special_tokens_map.json").unlink(missing_ok=True)
    assert "no end-of-sequence token" in refusal(student, tmp_path)


def test_weights_are_looked_at_by_their_headers(student, tmp_path):
    weights = student / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "its weights cannot be read" in refusal(student, tmp_path)
    set_json(student / "model.safetensors.index.json", weight_map={"a": "model-00001-of-00002.safetensors"})
    assert "model-00001-of-00002.safetensors" in refusal(student, tmp_path)
    (student / "model.safetensors.index.json").unlink()
    weights.rename(student / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(student, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"architectures": ["BertModel"], "model_type": "t5"}, {"num_attention_heads": "many"}]
)
def test_the_architecture_is_built_without_weights(student, tmp_path, changes):
    set_json(student / "config.json", **changes)
    text = refusal(student, tmp_path)
    assert str(student) in text


def test_a_folder_that_cannot_be_written_is_refused(student, tmp_path):
    (tmp_path / "runs").write_text("a file")
    assert "runs is a file" in refusal(student, tmp_path)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "num_return_sequences": 2}, {"temperature": 0.6}),
        ({"do_sample": False, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 2]},
         {"repetition_penalty": 1.1, "eos_token_id": [1, 2]}),
        ({"do_sample": False, "temperature": 0.6, "early_stopping": True}, {"early_stopping": None}),
    ],
)  # fmt: skip
def test_generation_settings_that_contradict_each_other_can_be_saved(student, tmp_path, values, kept):
    from transformers import GenerationConfig

    (student / "generation_config.json").unlink(missing_ok=True)
    set_json(student / "generation_config.json", **values)
    preflight(tiny_settings(run={"dir": tmp_path / "runs"}, student={"model": str(student)}))
    config = savable_generation_config(GenerationConfig.from_pretrained(student))
    config.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    for key, value in kept.items():
        assert getattr(saved, key) == value or (value == 1.0 and getattr(saved, key) is None)


def test_generation_settings_that_cannot_be_loaded_are_refused(student, tmp_path):
    set_json(student / "generation_config.json", do_sample=False, temperature=None, num_return_sequences=3)
    assert "its generation_config.json cannot be used" in refusal(student, tmp_path)


@pytest.fixture
def avx512(monkeypatch):
    monkeypatch.setattr(model_checks, "cpu_capability", lambda: "AVX512")


def test_weights_that_are_quantized_already_are_not_quantized_again(student, tmp_path, avx512):
    teacher = {"model": str(student), "engine": "vllm", "quantization": "fp8"}
    model_checks.check_quantization(tiny_settings(teacher=teacher))
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    model_checks.check_quantization(tiny_settings(teacher=teacher | {"quantization": None}))
    with pytest.raises(ConfigError, match=r"teacher\.quantization=fp8.*quantized already \(gptq\).*leave it empty"):
        model_checks.check_quantization(tiny_settings(teacher=teacher))


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "mxfp4", "nonsense"])
def test_students_and_teachers_in_transformers_accept_no_quantized_weights(student, tmp_path, method, avx512):
    set_json(student / "config.json", quantization_config={"quant_method": method})
    teacher = {"model": str(student), "engine": "transformers"}
    assert refusal("bundled:demo_student", tmp_path, teacher=teacher) == (
        f"teacher.model={student}: its weights are quantized ({method}); use teacher.engine=vllm"
    )
    assert refusal(student, tmp_path).endswith(f"its weights are quantized ({method}); use an unquantized checkpoint")
    model_checks.check_quantization(tiny_settings(teacher=teacher | {"engine": "vllm"}))


def test_four_bit_weights_on_a_cpu_without_their_instructions_are_refused(student, tmp_path, monkeypatch):
    monkeypatch.setattr(model_checks, "cpu_capability", lambda: "AVX2")
    set_json(student / "config.json", quantization_config={"quant_method": "gptq"})
    teacher = {"model": str(student), "engine": "vllm"}
    assert "needs a GPU or a CPU with AVX-512" in refusal("bundled:demo_student", tmp_path, teacher=teacher)
    monkeypatch.setattr(model_checks.loading, "pick_device", lambda _: "cuda")
    model_checks.check_quantization(tiny_settings(teacher=teacher))


@pytest.mark.parametrize("section", ["teacher", "rollout"])
def test_gpus_that_cannot_share_the_attention_heads_are_refused(student, tmp_path, section):
    text = refusal(student, tmp_path, **{section: {"engine": "vllm", "tensor_parallel": 5}})
    assert text.startswith(f"{section}.tensor_parallel=5: ")


def two_teachers(tmp_path, idle):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "2 + 2?", "answer": "4", "who": "asked"}) + "\n")
    data = {"source": "jsonl", "train_file": str(file), "teacher_column": "who"}
    teachers = {"asked": {"model": "bundled:demo_teacher"}, "idle": {"model": str(idle)}}
    return {"data": data, "teachers": teachers, "teacher": TeacherSettings().model_dump(include={"model", "dtype"})}


def test_errors_of_models_name_their_settings(student, tmp_path):
    sections = two_teachers(tmp_path, "/nope/x")
    assert refusal(student, tmp_path, **sections).startswith("teachers.idle.model: model '/nope/x': no such folder")
    missing = {"model": "/nope/x"}
    assert refusal(student, tmp_path, teacher=missing).startswith("teacher.model: model '/nope/x': no such folder")
    assert refusal("/nope/x", tmp_path).startswith("student.model: model '/nope/x': no such folder")
    assert refusal("", tmp_path).startswith("student.model: model ''")
    set_json(student / "config.json", quantization_config={"quant_method": "awq"})
    assert refusal("bundled:demo_student", tmp_path, **two_teachers(tmp_path, student)) == (
        f"teachers.idle.model={student}: its weights are quantized (awq); use teachers.idle.engine=vllm"
    )


@pytest.mark.parametrize(("heads", "devices", "accepted"), [(4, 3, False), (4, 2, True), (4, 1, True), (6, 4, False)])
def test_vllm_splits_attention_heads_evenly(tmp_path, heads, devices, accepted):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_attention_heads": heads}))
    sections = [
        {"teacher": {"model": str(tmp_path), "engine": "vllm", "tensor_parallel": devices}},
        {"student": {"model": str(tmp_path)}, "rollout": {"engine": "vllm", "tensor_parallel": devices}},
        {
            "teacher": TeacherSettings().model_dump(include={"model", "dtype"}),
            "teachers": {"a": {"model": str(tmp_path), "engine": "vllm", "tensor_parallel": devices}},
            "data": {"source": "demo", "teacher": "a"},
        },
    ]
    for name, section in zip(("teacher", "rollout", r"teachers\.a"), sections, strict=True):
        settings = tiny_settings(**section)
        if accepted:
            model_checks.check_tensor_parallel(settings)
            continue
        needle = rf"{name}\.tensor_parallel={devices}: .* has {heads} attention heads; accepted: .* divide {heads}$"
        with pytest.raises(ModelError, match=needle):
            model_checks.check_tensor_parallel(settings)


def test_lengths_and_tokenizers_that_do_not_fit_name_their_settings(student, tmp_path):
    def message(**sections):
        with pytest.raises(ConfigError) as error:
            prepare(tiny_settings(run={"dir": tmp_path / "runs"}, **sections), generates=False)
        return str(error.value)

    sections = two_teachers(tmp_path, student)
    added = json.loads((student / "tokenizer.json").read_text())
    added["added_tokens"][-1]["content"] = "<|another|>"
    (student / "tokenizer.json").write_text(json.dumps(added))
    assert message(**sections).startswith("teachers.idle.model: the tokenizers of student ")
    shutil.copy(Path(resolve_path("bundled:demo_student")) / "tokenizer.json", student)
    set_json(student / "config.json", max_position_embeddings=8)
    assert message(**sections).startswith(f"teachers.idle.model: model '{student}': supports 8 positions")
    assert message(student={"model": str(student)}).startswith(f"student.model: model '{student}': supports 8")


@pytest.mark.parametrize(("slowdown", "keys"), [(40.0, ["teacher.dtype", "rollout.dtype"]), (1.5, [])])
def test_types_without_instructions_on_this_cpu_are_warned_of(monkeypatch, caplog, slowdown, keys):
    monkeypatch.setattr(checks, "_slowdown", lambda dtype: slowdown if dtype == torch.bfloat16 else math.nan)
    checks.warn_of_slow_dtypes(tiny_settings(teacher={"dtype": "bfloat16"}, rollout={"dtype": "bfloat16"}))
    assert [r.getMessage() for r in caplog.records] == [
        f"{', '.join(keys)}: matrix products in bfloat16 take 40 times as long as in float32 on this CPU; "
        f"set {' '.join(f'{key}=float32' for key in keys)}"
    ][: len(keys)]


def test_the_type_of_each_teacher_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(checks, "_slowdown", lambda _: 40.0)
    settings = tiny_settings(
        teacher=TeacherSettings().model_dump(include={"model", "dtype"}),
        teachers={"a": {"model": "bundled:demo_teacher", "dtype": "bfloat16"}, "b": {"model": "bundled:demo_teacher"}},
        data={"teacher_column": "teacher"},
    )
    checks.warn_of_slow_dtypes(settings)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["teachers.a.dtype"]


def test_the_slowdown_of_a_type_is_a_ratio_of_times():
    assert 0.0 < checks._slowdown(torch.bfloat16) < 1e5
