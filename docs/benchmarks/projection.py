"""Write the tables of reproduce-imagenet.md: what the headline run costs, computed from arithmetic and stated rates.

PYTHONPATH=.:docs/benchmarks python docs/benchmarks/projection.py [--rate 790] [--price 3]

Nothing here was measured on a GPU. Operations are counted (`d2c.flops`, and the constants below); ``--rate`` is the
bf16 rate of matrix products of one GPU, ``--score-share`` and ``--train-share`` the parts of it that a step reaches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from tables import table

from d2c.flops import forward_flops
from d2c.sit import model_spec

IMAGES = 1_281_167
VAE_ENCODE, VAE_DECODE, DINOV2_B = 272.7e9, 622e9, 46.3e9
"""Operations an image at 256 px (at 224 px for DINOv2-B), counted with torch's FlopCounterMode.

The VAE encodes in float32 whatever ``--precision`` says: its convolutions in TF32, cuDNN's default. Its attention,
1.6 % of the operations, stays in float32 and is not charged apart.
"""
TOKENS, DIM, TEXT = 256, 768, (16, 2048)
LATENT_BYTES = 2 * 4 * 32 * 32 * 2
FILES = 148e9
"""Bytes of ImageNet's training images."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of one GPU, by what it does, and money an hour."""

    score: float
    encode: float
    train: float
    sample: float
    price: float


def main() -> None:
    """Print one table a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=790.0, help="TFLOP/s of bf16 matrix products, one GPU")
    parser.add_argument("--score-share", type=float, default=0.45)
    parser.add_argument("--train-share", type=float, default=0.40)
    parser.add_argument("--price", type=float, default=3.0, help="money for a GPU-hour")
    options = parser.parse_args()
    peak = 1e12 * options.rate
    # The VAE and sampling are in TF32, which a tensor core multiplies at half the rate of bf16.
    rates = Rates(
        score=peak * options.score_share,
        encode=peak / 2 * options.score_share,
        train=peak * options.train_share,
        sample=peak / 2 * options.train_share,
        price=options.price,
    )
    for name, images, steps in (("10 K: the headline", 10_000, 40_000), ("50 K", 50_000, 180_000)):
        print(f"### {name}, {steps:,} steps of 256\n")
        rows = stages(images, steps, rates)
        print(table(["stage", "EFLOP", "one GPU, h", "8 GPUs, h", "money"], rows), end="\n\n")
    print(table(["on disk", "10 K", "50 K"], disk()), end="\n\n")
    print(table(["in a GPU's memory, SiT-XL/2", "GB"], memory()))


def stages(images: int, steps: int, rates: Rates) -> list[list[str]]:
    """A row for each stage."""
    scorer = model_spec("dit-xl/2", 32, 4, 1000)
    model = model_spec("sit-xl/2", 32, 4, 1000, TEXT[1], DIM)
    forward = forward_flops(model)
    projector = 2 * model.tokens * model.projector_width * (model.width + model.projector_width + DIM)
    work = {
        "score, 8 evaluations": [
            (IMAGES * 8 * forward_flops(scorer), rates.score),
            (IMAGES * VAE_ENCODE, rates.encode),
        ],
        "attach and pack": [(images * DINOV2_B, rates.score), (images * VAE_ENCODE, rates.encode)],
        "train": [(256 * steps * 3 * (forward + projector), rates.train)],
        "fid: 50,000 samples, 250 steps, guided": [(50_000 * (500 * forward + VAE_DECODE), rates.sample)],
    }
    work["together"] = [part for parts in work.values() for part in parts]
    return [
        _row(name, sum(flops for flops, _ in parts), sum(flops / rate / 3600 for flops, rate in parts), rates.price)
        for name, parts in work.items()
    ]


def _row(name: str, flops: float, hours: float, price: float) -> list[str]:
    return [name, f"{flops / 1e18:.2f}", f"{hours:.1f}", f"{hours / 8:.2f}", f"{hours * price:,.0f}"]


def disk() -> list[list[str]]:
    """Bytes of what is kept."""
    tokens = TOKENS * (DIM + 2)
    rows = [["ImageNet's training images (yours already)", *2 * [f"{FILES / 1e9:,.0f} GB"]]]
    for name, stored in (("artifact, int8 tokens", tokens), ("the same, fp16 tokens", 2 * TOKENS * DIM)):
        each = LATENT_BYTES + stored + 2 * DIM
        rows.append([name, *(f"{count * each / 1e9:,.1f} GB" for count in (10_000, 50_000))])
    rows.append(["scores of all images", *2 * [f"{IMAGES * 220 / 1e9:,.1f} GB"]])
    return rows


def memory() -> list[list[str]]:
    """What does not depend on the batch."""
    count = 675.2e6 + 8.1e6 + 40.4e6
    return [
        ["weights, gradients, two moments, averages (fp32)", f"{5 * 4 * count / 1e9:.1f}"],
        ["the 10 K artifact, resident", f"{10_000 * (LATENT_BYTES + TOKENS * (DIM + 2)) / 1e9:.1f}"],
        ["the 50 K artifact, resident", f"{50_000 * (LATENT_BYTES + TOKENS * (DIM + 2)) / 1e9:.1f}"],
    ]


if __name__ == "__main__":
    main()
