"""Decoding: every odd file becomes the pixels of the written rule, or is refused with a sentence."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.images.decoding import CorruptImage, DecodePolicy, UnreadableImage, check_header, decode

POLICY = DecodePolicy()
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int = 24, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow cannot write all of these. `rows`: each with its filter byte in front."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_rgb_is_lossless() -> None:
    pixels = decode(encode(photo(), "PNG"), POLICY)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(photo()))


def test_gray_is_repeated() -> None:
    pixels = decode(encode(Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8)), "PNG"), POLICY)
    np.testing.assert_array_equal(pixels, [[[0] * 3, [100] * 3, [255] * 3]])


def test_bilevel_fills_the_range() -> None:
    pixels = decode(encode(Image.fromarray(np.array([[False, True]])), "PNG"), POLICY)
    np.testing.assert_array_equal(pixels, [[[0] * 3, [255] * 3]])


def test_cmyk_becomes_rgb() -> None:
    pixels = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), POLICY)
    np.testing.assert_allclose(pixels.reshape(-1, 3), [RED] * 256, atol=3)


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(encode(image, "PNG"), POLICY), [[RED, GREEN]])
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=1), POLICY), [[RED, WHITE]])


def test_alpha_lies_over_white() -> None:
    image = Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 100, 200, 128]]], dtype=np.uint8))
    half = [127, 177, 227]  # (c * 128 + 255 * 127) / 255, rounded
    np.testing.assert_array_equal(decode(encode(image, "PNG"), POLICY), [[WHITE, RED, half]])
    gray = Image.fromarray(np.array([[[0, 0], [9, 255]]], dtype=np.uint8), "LA")
    np.testing.assert_array_equal(decode(encode(gray, "PNG"), POLICY), [[WHITE, [9] * 3]])


def test_transparent_colour_becomes_white() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=GREEN), POLICY), [[RED, WHITE]])


def test_name_does_not_decide_the_format(tmp_path: Path) -> None:
    path = tmp_path / "n01.JPEG"
    path.write_bytes(encode(photo(), "PNG"))
    np.testing.assert_array_equal(decode(path, POLICY), np.asarray(photo()))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    np.testing.assert_array_equal(decode(data, POLICY).reshape(-1, 3), [RED] * 64)


RAMP = np.arange(0, 65536, 256, dtype=np.uint16) + np.arange(256, dtype=np.uint16)  # 0, 257, ... 65535


def test_sixteen_bit_gray_is_scaled() -> None:
    pixels = decode(encode(Image.fromarray(RAMP[None]), "PNG"), POLICY)
    np.testing.assert_array_equal(pixels[0, :, 0], np.arange(256))
    assert pixels.shape == (1, 256, 3)
    assert decode(encode(Image.fromarray(RAMP[None]), "TIFF"), POLICY)[0, :, 2].tolist() == list(range(256))


def test_sixteen_bit_gray_of_a_pgm_is_scaled() -> None:
    pixels = decode(b"P5 256 1 65535\n" + RAMP.astype(">u2").tobytes(), POLICY)
    np.testing.assert_array_equal(pixels[0, :, 1], np.arange(256))


def test_sixteen_bit_transparent_gray_becomes_white() -> None:
    rows = b"\0" + RAMP[:3].astype(">u2").tobytes()
    pixels = decode(png(3, 1, depth=16, colour=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", RAMP[1]))), POLICY)
    assert pixels[0, :, 0].tolist() == [0, 255, 2]


def test_sixteen_bit_colour_is_scaled() -> None:
    rows = b"\0" + np.repeat(RAMP[:, None], 3, axis=1).astype(">u2").tobytes()
    pixels = decode(png(256, 1, depth=16, colour=2, rows=rows), POLICY)
    np.testing.assert_array_equal(pixels[0], np.repeat(np.arange(256)[:, None], 3, axis=1))


def test_sixteen_bit_alpha_is_scaled() -> None:
    opaque = np.full(256, 65535, dtype=np.uint16)
    gray = b"\0" + np.stack([RAMP, opaque], axis=1).astype(">u2").tobytes()
    colour = b"\0" + np.stack([RAMP, RAMP, RAMP, opaque], axis=1).astype(">u2").tobytes()
    for data in (png(256, 1, depth=16, colour=4, rows=gray), png(256, 1, depth=16, colour=6, rows=colour)):
        np.testing.assert_array_equal(decode(data, POLICY)[0, :, 0], np.arange(256))


def test_exif_orientation_is_ignored_unless_asked_for() -> None:
    image = Image.new("RGB", (4, 2), RED)
    image.putpixel((0, 0), GREEN)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    data = encode(image, "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, POLICY), np.asarray(image))
    turned = decode(data, DecodePolicy(exif="apply"))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))
    plain = encode(image, "PNG")
    np.testing.assert_array_equal(decode(plain, DecodePolicy(exif="apply")), np.asarray(image))


def test_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    forged = png(60_000, 60_000, depth=8, colour=2, rows=b"\0")
    (tmp_path / "bomb.png").write_bytes(forged)
    with pytest.raises(CorruptImage, match="more than 80000000 pixels"):
        check_header(tmp_path / "bomb.png", POLICY)
    with pytest.raises(CorruptImage, match="more than 80000000 pixels"):
        decode(forged, POLICY)
    with pytest.raises(CorruptImage, match="more than 959 pixels"):
        decode(encode(photo(24, 40), "PNG"), DecodePolicy(max_pixels=959))
    assert decode(encode(photo(24, 40), "PNG"), DecodePolicy(max_pixels=960)).shape == (24, 40, 3)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_where_warnings_are_errors() -> None:
    with pytest.raises(CorruptImage, match="more than 80000000 pixels"):
        decode(png(10_000, 10_000, depth=8, colour=2, rows=b"\0"), POLICY)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_file_is_refused(format: str, share: float) -> None:
    data = encode(photo(), format)
    with pytest.raises(CorruptImage):
        decode(data[: int(share * len(data))], POLICY)


def test_flipped_bit_in_a_png_is_refused() -> None:
    data = encode(photo(), "PNG")
    for position in range(40, len(data) - 12, 97):
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(CorruptImage):
            decode(bytes(damaged), POLICY)


@pytest.mark.parametrize(
    "data", [b"", bytes(1000), b"not an image" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_garbage_is_refused_with_a_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "odd.JPEG"
    path.write_bytes(data)
    with pytest.raises(CorruptImage, match=r"odd\.JPEG") as caught:
        decode(path, POLICY)
    assert caught.value.exit_code == 3
    assert caught.value.path == str(path)
    assert str(tmp_path) not in caught.value.reason
    with pytest.raises(CorruptImage) as from_header:
        check_header(path, POLICY)
    assert str(from_header.value) == str(caught.value)


def test_32_bit_samples_are_refused() -> None:
    for values in (np.array([[1.5]], dtype=np.float32), np.array([[70000]], dtype=np.int32)):
        with pytest.raises(CorruptImage):
            decode(encode(Image.fromarray(values), "TIFF"), POLICY)


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as caught:
        decode(tmp_path / "gone.png", POLICY)
    assert not isinstance(caught.value, CorruptImage)
    with pytest.raises(UnreadableImage, match="No such file") as from_header:
        check_header(tmp_path / "gone.png", POLICY)
    assert str(pickle.loads(pickle.dumps(from_header.value))) == str(caught.value)


def test_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CorruptImage("is empty", path="a.png")))
    assert (str(error), error.reason, error.path) == (str(CorruptImage("is empty", path="a.png")), "is empty", "a.png")


def test_single_pixel_and_line() -> None:
    assert decode(encode(photo(1, 1), "PNG"), POLICY).shape == (1, 1, 3)
    assert decode(encode(photo(1, 3000), "JPEG"), POLICY).shape == (1, 3000, 3)
