"""Every option, once: its name, unit, help and environment variable are the same wherever it occurs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from d2c_cli import config_file

WORKSPACE = Path("d2c-workspace")
SHARDS = Path("shards")
DEMO = Path("d2c-demo")

_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def whole(text: str | int) -> int:
    """Parse an integer such as ``50000``, ``50k`` or ``1.5M``.

    Raises:
        typer.BadParameter: this is no whole number.
    """
    match = re.fullmatch(r"([+-]?)(\d[\d_]*)(?:\.(\d+))?([kKmM]?)", str(text).strip())
    if match:
        sign, digits, decimals, suffix = match.groups(default="")
        # In integers: 1.1k is 1100, which binary fractions would miss.
        scale: int = 10 ** len(decimals)
        scaled, rest = divmod(int(digits + decimals) * _FACTORS[suffix.lower()], scale)
        if not rest:
            return -scaled if sign == "-" else scaled
    raise typer.BadParameter(f"{text!r} is not a whole number, such as 50000, 50k or 1.5M.")


def finite(text: str | float) -> float:
    """Parse a number that is neither infinite nor NaN.

    Raises:
        typer.BadParameter: this is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    raise typer.BadParameter(f"{text!r} is not a number, such as 1.5.")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = whole(text)
        if number < least:
            raise typer.BadParameter(f"{text} is too small: {least} or more.")
        return number

    return parse


def variable(name: str) -> str:
    """The environment variable of an option: ``--batch-size`` -> ``D2C_BATCH_SIZE``."""
    return "D2C_" + name.lstrip("-").upper().replace("-", "_")


def _option(
    name: str,
    metavar: str | None,
    text: str,
    *,
    parser: Callable[[str], Any] | None = None,
    callback: Callable[[typer.Context, Any], Any] | None = None,
    is_eager: bool = False,
    file_okay: bool = True,
) -> Any:
    return typer.Option(
        name,
        metavar=metavar,
        help=text,
        envvar=variable(name),
        show_envvar=False,
        parser=parser,
        callback=callback,
        is_eager=is_eager,
        file_okay=file_okay,
    )


def _count(name: str, metavar: str, text: str, *, least: int = 1) -> Any:
    return _option(name, metavar, text, parser=_at_least(least))


def _folder(name: str, text: str) -> Any:
    return _option(name, "DIR", text, file_okay=False)


# What a command works on.
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="Images: a folder with one folder per class, a Parquet file or folder, or a tar.",
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="SHARDS", help="An artifact that `d2c pack` wrote.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run that `d2c train` finished, such as runs/sit-xl-2-d2c.")]

# What almost every command shares.
Workspace = Annotated[Path, _folder("--workspace", "Where the stages leave their results and find each other's.")]
Out = Annotated[Path, _folder("--out", "Where the result goes.")]
RunOut = Annotated[Path | None, _folder("--out", "Where the run goes.  [default: runs/MODEL-RECIPE]")]
SamplesOut = Annotated[Path | None, _folder("--out", "Where the samples go.  [default: RUN/samples]")]
Device = Annotated[str, _option("--device", "auto|cpu|cuda|cuda:N", "Where to compute; auto takes a GPU if any.")]
Gpus = Annotated[int, _count("--gpus", "N", "GPUs to share the work; on a CPU, the number of worker processes.")]
Seed = Annotated[
    int,
    _option("--seed", "N", "Everything random follows from it: same input, same seed, same bytes.", parser=whole),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    _option("--precision", "auto|fp32|bf16|fp16", "Arithmetic; auto is bf16 on a GPU and fp32 on a CPU."),
]
Json = Annotated[
    bool,
    _option("--json", None, "Print one JSON document instead of text.", callback=config_file.note_json, is_eager=True),
]
DryRun = Annotated[bool, _option("--dry-run", None, "Say what would run and why, and write nothing.")]
Overwrite = Annotated[bool, _option("--overwrite", None, "Do it anew even if it is finished, replacing what is there.")]
Config = Annotated[
    Path | None,
    _option(
        "--config",
        "FILE.toml",
        "Options from a file: a table per command, for example [score] with evals = 16.",
        callback=config_file.apply,
        is_eager=True,
    ),
]

# score
Scorer = Annotated[
    str | None,
    _option(
        "--scorer",
        "FILE|train",
        "The frozen model that judges difficulty: a weight file, a run, a diffusers folder or hub id; or train, to "
        "train a small one on the source.  [default: the paper's DiT-XL/2 for ImageNet-1k, else train]",
    ),
]
ScorerModel = Annotated[
    str | None,
    _option("--scorer-model", "MODEL", "What --scorer train trains.  [default: by image size]"),
]
ScorerSteps = Annotated[
    int | None,
    _count("--scorer-steps", "STEPS", "How long --scorer train trains.  [default: 2k for small images, else 20k]"),
]
Objective = Annotated[
    Literal["velocity", "eps"] | None,
    _option(
        "--objective",
        "velocity|eps",
        "What the scorer predicts (SiT: velocity, DiT: eps), where its file does not tell.",
    ),
]
Codec = Annotated[
    str | None,
    _option(
        "--codec",
        "rgb|vae|DIR",
        "Latents: rgb (the pixels) or the Stable Diffusion VAE.  [default: rgb up to 64 px, else vae]",
    ),
]
RunCodec = Annotated[
    str | None,
    _option(
        "--codec",
        "rgb|vae|DIR",
        "The codec that turns latents into pixels.  [default: the run's]",
    ),
]
Size = Annotated[
    int | None,
    _count("--size", "PIXELS", "Side of the square crop.  [default: the images' own up to 64, else 256]"),
]
Estimator = Annotated[
    Literal["stratified", "paper"],
    _option(
        "--estimator",
        "stratified|paper",
        "How times and noise are drawn: alike for all images (ranks better), or each its own (Algorithm 2).",
    ),
]
Evals = Annotated[int, _count("--evals", "N", "Model evaluations per image; more rank more reliably.", least=2)]
ScoreBatch = Annotated[int, _count("--batch-size", "IMAGES", "Images at once on one device.")]

# select, attach, pack
Ratio = Annotated[
    float | None,
    _option("--ratio", "SHARE", "Budget as a share of all images, spread equally over the classes."),
]
PerClass = Annotated[int | None, _count("--per-class", "IMAGES", "Budget as images per class.")]
Method = Annotated[
    Literal["interval", "random"],
    _option("--method", "interval|random", "interval: evenly over the difficulty ranks; random: the baseline."),
]
PackMethod = Annotated[
    Literal["interval", "random"] | None,
    _option(
        "--method",
        "interval|random",
        "interval: evenly over the difficulty ranks; random: the baseline.  [default: interval]",
    ),
]
Interval = Annotated[
    int | None,
    _count(
        "--interval",
        "RANKS",
        "Distance between picks in the ranking of a class.  [default: so that the picks span 74 % of it]",
    ),
]
Text = Annotated[
    str | None,
    _option(
        "--text",
        "ENCODER",
        "Text encoder: none, hashed, t5, t5:DIR or open_clip:MODEL:FILE.  [default: what was attached last, else "
        "hashed for small images, t5 for others]",
    ),
]
Vision = Annotated[
    str | None,
    _option(
        "--vision",
        "ENCODER",
        "Vision encoder: none, scorer, dinov2, timm:MODEL:FILE or open_clip:MODEL:FILE.  [default: what was attached "
        "last, else scorer for small images, dinov2 for others]",
    ),
]
Grid = Annotated[
    int | None,
    _count(
        "--grid",
        "TOKENS",
        "Side of the vision token grid; the model to train must have the same.  [default: that of a /2 model, or the "
        "scorer's for pixels beyond 64]",
    ),
]
Selection = Annotated[
    str | None,
    _option("--selection", "NAME", "Which selection.  [default: the one made last]"),
]
Container = Annotated[
    Literal["tar", "parquet"], _option("--container", "tar|parquet", "Shards as WebDataset tar files or as Parquet.")
]
Shards = Annotated[
    int | None,
    _count("--shards", "N", "Shard files.  [default: 8, 16 or 64, by the number of images]"),
]
Licence = Annotated[str, _option("--licence", "SPDX", "Licence of the source images, written into the artifact.")]

# train
Model = Annotated[
    str,
    _option("--model", "MODEL", "sit-xl/2 and the like: sit or dit, tiny s b l xl, patch 2 4 8."),
]
Recipe = Annotated[str, _option("--recipe", "d2c|repa|sit|dit|small", "A published recipe; small is for sit-tiny.")]
Steps = Annotated[int | None, _count("--steps", "STEPS", "Optimizer steps.  [default: the recipe's]")]
TrainBatch = Annotated[
    int | None,
    _count("--batch-size", "IMAGES", "Images per step, over all GPUs.  [default: the recipe's]"),
]

# sample, fid
Sampler = Annotated[Literal["euler", "heun"], _option("--sampler", "euler|heun", "ODE solver; for DiT, euler is DDIM.")]
SamplingSteps = Annotated[int, _count("--sampling-steps", "STEPS", "Solver steps per image.")]
Guidance = Annotated[float, _option("--guidance", "SCALE", "Classifier-free guidance; 1 is off.", parser=finite)]
Count = Annotated[int, _count("--count", "IMAGES", "Images to draw, every class equally often.")]
Npz = Annotated[bool, _option("--npz", None, "Also write all images as one samples.npz, to measure elsewhere.")]
SampleBatch = Annotated[int, _count("--batch-size", "IMAGES", "Images drawn at once.")]
Samples = Annotated[
    int, _count("--samples", "IMAGES", "Images to generate and measure; publications use 50k.", least=2)
]
Inception = Annotated[
    Path | None,
    _option(
        "--inception",
        "FILE",
        "torch-fidelity's Inception weights (pt_inception-2015-12-05-6726825d.pth). Without them the distance is taken "
        "in a classifier trained on the source, and is not called FID.",
    ),
]
Reference = Annotated[
    Path | None,
    _option("--reference", "SOURCE", "Real images to measure against.  [default: the scored source]"),
]
Subsets = Annotated[
    int, _count("--subsets", "N", "Random real subsets that show how far chance moves the distance.", least=0)
]
RunArtifact = Annotated[
    Path | None,
    _folder("--artifact", "The artifact that the run was trained on, where it moved.  [default: where it was]"),
]

# verify, demo
Level = Annotated[
    Literal["quick", "default", "deep"],
    _option("--level", "quick|default|deep", "quick: sizes; default: and file hashes; deep: and every array."),
]
Seeds = Annotated[int, _count("--seeds", "N", "Training seeds per arm, for the spread.")]
DemoSteps = Annotated[int, _count("--steps", "STEPS", "Training steps per run.")]
DemoSamples = Annotated[int, _count("--samples", "IMAGES", "Images to generate and measure per run.", least=2)]
