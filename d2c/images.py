"""From the bytes of one picture to pixels: decoding to RGB, ADM's centre crop, and the range models see."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# A closed list: Pillow would otherwise hand unknown bytes to plugins that start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k".split()
)

# Decoders meet damaged bytes with any of these; Warning is here for programs that turn warnings into errors.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """One picture cannot be used; ``reason`` says why, in words fit for a table."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def decode(data: bytes) -> Image.Image:
    """Decode a file's bytes to an upright RGB picture at full resolution.

    - EXIF orientation is applied; where the EXIF block is unreadable the picture is taken as stored.
    - Greyscale, palette, CMYK (with Adobe's inversion) and YCbCr become RGB as Pillow converts them.
    - Transparency (alpha channel, palette or colour key) is composited on white: the colour stored under
      transparent pixels is arbitrary.
    - 16-bit samples keep their high byte (``value >> 8``); 32-bit integer and float pixels have no defined
      8-bit range and are refused, except 16-bit PNG and PNM that Pillow widens to 32.
    - Of an animation, the first frame.

    libjpeg's draft mode (decoding at 1/2, 1/4, 1/8 size) is not used although it is faster: it averages in
    the DCT domain, so pixels would differ from those that the published crop produces.

    Raises:
        BadImage: empty, truncated or damaged bytes, an unknown format, or more pixels than Pillow's limit
            against decompression bombs (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    try:
        image = _open(data)
        image.load()
        return _to_rgb(_upright(image))
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error


def stored_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone, before EXIF orientation.

    Raises:
        BadImage: as `decode`, for what a header can show.
    """
    try:
        return _open(data).size
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error


def center_crop(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """The centred square of an RGB picture at ``size`` pixels: u1 [size, size, 3].

    ADM's crop (Dhariwal and Nichol 2021, arXiv:2105.05233; used by DiT, SiT and their successors): halve with
    a box filter while the short side is at least ``2 * size``, scale the short side to ``size`` with a bicubic
    filter, cut the centre.

    Raises:
        BadImage: the picture is so elongated that its scaled form exceeds Pillow's pixel limit.
    """
    while min(image.size) >= 2 * size:
        image = _resize(image, image.width // 2, image.height // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _pixel_limit():
        raise BadImage(f"too elongated to crop: {image.width} x {image.height} scales to {width} x {height} pixels")
    image = _resize(image, width, height, Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def gradient_energy(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Mean squared difference of neighbouring pixels, in units of full brightness: u1 [N, S, S, 3] -> f4 [N].

    How much texture a picture has: the trivial score beside which a learned one must prove itself.
    """
    energy = np.zeros(len(pixels))
    for row, picture in enumerate(pixels):
        levels = picture.astype(np.float32) / 255
        energy[row] = np.square(np.diff(levels, axis=0)).mean() + np.square(np.diff(levels, axis=1)).mean()
    return energy.astype(np.float32)


def _resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    # Across, then down, each rounded to bytes: what Pillow did in one call until 13.0, which goes down first on
    # tall pictures. Two calls give the pixels of published work, and the same ones, under every version.
    return image.resize((width, image.height), kernel).resize((width, height), kernel)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image in a known format (starts with {data[:8].hex(' ')})") from error
    # Pillow only warns between one and two times its limit, and a warning cannot be caught per thread.
    if image.width * image.height > _pixel_limit():
        raise BadImage(f"too many pixels: {image.width} x {image.height}, limit {_pixel_limit()}")
    return image


def _pixel_limit() -> float:
    return Image.MAX_IMAGE_PIXELS or float("inf")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        return image
    # A damaged block may hold anything here, unhashable values included.
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise BadImage(f"{kind} pixels have no defined 8-bit range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too many pixels: {error}"
    return f"cannot be decoded: {error}" if str(error) else f"cannot be decoded: {type(error).__name__}"
