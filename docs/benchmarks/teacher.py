"""Train the benchmark's teacher: a small vision transformer of timm's, on the labels of the images.

python docs/benchmarks/teacher.py SOURCE OUT.safetensors [--size 16]

It gives features to selectors and tokens to attach (`--vision timm:test_vit:OUT.safetensors`), and is neither the
scorer nor the judge. Its accuracy on a tenth that it was not trained on goes to OUT.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from d2c import batches
from d2c.sources import open_source
from formats.files import write_bytes, write_json

MODEL = "test_vit"
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="pixels that the images are cropped to")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--mirror", action="store_true", help="also train on mirror images")
    args = parser.parse_args()
    facts = args.out.with_suffix(".json")
    if facts.exists() and args.out.exists():
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    start = time.perf_counter()
    source = open_source(args.source)
    loaded = list(batches.load(source, range(len(source)), args.size, batch=256))
    pixels = torch.from_numpy(np.concatenate([batch.pixels for batch in loaded])).permute(0, 3, 1, 2).float()
    rows = np.concatenate([batch.indices for batch in loaded])
    names, targets = np.unique(np.asarray([source.labels[row] for row in rows]), return_inverse=True)
    labels = torch.from_numpy(targets)
    kept, held_out = torch.arange(len(labels))[torch.arange(len(labels)) % 10 != 0], torch.arange(0, len(labels), 10)
    model = timm.create_model(MODEL, num_classes=len(names), img_size=4 * args.size)
    steps = args.passes * len(kept) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in range(steps):
        chosen = kept[torch.randint(len(kept), (BATCH,))]
        images = shifted(pixels[chosen], args.size // 8)
        if args.mirror:
            images = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, images.flip(3), images)
        loss = F.cross_entropy(model(seen(images, model)), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(step, steps, round(loss.item(), 3), round(time.perf_counter() - start), flush=True)
    model.eval()
    with torch.inference_mode():
        guesses = torch.cat([model(seen(pixels[part], model)).argmax(1) for part in held_out.split(BATCH)])
    accuracy = (guesses == labels[held_out]).float().mean().item()
    write_bytes(args.out, save({name: value.contiguous() for name, value in model.state_dict().items()}))
    seconds = round(time.perf_counter() - start, 1)
    write_json(facts, {"model": MODEL, "accuracy": round(accuracy, 4), "images": len(kept), "seconds": seconds})


def seen(images: Tensor, model: torch.nn.Module) -> Tensor:
    """Pixels float [n, 3, s, s] in 0..255 as d2c shows them to an encoder: normalised, then resized to 4 s."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    side = 4 * images.shape[-1]
    return F.interpolate((images / 255 - mean) / std, size=(side, side), mode="bicubic", align_corners=False)


def shifted(images: Tensor, reach: int) -> Tensor:
    """Each image moved by up to ``reach`` pixels both ways, its border repeated."""
    n, _, side, _ = images.shape
    moves = torch.randint(-reach, reach + 1, (2, n, 1))
    rows, columns = (torch.arange(side) + moves).clamp(0, side - 1)
    return images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
