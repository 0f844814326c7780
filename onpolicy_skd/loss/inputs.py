"""Typed inputs of the distillation loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from onpolicy_skd.config.schema import AlignmentSettings
from onpolicy_skd.loss.mixture import Mixture
from onpolicy_skd.models.lm_head import LMHead, Projector

KINDS = ("reverse_kl", "forward_kl", "jsd")
ESTIMATORS = ("exact", "topk_tail", "student_topk_tail", "sampled")


@dataclass(frozen=True, slots=True)
class Alignment:
    """The loss of a position: kd_weight * divergence + (1 - kd_weight) * cross-entropy.

    ``estimator`` of the divergence: ``exact``; ``topk_tail``, over the teacher's ``top_k`` classes and one group that
    holds the rest of both distributions; ``student_topk_tail``, the same with the student's classes; ``sampled``, from
    the target alone, whose value and gradient are unbiased if the target was drawn from q.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_weight: float = 1.0
    chunk_rows: int | None = None
    estimator: str = "exact"
    top_k: int = 64
    mixture: Mixture | None = None  # of reverse and forward KL; replaces the divergence
    clip: float | None = None  # bound of |log p(y) - log q(y)|, nats; positions beyond are masked or scaled to it
    clip_mode: str = "mask"

    def __post_init__(self) -> None:
        if self.divergence not in KINDS:
            raise ValueError(f"unknown divergence {self.divergence!r}; accepted: {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; accepted: {', '.join(ESTIMATORS)}")

    @classmethod
    def from_settings(cls, cfg: AlignmentSettings) -> Alignment:
        """Return the settings under ``alignment`` that one call of the loss needs.

        Raises ConfigError for a user's gate that cannot be imported.
        """
        fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cls) if f.name != "mixture"}
        return cls(**fields, mixture=Mixture.from_settings(cfg.mixture))

    def at(self, step: int) -> Alignment:
        """Return the loss after ``step`` optimizer steps, since a mixture may depend on the step."""
        return dataclasses.replace(self, mixture=self.mixture.at(step)) if self.mixture else self

    def exact(self, divergence: str) -> Alignment:
        """Return the plain ``divergence`` at the same temperature."""
        changes = {"kd_weight": 1.0, "estimator": "exact", "mixture": None, "clip": None}
        return dataclasses.replace(self, divergence=divergence, **changes)

    @property
    def kind(self) -> str:
        """The divergence that is computed: jsd at beta 0 or 1 is one of the two KLs."""
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return limits.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """The teacher's full distributions at N positions, as last hidden states and LM head."""

    hidden_NG: Tensor
    head: Tensor | LMHead  # [V, G]

    def logits(self, size: int) -> Callable[[slice], Tensor]:
        """Return a function from a slice of up to ``size`` rows to their logits; each call overwrites the last."""
        project = Projector(self.head.to(self.hidden_NG.dtype), size)
        return lambda rows: project(self.hidden_NG[rows])


@dataclass(frozen=True, slots=True)
class Rows:
    """N supervised positions."""

    weights_N: Tensor  # float32; weight of each row in the sum
    targets_N: Tensor  # int64; y
    temperature_N: Tensor | None = None  # float32; replaces the alignment's temperature, for both models
    decoupled_N2: Tensor | None = None  # float32; weights a and b of decoupled KD, which replaces the divergence

    def __getitem__(self, rows: slice) -> Rows:
        temperature = None if self.temperature_N is None else self.temperature_N[rows]
        decoupled = None if self.decoupled_N2 is None else self.decoupled_N2[rows]
        return Rows(self.weights_N[rows], self.targets_N[rows], temperature, decoupled)
