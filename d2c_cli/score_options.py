"""Options of ``score`` alone; those that it shares with other commands are in `d2c_cli.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from d2c_cli.values import count, finite, option

Scorer = Annotated[
    str | None,
    option(
        "--scorer",
        "FILE",
        "The frozen model that judges difficulty: a weight file, a run, a diffusers folder or hub id; or train, to "
        "train a small one on the source.  [default: the paper's DiT-XL/2 for ImageNet-1k (classes may be "
        "missing) through the VAE, else train]",
    ),
]
ScorerModel = Annotated[
    str | None,
    option("--scorer-model", "MODEL", "What --scorer train trains.  [default: by image size]"),
]
ScorerSteps = Annotated[
    int | None,
    count("--scorer-steps", "STEPS", "How long --scorer train trains.  [default: 2k for small images, else 20k]"),
]
ClassMap = Annotated[
    Path | None,
    option(
        "--class-map",
        "FILE",
        "Which class of the source is which of the scorer's: CSV lines or JSON, source class -> number.",
    ),
]
Codec = Annotated[
    str | None,
    option(
        "--codec",
        "rgb|vae|DIR",
        "Latents: rgb (the pixels) or the Stable Diffusion VAE.  [default: rgb up to 64 px, else vae]",
    ),
]
Size = Annotated[
    int | None,
    count("--size", "PIXELS", "Side of the square crop.  [default: the images' own up to 64, else 256]"),
]
Estimator = Annotated[
    Literal["stratified", "paper"],
    option(
        "--estimator",
        "stratified|paper",
        "How times and noise are drawn: alike for all images (ranks better), or each its own (Algorithm 2).",
    ),
]
TargetRankCorr = Annotated[
    float | None,
    option(
        "--target-rank-corr",
        "R",
        "Choose --evals by this Spearman correlation, inside a class, between two scorings; 0.95 is good.",
        parser=finite,
    ),
]
ArrayPart = Annotated[
    str | None,
    option("--part", "I/N", "Score only the I-th of N shares, as a task of a job array; run once more to merge."),
]
MaxBad = Annotated[
    float | None,
    option("--max-bad", "N|SHARE", "Fail where more images, or a larger share, cannot be used.", parser=finite),
]
Labels = Annotated[
    str,
    option(
        "--labels",
        "source|none|clusters:K",
        "Classes: the source's own, one for all images, or K clusters of similar images (k-means, no download).",
    ),
]
Duplicates = Annotated[
    Literal["report", "drop", "off"],
    option(
        "--duplicates",
        "report|drop|off",
        "Exact and near duplicates: list them, also drop all but one of each group from the scores, or do not look.",
    ),
]
Keep = Annotated[
    Literal["first", "largest", "easiest", "hardest"],
    option(
        "--keep", "first|largest|easiest|hardest", "Which of some duplicates stays: by key, by pixels, or by score."
    ),
]
HeldOut = Annotated[
    str | None,
    option(
        "--held-out",
        "SOURCE",
        "Images kept apart, such as a validation set: those that are in the source too are listed as leaks.",
    ),
]
RetryBad = Annotated[bool, option("--retry-bad", None, "Try images again that could not be read.")]
Price = Annotated[
    float | None,
    option("--price", "MONEY", "Price of a GPU-hour, for the estimate of --dry-run.", parser=finite),
]
Evals = Annotated[int, count("--evals", "N", "Model evaluations per image; more rank more reliably.", least=2)]
ScoreBatch = Annotated[int, count("--batch-size", "IMAGES", "Images at once on one device.")]
