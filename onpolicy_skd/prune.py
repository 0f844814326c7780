"""Make a smaller student from a model: remove some layers, keep everything else.

``--model HuggingFaceTB/SmolLM2-135M-Instruct --every 2 --out models/smollm2-pruned`` keeps each second layer,
``--every 1 --without 12 13`` removes just these.  ``--every 1`` alone keeps all layers: with ``--gguf-file`` it turns a
GGUF file (32-bit weights after dequantisation) into an ordinary transformers checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onpolicy_skd.config.errors import ConfigError
from onpolicy_skd.models.loading import ModelError, load_tokenizer, resolve_path


def prune_layers(model: Any, stride: int = 1, without: Sequence[int] = ()) -> Any:
    """Return a copy of ``model`` with layers 0, stride, 2 * stride, ... of its backbone, except those in ``without``.

    Raises ModelError if it has no list of layers, or if none would be left.
    """
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise ModelError(f"{type(model).__name__}: its backbone has no list of layers to prune")
    kept = [i for i in range(0, len(layers), stride) if i not in without]
    if not kept:
        raise ModelError(f"{type(model).__name__}: none of its {len(layers)} layers would be left")
    config = type(model.config).from_dict(_without_quantization(model.config.to_dict()))
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.dtype = torch.float32
    pruned = type(model)(config).float()
    state = {}
    for name, tensor in model.state_dict().items():
        prefix, separator, suffix = name.partition(".layers.")
        if not separator:
            state[name] = tensor
        else:
            number, _, parameter = suffix.partition(".")
            if int(number) in kept:
                state[f"{prefix}.layers.{kept.index(int(number))}.{parameter}"] = tensor
    pruned.load_state_dict(state)
    pruned.generation_config = model.generation_config
    return pruned


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "quantization_config"}


def main(argv: Sequence[str] | None = None, prog: str = "python -m onpolicy_skd.prune") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="hub name or folder")
    parser.add_argument("--gguf-file", help="a GGUF file within --model (needs the package gguf)")
    parser.add_argument(
        "--every", dest="stride", metavar="N", type=int, default=2, help="keep layers 0, N, 2N, ... (default: 2)"
    )
    parser.add_argument("--without", type=int, nargs="+", default=(), metavar="N", help="leave out these layers too")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    args = parser.parse_args(argv)
    try:
        if args.stride < 1:
            raise ConfigError(f"--every {args.stride}: accepted: at least 1")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"gguf_file": args.gguf_file} if args.gguf_file else {}
        folder = args.model if args.gguf_file else resolve_path(args.model)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options) if options else load_tokenizer(args.model)
        pruned = prune_layers(model, args.stride, args.without)
    except (ConfigError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pruned.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {pruned.config.num_hidden_layers} layers, {pruned.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
