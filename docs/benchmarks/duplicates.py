"""What the search for duplicates finds, what it wrongly finds, and what it costs: `duplicates.md`.

    PYTHONPATH=. python docs/benchmarks/duplicates.py --small cifar10-train.parquet --large imagenet-samples-200.tar \
        --write docs/benchmarks/duplicates.md --sheet pairs.png

The sheet shows the pairs found in the small pictures, the least alike first, for a person to judge.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from machine import machine, note
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from d2c import batches, phash
from d2c.duplicates import CONFIRMED, Found, find, fingerprints
from d2c.images import center_crop, decode
from d2c.sources import Source, open_source

COUNT = 1_281_167  # ImageNet's training images
PLANTED = 1000

JUDGED = """\
Judged by eye, on sheets such as `--sheet` draws, of CIFAR-10's 607 pairs: all 56 mirrored ones and, outside the three
groups of more than ten images, the 88 straight ones with the largest distances and 56 drawn from those beyond 0.3. Of
these 200, 192 show the same photograph (recoloured, shifted by a pixel or two, sharpened, with another background);
8 do not, or nobody can tell (four pairs of airliners in one pose with different liveries, two of vans or airliners
that resemble each other, two of horses). Most other pairs are more alike. The largest group holds 39 images of one
white car."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path, required=True, help="pictures of 32 px")
    parser.add_argument("--large", type=Path, required=True, help="pictures to crop to 256 px")
    parser.add_argument("--write", type=Path, help="where the page goes; else it is printed")
    parser.add_argument("--sheet", type=Path, help="a PNG of the pairs found among the small pictures")
    options = parser.parse_args()
    # First, while nothing else has taken memory.
    cost = scale()
    small, large = open_source(options.small), open_source(options.large)
    recalls = {"CIFAR-10, 32 px": recall(small, 32, 2000), "ImageNet, 256 px": recall(large, 256, len(large))}
    wrong = [
        false_pairs("CIFAR-10, 32 px", small, 32, options.sheet),
        false_pairs("ImageNet, 256 px", large, 256, None),
    ]
    page = render(recalls, wrong, cost)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    else:
        print(page)


def scale() -> dict[str, Any]:
    """Search as many random hashes as ImageNet has, among them planted duplicates."""
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2**64, (COUNT, 4), dtype=np.uint64)
    ours, theirs = rng.permutation(COUNT)[: 2 * PLANTED].reshape(2, PLANTED)
    bits = np.zeros((PLANTED, 256), dtype=np.uint8)
    for row in bits:
        row[rng.choice(64, phash.NEAR_LOW, replace=False)] = 1
        row[64 + rng.choice(192, phash.NEAR_ALL - phash.NEAR_LOW, replace=False)] = 1
    known[theirs] = known[ours] ^ np.packbits(bits, axis=1, bitorder="little").view("<u8").astype(np.uint64)
    known[theirs[PLANTED // 2 :]] ^= phash.MIRROR
    before, found, wall, processor = _peak(), 0, time.perf_counter(), time.process_time()
    for mirrored in (False, True):
        note(f"searching {COUNT} hashes, mirrored: {mirrored}")
        found += len(phash.close(known, mirrored=mirrored).pairs)
    return {
        "found": found,
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "before": before,
        "peak": _peak(),
    }


def recall(source: Source, size: int, count: int) -> list[tuple[str, list[float]]]:
    """For each change: the share of copies within the limits on the first word, the whole hash, and the thumbnails."""
    chosen = np.random.default_rng(0).permutation(len(source))[:count]
    images = [decode(source.read(int(row))) for row in np.sort(chosen)]
    original = _stack(images, size)
    known, small = phash.hashes(original), phash.thumbnails(original)
    pairs = np.arange(2 * len(images)).reshape(2, -1).T
    rows = []
    for name, change in CHANGES.items():
        note(f"{size} px: {name}")
        changed = _stack([change(image) for image in images], size)
        mirrored = np.full(len(images), name.startswith("mirrored"))
        turned = phash.hashes(changed) ^ (phash.MIRROR if mirrored[0] else np.uint64(0))
        low = phash.distances(known[:, :1], turned[:, :1]) <= phash.NEAR_LOW
        whole = low & (phash.distances(known, turned) <= phash.NEAR_ALL)
        both = np.concatenate([small, phash.thumbnails(changed)])
        seen = whole & (phash.thumbnail_distances(both, pairs, mirrored) <= CONFIRMED)
        rows.append((name, [float(share.mean()) for share in (low, whole, seen)]))
    return rows


def false_pairs(name: str, source: Source, size: int, sheet: Path | None) -> dict[str, Any]:
    """Duplicates in a real data set, and how many of them have different labels and so are likely wrong."""
    note(f"{name}: duplicates among {len(source)}")
    pieces, digests, hashed, spent = [], [], [], 0.0
    for batch in batches.load(source, range(len(source)), size, 100, 2):
        start = time.thread_time()
        one, two = fingerprints(batch.pixels)
        spent += time.thread_time() - start
        digests += one
        hashed += two
        pieces.append(batch.pixels)
    pixels = np.concatenate(pieces)
    table = pa.table({"pixels_xxh3": digests, "phash": pa.array(hashed, pa.binary())})
    found = find(table, lambda rows: iter([pixels[rows]]))
    rows = np.unique(found.pictures, return_index=True)[1][found.pairs]
    labels = source.labels[rows]
    if sheet:
        _draw(sheet, pixels, rows, found)
    return {
        "name": name,
        "images": len(source),
        "pairs": len(source) * (len(source) - 1) / 2,
        "candidates": found.candidates,
        "found": len(found.pairs),
        "mirrored": int(found.mirrored.sum()),
        "conflicts": int((labels[:, 0] != labels[:, 1]).sum()),
        "micros": spent / len(source) * 1e6,
    }


def render(recalls: dict[str, list[tuple[str, list[float]]]], wrong: list[dict[str, Any]], cost: dict[str, Any]) -> str:
    lines = [
        "# Duplicates: what is found, what is wrongly found, what it costs",
        "",
        "[duplicates.py](duplicates.py) made this page. Two images are near duplicates if their perceptual hashes",
        f"differ in at most {phash.NEAR_LOW} of the 64 lowest frequencies and in at most {phash.NEAR_ALL} of all 256,",
        f"and then their 16 x 16 thumbnails by at most {CONFIRMED} of their contrast. Both orientations are compared.",
        "",
        "## Recall: changed copies that are found, %",
        "",
        "*low bits*: within the first limit on the hash; *hash*: within both; *found*: and the one on the thumbnails.",
        "A crop of 10 % takes 5 % off each side; a corner crop takes all of it off two sides.",
        "",
        "| change | " + " | ".join(f"{name}: low bits | hash | found" for name in recalls) + " |",
        "|---|" + "---|" * 3 * len(recalls),
    ]
    for number, name in enumerate(CHANGES):
        shares = [f"{100 * share:.1f}" for rows in recalls.values() for share in rows[number][1]]
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    lines += [
        "",
        "## What is found in real data",
        "",
        "| data | images | close hashes | duplicate pairs | mirrored | of two labels | per million pairs | CPU ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _line(
            row["name"],
            *(f"{row[column]:,}" for column in ("images", "candidates", "found", "mirrored", "conflicts")),
            f"{row['found'] / row['pairs'] * 1e6:.2f}",
            f"{row['micros'] / 1000:.2f}",
        )
        for row in wrong
    ]
    lines += [
        "",
        "*close hashes*: pairs that had to be read again; *CPU ms*: to hash an image, without decoding. Two images",
        "drawn at random from ten equal classes have different labels nine times of ten: that no pair has says",
        "that few of them are accidents.",
        "",
        JUDGED,
        "",
        f"## Scale: {COUNT:,} hashes",
        "",
        f"Random hashes with {PLANTED:,} planted pairs at the limits themselves, half of them mirrored; searched",
        "on one thread, once straight and once mirrored: about 180 comparisons an image each time, a number that grows",
        "with the number of images.",
        "",
        "| planted | found | s | CPU s | peak memory MiB | of these before the search |",
        "|---|---|---|---|---|---|",
        _line(f"{PLANTED:,}", *(f"{cost[x]:,.0f}" for x in ("found", "seconds", "processor", "peak", "before"))),
        "",
        machine(("numpy", "pillow", "pyarrow")),
        "",
    ]
    return "\n".join(lines)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _stack(images: list[Image.Image], size: int) -> npt.NDArray[np.uint8]:
    return np.stack([center_crop(image, size) for image in images])


def _saved(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return decode(stream.getvalue())

    return change


def _scaled(by: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.BICUBIC)


def _cropped(share: float, corner: bool = False) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        across, down = image.width * share, image.height * share
        if corner:
            return image.crop((round(across), round(down), image.width, image.height))
        left, top = round(across / 2), round(down / 2)
        return image.crop((left, top, image.width - left, image.height - top))

    return change


def _brighter(by: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: ImageEnhance.Brightness(image).enhance(by)


def _marked(image: Image.Image) -> Image.Image:
    marked = image.copy()
    across, down = image.size
    ImageDraw.Draw(marked, "RGBA").rectangle(
        (across * 0.6, down * 0.85, across * 0.95, down * 0.95), fill=(255, 255, 255, 160)
    )
    return marked


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 90": _saved(90),
    "JPEG, quality 75": _saved(75),
    "JPEG, quality 50": _saved(50),
    "0.75 x the size": _scaled(0.75),
    "0.5 x the size": _scaled(0.5),
    "mirrored": ImageOps.mirror,
    "mirrored, then JPEG 75": lambda image: _saved(75)(ImageOps.mirror(image)),
    "10 % brighter": _brighter(1.1),
    "10 % darker": _brighter(0.9),
    "watermark, 3.5 % of the area": _marked,
    "cropped by 2 %": _cropped(0.02),
    "cropped by 5 %": _cropped(0.05),
    "cropped by 10 %": _cropped(0.1),
    "corner crop, 2 %": _cropped(0.02, corner=True),
    "corner crop, 5 %": _cropped(0.05, corner=True),
}


def _draw(path: Path, pixels: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], found: Found) -> None:
    side, columns = 64, 10
    order = np.argsort(-found.distances, kind="stable")
    sheet = Image.new("RGB", (columns * (2 * side + 6), -(-len(rows) // columns) * (side + 12)), "white")
    words = ImageDraw.Draw(sheet)
    for place, pair in enumerate(order.tolist()):
        x, y = place % columns * (2 * side + 6), place // columns * (side + 12)
        for offset, row in enumerate(rows[pair].tolist()):
            sheet.paste(Image.fromarray(pixels[row]).resize((side, side)), (x + offset * side, y))
        kind = "mirrored" if found.mirrored[pair] else ""
        words.text((x, y + side), f"{found.distances[pair]:.2f} {kind}", fill="black")
    sheet.save(path)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
