"""Grids and finished runs of a comparison, without running anything."""

from __future__ import annotations

import json

import yaml
from helpers import ROOT

from onpolicy_skd.config.loading import dump

CONFIGS = ROOT / "configs"


SCRIPT = "<script>alert(1)</script> & <b>"


def write_grid(folder, **changes):
    tree = {
        "base": str(CONFIGS / "demo.yaml"), "dir": str(folder / "out"), "seeds": [1, 2], "baseline": "Full KD",
        "settings": {"run": {"steps": 2}, "data": {"train_problems": 500}},
        "rows": [
            {"name": "Full KD", "settings": {"positions": {"policy": "full"}}, "published": {"on_policy": [70.6, 0.2]}},
            {"name": "SE-KD", "settings": {"positions": {"k": 0.2}}, "published": {"on_policy": [70.0, 0.1]}},
            {"name": "Forward", "modes": ["on_policy"], "settings": {"alignment": {"divergence": "forward_kl"}}},
        ],
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}))
    return path


def write_finished_run(run, right, **cost):
    """What a finished run leaves behind."""
    folder = run.folder
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(run.settings))
    records = [{"key": f"p#{i}/0", "match": bool(r)} for i, r in enumerate(right)]
    (folder / "evaluations" / "after-000002.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    share = sum(right) / len(right)
    step = {"step": 0, "loss": 1.0, "train_tokens": 500, "positions": 100, "positions_selected": 20,
            "seconds": {"step": 2.0}, "learner_memory_mib": 300.0, **cost}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    summary = {"status": "finished", "seconds": 9.0, "exact_match": {"before": 0.1, "after": share, "teacher": 1.0},
               "exact_match_interval": {"after": [0, 1]}, "strict_match": {"after": share}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def recorded(run, at=(0, 2)):
    """Adds evaluations and a token view to what ``write_finished_run`` left behind."""
    lines = []
    for step in at:
        lines.append({"step": step, "event": "evaluation", "name": "during", "match": {"share": 0.1 * (step + 1)},
                      "entropy_selected": 1.0, "entropy_unselected": 0.2, "divergence_selected": 0.5,
                      "divergence_unselected": 0.1})  # fmt: skip
    steps = [{"step": s, "loss": 1.0, "train_tokens": 50, "positions": 10, "positions_selected": 2, "generated": 4,
              "truncated": 0.25, "entropy_selected": 9.0, "response_tokens": 20.0 + s,
              "seconds": {"step": 2.0}, "learner_memory_mib": 300.0} for s in range(3)]  # fmt: skip
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*lines, *steps]))
    view = {"key": "a", "prompt": f"Q {SCRIPT}", "finish_reason": "length", "tokens": ["4", SCRIPT, "\n"],
            "entropy": [0.0, 1.0, 9.0], "divergence": [0.1, 0.2, 0.3], "selected": [False, True, True]}  # fmt: skip
    (run.folder / "evaluations" / "tokens-after-000002.jsonl").write_text(json.dumps(view) + "\n")
