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
    fidelity = {}
    with fixture.writer(out, container, shards, columns) as writer:
        rms = None
        if codec != RAW:
            rms = writer.codec_array("tokens", RMS, lambda: codecs.channel_rms(TOKENS[measured]))
            decoded = codecs.decode(codec, *codecs.encode(codec, TOKENS, rms), rms)
            fidelity["tokens"] = codecs.fidelity(codecs.cosines(TOKENS, decoded))
        for sample, tokens in zip(samples, TOKENS, strict=True):
            sample.arrays.update(codecs.stored("tokens", codec, tokens, rms))
        for shard, part in enumerate(fixture.split(samples, shards)):
            writer.write(shard, part)
        classes = [ClassRow(i, f"class {i}", f"n{i}", f"a photo of {i}", 5) for i in range(fixture.CLASSES)]
        return writer.finish(fixture.FIELDS, classes, {}, [], fidelity=fidelity)
