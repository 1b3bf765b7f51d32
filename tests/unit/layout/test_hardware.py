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


def test_every_figure_of_a_shipped_device_has_its_source() -> None:
    figures = ("memory_gib", "bandwidth_tb_s", "bf16_tflops", "fp8_tflops", "int8_tops", "link_gb_s", "network_gb_s")
    for name in list_hardware():
        device = load_hardware(name)
        known = {figure for figure in (*figures, "usd_per_hour") if getattr(device, figure) is not None}
        assert known == set(device.sources), name


def test_prices_are_those_of_the_report_alone() -> None:
    prices = {name: load_hardware(name).usd_per_hour for name in list_hardware()}
    assert {name: price for name, price in prices.items() if price is not None} == {
        "h800": 2,
        "h20": 0.8,
        "a800": 0.75,
        "910b": 0.67,
    }


@pytest.mark.parametrize(("short", "name"), [("h100", "h100-sxm"), ("A100", "a100-80gb"), ("H20", "h20")])
def test_a_name_may_leave_out_the_form_factor(short: str, name: str) -> None:
    assert load_hardware(short).name == name


def test_a_name_that_two_devices_begin_with_is_unknown() -> None:
    with pytest.raises(ValueError, match="rtx-4090"):
        load_hardware("rtx")


def test_every_shipped_deployment_names_a_device_of_the_table() -> None:
    for file in resources.find("configs/afd").glob("*.yaml"):
        found = load_deployment(file)
        assert {found.hardware, found.ffn_hardware} <= {None, *list_hardware()}, file.name


def test_a_device_without_fp8_products_has_none() -> None:
    assert load_hardware("a100-80gb").fp8_tflops is None


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="h100-sxm"):
        load_hardware("h1000")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a mapping is needed"),
        ("memory_gib: [", "is not YAML"),
        ("memory_gib: -1", "above 0 is needed"),
        ("memory_gib: 80\nprice: 3", "unknown key price"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path: pathlib.Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_hardware(str(file))
