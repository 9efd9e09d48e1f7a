"""Every option, once: its name, unit, help and environment variable are the same wherever it occurs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from d2c_cli import config_file
from d2c_cli.values import at_least, channels, count, finite, folder, interval, option, several, whole

WORKSPACE = Path("d2c-workspace")
SHARDS = Path("shards")
DEMO = Path("d2c-demo")

# What a command works on.
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Images: a folder with one folder per class, Parquet (a file, a folder or an s3:// URL), tar files, or a "
        "folder that `datasets` saved.",
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="SHARDS", help="An artifact that `d2c pack` wrote.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs that `d2c fid` measured.")]
RunOrWeights = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run that `d2c train` finished, an official SiT, DiT or REPA weight file, or a DiT folder of diffusers.",
    ),
]

# What almost every command shares.
Workspace = Annotated[Path, folder("--workspace", "Where the stages leave their results and find each other's.")]
Out = Annotated[Path, folder("--out", "Where the result goes.")]
PackOut = Annotated[
    Path | None,
    folder("--out", "Where the result goes.  [default: shards; of --recipe-only, recipe]"),
]
SamplesOut = Annotated[
    Path | None,
    folder("--out", "Where the samples go.  [default: RUN/samples; of a weight file, samples/NAME]"),
]
Device = Annotated[str, option("--device", "auto|cpu|cuda|cuda:N", "Where to compute; auto takes a GPU if any.")]
Gpus = Annotated[int, count("--gpus", "N", "GPUs to share the work; on a CPU, the number of worker processes.")]
Seed = Annotated[
    int,
    option("--seed", "N", "Everything random follows from it: same input, same seed, same bytes.", parser=whole),
]
PackSeed = Annotated[
    int | None,
    option(
        "--seed",
        "N",
        "Everything random follows from it: same input, same seed, same bytes.  [default: for tokens the last "
        "attach's, else 0]",
        parser=whole,
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    option("--precision", "auto|fp32|bf16|fp16", "Arithmetic; auto is bf16 on a GPU and fp32 on a CPU."),
]
SamplingPrecision = Annotated[
    Literal["auto", "fp32", "tf32", "bf16", "fp16"],
    option("--precision", "auto|fp32|tf32|bf16|fp16", "Arithmetic; auto is tf32 on a GPU and fp32 on a CPU."),
]
NoCompile = Annotated[
    bool,
    option("--no-compile", None, "On a GPU: do not compile the model first, as is done for a lot of images."),
]
Json = Annotated[
    bool,
    option("--json", None, "Print one JSON document instead of text.", callback=config_file.note_json, is_eager=True),
]
DryRun = Annotated[bool, option("--dry-run", None, "Say what would run and why, and write nothing.")]
Overwrite = Annotated[bool, option("--overwrite", None, "Do it anew even if it is finished, replacing what is there.")]
Config = Annotated[
    Path | None,
    option(
        "--config",
        "FILE.toml",
        "Options from a file: a table per command, for example [score] with evals = 16.",
        callback=config_file.apply,
        is_eager=True,
    ),
]

# score
Objective = Annotated[
    Literal["velocity", "eps"] | None,
    option(
        "--objective",
        "velocity|eps",
        "What the model predicts (SiT: velocity, DiT: eps), where its file does not tell.",
    ),
]
RunCodec = Annotated[
    str | None,
    option(
        "--codec",
        "rgb|vae|DIR",
        "The codec that turns latents into pixels.  [default: the run's]",
    ),
]
Threads = Annotated[int, count("--threads", "N", "Threads that decode images, for each worker.")]

# select, attach, pack
Ratio = Annotated[
    Any,
    option(
        "--ratio",
        "SHARE[,SHARE...]",
        "Budget as a share of all images; of several, each smaller selection lies inside the larger.",
        parser=several(finite),
    ),
]
PerClass = Annotated[
    Any, option("--per-class", "IMAGES[,...]", "Budget as images per class.", parser=several(at_least(1)))
]
Total = Annotated[Any, option("--total", "IMAGES[,...]", "Budget as images in all.", parser=several(at_least(1)))]
_METHODS = (
    "interval (the paper's rule), random, random-window, min, max, medium; looking at images: herding, k-center, "
    "facility-location, moments, kernel, ot, match; or your own PACKAGE.MODULE:FUNCTION."
)
Method = Annotated[str, option("--method", "METHOD", _METHODS)]
PackMethod = Annotated[str | None, option("--method", "METHOD", f"{_METHODS}  [default: interval]")]
Balance = Annotated[
    str,
    option("--balance", "equal|proportional|sqrt|min:N", "How classes of different sizes share the budget."),
]
Spread = Annotated[bool, option("--spread", None, "Let other classes give what small ones lack.")]
Report = Annotated[
    Path | None,
    option("--report", "FILE.html", "Also write a page to look at: pictures, and distances beside random selections."),
]
Easiest = Annotated[
    float | None,
    option("--easiest", "SHARE", "Pick only among this share of each class with the lowest scores.", parser=finite),
]
Score = Annotated[
    str,
    option(
        "--score",
        "COLUMN",
        "What difficulty is: score, a noise band (score_low_noise, score_mid_noise, score_high_noise), another reading "
        "of the same error (score_eps, score_velocity), or gradient, which needs no model.",
    ),
]
Features = Annotated[
    str | None,
    option(
        "--features",
        "ENCODER",
        "Where methods that look at images get features: scorer, an encoder as of `d2c attach --vision`, or a Parquet "
        "file with a column key and one of lists.  [default: scorer]",
    ),
]
Confidence = Annotated[
    float,
    option(
        "--confidence",
        "WEIGHT",
        "What the cross-entropies of a classifier fitted to the features count in `--method ot`; 0 leaves them out.",
        parser=finite,
    ),
]
Interval = Annotated[
    int | None,
    count(
        "--interval",
        "RANKS",
        "Distance between picks in the ranking of a class.  [default: so that the picks span 74 % of it; a whole "
        "number from 10 on]",
    ),
]
Text = Annotated[
    str | None,
    option(
        "--text",
        "ENCODER",
        "Text encoder: none, hashed, t5, t5:DIR or open_clip:MODEL:FILE; or FILE.parquet or FILE.npz with your own "
        "embeddings, a row for each class.  [default: what was attached last, else "
        "hashed for small images, t5 for others]",
    ),
]
Prompt = Annotated[
    str | None,
    option("--prompt", "TEXT", "What an encoder reads for a class.  [default: as before, else 'a photo of a {class}']"),
]
Synonyms = Annotated[
    Literal["first", "all"] | None,
    option(
        "--synonyms",
        "first|all",
        "Of a class called `tench, Tinca tinca` the prompt takes the first name, or all.  [default: what was attached "
        "last, else first]",
    ),
]
RankEncoders = Annotated[
    Any,
    option(
        "--rank-encoders",
        "ENCODER[,...]",
        "Instead of attaching: rank vision encoders by the spatial structure of their tokens (iREPA), in minutes.",
        parser=several(str),
    ),
]
RankImages = Annotated[int, count("--rank-images", "IMAGES", "Scored images that encoders are ranked on.")]
Vision = Annotated[
    str | None,
    option(
        "--vision",
        "ENCODER",
        "Vision encoder: none, scorer, dinov2, timm:MODEL:FILE or open_clip:MODEL:FILE.  [default: what was attached "
        "last, else scorer for small images, dinov2 for others]",
    ),
]
Grid = Annotated[
    int | None,
    count(
        "--grid",
        "TOKENS",
        "Side of the vision token grid; the model to train must have the same.  [default: that of a /2 model, or the "
        "scorer's for pixels beyond 64]",
    ),
]
Selection = Annotated[
    str | None,
    option("--selection", "NAME", "Which selection.  [default: the one made last]"),
]
_SELECTION = "A selection of the workspace, or a Parquet file with a column key."
FirstSelection = Annotated[str, typer.Argument(metavar="FIRST", help=_SELECTION)]
SecondSelection = Annotated[str, typer.Argument(metavar="SECOND", help=_SELECTION)]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A scored image: its path below the source.")]
Container = Annotated[
    Literal["tar", "parquet"], option("--container", "tar|parquet", "Shards as WebDataset tar files or as Parquet.")
]
Views = Annotated[
    Any,
    option(
        "--views",
        "orig|orig,hflip",
        "What is encoded of each image: itself, or its mirror image too.  [default: as before, else orig]",
        parser=several(str),
    ),
]
Tokens = Annotated[
    Literal["fp16", "int8", "int4"],
    option(
        "--tokens",
        "fp16|int8|int4",
        "How vision tokens are stored: int8 is half of fp16, int4 a quarter; what that costs is measured and recorded.",
    ),
]
RecipeOnly = Annotated[
    bool,
    option(
        "--recipe-only",
        None,
        "Write ids, hashes and settings without latents, for images that may not be shared: see `d2c rebuild`.",
    ),
]
Shards = Annotated[
    int | None,
    count("--shards", "N", "Shard files.  [default: 8, 16 or 64, by the number of images]"),
]
Licence = Annotated[
    str, option("--licence", "SPDX", "Licence of the source images, written into the artifact; `push` asks for it.")
]
SourceTerms = Annotated[
    str,
    option("--source-terms", "URL", "Where the terms of use of the source images stand; `push` asks for it."),
]

# repack
RepackOut = Annotated[Path, typer.Argument(metavar="OUT", help="Where the new artifact goes.", file_okay=False)]
NewContainer = Annotated[
    Literal["tar", "parquet"] | None,
    option("--container", "tar|parquet", "Tar files or Parquet.  [default: as it is]"),
]
NewTokens = Annotated[
    Literal["fp16", "int8", "int4"] | None,
    option("--tokens", "fp16|int8|int4", "Codec of the vision tokens; gives another content id.  [default: as it is]"),
]
NewShards = Annotated[int | None, count("--shards", "N", "Shard files.  [default: as many as there are]")]
NewLicence = Annotated[str | None, option("--licence", "SPDX", "Licence of the source images.  [default: as it is]")]
NewTerms = Annotated[
    str | None,
    option("--source-terms", "URL", "Where the terms of use of the source images stand.  [default: as it is]"),
]

# sample, fid, report
ReportOut = Annotated[Path, option("--out", "FILE.html", "Where the page goes.")]
Sampler = Annotated[
    Literal["euler", "heun", "sde", "dopri5", "ddim", "ddpm"],
    option(
        "--sampler",
        "METHOD",
        "For SiT: euler, heun or dopri5 (ODE), or sde (REPA's Euler-Maruyama). For DiT: ddim, which euler stands for "
        "too, or ddpm.",
    ),
]
SamplingSteps = Annotated[
    int, count("--sampling-steps", "STEPS", "Solver steps per image; dopri5 takes as many as it needs.")
]
Guidance = Annotated[
    float | None,
    option(
        "--guidance",
        "SCALE",
        "Classifier-free guidance; 1 is off.  [default: 1.5; 1 for a run with class_dropout=0]",
        parser=finite,
    ),
]
GuidanceInterval = Annotated[
    Any,
    option(
        "--guidance-interval",
        "LO,HI",
        "Guide only between these times; 1 is noise, 0 the image.",
        parser=interval,
    ),
]
GuidanceChannels = Annotated[
    Any,
    option(
        "--guidance-channels",
        "3|all",
        "Latent channels that are guided: official SiT and DiT guide 3 of 4, REPA all.",
        parser=channels,
    ),
]
Count = Annotated[int, count("--count", "IMAGES", "Images to draw.")]
ClassLabels = Annotated[
    Literal["balanced", "random"],
    option("--class-labels", "balanced|random", "Classes of the images: equally often, or drawn at random."),
]
Npz = Annotated[bool, option("--npz", None, "Also write all images as one samples.npz, to measure elsewhere.")]
SampleBatch = Annotated[int, count("--batch-size", "IMAGES", "Images drawn at once.")]

# push, pull
Destination = Annotated[
    str,
    typer.Argument(metavar="DEST", help="hf://ORG/NAME[@BRANCH], s3://BUCKET/PREFIX, another fsspec URL, or a path."),
]
Published = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="hf://ORG/NAME[@REVISION], s3://BUCKET/PREFIX, another fsspec URL, or a path."
    ),
]
PullOut = Annotated[Path, typer.Argument(metavar="OUT", file_okay=False, help="Where the artifact goes.")]
Private = Annotated[bool, option("--private", None, "Make the data set on the hub a private one.")]
Replace = Annotated[bool, option("--overwrite", None, "Replace another artifact that is there.")]
Root = Annotated[
    str | None,
    option("--root", "SHA256", "The root that `d2c push` printed, from somebody you trust: anything else is refused."),
]

# rebuild
RecipeFolder = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: an artifact without its arrays.")]
RebuildSource = Annotated[
    str, option("--source", "SOURCE", "Your copy of the images: the data set that the recipe names.")
]
RebuildScorer = Annotated[
    str | None, option("--scorer", "FILE", "The recipe's scorer, where its vision tokens come from that.")
]
RebuildVision = Annotated[
    str | None,
    option("--vision", "ENCODER", "The recipe's vision encoder with local weights, such as timm:MODEL:FILE."),
]
RebuildCodec = Annotated[
    str | None, option("--codec", "rgb|vae|DIR", "The recipe's VAE, where it lies in a local folder.")
]
Approximate = Annotated[
    bool,
    option(
        "--approximate",
        None,
        "Keep arrays that differ from the recipe's, as other devices round; says what differs, under another id.",
    ),
]

# verify, inspect, demo
Quick = Annotated[bool, option("--quick", None, "Only the manifest, the list of files, their sizes and the index.")]
Deep = Annotated[bool, option("--deep", None, "Also sha256 of every file, and every array against its own hash.")]
SampleKey = Annotated[str | None, option("--sample", "KEY", "Show this sample instead: its facts and its arrays.")]
Diff = Annotated[
    Path | None, folder("--diff", "Show instead what changed since this artifact: d2c inspect --diff OLD NEW.")
]
Seeds = Annotated[int, count("--seeds", "N", "Training seeds per arm, for the spread.")]
DemoSteps = Annotated[int, count("--steps", "STEPS", "Training steps per run.")]
DemoSamples = Annotated[int, count("--samples", "IMAGES", "Images to generate and measure per run.", least=2)]
