"""Write training.md: seconds a step of d2c's trainer and of the official REPA code, interleaved in one process.

PYTHONPATH=. python docs/benchmarks/training.py --repa DIR > docs/benchmarks/training.md
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine, note
from made_artifact import trainer, write
from official import Repa, RepaStep, commit
from scoring_gpu import peak
from tables import table

from d2c import runtime
from d2c.errors import D2CError
from d2c.flops import forward_flops
from d2c.recipe import RECIPES
from d2c.sit import ModelSpec

BARS = {"cpu": 1.6, "cuda": 2.5}
"""Times the speed of REPA's step in the precision that comes first in OFFICIAL."""
PEAK_BAR = 0.4
DATA_BAR = 0.02
OFFICIAL = {"cpu": ("fp32", "bf16"), "cuda": ("fp16",)}
OURS = {"cpu": ("bf16", "fp32"), "cuda": ("bf16",)}
MODEL = {"cpu": "sit-s/2", "cuda": "sit-xl/2"}
BATCH = {"cpu": 4, "cuda": 256}
TURN = {"cpu": 1, "cuda": 10}
"""Steps until it is another one's turn."""
PACKAGES = "torch timm numpy".split()
TEXT = """# Training: a step of `d2c train` against a step of the official REPA code

[training.py](training.py) made this page: `PYTHONPATH=. python docs/benchmarks/training.py --repa DIR`, from a clone of
REPA (commit {commit}). All run in one process and take turns every {turn}, in an order drawn anew for each
round, so that whatever else the machine does hits all alike. The figures to trust are ratios: medians over {rounds}
rounds of the ratio inside a round, with the least and the greatest in brackets, after a first step each. What the
precision gives, and what the code, is told apart by the last column.

- *model*: {model} with REPA's projector, {parameters:,.1f} M parameters, the same weights on both sides; batch {batch},
  latents of 4 x 32 x 32, 256 x 768 vision tokens, 1,000 classes; {place}.
- *d2c*: `d2c.training`'s own step with the recipe `repa` on an artifact with ImageNet's shapes and 8-bit tokens, all of
  it: fetching and decoding the batch, draws, forward, backward, clipping, fused AdamW, averages. `bf16` is
  `--precision bf16`{auto}.
- *REPA*: the loop of its train.py with its model, `SILoss`, `sample_posterior`, AdamW, clipping, `update_ema` and the
  losses read for its log, without accelerate around it, whose autocast (and, for fp16, scaler) is written out. It is
  given its batch ready on the device: no files, no image decoding, and DINOv2's tokens precomputed, which REPA computes
  anew in each step. {own}
- *data*: fetching and decoding one batch by itself, as a share of a step; the step waits for no more than this.
{gpu}"""
GPU = """\
- *peak*: the fastest of square bf16 matrix products on this GPU, measured here too. A step's operations are three times
  those of the forward pass' matrix products with the projector: {gflops:,.1f} GFLOP an image.
"""


@dataclass
class Arm:
    """One side in one precision."""

    name: str
    call: Callable[[int], object]
    seconds: list[float] = field(default_factory=list)

    def turn(self, steps: range) -> None:
        for step in steps:
            self.call(step)


@dataclass
class Bench:
    """The sides, the trainer whose data is measured, and its share, a figure a round."""

    arms: list[Arm]
    ours: Any
    data: list[float] = field(default_factory=list)


def shown(values: Sequence[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def training_flops(spec: ModelSpec) -> int:
    """Operations of one image's forward and backward pass: each product of the forward pass has two in the backward."""
    hidden = spec.projector_width
    projector = 2 * spec.tokens * hidden * (spec.width + hidden + (spec.align_dim or 0))
    return 3 * (forward_flops(spec) + projector)


def waiting(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds until what ``call`` started is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def build(repa: Repa, artifact: Path, model: str, batch: int, device: torch.device) -> Bench:
    """Every side with the same weights, each having taken a step."""
    recipe = replace(RECIPES["repa"], batch_size=batch)
    ours = {
        precision: trainer(artifact, artifact.parent / f"run-{precision}", model, recipe, precision, str(device))
        for precision in OURS[device.type]
    }
    first = next(iter(ours.values()))
    ready = []
    for number in range(2):
        one = first.loader.batch(number)
        ready.append((one.raw.float().flatten(1, 2), one.labels, one.tokens))
    state = first.parts.model.state_dict()
    arms = []
    for precision in OFFICIAL[device.type]:
        theirs = repa.model(first.settings.spec).to(device)
        theirs.load_state_dict(state, strict=True)
        step = RepaStep(repa, theirs, precision)
        arms.append(Arm(f"REPA, {precision}", lambda n, step=step: step(*ready[n % 2])))
    arms += [Arm(f"d2c, {precision}", one.step) for precision, one in ours.items()]
    for arm in arms:
        note(f"first step, batch {batch}: {arm.name}")
        waiting(device, partial(arm.call, 0))
    return Bench(arms, first)


def largest(repa: Repa, artifact: Path, model: str, batch: int, device: torch.device) -> tuple[Bench, int]:
    """With the largest batch, halved as often as it must be, that fits all sides."""
    while True:
        try:
            return build(repa, artifact, model, batch, device), batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def measure(bench: Bench, rounds: int, device: torch.device) -> None:
    draw, turn = random.Random(0), TURN[device.type]
    ours = next(arm for arm in bench.arms if arm.name.startswith("d2c"))
    data = Arm("data", bench.ours.loader.batch)
    for number in range(rounds):
        steps = range(1 + number * turn, 1 + (number + 1) * turn)
        for arm in draw.sample(bench.arms, len(bench.arms)):
            arm.seconds.append(waiting(device, partial(arm.turn, steps)) / turn)
        fetched = waiting(device, partial(data.turn, steps)) / turn
        bench.data.append(fetched / ours.seconds[-1])
        note(f"round {number + 1} of {rounds}: " + ", ".join(f"{a.name} {a.seconds[-1]:.3f} s" for a in bench.arms))


def ratios(arms: Sequence[Arm], name: str, to: str) -> list[float]:
    """Speed of ``name`` relative to ``to``, a figure a round."""
    seconds = {arm.name: arm.seconds for arm in arms}
    return [theirs / ours for theirs, ours in zip(seconds[to], seconds[name], strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repa", type=Path, default=Path("REPA"), help="a clone of github.com/sihyun-yu/REPA")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", help=f"default: {MODEL}")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH}; on a GPU halved until it fits")
    parser.add_argument("--rounds", type=int, default=9, help="medians need at least 5")
    parser.add_argument("--json", action="store_true", help="one JSON line after the page")
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("needs at least 5 rounds")
    if not (options.repa / "train.py").is_file():
        note(f"{options.repa} is no clone of REPA: git clone https://github.com/sihyun-yu/REPA, then --repa REPA")
        return 2
    try:
        device = runtime.resolve_device(options.device)
    except D2CError as error:
        note(str(error))
        return 2
    kind, model = device.type, options.model or MODEL[device.type]
    # As REPA's own command has it, for both sides; it matters on a GPU alone.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with tempfile.TemporaryDirectory() as folder:
        batch = options.batch or BATCH[kind]
        artifact = write(Path(folder) / "artifact", 4 * batch)
        bench, batch = largest(Repa.load(options.repa), artifact, model, batch, device)
        measure(bench, options.rounds, device)
    spec, threads = bench.ours.settings.spec, torch.get_num_threads()
    against, best = f"REPA, {OFFICIAL[kind][0]}", f"d2c, {OURS[kind][0]}"
    speedup, data = ratios(bench.arms, best, against), statistics.median(bench.data)
    middle = {arm.name: statistics.median(arm.seconds) for arm in bench.arms}
    share = None
    if kind == "cuda":
        note("peak")
        rate = training_flops(spec) * batch / middle[best]
        share = rate / peak(device, torch.bfloat16, options.rounds, 1.0)
    print(
        TEXT.format(
            commit=commit(options.repa),
            turn=f"{TURN[kind]} steps" if TURN[kind] > 1 else "step",
            rounds=options.rounds,
            model=model,
            parameters=sum(p.numel() for p in bench.ours.parts.model.parameters()) / 1e6,
            batch=batch,
            place=torch.cuda.get_device_name(device) if kind == "cuda" else f"CPU threads: {threads}",
            auto=", the default on a GPU" if kind == "cuda" else "; on a CPU the default is fp32",
            own="fp16 is what its README trains in." if kind == "cuda" else "fp32 is its `--mixed-precision no`.",
            gpu=GPU.format(gflops=training_flops(spec) / 1e9) if kind == "cuda" else "",
        )
    )
    print(machine(PACKAGES) + "\n\n## Steps\n")
    rows = []
    for arm in bench.arms:
        figures = [shown(arm.seconds, ".3f"), f"{1 / middle[arm.name]:.3g}", f"{batch / middle[arm.name]:.3g}"]
        peer = arm.name.replace("d2c", "REPA")
        same = shown(ratios(bench.arms, arm.name, peer)) if peer in middle and peer != arm.name else ""
        rows.append([arm.name, *figures, shown(ratios(bench.arms, arm.name, against)), same])
    print(table(["", "s/step", "steps/s", "images/s", f"speed against {against}", "against its own precision"], rows))
    targets = [
        (f"{best} against {against}", f">= {BARS[kind]} x", shown(speedup), statistics.median(speedup) >= BARS[kind]),
        ("data, of a step", f"< {DATA_BAR:.0%}", shown(bench.data, ".2%"), data < DATA_BAR),
    ]
    if share is not None:
        targets.append((f"{best}: share of the measured peak", f">= {PEAK_BAR:.0%}", f"{share:.1%}", share >= PEAK_BAR))
    body = [[what, bar, found, "met" if met else "**missed**"] for what, bar, found, met in targets]
    print("\n## Targets\n\n" + table(["", "target", "measured", ""], body))
    met = all(target[-1] for target in targets)
    if options.json:
        facts = {"against": against, "ours": best, "model": model, "batch": batch, "device": kind}
        facts |= {"speedup": round(statistics.median(speedup), 3), "least": round(min(speedup), 3)}
        facts |= {"most": round(max(speedup), 3), "seconds": {name: round(s, 4) for name, s in middle.items()}}
        facts |= {"rounds": options.rounds, "data_share": round(data, 5), "peak_share": share, "met": met}
        print(json.dumps(facts))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
