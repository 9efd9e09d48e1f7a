"""A model's training state cut up among the GPUs (FSDP2), where it does not fit on each of them.

What is cut up is a DTensor, of which every rank holds some rows. Files hold whole tensors: `host_copies` puts them
together and `placed` cuts them again, so that a checkpoint does not know how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2c.errors import D2CError, UsageError
from d2c.sit import ModelSpec, SiT

CHOICES = ("auto", "yes", "no")
_BYTES = 20
"""Of a parameter's training state in float32: weight, gradient, AdamW's two moments and the average."""
_SHARE = 0.7
"""Of a GPU's memory that the state may take; activations and images need the rest."""


@dataclass(frozen=True)
class Sharding:
    """Whether the state is cut up, and why."""

    on: bool
    why: str


def decide(asked: str, spec: ModelSpec, device: torch.device, world: int) -> Sharding:
    """What ``asked`` (one of `CHOICES`) means for this model on ``world`` GPUs like ``device``.

    Raises:
        UsageError: one process is to share the state.
        D2CError: this torch has no FSDP2.
    """
    if asked == "yes" and world == 1:
        raise UsageError(
            "one process has nobody to share the training state with",
            found="--shard yes",
            hint="add --gpus N or start it with torchrun, or leave --shard out",
        )
    decided = _decide(asked, spec, device, world)
    if decided.on:
        from torch.distributed import fsdp

        if not hasattr(fsdp, "fully_shard"):
            raise D2CError(
                "this torch cannot cut a model's training state up among GPUs",
                found=f"torch {torch.__version__}",
                expected="2.6 or later",
                hint="--shard no keeps all of it on every GPU",
            )
    return decided


def _decide(asked: str, spec: ModelSpec, device: torch.device, world: int) -> Sharding:
    if asked != "auto":
        return Sharding(asked == "yes", f"--shard {asked}")
    if world == 1:
        return Sharding(False, "one process")
    if device.type != "cuda":
        return Sharding(False, "processes on a CPU share its memory")
    needed, memory = state_bytes(spec), torch.cuda.get_device_properties(device).total_memory
    on = needed > _SHARE * memory
    return Sharding(
        on,
        f"weights, gradients, moments and averages are {needed / 1e9:,.1f} GB, {'more' if on else 'no more'} than "
        f"{_SHARE:.0%} of a GPU's {memory / 1e9:,.1f} GB",
    )


def state_bytes(spec: ModelSpec) -> int:
    """Bytes of a whole model's training state."""
    return _BYTES * sum(parameter.numel() for parameter in _empty(spec).parameters())


def shard(model: SiT, device: torch.device, world: int, precision: str) -> None:
    """Cut up ``model`` in place, one block after the other, and move it to ``device`` so: it is never there whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world,))
    # Linear maps round their weights to what autocast computes in, with the same result. Where autocast does it, its
    # copies of all blocks live until the backward pass; normalised queries and keys have weights that it leaves alone.
    dtype = None if model.spec.qk_norm else {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def assembled(spec: ModelSpec, weights: Mapping[str, Tensor], device: torch.device) -> SiT:
    """A whole model on ``device`` with these weights."""
    model = _empty(spec)
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def _empty(spec: ModelSpec) -> SiT:
    with torch.device("meta"):
        return SiT(spec)


def host_copies(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies in host memory for those ranks that ``keep`` them, one tensor at a time.

    Where tensors are cut up, every rank must call this.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=True)
    return copies


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` put together; every rank must call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's rows of ``tensor``, in the same memory and without a gradient."""
    rows: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
    return rows


def placed(full: Tensor, like: Tensor) -> Tensor:
    """``full``, cut up as ``like`` is where their shapes agree; every rank brings the same ``full``."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None or full.shape != like.shape:
        return full
    from torch.distributed.tensor import DTensor

    # As fully_shard cuts: rows in equal pieces, of which the last may be shorter or empty.
    size, rank = -(-len(full) // mesh.size()), mesh.get_local_rank()
    rows = full[rank * size : (rank + 1) * size]
    return DTensor.from_local(
        rows, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()  # type: ignore[attr-defined]
    )  # fmt: skip
