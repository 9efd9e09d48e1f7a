"""Token codecs: how a sample's [tokens, channels] array becomes few bytes, and what that cost.

Every channel is divided by its root mean square over the data set, so that outlier channels do not eat the range; then
every token is rounded against a scale of its own. ``value = level(code) * (scale[token] * rms[channel])``; a direction,
as an alignment loss wants it, needs ``level(code) * rms`` only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats.errors import FormatError
from formats.schema import CODECS, INT4, INT8, RAW, Column

Floats = NDArray[np.float32]

_STEP = 0.335
"""Of the 16-level uniform quantiser that is best for a unit normal distribution (Max 1960, table II)."""
_REFITS = 2
_TINY = np.float32(1e-30)
_BIN, _FINEST = 0.01, 1e-8


def columns(name: str, codec: str, shape: tuple[int, ...]) -> list[Column]:
    """The columns that hold arrays of ``shape`` [T, D] in ``codec``: the codes, and the scale of every token.

    Raises:
        FormatError: an unknown codec, or a shape that it cannot hold.
    """
    if codec == RAW:
        return [Column(name, "f2", shape)]
    if codec not in CODECS:
        raise FormatError("unknown codec", where=name, found=codec, expected=", ".join(CODECS))
    if len(shape) != 2 or (codec == INT4 and shape[1] % 2):
        raise FormatError(f"codec {codec} cannot hold this shape", where=name, found=shape, expected="[T, even D]")
    scale = Column(f"{name}_scale", "f2", shape[:1])
    if codec == INT8:
        return [Column(name, "i1", shape, INT8, scale_column=scale.name), scale]
    return [Column(name, "u1", (shape[0], shape[1] // 2), INT4, scale_column=scale.name), scale]


def channel_rms(arrays: Iterable[NDArray[np.floating]]) -> Floats:
    """Root mean square of every channel over ``arrays`` of shape [..., D], summed in float64: float32 [D]."""
    total: NDArray[np.float64] | None = None
    count = 0
    for array in arrays:
        flat = array.reshape(-1, array.shape[-1]).astype(np.float64)
        part = np.einsum("td,td->d", flat, flat)
        total = part if total is None else total + part
        count += len(flat)
    if total is None or not np.isfinite(total).all():
        raise FormatError("there are no finite tokens to measure", found="none" if total is None else "NaN or infinity")
    return np.sqrt(total / count).astype(np.float32)


def encode(codec: str, tokens: NDArray[np.floating], rms: Floats) -> tuple[NDArray[np.generic], NDArray[np.float16]]:
    """Codes as `columns` declares them and the scale of every token, float16 [..., T], of ``tokens`` [..., T, D]."""
    live = rms > 0
    units = np.where(live, tokens.astype(np.float32) / np.where(live, rms, 1), 0).astype(np.float32)
    if codec == INT8:
        exact = np.abs(units).max(-1) / 127
        scale = exact.astype(np.float16)
        # Up, so that no code is clipped and no small token becomes zero.
        scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
        codes = np.rint(units / _divisor(scale))
        return np.clip(codes, -127, 127).astype(np.int8), scale
    fitted = _STEP / 2 * np.sqrt(np.square(units).mean(-1))
    for _ in range(_REFITS):
        # Least squares: the scale that is best for the codes which the last scale gave.
        levels = (2 * _nibbles(units, fitted) - 15) * live
        fitted = (units * levels).sum(-1) / np.maximum(np.square(levels).sum(-1), 1)
    scale = fitted.astype(np.float16)
    codes = _nibbles(units, scale).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale


def stored(
    name: str, codec: str, tokens: NDArray[np.floating], rms: Floats | None, cost: Fidelity | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of one sample for the `columns` of ``name``; ``rms`` is None for raw ones. ``cost`` takes note."""
    if rms is None:
        return {name: tokens.astype(np.float16, copy=False)}
    codes, scale = encode(codec, tokens, rms)
    if cost is not None:
        cost.add(cosines(tokens, decode(codec, codes, scale, rms)))
    return {name: codes, f"{name}_scale": scale}


def decode(codec: str, codes: NDArray[np.generic], scale: NDArray[np.float16], rms: Floats) -> Floats:
    """The values of ``codes`` [..., T, D or D/2] with ``scale`` [..., T] and ``rms`` [D]: float32 [..., T, D].

    ``level * (scale * rms)`` in float32, in this order: another one rounds another way.
    """
    return levels(codec, codes) * (scale.astype(np.float32)[..., None] * rms)


def levels(codec: str, codes: NDArray[np.generic]) -> Floats:
    """What codes stand for before scale and rms: float32 [..., D]."""
    if codec == INT8:
        return codes.astype(np.float32)
    packed = codes.astype(np.uint8, copy=False)
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return 2 * both.reshape(*codes.shape[:-1], -1).astype(np.float32) - 15


def cosines(tokens: NDArray[np.floating], decoded: Floats) -> Floats:
    """Cosine between every token [..., D] and its decoded self: float32 [...]; 1 where both are zero."""
    flat = tokens.astype(np.float32)
    product = np.einsum("...d,...d->...", flat, decoded)
    squares = np.einsum("...d,...d->...", flat, flat) * np.einsum("...d,...d->...", decoded, decoded)
    both_zero = ~flat.any(-1) & ~decoded.any(-1)
    return np.where(both_zero, 1, product / np.sqrt(np.maximum(squares, _TINY))).astype(np.float32)


@dataclass
class Fidelity:
    """What a codec cost many tokens, gathered a few at a time: their `cosines` as sum, minimum and histogram.

    The first percentile is read from the histogram of 1 - cosine, in bins of 1 %, at the end that promises less.
    ``against`` is the codec of what was encoded: not raw where tokens were encoded for the second time.
    """

    against: str = RAW
    tokens: int = 0
    total: float = 0.0
    least: float = 1.0
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, values: NDArray[np.float32]) -> None:
        """Take note of some tokens' cosines, of any shape."""
        flat = values.reshape(-1).astype(np.float64)
        self.tokens += flat.size
        self.total += float(flat.sum())
        self.least = min(self.least, float(flat.min()))
        places = np.ceil(np.log(np.maximum(1 - flat, _FINEST)) / _BIN).astype(int)
        self.bins.update(dict(zip(*(part.tolist() for part in np.unique(places, return_counts=True)), strict=True)))

    def merge(self, other: Fidelity) -> None:
        """Take note of what another one has noted."""
        self.tokens += other.tokens
        self.total += other.total
        self.least = min(self.least, other.least)
        self.bins.update(other.bins)

    def to_dict(self) -> dict[str, Any]:
        """For a file of its own; `from_dict` reads it."""
        return {**asdict(self), "bins": {str(place): count for place, count in sorted(self.bins.items())}}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Fidelity:
        bins = Counter({int(place): count for place, count in record["bins"].items()})
        return Fidelity(record["against"], record["tokens"], record["total"], record["least"], bins)

    def summary(self) -> dict[str, Any]:
        """What goes into a manifest, rounded down to six digits."""
        left = math.ceil(0.01 * self.tokens)
        p01 = self.least
        for place in sorted(self.bins, reverse=True):
            p01, left = max(self.least, 1 - math.exp(place * _BIN)), left - self.bins[place]
            if left <= 0:
                break
        numbers = {"mean": self.total / max(1, self.tokens), "p01": p01, "min": self.least}
        rounded = {name: math.floor(value * 1e6) / 1e6 for name, value in numbers.items()}
        return {"metric": "cosine", **rounded, "tokens": self.tokens, "against": self.against}


def _divisor(scale: NDArray[np.floating]) -> Floats:
    """``scale`` as a divisor: a token that is zero, or rounds to it, keeps zeros instead of becoming infinite."""
    wide = scale.astype(np.float32)[..., None]
    return np.where(wide > 0, wide, np.float32(np.inf))


def _nibbles(units: Floats, scale: NDArray[np.floating]) -> Floats:
    codes: Floats = np.clip(np.floor(units / (2 * _divisor(scale))) + 8, 0, 15)
    return codes
