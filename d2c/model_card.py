"""The README of a run: what its weights are, what they were trained on, and how to use them."""

from __future__ import annotations

import json
from typing import Any

from d2c.runs import MODEL, RUN, WEIGHTS, Run
from formats.card import CITATION, plain
from formats.files import read_json, write_bytes

CARD = "README.md"
_TEXT = """---
library_name: d2c-toolkit
tags: [diffusion, image-generation, {family}, d2c]
---

# {model}, trained on {images:,} images

`{weights}` holds the averaged weights (decay {ema_decay}) after {steps:,} steps of {batch_size:,}: {passes:,.1f} passes
over each image. Parameter names are those of the official SiT and DiT files; `{spec}` holds the shapes.

```
d2c sample RUN              # a grid of samples
d2c fid RUN                 # distance to real images, with baselines and a check for copies
```

## Trained on

{data}

## How

| field | value |
| --- | --- |
{recipe}

Precision {precision}, seed {seed}, latents: {latent}.

## Before you use it

Models trained on few images for many passes can reproduce them: look at the copy check of `d2c fid` first. The rights
in the weights depend on those in the training images: {licence}.

## Cite

The method of selecting and attaching is that of D2C:

```bibtex
{citation}
```
"""


def write_model_card(run: Run, *, samples: int) -> None:
    """Write the README beside the finished weights of ``run``, which was trained on ``samples`` images."""
    facts, spec = read_json(run.path / RUN), read_json(run.path / MODEL)
    identity, last = facts["identity"], run.stats()[-1]
    recipe: dict[str, Any] = identity["recipe"]
    licence = facts.get("licence", {})
    terms = [plain(value) for value in (licence.get("spdx"), licence.get("source_terms")) if value]
    counts = [row["count"] for row in facts["classes"]]
    text = _TEXT.format(
        family=spec["name"].split("-")[0],
        model=spec["name"],
        images=samples,
        weights=WEIGHTS,
        spec=MODEL,
        ema_decay=recipe["ema_decay"],
        steps=last["step"],
        batch_size=recipe["batch_size"],
        passes=last["step"] * recipe["batch_size"] / samples,
        data=f"Artifact `{identity['content_id']}`: {samples:,} images in {len(counts):,} classes "
        f"({min(counts):,} to {max(counts):,} each).",
        recipe="\n".join(f"| {name} | {json.dumps(value)} |" for name, value in recipe.items()),
        precision=identity["precision"],
        seed=identity["seed"],
        latent=plain(facts["latent"].get("encoder")) or facts["latent"]["codec"],
        licence="; ".join(terms) if terms else "the artifact names no licence",
        citation=CITATION,
    )
    write_bytes(run.path / CARD, text.encode())
