"""The learner's state: the tensors of a checkpoint, and the student's weights for engines and for saved models."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from onpolicy_skd.distributed.ranks import Ranks, shard_like
from onpolicy_skd.distributed.weight_transfer import WeightSpec
from onpolicy_skd.learner.objective import Objective
from onpolicy_skd.learner.optimizer import load_optimizer_tensors, optimizer_tensors
from onpolicy_skd.learner.precision import LossScale
from onpolicy_skd.learner.probe import Probe
from onpolicy_skd.models.generation_config import savable_generation_config
from onpolicy_skd.models.lora import LORA, merged_parameters
from onpolicy_skd.models.split_model import SplitModel
from onpolicy_skd.selection.selector import Selector
from onpolicy_skd.storage import checkpoint, files


@dataclass
class LearnerState:
    """Everything that training changes."""

    student: SplitModel
    named: dict[str, torch.nn.Parameter]  # trainable parameters: float32 masters
    optimizer: torch.optim.Optimizer
    selector: Selector
    objective: Objective
    ranks: Ranks
    dtype: torch.dtype  # compute dtype of the forward
    version: int = 0  # optimizer steps done
    probe: Probe | None = None  # of the bandit

    def __post_init__(self) -> None:
        self.loss_scale = LossScale(self.dtype)

    def reshard(self) -> None:
        """Drop gathered parameters before the shards are read or written."""
        self.ranks.reshard(self.student)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint by name: masters, moments, selector, objective, probe, loss scale.

        Rank 0 gets full tensors, so that a run may resume with another number of ranks.  Other ranks cannot use theirs.
        """
        sections: dict[str, Mapping[str, Tensor]] = {
            "model": self.named,
            "selector": self.selector.state_dict(),
            "objective": self.objective.state_dict(),
            "probe": self.probe.state_dict() if self.probe else {},
            "loss_scale": self.loss_scale.state_dict(),
        }
        tensors = {f"{section}/{n}": t.detach() for section, named in sections.items() for n, t in named.items()}
        tensors |= optimizer_tensors(self.optimizer, self.named)
        self.ranks.reshard(self.student)
        return {name: self._gathered(tensor) for name, tensor in tensors.items()}

    def _gathered(self, tensor: Tensor) -> Tensor:
        """Return the full tensor, moved to the CPU if it was sharded, so that the next one fits the device."""
        full = self.ranks.full_tensor(tensor)
        return full if full is tensor else full.cpu()

    def restore(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Load what ``tensors`` returned.  Raises CheckpointError if the checkpoint belongs to another model."""
        sections: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for full_name, tensor in tensors.items():
            section, _, name = full_name.partition("/")
            sections[section][name] = tensor
        if odd := sorted(set(self.named) ^ set(sections["model"])):
            raise checkpoint.CheckpointError(f"the checkpoint belongs to another model: parameter {odd[0]} differs")
        self.ranks.reshard(self.student)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(shard_like(sections["model"][name], parameter))
        load_optimizer_tensors(self.optimizer, self.named, tensors, shard_like)
        self.version = version
        self.loss_scale.load_state_dict(sections["loss_scale"])
        if version:  # a checkpoint from before the first step lacks these
            self.selector.load_state_dict(sections["selector"])
            self.objective.load_state_dict(sections["objective"])
            self.probe = Probe.from_state_dict(sections["probe"]) if sections["probe"] else None

    def weights(self, dtype: torch.dtype | None = None, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors as in a transformers checkpoint; a tied LM head is left out.

        Rank 0 gets full tensors; the other ranks get them only with ``everywhere``.
        """
        self.ranks.reshard(self.student)
        gather = partial(self.ranks.full_tensor, everywhere=everywhere)
        for name, compute in merged_parameters(self.student.model, gather):
            tensor = compute()
            yield name, tensor.to(dtype or tensor.dtype)

    def weight_spec(self, dtype: torch.dtype) -> WeightSpec:
        """Return names, dtypes and shapes of what ``weights`` yields."""
        shapes = merged_parameters(self.student.model, lambda tensor: torch.empty(tensor.shape, device="meta"))
        return WeightSpec.of((name, dtype, compute().shape) for name, compute in shapes)

    def save_pretrained(self, folder: Path, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        """Save the student as a plain transformers checkpoint in ``dtype`` (the compute dtype); rank 0 writes it.

        Merged adapters are saved in float32, since bfloat16 may round away their effect.  Generation settings that
        transformers refuses to save are left out.  Raises SaveError, with nothing changed, if writing fails, for
        example on a full disk.
        """
        dtype = torch.float32 if any(LORA in name for name in self.named) else dtype or self.dtype
        state = {name: tensor.cpu() for name, tensor in self.weights(dtype)}
        if self.ranks.rank:
            return
        model = self.student.model
        saved_buffers = model.state_dict().keys()
        state |= {name: buffer for name, buffer in model.named_buffers() if name in saved_buffers}
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        config_dtype, generation_config = model.config.dtype, model.generation_config
        try:
            model.generation_config = savable_generation_config(generation_config)
            model.save_pretrained(temporary, state_dict=state)
            model.config.dtype = dtype  # save_pretrained has set it to the dtype of the masters
            model.config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            files.replace_folder(folder, temporary)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise files.SaveError(f"the student cannot be written to {folder}: {error}") from error
        finally:
            model.config.dtype, model.generation_config = config_dtype, generation_config
