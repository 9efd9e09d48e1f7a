"""Keep fewer and fewer images of each class of a Parquet file: from all of the first to a hundredth of the last.

python docs/benchmarks/longtail.py cifar10-train.parquet OUT.parquet [--ratio 100]

Class c of C keeps ``n * ratio ** (-c / (C - 1))`` of its n images (Cui et al. 2019, 1901.05555), the first in the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, default=100.0)
    parser.add_argument("--column", default="label")
    args = parser.parse_args()
    table = pq.read_table(args.source)
    labels = table[args.column].to_numpy()
    classes = np.unique(labels)
    kept = []
    for place, label in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        kept.append(rows[: round(len(rows) * args.ratio ** (-place / (len(classes) - 1)))])
    partial = args.out.with_suffix(".partial")
    pq.write_table(table.take(pa.array(np.sort(np.concatenate(kept)))), partial)
    partial.rename(args.out)


if __name__ == "__main__":
    main()
