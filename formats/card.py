"""The README of an artifact: a dataset card that also tells how to read it without this package."""

from __future__ import annotations

import json

from formats.schema import CONTAINERS, Manifest


def card(manifest: Manifest) -> str:
    """A Markdown card with the YAML head that dataset hubs read. It may be edited: no hash covers it."""
    licence = manifest.raw.get("licence")
    spdx = licence.get("spdx") if isinstance(licence, dict) else None
    folder, kind = CONTAINERS[manifest.container], manifest.container
    rows = "\n".join(
        f"| {column.name} | `{column.numpy.str}` | {list(column.shape)} | {column.codec} | {column.nbytes:,} |"
        for column in manifest.columns
    )
    return f"""---
license: {json.dumps(str(spdx).lower() if spdx else "unknown")}
configs:
- config_name: default
  data_files:
  - split: train
    path: "{folder}/*.{kind}"
---
# {manifest.raw["name"]}

A condensed dataset for training diffusion models: {manifest.samples:,} samples of {manifest.class_count:,} classes in
{len(manifest.shards)} {kind} shards. Format `d2c-artifact` {manifest.raw["format"]["version"]}.

Content id: `{manifest.content_id}`

| column | dtype | shape | codec | bytes a sample |
|---|---|---|---|---|
{rows}

`manifest.json` says where everything came from; `meta/samples.parquet` has one row per sample with its label, its
facts, and the shard, offset, length and xxh3-128 of each array; `classes/` holds names, prompts and class tables.

Check the files: `sha256sum -c SHA256SUMS`

Read without special software:

```python
{_TAR_EXAMPLE if kind == "tar" else _PARQUET_EXAMPLE}```
"""


_TAR_EXAMPLE = """import io, tarfile
import numpy as np

with tarfile.open("shards/train-00000-of-NNNNN.tar") as tar:
    for member in tar:
        if member.name.endswith(".npy"):
            array = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
"""

_PARQUET_EXAMPLE = """import json
import numpy as np
import pyarrow.parquet as pq

file = pq.ParquetFile("parquet/train-00000-of-NNNNN.parquet")
columns = {c["name"]: c for c in json.loads(file.schema_arrow.metadata[b"d2c"])["columns"]}
for batch in file.iter_batches(64):
    for row in batch.to_pylist():
        arrays = {n: np.frombuffer(row[n], "<" + c["dtype"]).reshape(c["shape"]) for n, c in columns.items()}
"""
