"""Train the network whose features choose images, and write them: what `d2c select --features OUT.parquet` takes.

python docs/benchmarks/chooser.py SOURCE OUT.parquet [--size 32] [--seed 1]

A small convolutional classifier, as the judge is, but of another seed, on another 20,000 images, and at another size.
Its accuracy on held-out images goes to OUT.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from d2c import batches, runtime
from d2c.classifier import train_classifier
from d2c.sources import open_source
from formats.files import write_json, write_table

IMAGES = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=32, help="pixels that the images are cropped to")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    facts = args.out.with_suffix(".json")
    if facts.exists() and args.out.exists():
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    source = open_source(args.source)
    loaded = list(batches.load(source, range(len(source)), args.size, batch=256))
    pixels = np.concatenate([batch.pixels for batch in loaded])
    rows = np.concatenate([batch.indices for batch in loaded])
    labels = np.asarray(source.labels)[rows]
    chosen = np.sort(runtime.rng("chooser", args.seed).permutation(len(rows))[:IMAGES])
    network = train_classifier(pixels[chosen], labels[chosen], device=torch.device("cpu"), seed=args.seed)
    # 16 bits, as d2c keeps the features of encoders.
    features = network(pixels).astype(np.float16)
    keys = [source.keys[row] for row in rows]
    write_table(args.out, pa.table({"key": keys, "features": list(features)}))
    seconds = round(time.perf_counter() - start, 1)
    write_json(facts, {"accuracy": network.info.accuracy, "images": len(chosen), "seconds": seconds})


if __name__ == "__main__":
    main()
