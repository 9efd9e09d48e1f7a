"""Compare a repeated level A with the published one, to the digits printed.

python docs/benchmarks/bench_compare.py OUT DOMAIN
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench_arms import MEASURES
from bench_page import SUBSET_MEASURES, subsets
from tables import read, table


def main(out: Path, domain: str) -> int:
    """Print the repeated tables; 1 where a figure differs."""
    published = read(Path(__file__).parent / f"{domain}.json")["rows"]
    expected = {(row["method"], row["budget"]): row["measures"] for row in published if row["level"] == "a"}
    rows = [read(path) for path in sorted((out / domain / "results").glob("a-*.json"))]
    for caption, header, body in subsets(rows).tables:
        print(f"\n{caption}\n\n{table(header, body)}")
    different = []
    for row in rows:
        arm = row["method"], row["budget"]
        for measure in SUBSET_MEASURES if arm in expected else ():
            ours, theirs = (f"{found[measure]['value']:.3f}" for found in (row["measures"], expected[arm]))
            if ours != theirs:
                different.append(f"{arm[0]}, {arm[1]} a class, {MEASURES[measure][0]}: {ours}, published {theirs}")
    print(f"\n{len(rows) * len(SUBSET_MEASURES)} figures, {len(different)} differ from those published.")
    print("\n".join(different))
    if different:
        print("Networks trained on another processor or by another torch choose and judge a little differently.")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
