"""The images: what their files say fits the service, and the steps of the CPU one run in a fresh Debian."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
import yaml

from step3_jax.cli.main import build_parser
from step3_jax.cli.serve import read_server_config
from step3_jax.server.config import ServerConfig
from tests.packaging.containerfile import CHROOT, Containerfile
from tests.process import ROOT

FOLDER = ROOT / "configs" / "container"
# Loading and compiling the tiny model's programs on two busy cores.
START_LIMIT_S = 900
ASK = """
import json, urllib.request
body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 64}
request = urllib.request.Request(
    "http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
print(json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["message"]["content"])
"""


@pytest.fixture(params=["cpu", "cuda"])
def file(request: pytest.FixtureRequest) -> Containerfile:
    return Containerfile.read(FOLDER / f"{request.param}.Containerfile")


def read_serve(words: list[str]) -> ServerConfig:
    return read_server_config(build_parser("serve").parse_args(words))


def test_an_image_serves_as_a_user_of_its_own_and_is_asked_where_the_service_answers(file: Containerfile) -> None:
    config = read_serve(file.words("CMD"))
    assert file.words("ENTRYPOINT") == ["step3"]
    assert config.host == "0.0.0.0"
    assert int(file.last("EXPOSE")) == config.port
    assert int(file.last("USER")) > 0
    assert f"127.0.0.1:{config.port}/health" in file.words("HEALTHCHECK")[-1]
    assert file.environment["JAX_COMPILATION_CACHE_DIR"].startswith(file.last("VOLUME") + "/")
    assert file.last("STOPSIGNAL") == "SIGTERM"


def test_the_images_differ_in_the_extra_and_its_variables_alone() -> None:
    cpu, cuda = (Containerfile.read(FOLDER / f"{name}.Containerfile").instructions for name in ("cpu", "cuda"))
    more = [one for one in cuda if one not in cpu]
    assert [name for name, _ in more] == ["RUN", "ENV"]
    assert "[server,grammar,cuda13]" in more[0][1]
    assert [(name, rest.replace(",cuda13", ",cpu")) for name, rest in cuda if (name, rest) != more[1]] == list(cpu)


def test_the_compose_file_gives_the_service_time_to_end_and_a_key() -> None:
    composed = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    assert set(composed["services"]) == {"cpu", "cuda"}
    for name, service in composed["services"].items():
        config = read_serve(service["command"])
        assert int(service["stop_grace_period"].removesuffix("s")) > config.shutdown_timeout
        assert service["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
        assert "STEP3_API_KEY" in service["environment"]
        assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
        assert service["build"]["dockerfile"].endswith(f"{name}.Containerfile")


def test_images_are_built_from_what_the_wheel_is_built_from() -> None:
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in taken)
    assert {"step3_jax", "pallas_kernels", "configs", "models", "pyproject.toml", "README.md", "LICENSE"} <= taken


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The root of a fresh Debian, as small as the image that FROM names."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip("a fresh Debian needs root and debootstrap (Debian: debootstrap)")
    if subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("the kernel refuses network namespaces")
    root = tmp_path_factory.mktemp("root")
    command = ["debootstrap", "--variant=minbase", "bookworm", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        pytest.skip(f"debootstrap could not fetch Debian: {done.stdout[-300:]}")
    # The image's user is a different one.
    root.chmod(0o755)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def started(root: pathlib.Path, file: Containerfile) -> Iterator[subprocess.Popen[bytes]]:
    """The image's command as its user, in its own network, so that its port is free."""
    inside = [*file.words("ENTRYPOINT"), *file.words("CMD")]
    user = file.last("USER")
    command = f'mount -t proc proc "$0/proc" && ip link set lo up && exec {CHROOT} --userspec={user}:{user} "$0" "$@"'
    words = ["unshare", "--net", "--mount", "sh", "-c", command, str(root), *inside]
    with subprocess.Popen(words, env=file.environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_the_steps_of_the_image_for_cpus_make_a_service_that_answers(debian: pathlib.Path) -> None:
    file = Containerfile.read(FOLDER / "cpu.Containerfile")
    file.build(debian, ROOT)
    (debian / "dev" / "shm").mkdir(exist_ok=True)
    with started(debian, file) as process:
        user = file.last("USER")
        enter = ["nsenter", "--net", "--mount", f"--target={process.pid}", CHROOT, f"--userspec={user}", str(debian)]

        def call(words: list[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*enter, *words], env=file.environment, capture_output=True, text=True, timeout=90, check=False
            )

        end = time.monotonic() + START_LIMIT_S
        while (asked := call(file.words("HEALTHCHECK"))).returncode != 0:
            assert process.poll() is None, "the service ended"
            assert time.monotonic() < end, f"the service did not become healthy: {asked.stderr[-500:]}"
            time.sleep(2)
        assert "Paris" in call(["python3", "-c", ASK]).stdout
        found = json.loads(call(["step3", "env", "--json"]).stdout)
    assert found["package"].startswith("/opt/step3/")
    assert found["compile_cache"] == file.environment["JAX_COMPILATION_CACHE_DIR"]
    assert any((debian / found["compile_cache"].lstrip("/")).iterdir()), "the user could keep no compiled programs"
