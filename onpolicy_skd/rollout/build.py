"""Build the rollout engine that the settings name."""

from __future__ import annotations

from onpolicy_skd.config.schema import Settings
from onpolicy_skd.rollout.engine import RolloutEngine
from onpolicy_skd.rollout.transformers_engine import TransformersEngine


def build_engine(model: str, settings: Settings, trust_remote_code: bool = False) -> RolloutEngine:
    """Return the engine that ``rollout.engine`` names, with the weights of ``model``.  Raises ModelError."""
    if settings.rollout.engine == "vllm":
        from onpolicy_skd.rollout.vllm_engine import VLLMEngine  # vLLM is optional and slow to import

        return VLLMEngine(model, settings, trust_remote_code)
    return TransformersEngine(model, settings, trust_remote_code)
