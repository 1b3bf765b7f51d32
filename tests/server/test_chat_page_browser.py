"""The chat page in a headless browser, against a service with scripted answers."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.server.browser import LIMIT_S, Page, find_browser, start_browser
from tests.server.stand_in import StandIn, serve

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
def running() -> Iterator[tuple[StandIn, str]]:
    service = StandIn()
    with serve(service.app()) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StandIn, str]) -> StandIn:
    """As new: whatever a test has set is reset."""
    running[0].__init__()  # type: ignore[misc]
    return running[0]


@pytest.fixture
def page(tab: Page, service: StandIn, running: tuple[StandIn, str]) -> Page:
    """The page, freshly loaded, with empty settings."""
    tab.open(running[1])
    tab.run("sessionStorage.clear()")
    tab.open(running[1])
    tab.wait("document.title === 'stand-in'")
    tab.problems.clear()
    tab.requested.clear()
    return tab


def send(page: Page, text: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter")


def ask(page: Page, text: str) -> None:
    """Sends a message and waits for the end of its answer."""
    send(page, text)
    page.wait(IS_DONE)


def wait_until(condition: object) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def image_bytes(width: int, height: int, form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def give_image(page: Page, event: str, content: str, kind: str = "image/png") -> None:
    """Pastes or drops a file."""
    page.run(f"""(() => {{
      const bytes = Uint8Array.from(atob("{content}"), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], "a", {{ type: "{kind}" }}));
      const make = {{
        paste: () => new ClipboardEvent("paste", {{ clipboardData: transfer, bubbles: true, cancelable: true }}),
        drop: () => new DragEvent("drop", {{ dataTransfer: transfer, bubbles: true, cancelable: true }}),
      }};
      document.body.dispatchEvent(make.{event}());
    }})()""")


def test_an_answer_comes_piece_by_piece_below_its_folded_reasoning(page: Page, service: StandIn) -> None:
    service.held_from = 4
    service.content = ("It is ", "a **dog**.\n", "```py\n", "a = 1 < 2\n", "```\n", "Bye.")
    send(page, "What is it?")
    page.wait("document.querySelector('.assistant .text').innerText.includes('It is')")
    assert page.text(".assistant .text").strip() == "It is"
    assert not page.run("document.querySelector('.reasoning').open")
    service.held_from = None
    page.wait(IS_DONE)
    assert page.run("document.querySelector('.assistant strong').textContent") == "dog"
    assert page.run("document.querySelector('.assistant pre').textContent") == "a = 1 < 2\n"
    assert page.text(".assistant .text").endswith("Bye.")
    assert page.text(".reasoning summary").startswith("Thought for ")
    assert page.run("document.activeElement.id") == "question"
    page.click(".reasoning summary")
    assert page.text(".reasoning div") == "Let me see."
    assert page.run(
        "/^12 prompt \\+ 8 tokens · [\\d.]+ tokens.s · first/.test(document.getElementById('status').innerText)"
    )
    assert page.problems == []


def test_only_its_own_server_is_asked(tab: Page, service: StandIn, running: tuple[StandIn, str]) -> None:
    tab.requested.clear()
    tab.open(running[1])
    tab.wait("document.title === 'stand-in'")
    ask(tab, "Hello?")
    assert len(tab.requested) > 5
    assert all(url.startswith(running[1]) for url in tab.requested)
    assert tab.problems == []


def test_an_answer_cannot_be_html(page: Page, service: StandIn) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    service.reasoning, service.content = (evil,), (evil, "\n```\n" + evil, "\n```\n`" + evil + "`")
    ask(page, evil)
    assert page.run("document.querySelectorAll('#log img, #log script').length") == 0
    assert page.run("document.title") == "stand-in"
    assert page.text(".assistant .text").count("onerror") == 3
    assert page.text(".user") == evil


def test_the_conversation_is_sent_without_its_reasoning(page: Page, service: StandIn) -> None:
    ask(page, "One?")
    service.content = ("Two.",)
    ask(page, "And\nmore?")
    assert service.bodies[1]["messages"] == [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "It is a dog."},
        {"role": "user", "content": "And\nmore?"},
    ]
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('article').length") == 0
    ask(page, "New?")
    assert service.bodies[2]["messages"] == [{"role": "user", "content": "New?"}]


def test_shift_and_enter_begin_a_line(page: Page, service: StandIn) -> None:
    page.type("a")
    page.press("Enter", shift=True)
    page.type("b")
    page.press("Enter")
    page.wait(f"{IS_DONE} && document.querySelector('.assistant button')")
    assert service.bodies[0]["messages"] == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("how", ["button", "key", "reload", "new chat"])
def test_a_stream_that_is_left_ends_on_the_server(page: Page, service: StandIn, how: str) -> None:
    service.content, service.delay_s = ("more ",) * 3000, 0.02
    send(page, "Tell me everything.")
    page.wait("document.querySelector('.assistant .text')?.innerText.includes('more')")
    assert service.num_running == 1
    act = {
        "button": lambda: page.click("#stop"),
        "key": lambda: page.press("Escape"),
        "reload": lambda: page.call("Page.reload"),
        "new chat": lambda: page.click("#new-chat"),
    }
    act[how]()
    wait_until(lambda: service.num_running == 0)
    if how in ("button", "key"):
        assert page.text(".assistant .note") == "Stopped."
        service.content, service.delay_s = ("Yes.",), 0.0
        ask(page, "Go on?")
        assert service.bodies[1]["messages"][1]["content"].startswith("more ")  # type: ignore[index]
    page.problems.clear()


@pytest.mark.parametrize("how", ["paste", "drop", "button"])
def test_images_go_in_front_of_the_text(page: Page, service: StandIn, how: str) -> None:
    content = image_bytes(40, 30)
    page.type("What is it?")
    if how == "button":
        page.run(f"""(() => {{
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob("{content}"), (letter) => letter.charCodeAt(0));
          transfer.items.add(new File([bytes], "a.png", {{ type: "image/png" }}));
          const input = document.getElementById("image-file");
          input.files = transfer.files;
          input.dispatchEvent(new Event("change"));
        }})()""")
    else:
        give_image(page, how, content)
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    page.press("Enter")
    page.wait(f"{IS_DONE} && document.querySelector('.assistant button')")
    url = f"data:image/png;base64,{content}"
    assert service.bodies[0]["messages"] == [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}],
        }
    ]
    assert page.run("document.querySelectorAll('.thumbnail').length") == 0
    assert page.run("document.querySelector('.user img').naturalWidth") == 40


@pytest.mark.parametrize(
    ("size", "form", "expected"),
    [
        ((6400, 200), "PNG", ("JPEG", (3024, 95))),
        ((20, 10), "BMP", ("PNG", (20, 10))),
        ((20, 10), "WEBP", ("WEBP", (20, 10))),
    ],
)
def test_large_images_and_other_formats_are_drawn_anew(
    page: Page, service: StandIn, size: tuple[int, int], form: str, expected: tuple[str, tuple[int, int]]
) -> None:
    give_image(page, "drop", image_bytes(*size, form), f"image/{form.lower()}")
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    ask(page, "Hm?")
    url = service.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]  # type: ignore[index]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (sent.format, sent.size) == expected


def test_an_image_can_be_taken_back_and_a_bad_one_is_named(page: Page, service: StandIn) -> None:
    give_image(page, "paste", image_bytes(4, 4))
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    page.click(".thumbnail button")
    page.wait("document.querySelectorAll('.thumbnail').length === 0")
    give_image(page, "paste", base64.b64encode(b"no image").decode())
    page.wait("document.getElementById('status').innerText.includes('no image that this browser can read')")
    ask(page, "Only text")
    assert service.bodies[0]["messages"] == [{"role": "user", "content": "Only text"}]


def test_a_refused_question_comes_back_into_the_form(page: Page, service: StandIn) -> None:
    service.status, service.message = 503, "The queue is full."
    give_image(page, "paste", image_bytes(4, 4))
    page.wait("document.querySelectorAll('.thumbnail').length === 1")
    send(page, "Hello?")
    page.wait("document.getElementById('status').innerText === 'The queue is full. Try again in 7 s.'")
    assert page.run("document.getElementById('question').value") == "Hello?"
    assert page.run("document.querySelectorAll('.thumbnail').length") == 1
    service.status = 200
    page.press("Enter")
    page.wait("document.querySelector('.assistant button')")
    assert len(service.bodies[0]["messages"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(("flag", "said"), [("is_broken", "Something is wrong."), ("is_cut", "The connection ended")])
def test_a_stream_that_breaks_keeps_what_came_and_says_why(page: Page, service: StandIn, flag: str, said: str) -> None:
    setattr(service, flag, True)
    ask(page, "Hello?")
    page.wait("document.querySelector('.note')")
    assert page.text(".assistant .note").startswith(said)
    assert "It is a dog." in page.text(".assistant .text")


def test_an_answer_that_was_cut_off_says_so(page: Page, service: StandIn) -> None:
    service.finish_reason = "length"
    ask(page, "Hello?")
    page.wait("document.querySelector('.note')")
    assert page.text(".note").startswith("Cut off")


def test_the_key_is_asked_for_and_kept_for_the_tab_alone(
    tab: Page, service: StandIn, running: tuple[StandIn, str]
) -> None:
    service.key = "secret"
    tab.open(running[1])
    tab.run("sessionStorage.clear()")
    tab.open(running[1])
    tab.wait("document.getElementById('settings').open")
    assert tab.run("document.activeElement.id") == "key"
    tab.type("secret")
    tab.press("Enter")
    tab.wait("document.title === 'stand-in'")
    ask(tab, "Hello?")
    assert len(service.bodies) == 1
    tab.open(running[1])
    tab.wait("document.title === 'stand-in'")
    assert tab.run("[localStorage.length, document.cookie, location.href.includes('secret')]") == [0, "", False]
    tab.problems.clear()


def test_settings_are_sent_and_survive_a_reload(page: Page, service: StandIn, running: tuple[StandIn, str]) -> None:
    page.click("#open-settings")
    for field, text in (("system", "Be brief."), ("temperature", "0.5"), ("max-tokens", "9")):
        page.run(f"document.getElementById('{field}').focus()")
        page.type(text)
    page.click("#close-settings")
    page.wait("!document.getElementById('settings').open")
    page.open(running[1])
    page.wait("document.title === 'stand-in'")
    ask(page, "Hello?")
    body = service.bodies[0]
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("stand-in", 0.5, 9)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_shows_all_of_it(tab: Page, service: StandIn, running: tuple[StandIn, str], is_dark: bool) -> None:
    service.content = ("A word as long as " + "x" * 200, "\n```\n" + "y" * 200 + "\n```")
    tab.open(running[1], width=320, height=560, is_dark=is_dark)
    tab.wait("document.title === 'stand-in'")
    ask(tab, "Hello?")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    boxes = "[...document.querySelectorAll('button, textarea')].filter((one) => one.checkVisibility())"
    inside = "((box) => box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight)"
    assert tab.run(f"{boxes}.every((one) => {inside}(one.getBoundingClientRect()))")
    ground = json.loads(str(tab.run("JSON.stringify(getComputedStyle(document.body).backgroundColor.match(/\\d+/g))")))
    assert (int(ground[0]) < 128) is is_dark


def test_every_control_is_reached_by_keyboard(page: Page) -> None:
    seen = []
    page.run("document.getElementById('question').focus()")
    for _ in range(8):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id"))
    order = ["send", "new-chat", "open-settings", "log", "add-image", "question"]
    assert [one for one in seen if one in order][: len(order)] == order
