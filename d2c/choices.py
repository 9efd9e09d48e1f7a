"""The choices nobody named. They depend on the data alone, never on what the network happens to reach."""

from __future__ import annotations

from d2c.batches import probe
from d2c.sources import Source

PAPER_SCORER = "facebook/DiT-XL-2-256"
"""The paper's scorer, as diffusers publishes it."""
TRAIN_SCORER = "train"
SMALL = 64
"""Images up to this side (pixels) are modelled as they are; larger ones through the VAE at 256 px."""


def choose_codec(source: Source, codec: str | None, size: int | None) -> tuple[str, int]:
    """The latent codec and image side for a source: small images as they are, larger ones through the VAE at 256."""
    if codec is not None and size is not None:
        return codec, size
    seen = probe(source)
    native = max(4, seen.median_side - seen.median_side % 4)
    if codec is None:
        codec = "rgb" if (size or seen.max_side) <= SMALL else "vae"
    return codec, size or (min(native, SMALL) if codec == "rgb" else 256)


def choose_scorer(source: Source, scorer: str | None, codec: str) -> str:
    """The scorer nobody named: the paper's for ImageNet-1k at full size, else one trained on the source itself."""
    if scorer is not None:
        return scorer
    return PAPER_SCORER if source.imagenet_ids is not None and codec != "rgb" else TRAIN_SCORER


def choose_scorer_model(codec: str, size: int) -> str:
    """A small model for a scorer: S/2 on the VAE's latents; tiny on pixels, with at most 256 tokens up to 128 px."""
    if codec != "rgb":
        return "sit-s/2"
    # 2 up to 16 px and 4 up to 64 px: a CPU then scores 50,000 images in minutes.
    return f"sit-tiny/{2 if size <= 16 else 4 if size <= 64 else 8}"
