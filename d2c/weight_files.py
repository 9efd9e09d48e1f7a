"""The tensors of a weight file, read so that nothing in it is executed."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2c import checkpoint
from d2c.errors import D2CError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The model's named tensors, the averaged ones where a training checkpoint has both; and whether d2c wrote them.

    Raises:
        D2CError: the file is damaged, holds code or other objects, no named tensors, or a run's training state.
    """
    if path.suffix not in SUFFIXES:
        raise D2CError("this is not a weight file", where=path, expected="a file ending in " + ", ".join(SUFFIXES))
    if path.suffix != ".safetensors":
        return _unwrap(_unpickle(path), path), False
    tensors, facts = checkpoint.load_tensors(path)
    if any(name.startswith("opt.") for name in tensors):
        raise D2CError(
            "this is the training state of a run, not its result",
            where=path,
            hint="finish the run with d2c train, then give its folder",
        )
    return _unwrap(tensors, path), bool(facts)


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # Training checkpoints keep their command line beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can fail in any way: a dozen kinds were seen
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        lines = str(error).splitlines() or [""]
        # torch begins with the advice to load it anyway.
        told = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        raise D2CError(
            "this weight file holds more than tensors and was refused" if refused else "this weight file is damaged",
            where=path,
            found=refused[1] if refused else f"{type(error).__name__}: {told}",
            hint="save its tensors alone as .safetensors and give that file" if refused else "fetch it again",
        ) from error
    if not isinstance(content, dict):
        raise D2CError("this file holds no named tensors", where=path, found=type(content).__name__)
    return content


def _unwrap(content: Mapping[str, Any], where: Path) -> dict[str, Tensor]:
    """The named tensors, from under the names that training scripts give them and without the prefix that DDP adds."""
    for nest in ("ema", "state_dict_ema", "model", "state_dict"):
        if isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    state = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise D2CError("this file holds no named tensors", where=where, found=", ".join(map(str, list(content)[:5])))
    return state
