"""Where a run's figures go besides its own log: TensorBoard or wandb, where they are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from d2c.errors import UsageError

Log: TypeAlias = Literal["tensorboard", "wandb"]


class Writer(Protocol):
    """Takes figures and pictures by name."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def picture(self, step: int, name: str, png: Path) -> None: ...
    def close(self) -> None: ...


def open_writers(names: Sequence[str], run: Path, facts: Mapping[str, Any]) -> list[Writer]:
    """A writer for each name; ``facts`` are what the run was asked for.

    Raises:
        UsageError: its package is not installed.
    """
    return [_open(name, run, facts) for name in names]


def _open(name: str, run: Path, facts: Mapping[str, Any]) -> Writer:
    try:
        return _TensorBoard(run) if name == "tensorboard" else _Wandb(run, facts)
    except ImportError as error:
        hint = f"pip install d2c-toolkit[{name}]"
        raise UsageError(f"{name} is not installed", found=str(error), hint=hint) from error


class _TensorBoard:
    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(png) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: Path, facts: Mapping[str, Any]) -> None:
        import wandb

        # The folder's name is the run's id: one that is resumed goes on in the same place.
        self._wandb: Any = wandb
        self._run = self._wandb.init(project="d2c", id=run.name, name=run.name, resume="allow", config=dict(facts))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: Path) -> None:
        self._run.log({name: self._wandb.Image(str(png))}, step=step)

    def close(self) -> None:
        self._run.finish()
