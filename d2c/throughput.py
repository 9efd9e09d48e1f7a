"""Keep a GPU busy: compiled blocks, batches of one shape, and copies that the host does not wait for.

On a CPU each of these is the plain thing, so that nothing it computes depends on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from d2c.sit import SiT

T = TypeVar("T")

_COMPILED = 200_000
"""Images from which on compiling pays: it takes about a minute, in which a small model sees more, a large one fewer."""

_SHAPES = 64
"""Programs of a block, one for each shape, precision and model, that a process may need."""


def compile_blocks(model: SiT, device: torch.device, backend: str = "inductor") -> None:
    """Compile the transformer's blocks in place, on a GPU; they share one program for each shape of a batch.

    Block by block, not as a whole: XL then compiles in the time of one block, and ``hidden`` gains too.
    """
    if device.type == "cuda":
        from torch._dynamo import config

        # Past this number, which all models of a process share, a new shape is an error; torch's own is 8.
        name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
        setattr(config, name, max(getattr(config, name), _SHAPES))
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False, backend=backend)


def pays(device: torch.device, images: int) -> bool:
    """Whether compiling a model that is to see so many images costs less time than it saves, on this device."""
    return device.type == "cuda" and images >= _COMPILED


def padded(batch: Tensor, rows: int, device: torch.device) -> Tensor:
    """On a GPU ``batch`` [n, ...] with its last row repeated up to ``rows``; elsewhere as it is.

    A compiled program, and the choice of a GPU's kernels, belongs to one shape. A row's result then does not depend
    on how many others its batch has lost to unreadable files.
    """
    missing = rows - len(batch)
    if device.type != "cuda" or missing <= 0:
        return batch
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """``array`` on ``device``; to a GPU it goes through pinned memory, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Coming:
    """Values on their way from a GPU to the host; `numpy` waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values in host memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def one_behind(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """The same items; with a GPU each is given only when the next one's work is queued, so that it never idles."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if device.type != "cuda" or len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
