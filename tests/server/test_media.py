"""Images in HTTP messages: what is read, what is refused, and that the event loop stays free."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import pathlib
import struct
import threading
import zlib
from collections.abc import Sequence

import pytest
from PIL import Image, PngImagePlugin

from step3_jax.server import media
from step3_jax.server.fetch import MediaFetcher
from step3_jax.server.media import MediaLimits, MediaReader
from step3_jax.text.image_input import open_image


def encode(form: str = "PNG", size: tuple[int, int] = (4, 3), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (250, 0, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def part(url: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def ask(*parts: object) -> list[dict[str, object]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [*parts]}]


def read(messages: Sequence[dict[str, object]], **options: object) -> list[dict[str, object]]:
    return asyncio.run(MediaReader(**options).read(messages))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_data_urls_of_the_usual_formats_are_read(form: str) -> None:
    data = encode(form)
    found = read(ask({"type": "text", "text": "What?"}, part(data_url(data, "text/plain"))))
    assert found[0] == {"role": "system", "content": "Be brief."}
    assert found[1]["content"] == [{"type": "text", "text": "What?"}, {"type": "image", "image": data}]
    assert open_image(data).size == (4, 3)


def test_images_stay_in_their_places_in_every_form_of_part() -> None:
    files = [encode(size=(width, 3)) for width in (1, 2, 3)]
    urls = [data_url(data) for data in files]
    found = read(
        ask(part(urls[0]), "and", {"type": "input_image", "image_url": urls[1]}, {"image_url": {"url": urls[2]}})
    )
    assert [item["image"] if isinstance(item, dict) else item for item in found[1]["content"]] == [
        files[0],
        "and",
        *files[1:],
    ]


def test_the_first_frame_of_an_animation_is_taken() -> None:
    data = encode("GIF", save_all=True, append_images=[Image.new("RGB", (4, 3), "blue")])
    red, _, blue = open_image(read(ask(part(data_url(data))))[1]["content"][0]["image"]).getpixel((0, 0))
    assert (red > 200, blue) == (True, 0)


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(ValueError, match="use one of PNG, JPEG, WEBP, GIF"):
        read(ask(part(data_url(encode(form)))))


def test_nothing_but_data_urls_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode())
    for url in (str(path), path.as_uri(), "http://127.0.0.1/a.png", "https://example.com/a.png", "ftp://x/a", ""):
        with pytest.raises(ValueError, match="this server fetches nothing"):
            read(ask(part(url)))
    for source in (encode(), Image.new("RGB", (1, 1)), path, 7):
        with pytest.raises(ValueError, match="a data:image/png;base64"):
            read(ask({"type": "image", "image": source}))
    with pytest.raises(ValueError, match="no source"):
        read(ask({"type": "image_url"}))


def test_listed_hosts_are_fetched_and_their_files_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = MediaFetcher(["images.example.com"])
    files = {"https://images.example.com/a.png": encode(), "https://images.example.com/b": b"<html>"}

    async def fetch(url: str, *, max_bytes: int) -> bytes:
        assert max_bytes == 5_000
        return files[url]

    monkeypatch.setattr(fetcher, "fetch", fetch)
    limits = MediaLimits(max_bytes=5_000)
    found = read(ask(part("https://images.example.com/a.png")), limits=limits, fetcher=fetcher)
    assert found[1]["content"][0]["image"] == encode()
    with pytest.raises(ValueError, match="an HTML page"):
        read(ask(part("https://images.example.com/b")), limits=limits, fetcher=fetcher)
    with pytest.raises(ValueError, match="not a URL that can be fetched"):
        read(ask(part("file:///etc/passwd")), fetcher=MediaFetcher(["images.example.com"]))


def test_limits_name_what_was_given_and_what_is_allowed() -> None:
    url = data_url(encode())
    with pytest.raises(ValueError, match="have 17 images; at most 16"):
        read(ask(*[part(url)] * 17))
    with pytest.raises(ValueError, match="4x3 = 12 pixels; at most 11"):
        read(ask(part(url)), limits=MediaLimits(max_pixels=11))
    with pytest.raises(ValueError, match="at most 50 "):
        read(ask(part(url)), limits=MediaLimits(max_bytes=50))
    with pytest.raises(ValueError, match="max_pixels is 0"):
        MediaLimits(max_pixels=0)


def test_a_bomb_is_refused_by_its_header() -> None:
    # A few bytes that promise 30,000 x 30,000 pixels.
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    with pytest.raises(ValueError, match=r"too large|at most 40,000,000"):
        read(ask(part(data_url(data))))


def test_texts_in_a_png_file_are_never_unpacked() -> None:
    texts = PngImagePlugin.PngInfo()
    for number in range(80):
        texts.add_text(f"comment{number}", "x" * 1_000_000, zip=True)
    data = encode(pnginfo=texts)
    assert open_image(read(ask(part(data_url(data))))[1]["content"][0]["image"]).size == (4, 3)


def test_images_are_read_in_the_pool_and_not_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def read_image(source: str | bytes, **options: object) -> bytes:
        threads.append(threading.current_thread().name)
        return b""

    monkeypatch.setattr(media, "read_image", read_image)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="images") as pool:
        read(ask(part(data_url(encode()))), pool=pool)
    assert threads == ["images_0"]
