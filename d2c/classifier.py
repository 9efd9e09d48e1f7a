"""A small classifier of the user's own labelled images, to measure with where no published network is at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from d2c.errors import D2CError
from d2c.features import INCEPTION_FILE, checked_pixels
from d2c.progress import Progress, Silent
from formats.errors import IntegrityError
from formats.files import read_json, write_bytes, write_json
from formats.hashing import xxh3

Array: TypeAlias = np.ndarray[Any, Any]

_MAX_SIDE = 64  # the classifier sees larger images area-averaged to this side
_WIDTHS = (32, 64, 128, 128)


@dataclass(frozen=True)
class ClassifierInfo:
    """How a classifier came about. ``labels``: the class id of each output; ``accuracy``: on the held-out tenth."""

    labels: tuple[int, ...]
    side: int
    accuracy: float
    images: int
    steps: int
    seed: int


class _Net(nn.Module):
    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(_WIDTHS):
            if stage and side >= 4:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            for _ in range(1 if stage == 0 else 2):  # the first stage has the most pixels: one layer
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def features(self, images: Tensor) -> Tensor:  # float [n, 3, s, s] in [-1, 1] -> [n, 128]
        return self.body(images).mean(dim=(2, 3))  # type: ignore[no-any-return]  # nn.Sequential returns Any

    def forward(self, images: Tensor) -> Tensor:  # -> logits [n, classes]
        return self.head(self.features(images))  # type: ignore[no-any-return]  # nn.Linear's call returns Any


class Classifier:
    """A small network trained on the user's own labelled images: 128 features before its last layer."""

    name = "classifier"
    dim = _WIDTHS[-1]

    def __init__(self, net: _Net, info: ClassifierInfo, device: torch.device) -> None:
        self.info = info
        self._net, self._device = net.to(device).eval(), device
        self.digest = xxh3(self._weights())

    def __call__(self, pixels: Array) -> Array:
        """Features float64 [n, 128] of pixels u1 [n, s, s, 3], resized to the side of the training images."""
        return np.asarray(self._run(pixels, self._net.features), np.float64)

    def predict(self, pixels: Array) -> Array:
        """Class ids int32 [n] of pixels u1 [n, s, s, 3]."""
        labels: Array = np.asarray(self.info.labels, np.int32)[self._run(pixels, self._net).argmax(axis=1)]
        return labels

    def save(self, directory: Path) -> None:
        """Write classifier.safetensors and, last, classifier.json."""
        write_bytes(directory / "classifier.safetensors", self._weights())
        write_json(directory / "classifier.json", {**asdict(self.info), "digest": self.digest})

    @classmethod
    def load(cls, directory: Path, device: torch.device) -> Classifier:
        """Read what `save` wrote.

        Raises:
            IntegrityError: the weights are not those that the description names.
            D2CError: there is no classifier in ``directory``.
        """
        try:
            fields = read_json(directory / "classifier.json")
            weights = (directory / "classifier.safetensors").read_bytes()
        except FileNotFoundError as error:
            raise D2CError("no classifier here", where=directory, hint="train it with d2c fid") from error
        if xxh3(weights) != fields["digest"]:
            raise IntegrityError(
                "the classifier's weights are not those its description names",
                where=directory,
                found=xxh3(weights),
                expected=fields["digest"],
                hint="delete the directory and run the same command again to train a new one",
            )
        info = ClassifierInfo(
            labels=tuple(fields["labels"]),
            side=fields["side"],
            accuracy=fields["accuracy"],
            images=fields["images"],
            steps=fields["steps"],
            seed=fields["seed"],
        )
        net = _Net(len(info.labels), info.side)
        net.load_state_dict(load(weights))
        return cls(net, info, device)

    def _weights(self) -> bytes:
        return save({name: tensor.cpu().contiguous() for name, tensor in self._net.state_dict().items()})

    def _run(self, pixels: Array, function: Callable[[Tensor], Tensor]) -> Array:
        results = []
        with torch.inference_mode():
            for start in range(0, len(checked_pixels(pixels)), 256):
                images = _resized(pixels[start : start + 256], self.info.side)
                results.append(function(_to_float(images.to(self._device))).cpu())
        return np.asarray(torch.cat(results).numpy())


def train_classifier(
    pixels: Array,
    labels: Array,
    *,
    device: torch.device,
    seed: int = 0,
    steps: int | None = None,
    batch: int = 128,
    progress: Progress | None = None,
) -> Classifier:
    """Train a classifier on pixels u1 [n, s, s, 3] and labels int [n]; the same bytes for the same input on one CPU.

    A tenth of the images, taken class by class, is held out and only measures accuracy. Images are shifted by up to an
    eighth of their side and never mirrored: letters and digits do not survive that.

    ``steps`` default to eight passes over the images, but no fewer than 200 and no more than 1,000. With another number
    of threads torch adds in another order, and the bytes differ.

    Raises:
        D2CError: there are fewer than two classes or fewer than 20 images.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2 or len(checked_pixels(pixels)) < 20:
        raise D2CError(
            "these images cannot train a classifier to measure with",
            found=f"{len(pixels)} images in {len(classes)} class{'es' if len(classes) != 1 else ''}",
            expected="at least 20 images in at least 2 classes",
            hint=f"measure with the published network instead: --inception FILE ({INCEPTION_FILE})",
        )
    side = min(pixels.shape[1], _MAX_SIDE)
    images = torch.cat([_resized(pixels[i : i + 256], side) for i in range(0, len(pixels), 256)])
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(images), generator=generator).numpy()
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    held_out = by_class[::10]
    kept = torch.from_numpy(np.setdiff1d(by_class, held_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Net(len(classes), side)
    steps = min(1000, max(200, 8 * len(images) // batch)) if steps is None else steps
    info = ClassifierInfo(tuple(int(c) for c in classes), side, float("nan"), len(images), steps, seed)
    _fit(net.to(device), images, torch.from_numpy(targets), kept, generator, device, steps, batch, progress or Silent())
    classifier = Classifier(net, info, device)
    accuracy = float(np.mean(classifier.predict(pixels[held_out]) == classes[targets[held_out]]))
    classifier.info = replace(info, accuracy=accuracy)
    return classifier


def _fit(
    net: _Net,
    images: Tensor,  # u1 [n, 3, s, s]
    targets: Tensor,  # int64 [n]
    kept: Tensor,  # int64: rows to train on
    generator: torch.Generator,
    device: torch.device,
    steps: int,
    batch: int,
    progress: Progress,
) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    net.train()
    with progress.bar("classifier", total=steps, unit="step") as bar:
        for _ in range(steps):
            rows = kept[torch.randint(len(kept), (batch,), generator=generator)]
            shifted = _to_float(_shifted(images[rows], generator).to(device))
            loss = F.cross_entropy(net(shifted), targets[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
            bar.advance()


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image u1 [n, 3, s, s] moved by up to s // 8 pixels both ways, its border repeated."""
    n, _, side, _ = images.shape
    reach = side // 8
    moves = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator)
    rows, columns = (torch.arange(side) + moves).clamp(0, side - 1)
    return images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _resized(pixels: Array, side: int) -> Tensor:
    """Pixels u1 [n, s, s, 3] -> u1 [n, 3, side, side], averaged over areas."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images.float(), size=(side, side), mode="area").round().to(torch.uint8)


def _to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
