"""Pictures from users: what is accepted, how it becomes RGB, and what is refused with a clear message."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from step3_jax.text.image_input import open_image, read_image


def _encode(picture, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_all_sources_give_the_same_pixels(picture, tmp_path):
    data = _encode(picture)
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, url, picture):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


def test_result_shares_nothing_with_the_source(picture):
    opened = open_image(picture)
    opened.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) != (1, 2, 3)


def _half_transparent(mode):
    """Black, with a transparent left half."""
    alpha = Image.new("L", (4, 2), 255)
    alpha.paste(0, (0, 0, 2, 2))
    clear = Image.merge("LA", (Image.new("L", (4, 2)), alpha))
    if mode == "PA":
        palette = Image.new("P", (4, 2)).convert("PA")
        palette.putalpha(alpha)
        return palette
    return clear.convert(mode) if mode in ("LA", "La") else clear.convert("RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_what_is_transparent_is_laid_on_white(mode):
    picture = _half_transparent(mode)
    assert picture.mode == mode
    opened = open_image(picture)
    assert [opened.getpixel((x, 0)) for x in (0, 3)] == [(255, 255, 255), (0, 0, 0)]


def test_half_transparent_colours_are_blended():
    opened = open_image(_encode(Image.new("RGBA", (4, 4), (200, 10, 20, 128))))
    assert np.abs(np.subtract(opened.getpixel((0, 0)), (227, 132, 137))).max() <= 1


def test_palette_with_transparency_is_laid_on_white():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 9, 8, 7])
    assert open_image(_encode(picture, transparency=b"\x00\xff")).getpixel((0, 0)) == (9, 8, 7)
    assert open_image(_encode(picture, transparency=b"\x00\x00")).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(_encode(picture, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("I;16", 7000), ("1", 0)])
def test_one_transparent_colour_is_laid_on_white(mode, colour):
    picture = Image.new(mode, (2, 1), colour)
    opened = open_image(_encode(picture, transparency=colour))
    assert opened.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    opened = open_image(Image.new(mode, (4, 4)))
    assert (opened.mode, opened.size) == ("RGB", (4, 4))


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    opened = open_image(_encode(Image.fromarray(values)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


GREY = np.array([[0, 1, 77, 254, 255]], np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.int32),
        GREY.astype(np.uint16),
        GREY.astype(np.int32) * 257,
        GREY.astype(np.uint16) * 257,
        GREY.astype(np.float32),
        GREY.astype(np.float32) / 255,
        GREY.astype(np.float32) * 257,
    ],
    ids=lambda values: f"{values.dtype}, up to {values.max():g}",
)
def test_grey_of_any_type_is_the_same_picture(values):
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == GREY[0].tolist()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_in_either_byte_order_are_the_same_picture(mode):
    opened = open_image(Image.new(mode, (1, 1), 77 * 256))
    assert opened.getpixel((0, 0)) == (77, 77, 77)


@pytest.mark.parametrize("value", [70000, -1, np.nan, np.inf])
def test_grey_out_of_every_range_is_refused(value):
    values = np.full((2, 2), value, np.int32 if np.isfinite(value) else np.float32)
    with pytest.raises(ValueError, match="8 bits per channel"):
        open_image(Image.fromarray(values))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(_encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert opened.size == (4, 8)


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://example.com/a.png", "s3://bucket/a.png"])
def test_addresses_are_refused(url):
    with pytest.raises(ValueError, match="fetches nothing"):
        open_image(url)


@pytest.mark.parametrize("form", ["file://{}", "FILE://localhost{}", "file:{}", " file://{}\n"])
def test_file_addresses_of_this_machine_are_read(form, tmp_path, picture):
    path = tmp_path / "a b%é.png"
    picture.save(path)
    opened = open_image(form.format(path.as_uri().removeprefix("file://")))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


def test_file_addresses_of_other_machines_are_refused():
    with pytest.raises(ValueError, match="file of the machine 'server'"):
        open_image("file://server/a.png")


def test_paths_are_refused_where_they_are_not_allowed(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        with pytest.raises(ValueError, match="not accepted here"):
            open_image(source, allow_paths=False)


def test_limits_are_stated(picture, tmp_path):
    data = _encode(picture)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, picture):
        with pytest.raises(ValueError, match="9x6 = 54 pixels; at most 53"):
            open_image(source, max_pixels=53)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(ValueError, match="at most 10 are allowed"):
            open_image(source, max_bytes=10)
    with pytest.raises(ValueError, match="at most 10"):
        open_image("data:image/png;base64," + "A" * 4000, max_bytes=10)


@pytest.mark.parametrize("side", [9000, 11000, 20000])
def test_size_is_refused_from_the_header_alone(side):
    # A header that promises a huge picture, with no pixels behind it.
    data = bytearray(_encode(Image.new("L", (1, 1)), "BMP"))
    data[18:26] = side.to_bytes(4, "little") * 2
    with pytest.raises(ValueError, match=r"at most|too large"):
        open_image(bytes(data))


def test_truncated_and_garbage_files_are_named(tmp_path, picture):
    (tmp_path / ("long" * 30)).mkdir()
    path = tmp_path / ("long" * 30) / "broken.png"
    path.write_bytes(_encode(picture.resize((300, 300)))[:-2000])
    with pytest.raises(ValueError, match=r"broken\.png.* is damaged"):
        open_image(path)
    for data in (b"", b"GIF89a", b"hello" * 20, _encode(picture)[:20]):
        with pytest.raises(ValueError, match=f"image of {len(data)} bytes is"):
            open_image(data)


def test_base64_is_read_as_browsers_do(picture):
    # Bytes that need both letters in which the URL-safe alphabet differs.
    data = next(
        data
        for extra in range(1000)
        if {43, 47}
        <= set(base64.b64encode(data := _encode(picture) + b"\xfb\xff" + bytes([extra % 256]) * (extra % 3)))
    )
    letters = base64.b64encode(data).decode()
    url_letters = base64.urlsafe_b64encode(data).decode()
    lines = "\r\n".join(letters[start : start + 76] for start in range(0, len(letters), 76))
    escaped = letters.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for payload in (letters.rstrip("="), url_letters, url_letters.rstrip("="), lines, escaped, f" {letters} \n"):
        opened = open_image(f"  data:image/png;base64,{payload}")
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


def _with_chunks(data: bytes, kind: bytes, count: int, body: bytes = b"") -> bytes:
    """A PNG file with additional chunks after its header."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data[:33] + chunk * count + data[33:]


@pytest.mark.parametrize("kind", [b"abCd", b"tEXt", b"IDAT"])
def test_a_png_of_countless_chunks_is_refused_before_anything_is_done_with_them(picture, kind):
    with pytest.raises(ValueError, match=r"more than 65,536 PNG chunks"):
        open_image(_with_chunks(_encode(picture), kind, 100_000))


def test_chunks_that_say_nothing_about_pixels_change_none(picture):
    data = _with_chunks(_encode(picture), b"gAMA", 1, struct.pack(">I", 22_000))
    data = _with_chunks(data, b"abCd", 20_000)
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(picture))


def test_a_header_is_checked_without_decoding(picture, tmp_path):
    data = _encode(picture)
    assert read_image(data) == data
    assert read_image("data:;base64," + base64.b64encode(data).decode()) == data
    with pytest.raises(ValueError, match="use one of JPEG"):
        read_image(data, formats=("JPEG",))
    with pytest.raises(ValueError, match="54 pixels; at most 53"):
        read_image(data, max_pixels=53)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="not accepted here"):
        read_image(str(tmp_path / "a.png"))


@pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow has no AVIF decoder")
def test_avif_is_read(picture):
    assert open_image(_encode(picture.resize((64, 64)), "AVIF")).size == (64, 64)


def test_several_images_in_one_jpeg_file_are_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    red, green, _ = open_image(_encode(frames[0], "MPO", save_all=True, append_images=frames[1:])).getpixel((0, 0))
    assert red > 250
    assert green < 5


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<html>403 Forbidden</html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"", "empty"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIC image"),
        (b"%PDF-1.7", "a PDF"),
        (b'<?xml version="1.0"?>\n<svg>', "an SVG"),
        (b"hello" * 20, "cannot identify"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(data, what):
    with pytest.raises(ValueError, match=f"not an image that can be read; use one of PNG, .*{what}") as error:
        open_image(data)
    assert "MPO" not in str(error.value)


@pytest.mark.parametrize("place", ["zTXt", "iTXt", "iCCP"])
def test_much_beside_the_pixels_of_a_png_is_no_obstacle(picture, place):
    about = PngImagePlugin.PngInfo()
    if place == "zTXt":
        about.add_text("workflow", "x" * 3_000_000, zip=True)
    elif place == "iTXt":
        about.add_itxt("workflow", "x" * 3_000_000, zip=True)
    profile = {"icc_profile": b"x" * 3_000_000} if place == "iCCP" else {}
    opened = open_image(_encode(picture, pnginfo=about, **profile))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


def test_the_rotation_of_a_png_is_applied_wherever_it_stands():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(_encode(Image.new("RGB", (8, 4)), exif=exif)).size == (4, 8)
    about = PngImagePlugin.PngInfo()
    about.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    assert open_image(_encode(Image.new("RGB", (8, 4)), pnginfo=about)).size == (4, 8)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png", "not a data URL"),
        ("data:image/png;base64,AAAAA", "base64"),
        ("data:image/png;base64,@@@", "base64"),
        ("no such file.png", "no such file"),
        ("/dev/null", "no such file"),
        ("a\0b", "cannot be read"),
        (3, "not int"),
    ],
)
def test_other_sources_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_image(source)
