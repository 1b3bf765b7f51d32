"""The table of devices."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax import resources
from step3_jax.layout.deployment import load_deployment
from step3_jax.layout.hardware import list_hardware, load_hardware


def test_every_shipped_device_can_be_read() -> None:
    assert "h100-sxm" in list_hardware()
    for name in list_hardware():
        device = load_hardware(name)
        assert device.name == name
        assert 16 < device.memory_gib < 1024
        assert device.description


def test_every_shipped_deployment_names_a_device_of_the_table() -> None:
    for file in resources.find("configs/afd").glob("*.yaml"):
        hardware = load_deployment(file).hardware
        assert hardware is None or hardware in list_hardware(), file.name


def test_a_device_without_fp8_products_has_none() -> None:
    assert load_hardware("a100-80gb").fp8_tflops is None


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="h100-sxm"):
        load_hardware("h1000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a mapping is needed"),
        ("memory_gib: [", "is no YAML"),
        ("memory_gib: -1", "above 0 is needed"),
        ("memory_gib: 80\nprice: 3", "unknown key price"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: pathlib.Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_hardware(str(file))
