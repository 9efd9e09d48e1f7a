"""Render letters and digits from the fonts of a machine: 62 classes whose images are a few strokes.

python docs/benchmarks/glyphs.py OUT.tar [FONT_FOLDER ...]

The tar has a folder a class (`lower-a`, `upper-a`, `digit-0`) and in it a PNG a font. Fonts that lack one of the 62
characters, or draw all as another font does, are left out; of a family (the name up to a hyphen) the first is taken,
and of the families at most `--fonts`, evenly over the alphabet. What is rendered depends on the fonts at hand:
`OUT.json` lists them, with the digest of all pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import string
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formats.files import write_json

CHARACTERS = {
    **{f"digit-{c}": c for c in string.digits},
    **{f"lower-{c}": c for c in string.ascii_lowercase},
    **{f"upper-{c.lower()}": c for c in string.ascii_uppercase},
}
SIDE, LARGE = 32, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fonts", type=int, default=400)
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("/usr/share/fonts")])
    args = parser.parse_args()
    if args.out.exists():
        return
    files = sorted({path for folder in args.folders for kind in ("ttf", "otf") for path in folder.rglob(f"*.{kind}")})
    taken: dict[str, dict[str, np.ndarray]] = {}
    seen: set[bytes] = set()
    for path in files:
        family = re.split("[-_ ]", path.stem)[0]
        if family in taken or (glyphs := render(path)) is None:
            continue
        looks = hashlib.sha256(b"".join(glyph.tobytes() for glyph in glyphs.values())).digest()
        if looks not in seen:
            seen.add(looks)
            taken[family] = glyphs
    taken = {name: taken[name] for name in evenly(sorted(taken), args.fonts)}
    pixels = hashlib.sha256()
    partial = args.out.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for name in CHARACTERS:
            for font, glyphs in sorted(taken.items()):
                pixels.update(glyphs[name].tobytes())
                data = io.BytesIO()
                Image.fromarray(glyphs[name]).save(data, "PNG")
                member = tarfile.TarInfo(f"{name}/{font}.png")
                member.size = data.tell()
                tar.addfile(member, io.BytesIO(data.getvalue()))
    facts = {"fonts": sorted(taken), "files": len(files), "images": len(taken) * len(CHARACTERS)}
    write_json(args.out.with_suffix(".json"), {**facts, "sha256_of_pixels": pixels.hexdigest()})
    partial.rename(args.out)


def evenly(names: list[str], count: int) -> list[str]:
    return names if len(names) <= count else [names[i * len(names) // count] for i in range(count)]


def render(path: Path) -> dict[str, np.ndarray] | None:
    """Each character black on white, u1 [SIDE, SIDE], at one size and on one baseline; None: not a Latin text font."""
    try:
        font = ImageFont.truetype(str(path), LARGE)
        missing = [drawn(font, c) for c in ("\uffff", "\u0378")]
        large = {name: drawn(font, c) for name, c in CHARACTERS.items()}
    except (OSError, ValueError):
        return None
    inked = [image for image in large.values() if (image < 255).any()]
    if len(inked) < len(CHARACTERS) or any((image == none).all() for image in large.values() for none in missing):
        return None
    if len({image.tobytes() for image in large.values()}) < len(CHARACTERS) - 26:
        return None  # beyond small capitals: characters that look alike are placeholders
    # One box for all characters, so that a comma-sized `o` stays smaller than `O`.
    ink = np.minimum.reduce(list(large.values())) < 255
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    middle = ((rows[0] + rows[-1]) // 2, (columns[0] + columns[-1]) // 2)
    return {name: shrunk(image, middle, side) for name, image in large.items()}


def drawn(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """u1 [3 LARGE, 3 LARGE], the character's baseline in the middle."""
    image = Image.new("L", (3 * LARGE, 3 * LARGE), 255)
    ImageDraw.Draw(image).text((1.5 * LARGE, 1.75 * LARGE), character, font=font, fill=0, anchor="ms")
    return np.asarray(image)


def shrunk(image: np.ndarray, middle: tuple[int, int], side: int) -> np.ndarray:
    """The square of ``side`` around ``middle``, with a margin, at SIDE pixels."""
    half = side * 9 // 16 + 1
    padded = np.pad(image, 2 * LARGE, constant_values=255)
    top, left = middle[0] + 2 * LARGE - half, middle[1] + 2 * LARGE - half
    square = Image.fromarray(padded[top : top + 2 * half, left : left + 2 * half])
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))


if __name__ == "__main__":
    main()
