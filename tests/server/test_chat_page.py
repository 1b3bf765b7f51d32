"""The chat page's files: no outside requests, nothing inline, headers that forbid both, and its functions under node."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess

import pytest

from step3_jax.server.chat_page import CONTENT_SECURITY_POLICY, FILES, page_response
from tests.process import ROOT

FOLDER = ROOT / "step3_jax" / "server" / "page"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}


def test_every_file_is_served_with_its_type_and_the_policy() -> None:
    assert set(FILES) == set(TEXTS)
    for name in FILES:
        response = page_response(name)
        assert response is not None
        assert response.body.decode() == TEXTS[name]
        assert response.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[name.split(".")[1]]
        assert response.headers["Content-Type"] == f"{kind}; charset=utf-8"


@pytest.mark.parametrize("name", ["../chat_page.py", "", ".", "/etc/passwd", "page.css/", "PAGE.CSS"])
def test_no_other_file_is_served(name: str) -> None:
    assert page_response(name) is None


def test_the_policy_allows_the_pages_own_files_alone() -> None:
    rules = dict(rule.split(" ", 1) for rule in CONTENT_SECURITY_POLICY.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY


def test_nothing_is_inline_and_nothing_is_outside() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"(https?:)?//(?=\w)(?! )", re.sub(r"(^|\s)// .*", "", text)), f"{name} names another site"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    page = TEXTS["index.html"]
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]


def test_every_element_that_a_script_asks_for_is_on_the_page() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', TEXTS["index.html"])
    assert len(ids) == len(set(ids))
    scripts = "".join(text for name, text in TEXTS.items() if name.endswith(".js"))
    settings = json.loads(re.search(r"SETTINGS = (\[.*?\])", scripts)[1])  # type: ignore[index]
    asked = {*re.findall(r'find\("([\w-]+)"\)', scripts), *settings}
    assert asked <= set(ids)
    for name in re.findall(r'from "\./([\w.]+)"', scripts):
        assert name in FILES


def test_every_control_has_a_name() -> None:
    page = TEXTS["index.html"]
    labelled = re.sub(r"<label>.*?</label>", "", page, flags=re.DOTALL)
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", labelled):
        assert "aria-label=" in tag or " hidden" in tag, tag
    for attributes, text in re.findall(r"<button([^>]*)>(.*?)</button>", page):
        assert "aria-label=" in attributes or (text.isascii() and text.replace(" ", "").isalpha())


CHECKS = """
import assert from "node:assert";
import { EventReader, readError } from "./stream.mjs";
import { splitInline, isFence } from "./markup.mjs";
import { fitSize } from "./image.mjs";

const text = ': keep-alive\\n\\ndata: {"a": 1}\\r\\n\\r\\ndata:x\\ndata: y\\n\\nevent: z\\n\\ndata: [DONE]\\n\\n';
const expected = ['{"a": 1}', "x\\ny", "[DONE]"];
for (let cut = 0; cut <= text.length; cut++) {
  const reader = new EventReader();
  assert.deepEqual([...reader.push(text.slice(0, cut)), ...reader.push(text.slice(cut))], expected);
}
const single = new EventReader();
assert.deepEqual([...text].flatMap((letter) => single.push(letter)), expected);

const kinds = (line) => splitInline(line).map(({ kind, text }) => `${kind}:${text}`);
assert.deepEqual(kinds("a **b c** `d**` e"), ["text:a ", "strong:b c", "text: ", "code:d**", "text: e"]);
assert.deepEqual(kinds("2 ** 3 ** 4"), ["text:2 ** 3 ** 4"]);
assert.deepEqual(kinds("**open"), ["text:**open"]);
assert.deepEqual(kinds("<b>"), ["text:<b>"]);
assert.deepEqual(kinds(""), []);
assert.ok(isFence("```python") && isFence("   ```") && !isFence("    ```") && !isFence("a ```"));

assert.deepEqual(fitSize(6048, 100), [3024, 50]);
assert.deepEqual(fitSize(1, 30240), [1, 3024]);
assert.deepEqual(fitSize(640, 480), [640, 480]);

const answer = (body, status, headers) => readError(new Response(body, { status, headers }));
assert.equal((await answer('{"error": {"message": "Too long."}}', 400)).message, "Too long.");
assert.equal((await answer("<html>", 502)).message, "The server answered 502.");
const full = await answer('{"error": {"message": "Full."}}', 503, { "Retry-After": "3" });
assert.equal(full.message, "Full. Try again in 3 s.");
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_scripts_functions(tmp_path: pathlib.Path) -> None:
    for name in ("stream", "markup", "image"):
        shutil.copy(FOLDER / f"{name}.js", tmp_path / f"{name}.mjs")
    (tmp_path / "check.mjs").write_text(CHECKS, encoding="utf-8")
    done = subprocess.run(["node", "check.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
