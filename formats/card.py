"""The README of an artifact: a dataset card for people and hubs, made from the manifest alone.

A manifest holds names that other people gave to folders and files. Every one of them is put on the page as a quoted
YAML string or in a code span of one line, so that none can become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from formats.schema import INT4, INT8, LATENT, RAW, RECIPE, RMS, Column, Manifest

_PROVENANCE = ("source", "selection", "encoders", "latent", "preprocess", "seeds", "order", "parents", "tool")
_LONGEST = 200
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")
_HUB_LICENCES = frozenset(
    """apache-2.0 mit afl-3.0 artistic-2.0 bsl-1.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 etalab-2.0 eupl-1.1 eupl-1.2 isc mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0
    unlicense zlib""".split()
)
"""SPDX ids, in lower case, that the Hub takes as they are; it refuses a card whose licence it does not know."""
_HUB_NAMES = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl"}

CITATION = """@article{huang2025d2c,
  title         = {Accelerating Diffusion Model Training under Minimal Budgets: A Condensation-Based Perspective},
  author        = {Huang, Rui and Shao, Shitong and Zhou, Zikai and Zhao, Pukun and Guo, Hangyu and Ye, Tian and
                   Bai, Lichen and Yang, Shuo and Xie, Zeke},
  journal       = {arXiv preprint},
  eprint        = {2507.05914},
  archivePrefix = {arXiv},
  year          = {2025}
}"""
"""The paper of the method, as BibTeX."""


def card(manifest: Manifest) -> str:
    """A Markdown card with the YAML head that dataset hubs read. It may be edited: no hash covers it."""
    sections = [
        _head(manifest),
        f"# {_code(manifest.raw.get('name')) or 'A condensed dataset'}\n\n{_summary(manifest)}",
        f"## What a sample holds\n\n{_columns(manifest)}",
        f"## Rebuild\n\n{_REBUILD}" if manifest.container == RECIPE else f"## Read\n\n{_reading(manifest)}",
        f"## Verify\n\n{_VERIFY}",
        f"## Licence\n\n{_licence(manifest)}",
        f"## Where it came from\n\n{_provenance(manifest)}",
        f"## Cite\n\nThe method of selecting and attaching is that of D2C:\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def plain(value: Any) -> str:
    """``value`` as one line of at most 200 printable characters; "" for None and for what is empty."""
    text = value if isinstance(value, str) else "" if value in (None, {}, []) else json.dumps(value, ensure_ascii=False)
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def part(manifest: Manifest, name: str) -> dict[str, Any]:
    """The object ``name`` of the manifest; {} where it is missing or something else."""
    value = manifest.raw.get(name)
    return value if isinstance(value, dict) else {}


def summary(manifest: Manifest) -> str:
    """What the artifact is in one sentence, without any name from the manifest."""
    what = (
        "The recipe of a condensed dataset for training diffusion models, without its arrays"
        if manifest.container == RECIPE
        else "A condensed dataset for training diffusion models"
    )
    return f"{what}: {manifest.samples:,} samples of {manifest.class_count:,} classes."


def _code(value: Any) -> str:
    text = plain(value).replace("`", "'")
    return f"`{text}`" if text else ""


def _head(manifest: Manifest) -> str:
    licence = part(manifest, "licence")
    spdx, terms = plain(licence.get("spdx")), plain(licence.get("source_terms"))
    known = _HUB_NAMES.get(spdx.lower(), spdx.lower())
    fields: dict[str, Any] = {"license": known if known in _HUB_LICENCES | set(_HUB_NAMES.values()) else "other"}
    if not spdx:
        fields["license"] = "unknown"
    elif fields["license"] == "other":
        fields["license_name"] = re.sub(r"[^a-z0-9.]+", "-", spdx.lower()).strip("-") or "other"
        if re.fullmatch(r"https://\S{1,190}", terms):
            fields["license_link"] = terms
    power = min(len(str(manifest.samples)) - 4, len(_SIZES) - 2)
    fields["pretty_name"] = plain(manifest.raw.get("name")) or "A condensed dataset"
    fields["task_categories"] = ["unconditional-image-generation"]
    fields["size_categories"] = ["n<1K" if power < 0 else f"{_SIZES[power]}<n<{_SIZES[power + 1]}"]
    fields["tags"] = ["d2c", "dataset-condensation", "diffusion"]
    path = {"tar": "shards/*.tar", "parquet": "parquet/*.parquet"}.get(manifest.container, "meta/samples.parquet")
    fields["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": path}]}]
    # JSON is YAML, and leaves nothing for a value to break out of.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(manifest: Manifest) -> str:
    least, most = (part(manifest, "counts").get(f"per_class_{bound}") for bound in ("min", "max"))
    spread = ""
    if isinstance(least, int) and isinstance(most, int):
        spread = f"Every class has {most:,} of them.\n" if least == most else f"A class has {least:,} to {most:,}.\n"
    source, method = _code(part(manifest, "source").get("name")), _code(part(manifest, "selection").get("method"))
    origin = f"They were chosen from {source} by the method {method}.\n" if source and method else ""
    shards = f"in {len(manifest.shards)} {manifest.container} shards, " if manifest.shards else ""
    return f"""{summary(manifest)}
{spread}{origin}It takes {sum(record.bytes for record in manifest.files):,} bytes, {shards}\
in format `d2c-artifact` {_code(part(manifest, "format").get("version"))}.

Content id: {_code(manifest.content_id)}, which is the same for the same content in any container, shard size and order.

- `manifest.json` says everything about the artifact but its rows; `SHA256SUMS` is the proof of all files.
- `meta/samples.parquet` has one row per sample: key, label, facts (source file, score, rank) and the digest of each \
array.
- `meta/selection.json` tells what was chosen, by key, each with its label and its rank in its class.
- `classes/` holds class names, prompts and class tables."""


def _columns(manifest: Manifest) -> str:
    lines = ["| column | codec | stored | decoded | bytes a sample | fidelity |", "|---|---|---|---|---|---|"]
    for column in manifest.columns:
        stored = f"{column.dtype} {list(column.shape)}"
        decoded = "as stored" if column.codec == RAW else f"`f4 {list(column.values_shape)}`"
        cells = [f"`{column.name}`", f"`{column.codec}`", f"`{stored}`", decoded, f"{column.nbytes:,}"]
        lines.append(f"| {' | '.join([*cells, _fidelity(column)])} |")
    tables = [f"- `{table.path}`: `{table.dtype} {list(table.shape)}`" for table in manifest.tables.values()]
    if tables:
        lines += ["", "One row per class:", "", *tables]
    return "\n".join(lines)


def _fidelity(column: Column) -> str:
    if column.codec == RAW:
        return ""
    numbers = {name: (column.fidelity or {}).get(name) for name in ("mean", "p01", "min", "tokens")}
    if not all(isinstance(value, (int, float)) for value in numbers.values()):
        return "not measured"
    return (
        f"cosine: mean {numbers['mean']}, 1st percentile {numbers['p01']}, least {numbers['min']} "
        f"({numbers['tokens']:,} tokens)"
    )


def _reading(manifest: Manifest) -> str:
    if manifest.container == "tar":
        reader, folder, others = _TAR, "shards/*.tar", "`webdataset` reads `shards/*.tar`."
        arrives = "arrays arrive as nested lists"
    else:
        reader, folder, others = _PARQUET, "parquet/*.parquet", "Anything that knows Parquet reads `parquet/`."
        arrives = "arrays arrive as bytes, for `np.frombuffer`; do not ask for the numpy format, which cuts zero bytes"
        stored = ", ".join(f'"{c.name}": ("{c.numpy.str}", {c.shape})' for c in manifest.columns)
        reader = reader.replace("STORED", f"{{{stored}}}")
    coded = [column for column in manifest.columns if column.codec in (INT8, INT4)]
    arrays = [f'"{column.name}": np.load("{column.codec_arrays[RMS].path}")' for column in coded]
    lines = [f"rms = {{{', '.join(arrays)}}}"] if coded else []
    folder, pattern = folder.split("/")
    lines += [f'for path in sorted(Path("{folder}").glob("{pattern}")):', "    for sample in samples(path):"]
    for column in coded:
        lines += [f"        {line}" for line in _decoding(column)]
    lines += [f"        {_model_input(manifest)}"]
    return f"""With numpy and {"the standard library" if manifest.container == "tar" else "pyarrow"}, from this folder:

```python
{reader}

{chr(10).join(lines)}
```

{others} `datasets.load_dataset` reads this folder or its copy on the Hub, streaming too; there {arrives}.
One array alone is the `nbytes` bytes at `offset` of its shard, both given in `meta/samples.parquet`: one read, or one
HTTP range."""


def _decoding(column: Column) -> list[str]:
    codes, scale = f'sample["{column.name}"]', f'sample["{column.scale_column}"].astype("f4")[:, None]'
    factor = f'({scale} * rms["{column.name}"])'
    if column.codec == INT8:
        return [f"{codes} = {codes} * {factor}"]
    return [
        f"codes = np.stack([{codes} & 15, {codes} >> 4], axis=-1)",
        f'{codes} = (2 * codes.reshape{column.values_shape}.astype("f4") - 15) * {factor}',
    ]


def _model_input(manifest: Manifest) -> str:
    shift, scale = manifest.latent.get("shift"), manifest.latent.get("scale")
    if manifest.column(LATENT) is None or not all(isinstance(value, (int, float)) for value in (shift, scale)):
        return "pass"
    return f'model_input = (sample["{LATENT}"][0].astype("f4") - {shift}) * {scale}'


def _licence(manifest: Manifest) -> str:
    licence = part(manifest, "licence")
    if manifest.container == RECIPE:
        meaning = "A recipe holds ids, digests and settings; it holds no pixels and no latents."
    elif manifest.column(LATENT) is None:
        meaning = "This artifact holds no latents."
    elif manifest.latent.get("codec") == "rgb":
        meaning = "**The column `latent` holds the pixels: this artifact contains the images**, cropped and resized."
    else:
        meaning = (
            "**Latents are images in another form**: the decoder of the encoder named below turns the column `latent`\n"
            "back into close approximations of the source images. Whoever may not pass on those images should not\n"
            "assume that these latents may be passed on."
        )
    included = licence.get("images_included")
    return f"""- Licence (SPDX): {_code(licence.get("spdx")) or "not recorded"}
- Terms of the source: {_code(licence.get("source_terms")) or "not recorded"}
- Original images included: {"yes" if included is True else "no" if included is False else "not recorded"}

{meaning}"""


def _provenance(manifest: Manifest) -> str:
    lines = [
        f"- {_code(name)}: {_code(value)}"
        for field in _PROVENANCE
        for name, value in _facts(field, manifest.raw.get(field))
    ]
    return "\n".join(lines) or "Not recorded."


def _facts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _facts(f"{name}.{key}", value[key])
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _facts(f"{name}[{i}]", item)
    elif plain(value):
        yield name, value


_VERIFY = """```
sha256sum -c SHA256SUMS     # every file but this one and croissant.json, with coreutils alone
d2c verify .                # and what the files mean; --deep for every array
```

`d2c` comes with `pip install d2c-toolkit`."""

_REBUILD = """This is a recipe: which images were chosen and what every array must be, but no array. Whoever has an own
copy of the source rebuilds the artifact from it:

```
d2c rebuild . --source DIR
```

Every image and every array made from it is checked against the digests kept here; the result has the content id above.
The rows can be read with pyarrow, from this folder:

```python
import json
import pyarrow.parquet as pq

for row in pq.read_table("meta/samples.parquet").to_pylist():
    key, label, facts = row["key"], row["label"], json.loads(row["info"])
```"""

_TAR = """import io, json, tarfile
from pathlib import Path
import numpy as np

def samples(path):
    sample = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, name = member.name.split(".", 1)
            if sample.get("key", key) != key:
                yield sample
                sample = {}
            data = tar.extractfile(member).read()
            value = np.load(io.BytesIO(data), allow_pickle=False) if name.endswith(".npy") else json.loads(data)
            sample |= {"key": key, {"cls": "label"}.get(name, name.removesuffix(".npy")): value}
    yield sample"""

_PARQUET = """import json
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq

stored = STORED

def samples(path):
    for batch in pq.ParquetFile(path).iter_batches(64):
        for row in batch.to_pylist():
            arrays = {n: np.frombuffer(row[n], dtype).reshape(shape) for n, (dtype, shape) in stored.items()}
            yield {**row, "json": json.loads(row["json"]), **arrays}"""
