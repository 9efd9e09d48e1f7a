"""Write scoring-gpu.md: how much of a GPU's matrix-product peak the scorer uses.

PYTHONPATH=. python docs/benchmarks/scoring_gpu.py > docs/benchmarks/scoring-gpu.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from machine import machine, note
from tables import table

from d2c import runtime
from d2c.errors import D2CError
from d2c.flops import forward_flops
from d2c.scorers import Denoiser
from d2c.sit import ModelSpec, SiT, model_spec
from d2c.throughput import compile_blocks
from d2c.transport import objective_for

BAR = 0.45
"""Of the measured peak."""
SIDES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
PACKAGES = "torch timm".split()
TEXT = """# Scoring on a GPU: share of the matrix-product peak

[scoring_gpu.py](scoring_gpu.py) made this page: `PYTHONPATH=. python docs/benchmarks/scoring_gpu.py`. The peak is
measured here too: the fastest of square {dtype} matrix products of sides {sides}. A scorer's evaluation is
`Denoiser.loss` as `d2c score` calls it: noise an image, predict, mean squared error; {precision}, random weights and
latents (zeros would draw less power and run faster). Its operations are those of the forward pass' matrix products
(`d2c.flops`): {gflops:,.1f} GFLOP an image of {tokens} tokens. Each figure is the median of {rounds} rounds, with the
least and the greatest in brackets; decoding and encoding images are not in it.
"""


@dataclass(frozen=True)
class Rates:
    """Calls a second, a figure a round."""

    rounds: list[float]

    def shown(self, factor: float, form: str = ",.0f") -> str:
        middle, least, most = statistics.median(self.rounds), min(self.rounds), max(self.rounds)
        return f"{middle * factor:{form}} [{least * factor:{form}}, {most * factor:{form}}]"


def measure(call: Callable[[], object], device: torch.device, rounds: int, seconds: float) -> Rates:
    """``rounds`` times as many calls as take about ``seconds``."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed(2)  # allocations, kernel choices and compilation
    calls = max(1, round(seconds / timed(1)))
    return Rates([calls / timed(calls) for _ in range(rounds)])


def peak(device: torch.device, dtype: torch.dtype, rounds: int, seconds: float) -> float:
    """The best median over sizes, in operations a second."""
    best = 0.0
    for side in SIDES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found = measure(lambda a=a, b=b: a @ b, device, rounds, seconds)
        best = max(best, statistics.median(found.rounds) * 2 * side**3)
    return best


def scorer(spec: ModelSpec, device: torch.device) -> Denoiser:
    model = SiT(spec).requires_grad_(False).eval().to(device)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return Denoiser(model, objective_for(spec.objective), spec, {})


def evaluation(denoiser: Denoiser, batch: int, device: torch.device, precision: str) -> Callable[[], object]:
    """One evaluation of ``batch`` images."""
    spec = denoiser.spec
    shape = (spec.channels, spec.input_size, spec.input_size)
    latents, noise = torch.randn(batch, *shape, device=device), torch.randn(1, *shape, device=device)
    labels = torch.randint(spec.num_classes, (batch,), device=device)

    def call() -> object:
        with torch.inference_mode(), runtime.autocast(precision, device):
            return denoiser.loss(latents, noise.expand_as(latents), 0.5, labels)

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu only shows that the script runs")
    parser.add_argument("--model", default="sit-xl/2")
    parser.add_argument("--side", type=int, default=32, help="of the latents: 32 for images of 256 px")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    options = parser.parse_args()
    try:
        device = runtime.resolve_device(options.device)
    except D2CError as error:
        note(f"this benchmark needs a CUDA GPU: {error}")
        return 2
    precision = runtime.resolve_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    spec = model_spec(options.model, options.side, 4, 1000, learn_sigma=True)
    flops = forward_flops(spec)
    note("peak")
    top = peak(device, dtype, options.rounds, options.seconds)
    rows, best = [], 0.0
    # Compiled last, and in place: what is not compiled is measured first.
    denoiser = scorer(spec, device)
    for kind in ("eager", "compiled") if device.type == "cuda" else ("eager",):
        if kind == "compiled":
            compile_blocks(denoiser.model, device)
        for batch in options.batch:
            note(f"{kind}, batch {batch}")
            call = evaluation(denoiser, batch, device, precision)
            found = measure(call, device, options.rounds, options.seconds)
            best = max(best, statistics.median(found.rounds) * batch * flops / top)
            shown = [
                found.shown(batch),
                found.shown(batch * flops / 1e12, ",.4g"),
                found.shown(batch * flops / top, ".1%"),
            ]
            rows.append([kind, str(batch), *shown])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: these figures mean nothing"
    facts = {"precision": precision, "rounds": options.rounds, "tokens": spec.tokens, "gflops": flops / 1e9}
    sides = ", ".join(map(str, SIDES[device.type]))
    print(TEXT.format(dtype=str(dtype).removeprefix("torch."), sides=sides, **facts))
    print(machine(PACKAGES) + f"\n\n{name}: peak {top / 1e12:,.4g} TFLOP/s.\n\n## {spec.name}\n")
    print(table(["blocks", "batch", "images x evaluations/s", "TFLOP/s", "share of the peak"], rows))
    met = best >= BAR
    if device.type == "cuda":
        print(f"\nThe bar is {BAR:.0%} of the peak: {best:.1%}, {'met' if met else '**missed**'}.")
    return 0 if met or device.type == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
