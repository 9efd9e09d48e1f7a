"""Options of ``train`` alone; those that it shares with other commands are in `d2c_cli.options`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from d2c_cli.values import count, folder, option

RunOut = Annotated[Path | None, folder("--out", "Where the run goes.  [default: runs/MODEL-RECIPE]")]
Model = Annotated[
    str,
    option("--model", "MODEL", "sit-xl/2 and the like: sit or dit, tiny s b l xl, patch 2 4 8."),
]
Recipe = Annotated[str, option("--recipe", "d2c|repa|sit|dit|small", "A published recipe; small is for sit-tiny.")]
Steps = Annotated[int | None, count("--steps", "STEPS", "Optimizer steps.  [default: the recipe's]")]
Set = Annotated[
    list[str] | None,
    option("--set", "FIELD=VALUE", "Change a field of the recipe, such as lr=2e-4 or flip=grid; may be repeated."),
]
TrainBatch = Annotated[
    int | None,
    count("--batch-size", "IMAGES", "Images per step, over all GPUs.  [default: the recipe's]"),
]
MicroBatch = Annotated[
    int | None,
    count(
        "--micro-batch", "IMAGES", "Images that a GPU computes at once; gradients add up.  [default: all of its part]"
    ),
]
Shard = Annotated[
    Literal["auto", "yes", "no"],
    option(
        "--shard",
        "auto|yes|no",
        "Cut weights, gradients, moments and averages up among the GPUs; auto: where they would fill 70 % of each.",
    ),
]
TrainHeldOut = Annotated[
    str | None,
    option(
        "--held-out",
        "SOURCE",
        "Images whose loss shows whether the model memorises; those that are trained on are left out, so it may be the "
        "source that was scored.",
    ),
]
Patience = Annotated[
    int | None,
    count("--patience", "LOOKS", "Stop after so many looks without a new lowest loss of the held-out images."),
]
WatchEvery = Annotated[
    int | None,
    count("--watch-every", "STEPS", "Draw samples and curves, and read the held-out loss.  [default: ten times]"),
]
CheckpointEvery = Annotated[int, count("--checkpoint-every", "STEPS", "Save the state; and every 15 minutes.")]
KeepCheckpoints = Annotated[int, count("--keep-checkpoints", "N", "Newest states that stay.")]
KeepEvery = Annotated[int, count("--keep-every", "STEPS", "States that stay for good; 0: none.", least=0)]
LogTo = Annotated[
    list[str] | None,
    option("--log-to", "tensorboard|wandb", "Write stats.jsonl's figures and the pictures there too; may be repeated."),
]
