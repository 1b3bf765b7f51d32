"""The chat page in a browser, served and answered by the service itself; the model says what the test tells it to say."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from step3_jax import resources
from tests.server.browser import LIMIT_S, Page, find_browser, start_browser
from tests.server.client import Client
from tests.server.conftest import NAME, Open
from tests.server.stand_in import serve

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no headless browser is installed (Debian: apt-get install chromium-headless-shell)"
)
IS_DONE = "document.getElementById('stop').hidden"


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with start_browser(str(PROGRAM)) as page:
        yield page


@pytest.fixture(scope="module")
def service(open_client: Open) -> Iterator[tuple[Client, str]]:
    with open_client(lambda prompt: _reply(prompt)) as client, serve(client.app) as url:
        yield client, url


def _reply(prompt: str) -> str:
    if "everything" in prompt:
        return "Long.</think>" + "more " * 3000
    return f"I see.</think>There is {'an image' if '<im_patch>' in prompt else 'no image'} in it."


def wait_until(condition: object) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def send(page: Page, text: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter")


def test_it_answers_about_an_image_with_usage_and_without_a_word_on_the_console(
    tab: Page, service: tuple[Client, str]
) -> None:
    tab.open(service[1])
    tab.wait(f"document.title === '{NAME}'")
    picture = resources.find("models/step3-tiny/examples/cat.png").read_bytes()
    tab.run(f"""(() => {{
      const bytes = Uint8Array.from(atob("{base64.b64encode(picture).decode()}"), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "cat.png", {{ type: "image/png" }}));
      document.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: transfer }}));
    }})()""")
    tab.wait("document.querySelectorAll('.thumbnail').length === 1")
    send(tab, "What is it?")
    tab.wait(IS_DONE)
    assert tab.text(".assistant .text") == "There is an image in it."
    tab.click(".reasoning summary")
    assert tab.text(".reasoning div") == "I see."
    assert "tokens/s" in tab.text("#status")
    send(tab, "And now?")
    tab.wait(f"{IS_DONE} && document.querySelectorAll('.assistant').length === 2")
    assert tab.problems == []


@pytest.mark.parametrize("how", ["stop", "reload"])
def test_a_stream_that_is_left_frees_its_slot(tab: Page, service: tuple[Client, str], how: str) -> None:
    client, url = service
    tab.open(url)
    tab.wait(f"document.title === '{NAME}'")
    send(tab, "Tell me everything.")
    tab.wait("document.querySelector('.assistant .text')?.innerText.includes('more')")
    assert client.service.admission.num_requests == 1
    if how == "stop":
        tab.click("#stop")
    else:
        tab.call("Page.reload")
    wait_until(lambda: client.service.admission.num_requests == 0)
    wait_until(lambda: client.service.llm.core.num_running == 0)
    tab.problems.clear()


def test_a_refusal_of_the_service_is_shown_in_its_words(tab: Page, service: tuple[Client, str]) -> None:
    tab.open(service[1])
    tab.wait(f"document.title === '{NAME}'")
    tab.run("document.getElementById('max-tokens').value = '1000000'")
    send(tab, "Hello?")
    tab.wait("document.getElementById('status').classList.contains('error')")
    assert "1,000,000" in tab.text("#status") or "1000000" in tab.text("#status")
    assert tab.run("document.getElementById('question').value") == "Hello?"
    tab.problems.clear()


def test_a_page_of_another_site_gets_nothing(tab: Page, service: tuple[Client, str]) -> None:
    other = Starlette(routes=[Route("/", lambda request: HTMLResponse("<title>other</title>"))])
    with serve(other) as url:
        tab.open(url)
        ask = f"""fetch("{service[1]}/v1/models").then(() => "an answer", () => "nothing")"""
        assert tab.run(ask) == "nothing"
        frame = f"""new Promise((done) => {{
          const frame = document.createElement("iframe");
          frame.src = "{service[1]}/";
          frame.onload = () => done(true);
          document.body.append(frame);
        }})"""
        tab.run(frame)
        assert any("frame-ancestors" in problem for problem in tab.problems), "it cannot show it in a frame either"
    tab.problems.clear()
