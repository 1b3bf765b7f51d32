"""Pictures from users: what is accepted, how it becomes RGB, and what is refused with a clear message."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from step3_jax.text.image_input import open_image


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


def test_transparency_is_dropped_not_blended():
    opened = open_image(_encode(Image.new("RGBA", (4, 4), (200, 10, 20, 0))))
    assert opened.getpixel((0, 0)) == (200, 10, 20)


def test_palette_with_transparency_is_read():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 9, 8, 7])
    assert open_image(_encode(picture, transparency=b"\x00\x80")).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(mode):
    opened = open_image(Image.new(mode, (4, 4)))
    assert (opened.mode, opened.size) == ("RGB", (4, 4))


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    opened = open_image(_encode(Image.fromarray(values)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_refused():
    with pytest.raises(ValueError, match="8 bits a channel"):
        open_image(Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match="16 bits"):
        open_image(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(_encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert opened.size == (4, 8)


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = _encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("url", ["http://example.com/a.png", "HTTPS://example.com/a.png", "file:///a.png"])
def test_addresses_are_refused(url):
    with pytest.raises(ValueError, match="fetches nothing"):
        open_image(url)


def test_paths_are_refused_where_they_are_not_allowed(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png")):
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png", "no data URL"),
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
