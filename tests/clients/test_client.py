"""The service with third-party clients, each in its own environment made by `make clients`."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.process import HARD_LIMIT_S, ROOT
from tests.server.running import running

FOLDER = pathlib.Path(__file__).parent
ENVIRONMENTS = pathlib.Path(os.environ.get("STEP3_TEST_CLIENTS", ROOT / ".venv-clients"))
KEY = "a-key"
IMAGE = ROOT / "models" / "step3-tiny" / "examples" / "cat.png"

# Environments of half a gigabyte, and minutes to make them.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(["-m", "step3_jax", "serve", "--port", "0", "--api-key", KEY, "--max-num-seqs", "8"]) as server:
        server.wait_for("ready: ")
        yield f"http://127.0.0.1:{server.port}/v1"


def run(name: str, *words: str, **more: str) -> str:
    """What a command in a client's environment prints."""
    folder = ENVIRONMENTS / name
    if not (folder / ".installed").exists():
        pytest.skip(f"{folder} is not there: make clients makes it")
    found = subprocess.run(
        words, cwd=folder, env=os.environ | more, capture_output=True, text=True, timeout=HARD_LIMIT_S, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("openai-2", "openai_sdk.py"),
        ("openai-3", "openai_sdk.py"),
        ("litellm", "litellm_sdk.py"),
        ("langchain", "langchain_sdk.py"),
    ],
)
def test_python_clients_get_what_they_expect(url: str, name: str, program: str) -> None:
    python = str(ENVIRONMENTS / name / "bin" / "python")
    said = run(
        name, python, str(FOLDER / "programs" / program), url, KEY, str(IMAGE), LITELLM_LOCAL_MODEL_COST_MAP="True"
    )
    assert "all checks held" in said


def test_the_llm_command_answers(url: str, tmp_path: pathlib.Path) -> None:
    model = {"model_id": "tiny", "model_name": "step3-tiny", "api_base": url, "api_key_name": "step3"}
    model |= {"vision": True, "supports_schema": True, "supports_tools": True}
    # JSON is YAML too.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))

    def ask(*words: str, key: str = KEY, temperature: float = 0) -> str:
        command = [str(ENVIRONMENTS / "llm" / "bin" / "llm"), "-m", "tiny", "--key", key]
        return run("llm", *command, "-o", "temperature", str(temperature), *words, LLM_USER_PATH=str(tmp_path))

    question = "What is the capital of France?"
    answer = ask(question)
    assert "Paris" in answer
    assert ask("--no-stream", question) == answer
    word = answer.split()[1]
    assert word not in ask("-o", "stop", word, question)
    warm = [ask("-o", "seed", "7", "-o", "max_tokens", "40", question, temperature=1.5) for _ in range(2)]
    assert warm[0] == warm[1]
    schema = {"type": "object", "properties": {"name": {"enum": ["Paris", "Rome"]}}, "required": ["name"]}
    found = json.loads(ask("--schema", json.dumps(schema | {"additionalProperties": False}), question))
    assert found["name"] in ("Paris", "Rome")
    assert ask("-a", str(IMAGE), "-o", "max_tokens", "200", "What is this?")
    function = "def add(a: int, b: int) -> int:\n    return a + b\n"
    assert "Paris" in ask("--functions", function, question)
    with pytest.raises(AssertionError, match="401"):
        ask(question, key="wrong")
    with pytest.raises(AssertionError, match="max_tokens"):
        ask("-o", "max_tokens", "100000", question)


def test_the_javascript_client_gets_what_it_expects(url: str) -> None:
    said = run("openai-js", "node", str(ENVIRONMENTS / "openai-js" / "openai_js.mjs"), url, KEY, str(IMAGE))
    assert "all checks held" in said


def test_nothing_that_the_description_allows_breaks_the_service(url: str) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    checks += ",unsupported_method,ignored_auth"
    command = [str(ENVIRONMENTS / "schemathesis" / "bin" / "st"), "run", f"{url.removesuffix('/v1')}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--checks", checks, "--max-examples", "30", "--no-color"]
    # An answer as long as the context takes longer than the 10 s that it waits by default.
    run("schemathesis", *command, "--request-timeout", "60", "--continue-on-failure")
