"""Run lm-eval's tasks.

GSM8K (strict and flexible), ARC-Easy, HellaSwag, PIQA, LAMBADA (accuracy and perplexity) and IFEval, with calibration.
Tasks come from the hub, or from ``--data FOLDER`` with FOLDER/TASK/SPLIT.jsonl in the hub's columns.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eval import calibration
from eval.calibration import Calibration
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.models import loading as models
from onpolicy_skd.models import split_model
from onpolicy_skd.models.vllm_setup import require_vllm
from onpolicy_skd.report.summary import percent, versions
from onpolicy_skd.rollout.transformers_engine import keep_end_tokens_only
from onpolicy_skd.rollout.vllm_engine import harness_model
from onpolicy_skd.run.exits import EXIT_OK, run_cli
from onpolicy_skd.storage.files import write_text

FORMAT = 1
NEED_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}  # IFEval's instructions
DEFAULT_MAX_TOKENS = 256  # lm-eval's limit where a task sets none


@dataclass(frozen=True, slots=True)
class Task:
    """A task of the suite under lm-eval's name."""

    file: str  # its definition in lm-eval's package
    metrics: tuple[str, ...]  # lm-eval's names, without its ",none"
    accuracy: str | None  # the metric that enters the suite's mean accuracy
    calibrated: str | None = None  # "choices" or "next_token"


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "gsm8k/gsm8k.yaml", ("exact_match,strict-match", "exact_match,flexible-extract"), "exact_match,flexible-extract"
    ),
    "arc_easy": Task("arc/arc_easy.yaml", ("acc", "acc_norm"), "acc", "choices"),
    "hellaswag": Task("hellaswag/hellaswag.yaml", ("acc", "acc_norm"), "acc", "choices"),
    "piqa": Task("piqa/piqa.yaml", ("acc", "acc_norm"), "acc", "choices"),
    "lambada_openai": Task("lambada/lambada_openai.yaml", ("acc", "perplexity"), "acc", "next_token"),
    "ifeval": Task(
        "ifeval/ifeval.yaml",
        ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc"),
        None,
    ),
}


def load_tasks(
    names: Sequence[str], folder: Path | None = None, max_length: int = 4096, fewshot: int | None = None
) -> dict[str, Any]:
    """Return lm-eval's task objects by name; they read FOLDER/NAME/SPLIT.jsonl where that folder exists.

    Answers have at most half of ``max_length`` tokens, which leaves the other half to the prompt.  ``fewshot`` replaces
    the number of examples where a task takes any.  Raises ConfigError for an unknown name and for data that neither the
    folder nor the hub has.
    """
    from lm_eval import tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    unknown = [n for n in names if n not in TASKS]
    if unknown:
        raise ConfigError(f"--tasks {unknown[0]}: not in the suite; accepted: {', '.join(TASKS)}")
    loaded = {}
    for name in names:
        config = load_yaml(Path(tasks.__file__).parent / TASKS[name].file)
        needed = {config.get("test_split") or config["validation_split"]}
        if fewshot is not None and config.get("num_fewshot") != 0:
            config["num_fewshot"] = fewshot
        if config.get("num_fewshot") and (source := config.get("fewshot_split") or config.get("training_split")):
            needed.add(source)
        task_folder = folder / name if folder else None
        if task_folder and task_folder.is_dir():
            files = {f.stem: str(f.absolute()) for f in sorted(task_folder.glob("*.jsonl"))}
            missing = sorted(needed - files.keys())
            if missing:
                raise ConfigError(
                    f"--data {folder}: {name} needs {task_folder / missing[0]}.jsonl, in the hub's columns"
                )
            config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
                if config.get(split) not in files:
                    config[split] = None
        if "generation_kwargs" in config:
            task_limit = config["generation_kwargs"].get("max_gen_toks", DEFAULT_MAX_TOKENS)
            config["generation_kwargs"]["max_gen_toks"] = min(task_limit, max_length // 2)
        loaded[name] = _build(name, config, sorted(needed), task_folder)
    if "ifeval" in loaded:
        _require_punkt(loaded["ifeval"])
    return loaded


def _require_punkt(task: Any) -> None:
    """Raise ConfigError if an instruction counts sentences or words and NLTK's data for splitting them is missing."""
    import nltk

    asked = {i for doc in task.eval_docs for i in doc["instruction_id_list"]} & NEED_PUNKT
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if asked:
            raise ConfigError(
                f"task ifeval: {sorted(asked)[0]} needs NLTK's data set punkt_tab, which is not here; accepted: "
                "python -m nltk.downloader punkt_tab first, or --tasks without ifeval"
            ) from None


def _build(name: str, config: dict[str, Any], splits: Sequence[str], folder: Path | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    source = config["dataset_path"]
    try:
        return ConfigurableTask(config={k: v for k, v in config.items() if k not in ("tag", "group")})
    except Exception as error:  # datasets and the hub client raise many kinds; each means that data cannot be loaded
        files = ", ".join(f"{folder or Path('FOLDER') / name}/{split}.jsonl" for split in splits)
        first = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"task {name}: data set {source} cannot be loaded ({type(error).__name__}: {first}); accepted: a machine "
            f"that reaches the hub, or --data FOLDER with {files} in the hub's columns"
        ) from error


def language_model(args: argparse.Namespace) -> Any:
    """Return lm-eval's wrapper of the model on the chosen backend.  Raises ConfigError if vLLM cannot run here."""
    print(f"loading {args.model} into {args.backend}", flush=True)
    path, device = models.resolve_path(args.model), models.pick_device(args.device)
    dtype = str(models.pick_dtype(args.dtype, device)).removeprefix("torch.")
    shared: dict[str, Any] = dict(
        pretrained=path, dtype=dtype, max_length=max_length(args), trust_remote_code=args.trust_remote_code
    )
    if args.backend == "vllm":
        return harness_model(device, max_batch_size=args.batch_size, **shared)
    from lm_eval.models import huggingface

    wrapper: Any = huggingface.HFLM  # its type hints leave out most arguments
    harness = wrapper(device=device, batch_size=args.batch_size, **shared)
    keep_end_tokens_only(harness.model)  # else generate would use the model's settings where lm-eval passes none
    return harness


def max_length(args: argparse.Namespace) -> int:
    """Return the most tokens of a prompt with its answer: ``--max-length``, or the model's positions if fewer.

    Raises ConfigError if the model cannot be found.
    """
    config = models.load_config(args.model, args.trust_remote_code).get_text_config()
    return min(args.max_length, getattr(config, "max_position_embeddings", None) or args.max_length)


def target_calibration(args: argparse.Namespace, task: Any) -> Calibration:
    """Compute the calibration of the model's predictions at every token of the task's targets."""
    device = models.pick_device(args.device)
    tokenizer = models.load_tokenizer(args.model, args.trust_remote_code)
    dtype = models.pick_dtype(args.dtype, device)
    model = models.load_model(args.model, dtype, device, args.trust_remote_code).eval()
    split = split_model.split(model, models.vocabulary_of(model.config))
    docs = list(task.eval_docs)[: args.limit]
    pairs = [encode_pair(tokenizer, task.doc_to_text(d), task.doc_to_target(d)) for d in docs]
    return calibration.next_token_calibration(split, tokenizer.pad_token_id, pairs)[0]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize both and split the ids as lm-eval does: a space between them belongs to the continuation."""
    ids, context_ids = (tokenizer(text)["input_ids"] for text in (context + continuation, context.rstrip()))
    return ids[: len(context_ids)], ids[len(context_ids) :]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of the suite: ``result`` is the content of suite.json, ``samples`` holds prompts and answers by task."""

    result: dict[str, Any]
    calibrated: dict[str, Calibration]
    samples: dict[str, list[dict[str, Any]]]

    def write(self, folder: Path) -> None:
        """Write ``suite.json``, ``reliability.png`` and ``samples/TASK.jsonl``."""
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        for name, rows in self.samples.items():
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            write_text(folder / "samples" / f"{name}.jsonl", "".join(lines))
        if self.calibrated:
            calibration.plot(folder / "reliability.png", self.calibrated)
        write_text(folder / "suite.json", json.dumps(self.result, indent=1) + "\n")


def evaluate(args: argparse.Namespace) -> Outcome:
    """Run the suite.  Raises ConfigError, for tasks and data before a model loads."""
    from lm_eval.evaluator import simple_evaluate

    start = time.perf_counter()
    tasks = load_tasks(args.tasks, args.data, max_length(args), args.fewshot)
    calibrated: dict[str, Calibration] = {}
    for name in args.tasks:
        if TASKS[name].calibrated == "next_token" and not args.chat:
            calibrated[name] = target_calibration(args, tasks[name])
            gc.collect()  # frees memory for the engine
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    harness: Any = simple_evaluate(
        language_model(args),
        tasks=list(tasks.values()),
        limit=args.limit,
        apply_chat_template=args.chat,
        log_samples=True,
    )
    calibrated |= {
        n: _choice_calibration(harness["samples"][n]) for n in args.tasks if TASKS[n].calibrated == "choices"
    }
    results = {name: _task_result(name, harness) for name in args.tasks}
    scored = {n: results[n]["metrics"][t.accuracy]["value"] for n, t in TASKS.items() if t.accuracy and n in results}
    complete = len(scored) == sum(t.accuracy is not None for t in TASKS.values())
    result = {
        "format": FORMAT,
        "model": args.model,
        "backend": args.backend,
        "chat": args.chat,
        "limit": args.limit,
        "seconds": round(time.perf_counter() - start, 1),
        "tasks": results,
        "mean_accuracy": sum(scored.values()) / len(scored) if complete else None,
        "calibration": {n: {"kind": TASKS[n].calibrated, **asdict(c)} for n, c in calibrated.items()},
        "versions": versions(),
    }
    return Outcome(result, calibrated, harness["samples"])


def _choice_calibration(samples: Sequence[Mapping[str, Any]]) -> Calibration:
    logprobs = [[float(response[0]) for response in s["filtered_resps"]] for s in samples]
    return calibration.choice_calibration(logprobs, [int(s["target"]) for s in samples])


def _task_result(name: str, harness: Mapping[str, Any]) -> dict[str, Any]:
    values, metrics = harness["results"][name], {}
    for metric in TASKS[name].metrics:
        key, _, rule = metric.partition(",")
        rule = rule or "none"
        error = values.get(f"{key}_stderr,{rule}")
        metrics[metric] = {"value": values[f"{key},{rule}"], "stderr": error if isinstance(error, float) else None}
    return {
        "problems": harness["n-samples"][name]["effective"],
        "fewshot": harness["n-shot"][name],
        "version": harness["versions"][name],
        "metrics": metrics,
    }


def show(result: Mapping[str, Any]) -> None:
    """Print every metric and calibration error."""
    for name, task in result["tasks"].items():
        for metric, value in task["metrics"].items():
            scale, unit = (1, "") if metric == "perplexity" else (100, " %")
            error = "" if value["stderr"] is None else f" ± {scale * value['stderr']:.2f}"
            about = f"({task['problems']} problems, {task['fewshot']}-shot)"
            print(f"{name:>15} {metric:<30} {scale * value['value']:.2f}{error}{unit}  {about}")
    for name, c in result["calibration"].items():
        print(f"{name:>15} {'ece (' + c['kind'] + ')':<30} {percent(c['ece'])}  ({c['count']} predictions)")
    if result["mean_accuracy"] is not None:
        print(f"{'mean accuracy':>15} {percent(result['mean_accuracy'])}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.suite") -> int:
    """Run the command line and return the exit code: 0 for success, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder (runs/NAME/final), hub name, or bundled:NAME")
    parser.add_argument("--out", type=Path, required=True, help="folder for suite.json, reliability.png and samples/")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--backend", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--data", type=Path, help="folder with TASK/SPLIT.jsonl, instead of the hub")
    parser.add_argument("--limit", type=int, help="only the first N problems of each task")
    parser.add_argument("--fewshot", type=int, help="examples in the prompt (default: lm-eval's, 5 for gsm8k)")
    parser.add_argument("--chat", action="store_true", help="prompts through the chat template")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per batch (default: 16)")
    parser.add_argument("--max-length", type=int, default=4096, help="longest prompt with its answer, tokens")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    return run_cli(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: accepted: at least 1")
    if args.data and not args.data.is_dir():
        raise ConfigError(f"--data {args.data}: no such folder")
    if args.backend == "vllm":
        require_vllm()
    models.load_config(args.model, args.trust_remote_code)  # refuses a wrong name before any data loads
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    outcome = evaluate(args)
    outcome.write(args.out)
    show(outcome.result)
    print(f"written: {args.out / 'suite.json'}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
