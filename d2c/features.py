"""Named feature spaces in which two sets of images are compared.

A number is called FID only in the space of the published Inception weights; every other space lends its own name.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from d2c.errors import D2CError
from d2c.vision import VisionEncoder
from formats.hashing import sha256_file

Array: TypeAlias = np.ndarray[Any, Any]

INCEPTION = "inception-v3-compat"
INCEPTION_SHA256 = "6726825d"  # first digits, which the published file also carries in its name
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_PAGE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
_SPATIAL = 7
"""Channels of mixed_6/conv that sFID looks at: 17 x 17 x 7 = 2,023 numbers (Nash et al. 2021, as ADM computes it)."""


class FeatureSpace(Protocol):
    """Pixels u1 [n, s, s, 3] -> features float64 [n, dim]; ``digest`` names the exact weights."""

    name: str
    digest: str
    dim: int

    def __call__(self, pixels: Array) -> Array: ...


@dataclass(frozen=True)
class Activations:
    """What one pass of a network over n images gives.

    ``features`` float64 [n, dim]. Inception also gives ``spatial`` float32 [n, 2023], for sFID, and ``logits`` float32
    [n, 1008] without their bias, for the Inception score.
    """

    features: Array
    spatial: Array | None = None
    logits: Array | None = None


def activations(space: FeatureSpace, pixels: Array) -> Activations:
    """All that ``space`` can tell of pixels u1 [n, s, s, 3]."""
    return space.activations(pixels) if isinstance(space, Inception) else Activations(space(pixels))


def distance_name(space: FeatureSpace) -> str:
    """What a Frechet distance in ``space`` may be called: FID with the published Inception weights only."""
    return "FID" if space.name == INCEPTION else f"FD ({space.name})"


def checked_pixels(pixels: Array) -> Array:
    """``pixels`` as they are. Raises: D2CError: they are no RGB images u1 [n, s, s, 3]."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise D2CError(
            "features are computed from RGB images",
            found=f"{pixels.dtype} {pixels.shape}",
            expected="uint8 [n, side, side, 3]",
        )
    return pixels


class Inception:
    """The 2015 Inception network of FID (Heusel et al. 2017) through torch-fidelity: 2,048 pooled features.

    Raises:
        D2CError: the weights file is missing or does not fit the network.
    """

    dim = 2048

    def __init__(self, weights: Path, device: torch.device, batch: int = 64) -> None:
        from torch_fidelity.utils import create_feature_extractor

        if not weights.is_file():
            raise no_inception(weights)
        self.digest = sha256_file(weights)
        published = self.digest.startswith(INCEPTION_SHA256)
        self.name = INCEPTION if published else f"inception-{self.digest[:8]}"
        try:
            if not published:  # torch-fidelity unpickles without limits: let only plain tensors through
                torch.load(weights, map_location="cpu", weights_only=True)
            network = create_feature_extractor(
                INCEPTION,
                ["2048", "logits_unbiased"],
                cuda=False,
                feature_extractor_weights_path=str(weights),
                verbose=False,
            )
        except (
            RuntimeError,
            ValueError,
            EOFError,
            KeyError,
            TypeError,
            AttributeError,
            pickle.UnpicklingError,
        ) as error:
            unsafe = isinstance(error, pickle.UnpicklingError)
            raise D2CError(
                "this file does not hold weights of the 2015 Inception network",
                where=weights,
                found="no plain table of tensors" if unsafe else (str(error) or type(error).__name__).splitlines()[0],
                expected=f"{INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...)",
                hint=f"download it from {_INCEPTION_PAGE}",
            ) from error
        self._network = network.to(device)
        self._device, self._batch = device, batch
        self._spatial: list[Tensor] = []
        # TensorFlow's mixed_6/conv: the first branch of what torch-fidelity calls Mixed_6d.
        network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: self._spatial.append(output))

    def __call__(self, pixels: Array) -> Array:
        """Features float64 [n, 2048] of pixels u1 [n, s, s, 3]; the network resizes to 299 as TensorFlow 1 did."""
        return self.activations(pixels).features

    def activations(self, pixels: Array) -> Activations:
        """Features, the numbers of sFID in TensorFlow's order (row, column, channel), and logits without their bias."""
        found: list[tuple[Tensor, ...]] = []
        with torch.inference_mode():
            for start in range(0, len(checked_pixels(pixels)), self._batch):
                images = torch.from_numpy(
                    np.ascontiguousarray(pixels[start : start + self._batch].transpose(0, 3, 1, 2))
                )
                pooled, logits = self._network(images.to(self._device))
                spatial = self._spatial.pop()[:, :_SPATIAL].permute(0, 2, 3, 1).flatten(1)
                found.append((pooled.cpu(), spatial.cpu(), logits.cpu()))
        if not found:
            return Activations(*(np.empty((0, width), np.float32) for width in (self.dim, 2023, 1008)))
        joined = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
        return Activations(joined[0].astype(np.float64), joined[1], joined[2])


def inception_file(weights: Path | None) -> Path:
    """``weights``, else where torch hub keeps the published file, whether it is there or not."""
    return weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def fetch_inception() -> Path:
    """The published weights where torch hub keeps its downloads; downloaded if they are not there, and checked.

    Raises:
        D2CError: they cannot be reached, or what came is another file.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = inception_file(None)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise D2CError(
                "the Inception weights of FID could not be downloaded",
                where=URL_INCEPTION_V3,
                found=str(error),
                expected=f"{INCEPTION_FILE} (96 MB, sha256 {INCEPTION_SHA256}...)",
                hint=f"download it elsewhere and put it at {path}, or name it with --inception FILE",
            ) from error
    return path


def open_inception(weights: Path | None, device: torch.device) -> Inception:
    """Inception with the given weights file, else with the published one where torch hub keeps its downloads.

    Raises:
        D2CError: there is no such file; nothing is downloaded.
    """
    return Inception(inception_file(weights), device)


def no_inception(path: Path) -> D2CError:
    """What to say where the weights are not at ``path``: where to get them, where to put them, and what else to do."""
    return D2CError(
        "the Inception weights of FID are missing",
        where=path,
        expected=f"{INCEPTION_FILE} (96 MB, sha256 {INCEPTION_SHA256}...)",
        hint=f"download it from {_INCEPTION_PAGE} and put it there, or name it with --inception FILE; or leave "
        "--inception out and measure in the space of a classifier of your own labelled images, which `d2c score` makes "
        "possible; --second adds the space of a vision encoder",
    )


class VisionSpace:
    """The space of a vision encoder: its class token where it has one, else the mean of its patch tokens."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self._encoder = encoder
        self.name = encoder.info.name
        self.digest = encoder.info.weights_xxh3
        self.dim = encoder.info.dim

    def __call__(self, pixels: Array) -> Array:
        """Features float64 [n, dim] of pixels u1 [n, s, s, 3]."""
        found = [np.empty((0, self.dim))]
        for start in range(0, len(checked_pixels(pixels)), 64):
            part = pixels[start : start + 64]
            tokens = self._encoder.encode(part, np.zeros(len(part), np.int64)).astype(np.float64)
            found.append(tokens[:, 0] if self._encoder.info.class_token else tokens.mean(axis=1))
        return np.concatenate(found)
