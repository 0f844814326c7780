"""The command ``skd``: one verb for each program, which ``python -m MODULE`` starts as well.

A program is imported only when it is run, so that ``skd --help`` does not wait for torch, Ray or vLLM.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from onpolicy_skd import __version__, siblings

# Module and summary of each verb, by heading.
PROGRAMS = {
    "Runs": {
        "train": ("onpolicy_skd.train", "train a student: one run from settings to report"),
        "compare": ("onpolicy_skd.compare", "run a grid of methods, modes and seeds, and report it"),
        "cache": ("onpolicy_skd.cache", "store a teacher's outputs on disk: build, info, verify"),
        "configs": ("onpolicy_skd.config.shipped", "list the configs that --config finds by name"),
    },
    "Evaluation": {
        "eval": ("eval.gsm8k", "exact match on GSM8K or any set with its answer format"),
        "chat": ("eval.chat", "ask the student before and after training and the teacher, side by side"),
        "suite": ("eval.suite", "six lm-eval tasks and calibration"),
        "paired": ("eval.paired", "compare two evaluations of the same problems: change, interval, McNemar's test"),
        "agreement": ("eval.agreement", "compare our exact match with lm-eval's, answer by answer"),
    },
    "Models": {
        "demo-pair": ("onpolicy_skd.data.demo_pair", "train the bundled tiny teacher and student from scratch"),
    },
    "Measurements": {
        "perf": ("eval.performance.__main__", "time and memory compared with TRL: loss, step, end-to-end, ..."),
        "gradients": ("eval.gradients", "gradients of sparse targets compared with full KD"),
        "teachers": ("eval.teacher_engines", "the teacher in vLLM compared with the teacher in transformers"),
        "trl": ("eval.trl_baseline", "the same run by TRL's DistillationTrainer"),
        "faults": ("eval.faults.__main__", "inject faults into runs and report the outcome of each"),
        "gpu-check": ("eval.gpu_check.__main__", "check the GPU path: machine, mathematics, engine, runs"),
        "gpu-bench": ("eval.gpu_bench", "measure the learner at real shapes on one GPU"),
        "soak": ("eval.soak", "thousands of steps, watched for anything that grows"),
    },
}
MODULES = {verb: module for group in PROGRAMS.values() for verb, (module, _) in group.items()}


def usage() -> str:
    """Return the text of ``skd --help``."""
    lines = ["usage: skd COMMAND [arguments]", "", "On-policy selective distillation of language models on Ray."]
    for heading, group in PROGRAMS.items():
        lines += ["", f"{heading}:", *(f"  {verb:<11}{summary}" for verb, (_, summary) in group.items())]
    return "\n".join([*lines, "", "`skd COMMAND --help` describes a command; `skd --version` prints the version."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that ``argv`` names; return its exit code, or 2 for an unknown name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"skd {__version__}")
        return 0
    if verb not in MODULES:
        near = difflib.get_close_matches(verb, MODULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(MODULES)}"
        print(f"error: skd has no command {verb!r}; {hint}", file=sys.stderr)
        return 2
    siblings.bind()
    return importlib.import_module(MODULES[verb]).main(rest, prog=f"skd {verb}")


if __name__ == "__main__":
    sys.exit(main())
