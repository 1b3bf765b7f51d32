"""The shipped files for running the service fit what the service does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from step3_jax import resources
from step3_jax.cli.main import build_parser
from step3_jax.cli.serve import read_server_config
from step3_jax.server.config import ServerConfig
from step3_jax.server.context import _QUIET
from tests.server.client import Client


def read(name: str) -> str:
    return resources.find(f"configs/serve/{name}").read_text(encoding="utf-8")


def names_of(expressions: list[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"step3:\w+", text)}


@pytest.fixture
def metrics(client: Client) -> set[str]:
    """Names of all samples that the service may have."""
    client.chat()
    text = client.call("/metrics").body.decode()
    samples = set(re.findall(r"^(step3:\w+)", text, re.MULTILINE))
    # One without labels until something is counted.
    return samples | set(re.findall(r"^# TYPE (step3:\w+) counter", text, re.MULTILINE))


def test_the_dashboard_shows_metrics_that_there_are(metrics: set[str]) -> None:
    dashboard = json.loads(read("grafana.json"))
    asked = names_of([target["expr"] for panel in dashboard["panels"] for target in panel["targets"]])
    assert len(asked) > 10
    assert asked <= metrics
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"])


def test_alerts_are_about_metrics_that_there_are(metrics: set[str]) -> None:
    rules = [rule for group in yaml.safe_load(read("alerts.yml"))["groups"] for rule in group["rules"]]
    assert names_of([rule["expr"] for rule in rules]) <= metrics
    assert yaml.safe_load(read("prometheus.yml"))["rule_files"] == ["alerts.yml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_takes_its_files() -> None:
    command = ["promtool", "check", "config", str(resources.find("configs/serve/prometheus.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def read_command(words: list[str]) -> ServerConfig:
    program, *argv = words
    assert program.endswith("step3")
    return read_server_config(build_parser("serve").parse_args(argv))


def test_pods_are_probed_where_the_service_answers_and_have_time_to_end() -> None:
    documents = {one["kind"]: one for one in yaml.safe_load_all(read("kubernetes.yaml"))}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    config = read_command(container["command"])
    port = container["ports"][0]
    assert port["containerPort"] == config.port
    assert config.host == "0.0.0.0"
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/health",
        "readiness": "/ready",
        "liveness": "/live",
    }
    assert {probe["path"] for probe in probes.values()} <= _QUIET
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    stop_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > stop_s + config.shutdown_timeout
    service = documents["Service"]["spec"]
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] == port["name"]


def test_the_unit_gives_the_service_time_to_end_and_starts_it_again() -> None:
    settings = dict(line.split("=", 1) for line in read("step3.service").splitlines() if re.match(r"\w+=.", line))
    config = read_command(settings["ExecStart"].split())
    assert int(settings["TimeoutStopSec"]) > config.shutdown_timeout
    assert (settings["Restart"], settings["KillMode"]) == ("on-failure", "mixed")
    assert "--api-key" not in settings["ExecStart"], "every user of the machine reads command lines"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: pytest.TempPathFactory) -> None:
    unit = tmp_path / "step3.service"  # type: ignore[operator]
    unit.write_text(read("step3.service").replace("/opt/step3/bin/step3", "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step3.service" not in done.stderr


def test_the_proxy_takes_bodies_as_large_as_the_service_does() -> None:
    text = read("nginx.conf")
    limit = re.search(r"client_max_body_size (\d+)m;", text)
    assert limit is not None
    assert int(limit[1]) * 2**20 == ServerConfig().max_body_bytes
    assert f"127.0.0.1:{ServerConfig().port}" in text
