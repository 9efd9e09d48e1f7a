"""From the names of ``diffusers.DiTTransformer2DModel`` to the official ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2c.errors import D2CError

_BLOCK = r"transformer_blocks\.(\d+)\."
_FROM_DIFFUSERS = {  # stem of a diffusers name -> stem of the official name
    r"pos_embed\.proj": "x_embedder.proj",
    _BLOCK + r"norm1\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    _BLOCK + r"norm1\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    _BLOCK + r"norm1\.emb\.class_embedder\.embedding_table": "y_embedder.embedding_table",
    _BLOCK + r"norm1\.linear": r"blocks.\1.adaLN_modulation.1",
    _BLOCK + r"attn1\.to_([qkv])": r"blocks.\1.attn.\2",
    _BLOCK + r"attn1\.to_out\.0": r"blocks.\1.attn.proj",
    _BLOCK + r"ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
    _BLOCK + r"ff\.net\.2": r"blocks.\1.mlp.fc2",
    r"proj_out_1": "final_layer.adaLN_modulation.1",
    r"proj_out_2": "final_layer.linear",
}
_DIT = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
"""What makes a transformer of diffusers a DiT; its DiT class takes these where the file is silent."""


def grid_and_heads(config: Any, where: Path) -> tuple[int, int]:
    """Tokens along one side and attention heads, from the ``config.json`` beside the weights.

    Raises:
        D2CError: it describes no DiT.
    """
    config = config if isinstance(config, dict) else {}
    kind = config.get("_class_name")
    # The published DiT folders are older than the DiT class of diffusers, and name the general one.
    usual = _DIT if kind == "DiTTransformer2DModel" else {}
    found = {name: config.get(name, usual.get(name)) for name in _DIT}
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel") or found != _DIT:
        raise D2CError(
            "these diffusers weights are no DiT",
            where=where,
            found={"_class_name": kind, **found},
            expected={"_class_name": "DiTTransformer2DModel", **_DIT},
        )
    # What diffusers takes where the file is silent. Its weight files hold no positions; these are fixed.
    taken = {"sample_size": 32, "patch_size": 2, "num_attention_heads": 16}
    sizes = {name: config.get(name, usual) for name, usual in taken.items()}
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise D2CError("these sizes of a DiT are impossible", where=where, found=sizes, expected="positive integers")
    return sizes["sample_size"] // sizes["patch_size"], sizes["num_attention_heads"]


def convert_diffusers(state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors under the official names, all but the fixed ``pos_embed``.

    Raises:
        D2CError: a tensor is unknown, or the blocks' copies of the embedders differ, which no official model can hold.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        name = next((re.sub(old, new, stem) for old, new in _FROM_DIFFUSERS.items() if re.fullmatch(old, stem)), None)
        if name is None:
            raise D2CError("a DiT of diffusers has no such tensor", where=where, found=f"{key} {tuple(value.shape)}")
        earlier = converted.setdefault(f"{name}.{leaf}", value)
        if earlier is not value and not torch.equal(earlier, value):
            raise D2CError("the blocks of these diffusers weights use different embedders", where=where, found=key)
    for key in [key for key in converted if ".attn.q." in key]:
        names = [key.replace(".q.", f".{part}.") for part in "qkv"]
        parts = [converted.pop(name, torch.empty(0)) for name in names]
        if len({part.shape for part in parts}) > 1:
            found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise D2CError("the parts of an attention differ in shape", where=where, found=found)
        converted[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return converted
