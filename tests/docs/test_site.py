"""The documentation site, built as `make docs` does, in a browser at desktop and phone widths."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.process import ROOT, environment
from tests.server.browser import Page, find_browser, start_browser

# `make docs` itself runs in .ci/run; building again and looking at each page takes half a minute.
pytestmark = pytest.mark.slow
DESKTOP, PHONE = 1280, 390


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The built site's folder."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("the documentation site's libraries are not installed: make docs installs them")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=environment(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: pathlib.Path) -> Iterator[str]:
    """The address at which the site is served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("no headless browser is installed (Debian: chromium-headless-shell)")
    with start_browser(program) as found:
        yield found


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_no_page_is_wider_than_the_window_or_asks_another_site(
    width: int, site: pathlib.Path, address: str, page: Page
) -> None:
    names = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    assert {"index.html", "start.html", "reference/command.html", "repository/CONTRIBUTING.html"} <= set(names)
    wide = {}
    for name in names:
        page.open(f"{address}/{name}", width=width, height=900)
        shown = page.run("document.documentElement.scrollWidth")
        if shown > width:  # type: ignore[operator]
            wide[name] = shown
    assert not wide
    assert not page.problems
    assert all(url.startswith(address) for url in page.requested)


def test_the_search_finds_a_setting(address: str, page: Page) -> None:
    page.open(f"{address}/index.html", width=DESKTOP)
    page.run("document.querySelector('[data-md-toggle=search]').click()")
    page.run("document.querySelector('[data-md-component=search-query]').focus()")
    page.type("max_num_seqs")
    page.wait("document.querySelectorAll('.md-search-result__item a').length > 0")
    assert "configuration.html" in str(page.run("document.querySelector('.md-search-result__list').innerHTML"))
