"""A causal language model split into backbone and LM head."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy_skd.models.batch import Batch, collate
from onpolicy_skd.models.document_attention import documents_kept_apart, recomputed_alike
from onpolicy_skd.models.errors import ModelError
from onpolicy_skd.models.lm_head import LMHead
from onpolicy_skd.types import Trajectory

LOGIT_SETTING = re.compile(r"^(?!attn).*(logit|soft_?cap|lm_head_)")  # settings that change logits after the head


@dataclass(frozen=True)
class SplitModel:
    """A causal language model as backbone (everything before the LM head, final norm included) and LM head."""

    model: Any  # a transformers PreTrainedModel
    vocabulary: int  # rows of the head in use
    takes_embeddings: bool = True  # the backbone gives the same states from embeddings as from their ids
    causal: bool = False  # later tokens do not change earlier states, so padding on the right needs no mask
    reads_documents: bool = False  # attention keeps documents apart by their boundaries, without a mask
    forward: Any = None  # replaces a call of the backbone where the model is sharded (ranks.py)
    checkpointed: tuple[Any, ...] = ()  # layers whose activations are recomputed in the backward pass
    scale: float = 1.0  # of the head, see LMHead
    cap: float | None = None

    @property
    def backbone(self) -> Any:
        return self.forward or self.model.base_model

    @property
    def head(self) -> LMHead:
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        if bias is not None and len(bias) != self.vocabulary:
            bias = bias[: self.vocabulary]
        return LMHead(self.head_VH, bias, self.scale, self.cap)

    @property
    def head_VH(self) -> Tensor:
        """The weight of the head."""
        weight = self.model.get_output_embeddings().weight
        return weight if len(weight) == self.vocabulary else weight[: self.vocabulary]  # a slice's gradient is a copy

    @property
    def device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    def embedded(self, batch: Batch) -> Tensor | None:
        """Return embeddings ``[B, L, H]``, a leaf for ``add_embedding_gradient``; None if that is not supported.

        Autograd would compute a gradient of the full table ``[V, H]`` at every micro-batch, for a few rows.
        """
        table = self.model.get_input_embeddings()
        plain = type(table) is torch.nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq
        if not (plain and self.takes_embeddings and table.weight.requires_grad):
            return None
        return torch.nn.functional.embedding(batch.input_ids, table.weight.detach()).requires_grad_()

    @torch.no_grad()
    def add_embedding_gradient(self, batch: Batch, leaf_BLH: Tensor) -> None:
        """Add the gradient of ``leaf_BLH``, from ``embedded``, to that of the table, after the backward pass."""
        table, gradient = self.model.get_input_embeddings(), leaf_BLH.grad
        if gradient is None:
            return
        if table.weight.grad is None:
            table.weight.grad = torch.zeros_like(table.weight)
        if table.padding_idx is not None:
            gradient = gradient.masked_fill((batch.input_ids == table.padding_idx)[..., None], 0.0)
        ids, gradient_TH = batch.input_ids.flatten(), gradient.flatten(0, 1).to(table.weight.dtype)
        if ids.device.type == "cpu":  # the function that adds in a fixed order on this kind of device
            table.weight.grad.index_add_(0, ids, gradient_TH)
        else:
            table.weight.grad.index_put_((ids,), gradient_TH, accumulate=True)

    def hidden(self, batch: Batch, embedded_BLH: Tensor | None = None) -> Tensor:
        """Return the last hidden states ``[N, H]``, after the final norm, at the eligible positions.

        With padding on the right, a causal model gets no mask, because transformers would expand it to four dimensions,
        which rules out FlashAttention and grouped-query kernels.  A model that reads the boundaries of documents gets
        none either.  With documents, other models get a mask ``[B, 1, L, L]``; raises ModelError if their attention
        takes none.
        """
        options: dict[str, Any] = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        attention = nullcontext()
        if batch.right_padded and self.causal:
            options = {"attention_mask": None, "position_ids": None}
        elif batch.cu_seq_lens is not None and self.reads_documents:
            options["attention_mask"], attention = None, documents_kept_apart(self.model)
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.cu_seq_lens)
            options |= dict.fromkeys(("max_length_q", "max_length_k"), batch.max_length)
        elif batch.cu_seq_lens is not None:
            options["attention_mask"] = _mask_for(self.model, batch)
        if torch.is_grad_enabled():
            for layer in self.checkpointed:
                layer.training = True  # until its forward starts, see checkpoint_activations
        with attention:
            out = self.backbone(
                input_ids=batch.input_ids if embedded_BLH is None else None,
                inputs_embeds=embedded_BLH,
                use_cache=False,
                **options,
            )
        return batch.eligible(out.last_hidden_state)


def checkpoint_activations(model: Any) -> tuple[Any, ...]:
    """Make each layer of ``model`` recompute its activations in the backward pass; return the layers.

    The model stays in eval mode, without dropout, layer drop or router noise: a layer is in training mode only while
    transformers decides on checkpointing, and leaves it before its forward starts.  Raises ModelError if the model
    family does not support checkpointing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = tuple(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"student.activation_checkpointing: {type(model).__name__} does not support it; accepted: false"
        )
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": partial(recomputed_alike, model)}
    )
    model.eval()
    for layer in layers:
        layer.register_forward_pre_hook(_leave_training_mode, prepend=True)
    return layers


def _leave_training_mode(layer: Any, _: Any) -> None:
    layer.training = False


def _mask_for(model: Any, batch: Batch) -> Tensor:
    """Return the document mask in the form that ``model``'s attention takes.  Raises ModelError if it takes none."""
    kind = model.config._attn_implementation
    if kind == "sdpa":
        return batch.document_mask()
    if kind == "eager":
        mask_B1LL, least = batch.document_mask(), torch.finfo(model.dtype).min
        return torch.zeros(mask_B1LL.shape, dtype=model.dtype, device=mask_B1LL.device).masked_fill(~mask_B1LL, least)
    raise ModelError(
        f"{type(model).__name__}: its attention ({kind}) takes no mask of documents; accepted with "
        "data.documents=joined, or attention of kind sdpa or eager"
    )


@torch.no_grad()
def check_documents(split_model: SplitModel, pad_id: int, longest: int) -> None:
    """Raise ModelError unless the model keeps packed documents apart, in samples of up to ``longest`` tokens.

    The hidden states of a document must be those that it has alone, up to rounding, and must not change with the tokens
    of the document before it.  The second comparison is stricter, because masked attention multiplies those tokens by
    exactly zero: it finds a leak that the first takes for rounding.
    """
    name = type(split_model.model).__name__
    config = split_model.model.config.get_text_config()
    windowed = getattr(config, "use_sliding_window", True)
    window = getattr(config, "attention_chunk_size", None) or (windowed and getattr(config, "sliding_window", None))
    if window and window < longest:
        raise ModelError(
            f"{name}: its attention reaches {window} tokens back, which a mask of documents would override in samples "
            f"of {longest}; accepted with data.documents=joined and pipeline.packing=false, or shorter samples"
        )
    first, other, second = (np.arange(*r) % split_model.vocabulary for r in ((1, 6), (12, 7, -1), (3, 11)))

    def hidden(ids: np.ndarray, starts: list[int]) -> Tensor:
        zeros = np.zeros(len(ids) - 1, np.float32)
        packed = Trajectory("check", ids[:1], ids[1:], zeros, "stop", None, documents=np.array(starts, np.int64))
        return split_model.hidden(collate([packed], pad_id, split_model.device)).float()

    try:
        together, changed = (hidden(np.concatenate([before, second]), [5])[5:] for before in (first, other))
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # model families fail in different ways on a four-dimensional mask
        raise ModelError(
            f"{name}: takes no attention mask of documents ({type(error).__name__}); accepted with "
            "data.documents=joined and pipeline.packing=false"
        ) from error
    alone = hidden(second, [])
    largest = float(alone.abs().max())
    exact = split_model.head_VH.dtype == torch.float32
    tolerance, leak = (1e-3, 1e-5) if exact else (5e-2, 1e-2)  # the leak is 0, except for experts, whose batches change
    if not (
        torch.allclose(together, alone, rtol=tolerance, atol=tolerance * largest)
        and torch.allclose(together, changed, rtol=0, atol=leak * largest)
    ):
        raise ModelError(
            f"{name}: does not keep packed documents apart (a recurrent layer?); accepted with data.documents=joined "
            "and pipeline.packing=false"
        )


@torch.no_grad()
def split(model: Any, vocabulary: int) -> SplitModel:
    """Split ``model`` into backbone and head, and check by short forwards that together they are the model.

    Raises ModelError for models whose logits are not an ``LMHead`` of the last hidden state, or whose head is not
    finite in the ``vocabulary`` rows in use.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ModelError(f"{name}: has no output embeddings apart from its backbone; accepted: causal language models")
    if model.get_input_embeddings().weight.shape[0] < vocabulary:
        raise ModelError(f"{name}: fewer input embeddings than the vocabulary of {vocabulary}")
    ids = torch.arange(1, 9, device=head.weight.device)[None] % vocabulary
    was_training = model.training
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    scale, cap = _check_head(model, head, ids, hidden, vocabulary)
    takes_embeddings, causal = _takes_embeddings(model, ids, hidden), _is_causal(model, ids, hidden)
    reads_documents = _reads_documents(model, ids, hidden)
    model.train(was_training)
    return SplitModel(model, vocabulary, takes_embeddings, causal, reads_documents, scale=scale, cap=cap)


def _check_head(model: Any, head: Any, ids: Tensor, hidden_BLH: Tensor, vocabulary: int) -> tuple[float, float | None]:
    """Return scale and cap of the model's logits as a function of its head's output on ``hidden_BLH``.

    The head's output is replaced by numbers from 1e-4 to 1e4 of both signs, so the test does not depend on the logits'
    size.  Raises ModelError for other logits.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    states: list[Tensor] = []
    probe_V = _probe(len(head.weight), head.weight.device)

    def replace(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append((inputs[0], output))
        return probe_V.expand_as(output).clone()

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append(output.last_hidden_state.clone())

    handles = [head.register_forward_hook(replace), model.base_model.register_forward_hook(keep)]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    name = type(model).__name__
    transform = _transform(probe_V, logits, model.config) if len(seen) == 1 else None
    if transform is None:
        raise ModelError(
            f"{name}: its logits are not its LM head's output, scaled or with a soft cap ({_logit_settings(model)}); "
            "accepted: models such as Qwen, Llama, Mistral, Gemma, Cohere, Granite, Phi"
        )
    weight, bias, (head_input, output) = head.weight[:vocabulary], getattr(head, "bias", None), seen[0]
    finite = weight.isfinite().all(1) if bias is None else weight.isfinite().all(1) & bias[:vocabulary].isfinite()
    if bad := (~finite).nonzero()[:, 0].tolist():
        raise ModelError(
            f"{name}: {len(bad)} rows of its LM head hold NaN or infinity, the first is token id {bad[0]}; the softmax "
            f"reads all {vocabulary} rows of the shared vocabulary, so they must be finite"
        )
    if not hidden_BLH.isfinite().all():
        raise ModelError(f"{name}: its hidden states are not finite; check its weights")
    states_BLH = states[-1] if states else hidden_BLH  # some models, such as OPT, call a part of their backbone
    products = torch.nn.functional.linear(head_input, weight, None if bias is None else bias[:vocabulary])
    same_states = torch.equal(head_input, states_BLH.to(head_input.dtype)) and _close(states_BLH, hidden_BLH)
    if not same_states or not _close(output[..., :vocabulary], products):
        raise ModelError(
            f"{name}: its LM head does not read the last hidden state (a scale or a layer between them?); accepted: "
            "models whose head follows the final norm"
        )
    return transform


def _probe(size: int, device: torch.device) -> Tensor:
    """Return float32 ``[size]``, ascending: numbers from 1e-4 to 1e4 of both signs, and zero if ``size`` is odd."""
    positive = torch.logspace(-4, 4, size // 2, device=device)
    return torch.cat([-positive.flip(0), positive.new_zeros(size % 2), positive])


def _transform(probe_V: Tensor, logits_BLV: Tensor, config: Any) -> tuple[float, float | None] | None:
    """Return the scale and cap that turn ``probe_V`` into ``logits_BLV``; None if there are none."""
    logits_V = logits_BLV.flatten(0, -2)[0]
    if not torch.equal(logits_BLV, logits_V.expand_as(logits_BLV)):
        return None
    if torch.equal(logits_V, probe_V.to(logits_V.dtype)):
        return 1.0, None
    smallest, values_V = len(probe_V) - len(probe_V) // 2, logits_V.float()
    slope, last_slope = (float(values_V[i] / probe_V[i]) for i in (smallest, -1))
    linear = (_configured(last_slope, config), None)
    capped = (_configured(slope, config), _configured(float(values_V[-1]), config))
    for scale, cap in (linear, capped):
        if not (scale > 0 and (cap is None or cap > 0)):
            continue
        expected_V = LMHead(probe_V[:, None], None, scale, cap).logits_(probe_V.clone())
        if torch.allclose(values_V, expected_V, rtol=1e-5 if logits_V.dtype == torch.float32 else 1e-2, atol=0.0):
            return scale, cap
    return None


def _configured(value: float, config: Any) -> float:
    """Return a logit setting of the config, or its reciprocal, that is within 1 % of ``value``; else ``value``."""
    for key, setting in config.get_text_config().to_dict().items():
        if LOGIT_SETTING.search(key) and type(setting) in (int, float) and setting:
            for exact in (float(setting), 1.0 / setting):
                if abs(value / exact - 1.0) < 1e-2:
                    return exact
    return value


def _logit_settings(model: Any) -> str:
    settings = model.config.get_text_config().to_dict()
    named = ", ".join(f"{k}={v}" for k, v in settings.items() if LOGIT_SETTING.search(k) and v is not None)
    return named or "changed in code"


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Return True if two tensors are equal up to rounding, relative to the largest value."""
    if actual.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    return bool((actual.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())


def _is_causal(model: Any, ids: Tensor, hidden_BLH: Tensor) -> bool:
    """Return True if more tokens after ``ids``, without a mask, leave ``hidden_BLH`` unchanged."""
    longer = torch.cat([ids, ids[:, :1].expand_as(ids)], 1)
    hidden = model.base_model(input_ids=longer, use_cache=False).last_hidden_state[:, : ids.shape[1]]
    return _same_states(hidden, hidden_BLH)


def _reads_documents(model: Any, ids: Tensor, hidden_BLH: Tensor) -> bool:
    """Return True if ``ids`` twice in a row, as two documents, give ``hidden_BLH`` twice without a mask."""
    length = ids.shape[1]
    cu_seq_lens = torch.arange(0, 3 * length, length, dtype=torch.int32, device=ids.device)
    columns = torch.arange(2 * length, device=ids.device)
    batch = Batch(
        ids.repeat(1, 2), torch.ones_like(ids).repeat(1, 2), (columns % length)[None], torch.zeros_like(columns),
        columns, columns, [2 * length], cu_seq_lens=cu_seq_lens, max_length=length,
    )  # fmt: skip
    try:
        hidden = SplitModel(model, 0, reads_documents=True).hidden(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # model families fail in different ways on an attention function that they do not know
        return False
    return _same_states(hidden, hidden_BLH[0].repeat(2, 1))


def _same_states(actual: Tensor, expected: Tensor) -> bool:
    """Return True if hidden states are equal up to the rounding of another kernel."""
    tolerance = 1e-3 if actual.dtype == torch.float32 else 5e-2
    scale = float(expected.abs().max())
    return torch.allclose(actual.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def _takes_embeddings(model: Any, ids: Tensor, hidden_BLH: Tensor) -> bool:
    """Return True if embeddings as input give ``hidden_BLH`` too; some families scale them, or read the ids."""
    embeddings = model.get_input_embeddings()(ids)
    try:
        hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    except (TypeError, ValueError):  # it takes no embeddings
        return False
    return torch.allclose(hidden.float(), hidden_BLH.float(), rtol=1e-3, atol=1e-3)
