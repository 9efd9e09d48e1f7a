"""The small artifact of `formats_fixture` with tokens [6, 4] in a codec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import formats_fixture as fixture
import numpy as np

from formats import codecs
from formats.schema import RAW, RMS, ClassRow

TOKENS = np.random.default_rng(0).normal(size=(20, 6, 4)).astype("f2")
"""What the codes stand for, nearly."""


def write_coded(out: Path, codec: str, container: Any = "tar", shards: int = 2, measured: slice = slice(None)) -> Path:
    """20 samples; the rms is of the ``measured`` ones, the fidelity of all."""
    columns = (fixture.COLUMNS[0], *codecs.columns("tokens", codec, TOKENS.shape[1:]))
    samples = fixture.make_samples(len(TOKENS), columns[:1])
    with fixture.writer(out, container, shards, columns) as writer:
        rms = None
        if codec != RAW:
            rms = writer.codec_array("tokens", RMS, lambda: codecs.channel_rms(TOKENS[measured]))
        ends = [len(TOKENS) * shard // shards for shard in range(shards + 1)]
        for shard, part in enumerate(fixture.split(samples, shards)):
            cost = codecs.Fidelity()
            for sample, tokens in zip(part, TOKENS[ends[shard] : ends[shard + 1]], strict=True):
                sample.arrays.update(codecs.stored("tokens", codec, tokens, rms, cost))
            writer.write(shard, part, {} if rms is None else {"tokens": cost})
        classes = [ClassRow(i, f"class {i}", f"n{i}", f"a photo of {i}", 5) for i in range(fixture.CLASSES)]
        return writer.finish(fixture.FIELDS, classes, {}, [])


def cost_of(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What a manifest should say of tokens that became others."""
    cost = codecs.Fidelity()
    cost.add(codecs.cosines(before, after.astype("f4")))
    return cost.summary()


def agree(found: Any, expected: dict[str, Any]) -> bool:
    """Equal but for the last of six digits: sums over several shards round another way."""
    numbers = ("mean", "p01", "min")
    return bool(
        found["tokens"] == expected["tokens"] and all(abs(found[name] - expected[name]) < 2.5e-6 for name in numbers)
    )
