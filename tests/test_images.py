"""Decoding every kind of picture, and the crop against an implementation that shares no code with it."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_fixture import encoded, jpeg, picture, pixels, png
from PIL import Image, ImageFile, ImageOps

from d2c.images import BadImage, center_crop, decode, stored_size

U8 = npt.NDArray[np.uint8]


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert "0x" not in caught.value.reason, "an address makes the reason differ from run to run"
    return caught.value.reason


def as_array(data: bytes) -> U8:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


# The crop.


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _cubic(x: float) -> float:
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _weights(old: int, new: int, kernel: str) -> npt.NDArray[np.float64]:
    """[new, old] antialiased resampling: the kernel is stretched by the reduction and cut at the borders."""
    function, radius = (_box, 0.5) if kernel == "box" else (_cubic, 2.0)
    step = old / new
    stretch = max(step, 1.0)
    matrix: npt.NDArray[np.float64] = np.zeros((new, old))
    for row in range(new):
        middle = (row + 0.5) * step
        first, last = int(max(middle - radius * stretch + 0.5, 0)), int(min(middle + radius * stretch + 0.5, old))
        for column in range(first, last):
            matrix[row, column] = function((column - middle + 0.5) / stretch)
    matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix


def _resample(array: npt.NDArray[np.float64], width: int, height: int, kernel: str) -> npt.NDArray[np.float64]:
    def byte(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip(np.floor(values + 0.5), 0, 255)

    across = byte(np.einsum("wx,yxc->ywc", _weights(array.shape[1], width, kernel), array))
    return byte(np.einsum("hy,ywc->hwc", _weights(array.shape[0], height, kernel), across))


def crop_from_definition(array: U8, size: int) -> npt.NDArray[np.float64]:
    now = array.astype(np.float64)
    height, width = array.shape[:2]
    while min(height, width) >= 2 * size:
        height, width = math.floor(height / 2), math.floor(width / 2)
        now = _resample(now, width, height, "box")
    short = min(height, width)
    height, width = round(height * size / short), round(width * size / short)
    now = _resample(now, width, height, "cubic")
    top, left = math.floor((height - size) / 2), math.floor((width - size) / 2)
    return now[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (64, 64, 64),
        (64, 80, 32),
        (8, 8, 32),
        (37, 91, 32),
        (91, 37, 32),
        (131, 65, 32),
        (300, 171, 32),
        (171, 300, 32),
        (255, 513, 64),
        (129, 140, 64),
        (1, 3, 16),
    ],
)
def test_crop_is_adms(width: int, height: int, size: int) -> None:
    ours = center_crop(picture(width, height), size)
    assert ours.dtype == np.uint8
    assert ours.shape == (size, size, 3)
    apart = np.abs(ours - crop_from_definition(pixels(width, height), size))
    # Pillow rounds in 22-bit fixed point: ties may fall the other way, by one.
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.01


def test_crop_takes_the_middle_of_an_asymmetric_picture() -> None:
    stripes = np.zeros((10, 31, 3), np.uint8)
    stripes[:, 10:20] = 255
    assert (center_crop(Image.fromarray(stripes), 10) == 255).all()
    assert (center_crop(Image.fromarray(stripes.transpose(1, 0, 2).copy()), 10) == 255).all()


def test_crop_of_a_thread_thin_picture_is_refused() -> None:
    with pytest.raises(BadImage, match="elongated"):
        center_crop(Image.new("RGB", (8000, 1)), 256)


# Kinds of pictures.


def test_rgb_png_is_unchanged() -> None:
    np.testing.assert_array_equal(as_array(png(9, 5)), pixels(9, 5))


def test_greyscale_has_three_equal_channels() -> None:
    grey = pixels(9, 5)[..., 0]
    np.testing.assert_array_equal(as_array(encoded(Image.fromarray(grey))), np.stack([grey] * 3, axis=-1))


def test_palette_gives_its_colours() -> None:
    image = picture(9, 5).quantize(16)
    np.testing.assert_array_equal(as_array(encoded(image)), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    array = as_array(encoded(Image.fromarray(wide)))
    np.testing.assert_array_equal(array, np.stack([(wide // 256).astype(np.uint8)] * 3, axis=-1))
    assert len(np.unique(array)) == 256


def test_sixteen_bit_tiff_and_pgm_agree_with_png() -> None:
    wide = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    expected = as_array(encoded(Image.fromarray(wide)))
    np.testing.assert_array_equal(as_array(encoded(Image.fromarray(wide), "TIFF")), expected)
    pgm = b"P5 10 6 65535\n" + wide.astype(">u2").tobytes()
    np.testing.assert_array_equal(as_array(pgm), expected)


@pytest.mark.parametrize(("dtype", "word"), [(np.int32, "integer"), (np.float32, "floating-point")])
def test_pixels_without_a_range_are_refused(dtype: type, word: str) -> None:
    assert word in reason(encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


def test_cmyk_jpeg_has_the_right_colours() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    red = as_array(encoded(ink, "JPEG", quality=95)).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(red, [255, 0, 0], atol=6)


def test_adobe_and_plain_cmyk_differ_by_the_inversion() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (40, 90, 200, 20)), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(as_array(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 2:] = (10, 20, 30, 255)
    array = as_array(encoded(Image.fromarray(rgba), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (array[:, :2] == 255).all()
    assert (array[:, 2:] == (10, 20, 30)).all()


def test_half_transparent_black_on_white_is_mid_grey() -> None:
    array = as_array(encoded(Image.new("LA", (2, 2), (0, 128))))
    assert (np.abs(array.astype(int) - 127) <= 1).all()


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((0, 0), 1)
    array = as_array(encoded(image, transparency=0))
    assert (array[0, 0] == (0, 200, 0)).all()
    assert (array[1] == 255).all()


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    array = as_array(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (array == (255, 0, 0)).all()


def _with_orientation(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_gives_the_upright_picture(orientation: int) -> None:
    upright = pixels(9, 5)
    # How a camera held that way stores the scene: the inverse of the turn that the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    data = _with_orientation(Image.fromarray(np.ascontiguousarray(stored)), orientation)
    np.testing.assert_array_equal(as_array(data), upright)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP"])
def test_exif_agrees_with_pillow(orientation: int, kind: str) -> None:
    data = _with_orientation(picture(24, 16), orientation, kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(as_array(data), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_picture_as_stored() -> None:
    data = encoded(picture(24, 16), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01")
    assert decode(data).size == (24, 16)


# Damage.


def test_empty_file() -> None:
    assert "empty (0 bytes)" in reason(b"")


@pytest.mark.parametrize("data", [b"hello, this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 100])
def test_not_an_image(data: bytes) -> None:
    assert "not an image in a known format" in reason(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_file_is_bad_not_half_grey(kind: str, kept: float) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(picture(64, 64), kind)
    reason(data[: int(len(data) * kept)])


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_too_many_pixels_are_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 * 64 / factor))
    assert "too many pixels" in reason(png(64, 64))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_where_warnings_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    assert "too many pixels" in reason(png(64, 64))


SAMPLES = [
    jpeg(24, 16),
    png(24, 16),
    encoded(picture(24, 16), "WEBP"),
    encoded(picture(24, 16), "TIFF", compression="tiff_lzw"),
    encoded(picture(24, 16), "GIF"),
    encoded(picture(24, 16), "BMP"),
    encoded(picture(24, 16), "PPM"),
    _with_orientation(picture(24, 16), 6, "JPEG"),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0, 1))
def test_any_damage_gives_a_picture_or_a_reason(data: bytes, changes: list[tuple[float, int]], cut: float) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    try:
        mode = decode(bytes(damaged[: int(cut * len(damaged))] if cut > 0.5 else damaged)).mode
    except BadImage:
        return
    assert mode == "RGB"


def test_stored_size_reads_the_header_only() -> None:
    data = encoded(picture(300, 200), "JPEG")
    assert stored_size(data[:700]) == (300, 200)
    with pytest.raises(BadImage):
        stored_size(b"")
