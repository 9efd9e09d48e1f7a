"""Options of ``fid`` and ``fid-stats`` alone; those that they share with other commands are in `d2c_cli.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from d2c_cli.values import count, folder, option

Samples = Annotated[int, count("--samples", "IMAGES", "Images to generate and measure; publications use 50k.", least=2)]
Inception = Annotated[
    Path | None,
    option(
        "--inception",
        "FILE|download",
        "torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth); download fetches and checks "
        "them. Without them the distance is taken in a classifier trained on the scored source, and is not called "
        "FID.  [default: where torch hub keeps its downloads, if they are there]",
    ),
]
Judged = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|IMAGES",
        help="A run that `d2c train` finished; or images: a folder, Parquet, tar, artifact, or .npz with arr_0.",
    ),
]
TrainedOn = Annotated[
    str | None,
    option("--train", "SOURCE", "For images that are not a run's: what they may have been copied from."),
]
KeptBack = Annotated[
    str | None,
    option(
        "--held-out",
        "SOURCE",
        "Real images that nothing was trained on; they calibrate the copy check.  [default: those of the reference "
        "that were not trained on]",
    ),
]
SecondSpace = Annotated[
    str | None,
    option(
        "--second",
        "ENCODER",
        "Also measure in a second space: dinov2, timm:MODEL:FILE, open_clip:MODEL:FILE, or classifier.",
    ),
]
Reference = Annotated[
    str | None,
    option(
        "--reference",
        "SOURCE",
        "What to measure against: real images, an artifact, an .npz of ADM's, or what `d2c fid-stats` wrote.  "
        "[default: the scored source]",
    ),
]
ExportNpz = Annotated[
    Path | None, option("--export-npz", "FILE.npz", "Also write the images as arr_0, for ADM's own evaluator.")
]
FidOut = Annotated[
    Path | None, folder("--out", "Where the report goes.  [default: RUN/fid, or NAME-fid beside the images]")
]
StatsOut = Annotated[Path, option("--out", "FILE.npz", "Where the statistics go.")]
StatsSize = Annotated[
    int | None, count("--size", "PIXELS", "Side of the square crop.  [default: the images' own, if all have one]")
]
Subsets = Annotated[
    int, count("--subsets", "N", "Random real subsets that show how far chance moves the distance.", least=0)
]
RunArtifact = Annotated[
    Path | None,
    folder("--artifact", "The artifact that the run was trained on, where it moved.  [default: where it was]"),
]
