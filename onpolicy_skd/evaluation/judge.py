"""Verdicts on outputs: exact match where the data has a reference answer, else the user's judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onpolicy_skd.config import plugins
from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.evaluation.exact_match import LONGEST_ANSWER, Score, score
from onpolicy_skd.evaluation.stop_texts import before_stop
from onpolicy_skd.types import RolloutRequest, Trajectory

Judge = Callable[[str, Mapping[str, Any]], bool]  # (output, columns of its row) -> whether it is right


def find_judge(name: str) -> Judge | None:
    """Return the judge that ``eval.judge`` names; None for exact_match.  Raises ConfigError."""
    return plugins.find(name, {"exact_match": None}, "eval.judge")


def verdict(output: str, answer: str, columns: Mapping[str, Any], judge: str = "exact_match") -> Score:
    """Judge ``output`` by exact match with ``answer`` or, if that is empty, by ``judge``, for both rules alike.

    Raises ConfigError if the judge fails, and ValueError if there is neither an answer nor a judge.
    """
    if answer:
        return score(output, answer)
    function = find_judge(judge)
    if function is None:
        raise ValueError("no reference answer and no judge")
    try:
        right = bool(function(output, columns))
    except Exception as error:  # the user's code
        raise ConfigError(f"eval.judge={judge}: failed on {output[:40]!r}: {type(error).__name__}: {error}") from error
    return Score(right, right, output.strip()[:LONGEST_ANSWER])


def with_correctness(
    trajectories: Sequence[Trajectory],
    requests: Sequence[RolloutRequest],
    tokenizer: Any,
    stop: Sequence[str] = (),
    judge: str = "exact_match",
) -> list[Trajectory]:
    """Return ``trajectories`` (one per request) with ``correct`` set where the request asks for it.

    Text from the first ``stop`` text on is not judged.
    """
    results = []
    for t, request in zip(trajectories, requests, strict=True):
        if request.answer is not None:
            output = before_stop(tokenizer.decode(t.response_ids.tolist(), skip_special_tokens=True), stop)
            correct = verdict(output, request.answer, request.columns or {}, judge).match
            t = dataclasses.replace(t, correct=correct)  # noqa: PLW2901
        results.append(t)
    return results
