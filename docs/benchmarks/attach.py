"""Write attach.md: what vision tokens cost in time, memory and bytes, and how far a mirrored grid is from its own.

PYTHONPATH=.:docs/benchmarks python docs/benchmarks/attach.py WORKSPACE ENCODER GRID [WORKSPACE ENCODER GRID ...]

Each WORKSPACE is a scored one (it is copied, without its other stages). ENCODER is what --vision takes, or
random:MODEL for an architecture of timm with random weights: as large and as slow as the real one, and no download.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from machine import machine, note
from safetensors.torch import save_file
from tables import table

from d2c.tokens import VisionTokens
from d2c.workspace import Workspace
from formats import open_artifact

CODECS = ("fp16", "int8", "int4")
TEXT = """# Attaching vision tokens: time, memory and bytes

[attach.py](attach.py) made this page, through the public commands: every image of a scored source is selected, its
tokens are attached, and the picks are packed with each codec. *Beyond the model* is the peak resident memory of
`d2c attach` on all images less that on 16. Parts of 256 images are written as they are done, so the number of images
does not show in it. Time is that of a CPU; encoders with random weights are as slow as real ones, and their tokens say
nothing about fidelity. The bytes are those of whole artifacts, latents, labels and text included, for each image, by
codec; in brackets, how close decoded tokens are to the encoder's (mean cosine).

{table}

## Mirrored tokens

How close the tokens of an image, mirrored with their grid, are to those that the encoder makes of the mirrored image:
mean cosine over tokens, for {mirrored:,} images. Beside it the same without mirroring (what a trainer meets that flips
latents and not tokens), and each after the mean token is taken away, which all images share. The scorer sees every
image under the same noise, which is not mirrored and shows in its tokens: those of a mirror image are nearer to the
tokens as they are than to the mirrored ones.

{mirrors}

{machine}
"""
MIRRORS = ["encoder", "mirrored", "not mirrored", "mirrored, centred", "not mirrored, centred"]
LIMIT = 100
"""Images of the comparison of mirrored tokens."""


def main() -> None:
    """Run every encoder and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="WORKSPACE ENCODER GRID")
    rows = parser.parse_args().rows
    lines, mirrors = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, (workspace, encoder, grid) in enumerate(zip(rows[::3], rows[1::3], rows[2::3], strict=True)):
            own = Path(folder) / str(number)
            shutil.copytree(Path(workspace) / "scores", own / "scores", ignore=shutil.ignore_patterns("parts"))
            found = measure(own, encoder, int(grid))
            lines.append(found["line"])
            mirrors.append(found["mirror"])
            shutil.rmtree(own)
    header = ["encoder", "images", "tokens", "s / 1,000 images", "beyond the model, MiB", *CODECS]
    print(
        TEXT.format(
            table=table(header, lines),
            mirrored=LIMIT,
            mirrors=table(
                ["encoder", "mirrored", "not mirrored", "mirrored, centred", "not mirrored, centred"], mirrors
            ),
            machine=machine(("torch", "timm", "numpy")),
        ),
        end="",
    )


def measure(workspace: Path, encoder: str, grid: int) -> dict[str, list[str]]:
    """Both tables' rows for one encoder."""
    name, vision = encoder, encoder
    if encoder.startswith("random:"):
        vision, name = random_weights(workspace, encoder.partition(":")[2]), f"{encoder.partition(':')[2]}, random"
    attach = ["attach", "--text", "hashed", "--vision", vision, "--grid", str(grid)]
    run(workspace, "select", "--total", "16", "--method", "random")
    few, _ = run(workspace, *attach)
    some = min(LIMIT, int(Workspace(workspace).scores.require("d2c score").summary["images"]))
    run(workspace, "select", "--total", str(some), "--method", "random")
    run(workspace, *attach, "--views", "orig,hflip")
    stage = Workspace(workspace).current("selection")
    both = tokens_of(workspace, str(stage["name"] if stage else ""))
    run(workspace, "select", "--ratio", "1", "--method", "random")
    many, seconds = run(workspace, *attach, "--views", "orig")
    bytes_of, shape, images = [], (0, 0), 0
    for codec in CODECS:
        out = workspace / codec
        run(workspace, "pack", "--tokens", codec, "--out", str(out))
        artifact = open_artifact(out)
        size = sum(record["bytes"] for record in artifact.manifest["files"])
        column = next(c for c in artifact.columns if c.name == artifact.manifest["encoders"]["vision"]["column"])
        close = f" ({column.fidelity['mean']:.4f})" if column.fidelity else ""
        bytes_of.append(f"{size / len(artifact):,.0f}{close}")
        images, shape = len(artifact), column.values_shape
        shutil.rmtree(out)
    line = [name, f"{images:,}", f"{shape[0]} x {shape[1]}", f"{1000 * seconds / images:.1f}", f"{many - few:,.0f}"]
    return {"line": [*line, *bytes_of], "mirror": [name, *mirror(both, grid)]}


def tokens_of(workspace: Path, selection: str) -> VisionTokens:
    """The attachment with two views."""
    found = [path for path in (workspace / "attachments" / selection).iterdir() if (path / "stage.json").exists()]
    opened = [VisionTokens.open(Workspace(workspace).vision(selection, path.name)) for path in found]
    return next(tokens for tokens in opened if tokens.views == 2)


def mirror(tokens: VisionTokens, grid: int) -> list[str]:
    """Mean cosines of tokens with those of the mirrored image: mirrored and not, plain and centred."""
    both = np.stack([[tokens.patches(row, view) for view in (0, 1)] for row in range(len(tokens))]).astype(np.float32)
    found = []
    for values in (both, both - both.mean(axis=(0, 1, 2))):
        here, there = values[:, 0], values[:, 1]
        turned = here.reshape(len(here), grid, grid, -1)[:, :, ::-1].reshape(here.shape)
        for mine in (turned, here):
            products = (mine * there).sum(-1) / (np.linalg.norm(mine, axis=-1) * np.linalg.norm(there, axis=-1))
            found.append(f"{products.mean():.3f}")
    return found


def random_weights(folder: Path, model: str) -> str:
    """``timm:MODEL:FILE`` with weights that a seed decides."""
    torch.manual_seed(0)
    state: dict[str, Any] = timm.create_model(model).state_dict()
    save_file(state, folder / "random.safetensors")
    return f"timm:{model}:{folder / 'random.safetensors'}"


def run(workspace: Path, *typed: str) -> tuple[float, float]:
    """Run a command as a user would; its peak resident memory in MiB, and its seconds."""
    note(f"d2c {' '.join(typed)}")
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)\n"
        "sys.exit(done.returncode)"
    )
    command = [sys.executable, "-m", "d2c_cli", *typed, "--workspace", str(workspace), "--device", "cpu"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout)), seconds


if __name__ == "__main__":
    main()
