"""The artifact in Croissant's words (mlcommons.org/croissant, 1.0): what data set searches and loaders read."""

from __future__ import annotations

import re
from typing import Any

from formats.card import CITATION, part, plain, summary
from formats.layout import CLASSES, INDEX
from formats.schema import RECIPE, Manifest

CROISSANT = "croissant.json"
"""Its file, beside the card; like the card it may be edited, and no hash covers it."""

_ENCODINGS = {"tar": "application/x-tar", "parquet": "application/x-parquet", "json": "application/json"}
_TERMS = (
    "column conformsTo extract field fileObject fileSet format includes isLiveDataset jsonPath key md5 parentField "
    "path recordSet references regex repeated replace samplingRate separator source subField transform citeAs "
    "equivalentProperty"
)
_PREFIXES = {"conformsTo": "dct"}
_SPDX = re.compile(r"(?!LicenseRef-)[A-Za-z0-9.+-]+")


def croissant(manifest: Manifest) -> dict[str, Any]:
    """The Croissant document of an artifact: its files with sizes and sha256, and what their rows hold. JSON-ready.

    Record sets: ``samples`` (the index), ``classes``, and ``arrays`` (the rows of the shards) where they are Parquet.
    Codes of coded columns are given as stored.
    """
    licence = part(manifest, "licence")
    spdx, terms = plain(licence.get("spdx")), plain(licence.get("source_terms"))
    text = [summary(manifest), f"Terms of the source: {terms}." if terms else ""]
    document: dict[str, Any] = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": plain(manifest.raw.get("name")) or "d2c-artifact",
        "description": " ".join(filter(None, text)),
        "identifier": manifest.content_id,
        "keywords": ["d2c", "dataset condensation", "diffusion"],
        "citeAs": CITATION,
        "distribution": _files(manifest),
        "recordSet": [_samples(manifest), _classes()],
    }
    if spdx:
        document["license"] = f"https://spdx.org/licenses/{spdx}.html" if _SPDX.fullmatch(spdx) else spdx
    if created := plain(manifest.raw.get("created")):
        document["dateCreated"] = created
    if manifest.container == "parquet":
        document["recordSet"].append(_arrays(manifest))
    return document


def _context() -> dict[str, Any]:
    # Written out in full, so that nobody has to fetch it.
    return {
        "@language": "en",
        "@vocab": "https://schema.org/",
        "sc": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "rai": "http://mlcommons.org/croissant/RAI/",
        "dct": "http://purl.org/dc/terms/",
        "data": {"@id": "cr:data", "@type": "@json"},
        "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
        "examples": {"@id": "cr:examples", "@type": "@json"},
        "fileProperty": "cr:fileProperty",
        **{term: f"{_PREFIXES.get(term, 'cr')}:{term}" for term in _TERMS.split()},
    }


def _files(manifest: Manifest) -> list[dict[str, Any]]:
    files: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": record.path,
            "name": record.path,
            "contentUrl": record.path,
            "contentSize": f"{record.bytes} B",
            "encodingFormat": _ENCODINGS.get(record.path.rpartition(".")[2], "application/octet-stream"),
            "sha256": record.sha256,
        }
        for record in manifest.files
    ]
    if manifest.container == "parquet":
        files.append(
            {
                "@type": "cr:FileSet",
                "@id": "shards",
                "name": "shards",
                "description": "All shards, in storage order by name.",
                "encodingFormat": _ENCODINGS["parquet"],
                "includes": "parquet/*.parquet",
            }
        )
    return files


def _samples(manifest: Manifest) -> dict[str, Any]:
    fields = {
        "key": ("sc:Text", "Name of the sample, unique in the artifact."),
        "label": ("sc:Integer", "Class of the sample: the id of a row of the record set `classes`."),
        "sample_id": ("sc:Text", "xxh3-128 of the label and the arrays' digests."),
        "info": ("sc:Text", "Facts as a JSON object: where the sample came from, its score and rank."),
    }
    recipe = manifest.container == RECIPE
    if not recipe:
        fields["shard"] = ("sc:Text", "Path of the file that holds the sample.")
        fields["row"] = ("sc:Integer", "Its place in that file.")
    for column in manifest.columns:
        if not recipe:
            fields[f"{column.name}.offset"] = ("sc:Integer", f"First byte of the array {column.name} in its shard.")
        fields[f"{column.name}.nbytes"] = ("sc:Integer", f"Bytes of the array {column.name}.")
        fields[f"{column.name}.xxh3"] = ("sc:Text", f"xxh3-128 of the array {column.name}.")
    source = {name: {"fileObject": {"@id": INDEX}, "extract": {"column": name}} for name in fields}
    return _records("samples", "One record per sample, in storage order.", fields, source, key="key")


def _classes() -> dict[str, Any]:
    fields = {
        "id": ("sc:Integer", "Number of the class, which samples have as label."),
        "name": ("sc:Text", "Name at the source."),
        "source_id": ("sc:Text", "Id at the source."),
        "prompt": ("sc:Text", "The text that was embedded for it."),
        "count": ("sc:Integer", "Samples of this class."),
    }
    source = {
        name: {"fileObject": {"@id": CLASSES}, "extract": {"jsonPath": f"$.classes[*].{name}"}} for name in fields
    }
    return _records("classes", "One record per class.", fields, source, key="id")


def _arrays(manifest: Manifest) -> dict[str, Any]:
    fields = {
        "key": ("sc:Text", "Name of the sample."),
        "label": ("sc:Integer", "Class of the sample."),
        "json": ("sc:Text", "Facts as a JSON object."),
    }
    for column in manifest.columns:
        stored = f"bytes of a C-order array {column.numpy.str} {list(column.shape)}, codec {column.codec}"
        fields[column.name] = ("sc:Text", f"Column {column.name}: {stored}.")
    source = {name: {"fileSet": {"@id": "shards"}, "extract": {"column": name}} for name in fields}
    return _records("arrays", "One record per sample, with its arrays as bytes.", fields, source, key="key")


def _records(
    name: str, text: str, fields: dict[str, tuple[str, str]], source: dict[str, dict[str, Any]], *, key: str
) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": text,
        "key": {"@id": f"{name}/{key}"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{name}/{field}",
                "name": field,
                "description": about,
                "dataType": kind,
                "source": source[field],
            }
            for field, (kind, about) in fields.items()
        ],
    }
