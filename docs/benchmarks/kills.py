"""Write kills.md: kill -9 a random worker of a running `d2c score`, again and again, and compare what is left at last.

PYTHONPATH=. python docs/benchmarks/kills.py cifar10-train.parquet --scorer RUN > docs/benchmarks/kills.md
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, note
from tables import table

from formats.hashing import xxh3_file

OUTPUTS = ("scores.parquet", "bad_files.parquet", "classes.json", "duplicates.parquet", "leaks.parquet")
TEXT = """# Kill -9 of a random worker, {kills} times over

[kills.py](kills.py) made this page: `d2c score` of {images:,} images with {workers} worker processes. Each time, once
the workers run and none, one or two more parts are done, one of them is killed with signal 9 at a random moment, and
the same command is run again. In the end every output is compared, byte for byte, with that of one process that nobody
disturbed.

{table}

{verdict}

{machine}
"""


def main() -> None:
    """Disturb one scoring, leave another alone, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--scorer", required=True)
    parser.add_argument("--evals", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most", type=float, default=6.0, help="seconds at most between that and the kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, disturbed = Path(folder) / "alone", Path(folder) / "disturbed"
        rows, kills = [], 0
        while kills < args.kills:
            wait = chance.uniform(0, args.most)
            killed, told = run_and_kill(args, disturbed, wait, chance)
            parts = parts_done(disturbed)
            note(f"killed {killed} after {wait:.1f} s, {parts} parts done: {told}")
            if not killed:
                break
            kills += 1
            rows.append([str(kills), f"{wait:.1f}", str(parts), told])
        again = subprocess.run(command(args, disturbed, args.workers), capture_output=True, text=True, check=True)
        subprocess.run(command(args, alone, 1), capture_output=True, text=True, check=True)
        note(again.stderr[-500:])
        same = [name for name in OUTPUTS if digest(alone, name) == digest(disturbed, name)]
        images = read_count(disturbed)
    verdict = f"{kills} kills. Equal files: {', '.join(same)} ({len(same)} of {len(OUTPUTS)})."
    print(
        TEXT.format(
            kills=args.kills, workers=args.workers, images=images, verdict=verdict, machine=machine(("torch",)),
            table=table(["kill", "s after the last part", "parts done", "what the command said"], rows),
        ),
        end="",
    )  # fmt: skip
    if kills < args.kills or len(same) < len(OUTPUTS):
        raise SystemExit("too few kills, or other bytes")


def command(args: argparse.Namespace, workspace: Path, workers: int) -> list[str]:
    """`d2c score` as a user would type it."""
    options = {
        "--workspace": workspace, "--scorer": args.scorer, "--evals": args.evals, "--gpus": workers, "--device": "cpu",
    }  # fmt: skip
    typed = [str(word) for pair in options.items() for word in pair]
    return [sys.executable, "-m", "d2c_cli", "score", str(args.source), *typed]


def parts_done(workspace: Path) -> int:
    return sum(1 for _ in (workspace / "scores" / "parts").rglob("*.parquet"))


def run_and_kill(args: argparse.Namespace, workspace: Path, wait: float, chance: random.Random) -> tuple[bool, str]:
    """Start scoring, kill a worker ``wait`` seconds after some more parts are done; what it said in the end."""
    wanted = parts_done(workspace) + chance.randint(0, 2)
    words = command(args, workspace, args.workers)
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and (len(workers_of(running.pid)) < args.workers or parts_done(workspace) < wanted):
        time.sleep(0.05)
    time.sleep(wait)
    killed = False
    if running.poll() is None and (left := workers_of(running.pid)):
        os.kill(chance.choice(left), signal.SIGKILL)
        killed = True
    said = running.communicate()[1].strip().splitlines()
    return killed, next((line for line in said if line.startswith("error")), said[-1] if said else "nothing")


def workers_of(parent: int) -> list[int]:
    """Children that the elastic launcher started: not the helpers of Python's multiprocessing."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        found = [int(word) for word in children.read_text().split()]
        return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def digest(workspace: Path, name: str) -> str:
    return xxh3_file(workspace / "scores" / name)


def read_count(workspace: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(workspace / "scores" / OUTPUTS[0]).num_rows)


if __name__ == "__main__":
    main()
