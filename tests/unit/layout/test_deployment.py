"""Deployment files: the shipped ones are what they say, and a mistake in one is reported with its key."""

from __future__ import annotations

import pathlib

import pytest
import yaml

from step3_jax import resources
from step3_jax.layout.deployment import (
    Topology,
    Workload,
    find_deployment,
    format_deployment,
    load_deployment,
    parse_deployment,
    read_afd,
)
from step3_jax.layout.parallel import Parallel

SHIPPED = sorted(path.stem for path in resources.find("configs/afd").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_read(name: str) -> None:
    found = load_deployment(name)
    assert found.name == name
    assert found.description
    devices = found.num_devices if found.topology is None else found.topology.num_ffn_devices
    assert found.parallel.dp * found.parallel.tp == devices


def test_the_papers_deployment_has_32_devices() -> None:
    found = load_deployment("2a2f")
    assert found.topology == Topology("2a2f", 2, 2, 8)
    assert (found.num_devices, found.parallel, found.num_microbatches) == (32, Parallel(2, 8, 2), 3)
    assert (found.weights, found.kv_cache, found.payload) == ("fp8", "fp8", "fp8")
    assert found.workload == Workload(6144, 4096)


def test_bare_off_means_no_instances() -> None:
    # YAML reads it as false.
    found = parse_deployment("x", {"afd": False, "devices": 4})
    assert (found.topology, found.num_devices, found.parallel) == (None, 4, Parallel(4, 1, 4))


def test_experts_go_over_instances_and_widths_inside_one_unless_the_file_says_else() -> None:
    assert parse_deployment("x", {"afd": "1a2f", "devices_per_instance": 4}).parallel == Parallel(2, 4, 2)
    given = {"afd": "1a2f", "devices_per_instance": 4, "ffn": {"ep": 8}}
    assert parse_deployment("x", given).parallel == Parallel(8, 1, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "afd is None; give xAyF"),
        ({"afd": "2a2f", "microbatch": 3}, "unknown key microbatch; did you mean microbatches"),
        ({"afd": "2a2f", "ffn": {"tensor": 2}}, "unknown key ffn.tensor"),
        ({"afd": "2a2f", "microbatches": 5}, "5 micro-batches; allowed: 1 to 4"),
        ({"afd": "2a2f", "ffn": {"tp": 3}}, "dp x tp must be 2"),
        ({"afd": "2a2f", "ffn": {"tp": 2, "ep": 3}}, "ep a divisor"),
        ({"afd": "2a2f", "devices": 4}, "devices is not allowed here"),
        ({"afd": "2a2f", "parallel": {"dp": 2}}, "parallel is not allowed here"),
        ({"afd": "off", "devices": 4, "payload": "fp8"}, "payload is not allowed here"),
        ({"afd": "2a2f", "mm_encoder_tp_mode": "copy"}, "mm_encoder_tp_mode is 'copy'; allowed: weights, data"),
        ({"afd": "2a2f", "weights": "int8"}, "weights is 'int8'; allowed: float32, bfloat16, fp8"),
        ({"afd": "2a2f", "device_memory_gib": 0}, "device_memory_gib is 0; a number above 0"),
        ({"afd": "2a2f", "workload": {"sequences": True}}, "workload.* is True; a whole number"),
        ({"afd": "2a2f", "workload": 4}, "workload is 4; a mapping"),
        ({"afd": "2a", "weights": "fp8"}, "xAyF, such as"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_deployment("x", values)


def test_a_wrong_file_is_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("afd: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml is not YAML"):
        load_deployment(file)
    file.write_text("- afd", encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.yaml holds list"):
        load_deployment(file)
    with pytest.raises(ValueError, match=r"no deployment 3a3f: .* 2a2f"):
        find_deployment("3a3f")


def test_the_option_takes_instances_or_a_file(tmp_path: pathlib.Path) -> None:
    assert read_afd("off") is None
    found = read_afd("2A1f", 2)
    assert found is not None
    assert found.topology == Topology("2A1f", 2, 1, 2)
    file = tmp_path / "mine.yaml"
    file.write_text("afd: 1a1f\nmicrobatches: 2\n", encoding="utf-8")
    found = read_afd(str(file))
    assert found is not None
    assert found.num_microbatches == 2
    with pytest.raises(ValueError, match="--afd-devices is for xAyF"):
        read_afd(str(file), 2)
    file.write_text("afd: off\ndevices: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no instances"):
        read_afd(str(file))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_written_is_read_as_the_same_deployment(name: str) -> None:
    found = load_deployment(name)
    assert parse_deployment(name, yaml.safe_load(format_deployment(found))) == found


@pytest.mark.parametrize("afd", ["2a2f", "off"])
def test_a_file_keeps_how_images_are_encoded(afd: str) -> None:
    found = parse_deployment("x", {"afd": afd, "mm_encoder_tp_mode": "data"} | ({"devices": 2} if afd == "off" else {}))
    assert found.parallel.vision == "data"
    assert parse_deployment("x", yaml.safe_load(format_deployment(found))) == found


def test_the_ffn_side_may_be_of_another_kind() -> None:
    found = parse_deployment("x", {"afd": "1a1f", "hardware": "h20", "ffn_hardware": "h800"})
    assert (found.hardware, found.ffn_hardware) == ("h20", "h800")
    with pytest.raises(ValueError, match="ffn_hardware is not allowed here"):
        parse_deployment("x", {"afd": False, "devices": 4, "ffn_hardware": "h800"})
