"""The model card of a run's student: ``final/README.md`` with metadata for the Hugging Face hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from pydantic import BaseModel

from onpolicy_skd.config.schema import DataSettings, Settings, rules_of, walk
from onpolicy_skd.config.validation import value_of
from onpolicy_skd.report import summary as report
from onpolicy_skd.report.secrets import redact
from onpolicy_skd.storage.files import RunPaths, write_text

TAGS = ["onpolicy_skd", "knowledge-distillation", "on-policy-distillation"]
TRAINED_ON = {
    "on_policy": "its own responses",
    "off_policy": "reference texts",
    "mixed": "its own responses and reference answers",
}
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{prompt}
output = model.generate(**inputs, max_new_tokens={tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
CHAT_PROMPT = """messages = [
{messages}
]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking={thinking}, return_dict=True, return_tensors="pt"
)"""
WIDTH = 88  # characters of a line of the command


def write(settings: Settings, summary: dict[str, Any]) -> Path:
    """Write the card of a finished run, with the run's curves, into ``final/``; return its path.

    The card names no license, because that follows from the licenses of the models and the data.
    """
    paths = RunPaths(settings.run.folder)
    if paths.curves.exists():
        shutil.copyfile(paths.curves, paths.final / paths.curves.name)
    card = ModelCard(f"---\n{_metadata(settings, summary).to_yaml()}\n---\n\n{_text(settings, summary)}")
    file = paths.final / "README.md"
    write_text(file, str(card))
    return file


def command(settings: Settings) -> str:
    """Return one command that repeats a run: every setting that differs from its default and affects the result.

    Folders and files are given by name without their path, and credentials are left out.
    """
    changed = {
        key: value_of(settings, key)
        for key, field in walk()
        if value_of(settings, key) != field.default and (rules_of(field)["affects_result"] or key == "run.name")
    }
    lines = ["skd train"]
    for key, value in changed.items():
        word = shlex.quote(f"{key}={_shown(value)}")
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return " \\\n".join(lines)


def _shown(value: Any) -> str:
    text = _public(value)
    return text if isinstance(text, str) else "" if value is None else json.dumps(text)


def _public(value: Any) -> Any:
    """Return a setting as plain data, without defaults, folders and credentials."""
    if isinstance(value, str | Path):
        return redact(_name(value))
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in value.model_dump(exclude_defaults=True)}
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    return [_public(item) for item in value] if isinstance(value, list) else value


def _name(value: str | Path) -> str:
    """Return a setting's text; for a local path only its name, since the rest may identify a user or machine."""
    if isinstance(value, Path) or os.path.exists(value):  # Path.exists raises for long texts
        return Path(value).name
    return value


def _is_hub_name(model: str) -> bool:
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return "/" in model and not Path(model).exists()


def _metadata(settings: Settings, summary: dict[str, Any]) -> ModelCardData:
    student, sources = settings.student.model, settings.data.sources
    datasets = list(dict.fromkeys(filter(None, map(_hub_dataset, sources))))
    dataset = datasets[0] if len(sources) == len(datasets) == 1 else None  # the data set of the evaluation
    share = summary["exact_match"]["after"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config="main" if sources[0].source == "gsm8k" else sources[0].subset,
            dataset_split=sources[0].eval_split,
            metric_type="exact_match",
            metric_name="exact match (math-verify)",
            metric_value=round(100 * share, 2),
        )
    ] if dataset and share is not None else None  # fmt: skip
    return ModelCardData(
        base_model=student if _is_hub_name(student) else None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=summary["run"] if results else None,
        eval_results=results,
    )


def _hub_dataset(data: DataSettings) -> str | None:
    """Return the hub data set of a source; None for local files and the demo task."""
    if data.source == "gsm8k":
        return None if data.path else "openai/gsm8k"
    return data.name if data.name and not Path(data.name).exists() else None


def _data_name(data: DataSettings) -> str:
    return _name(_hub_dataset(data) or data.train_file or data.name or data.path or data.source)


def _text(settings: Settings, summary: dict[str, Any]) -> str:
    student, data = _name(settings.student.model), "`, `".join(map(_data_name, settings.data.sources))
    teacher = "`, `".join(_name(each.teacher_model.model) for each in settings.by_teacher)
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    plot = "![Curves of the run](curves.png)" if RunPaths(settings.run.folder).curves.exists() else ""
    sections = [
        f"# {summary['run']}",
        f"`{student}`, distilled from `{teacher}` on {TRAINED_ON[settings.mode]} by onpolicy_skd, on-policy selective "
        f"distillation: {_divergence(settings)} at {_positions(settings)}, {summary['steps']} optimizer steps "
        f"of {settings.learner.batch_size} samples. Data: `{data}`.",
        "## Results",
        report.evaluation_table(summary, settings),
        plot,
        "## Use",
        USE.format(
            name=settings.hub.push or "FOLDER",
            prompt=_prompt(settings.data.sources[0]),
            tokens=settings.eval.max_tokens or settings.rollout.max_tokens,
        ),
        "## Reproduce",
        f"```\n{command(settings)}\n```",
        f"Versions: {versions}.",
        "## License",
        "Not set. It follows from the licenses of the student, the teacher and the data: add `license: NAME` to the "
        "metadata at the top of this file.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _positions(settings: Settings) -> str:
    """Return in words which positions were supervised."""
    cfg = settings.positions
    if cfg.policy == "full":
        return "all positions"
    return f"{100 * cfg.k:g} % of the positions ({cfg.policy} by {cfg.metric})"


def _divergence(settings: Settings) -> str:
    cfg = settings.alignment
    return cfg.divergence if cfg.mixture.gate == "none" else f"reverse and forward KL mixed by {cfg.mixture.gate}"


def _prompt(data: DataSettings) -> str:
    """Return the code that makes the prompt of a question in the format of training, without few-shot examples."""
    system, instruction, plain = (redact(text or "") for text in (data.system, data.instruction, data.plain))
    question = f"QUESTION{instruction}"
    shots = f"# In training {data.shots} examples stood before the question.\n" if data.shots else ""
    if data.template == "plain":
        text = plain.replace("{question}", question)
        return f'{shots}inputs = tokenizer({json.dumps(text, ensure_ascii=False)}, return_tensors="pt")'
    messages = [{"role": "system", "content": system}] if data.system is not None else []
    lines = [json.dumps(m, ensure_ascii=False) for m in [*messages, {"role": "user", "content": question}]]
    return shots + CHAT_PROMPT.format(messages="\n".join(f"    {line}," for line in lines), thinking=data.thinking)
