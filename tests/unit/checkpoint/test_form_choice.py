"""The form in which weights are held: by device, by request, and by whether there are kernels."""

from __future__ import annotations

import pytest

from step3_jax.checkpoint.form_choice import FormChoice, Place, choose_form

CPU, CPUS, GPU = Place("cpu", 1), Place("cpu", 4), Place("gpu", 1)


def choose(asked: str, place: Place = CPU, *, cpu_obstacle: str | None = None, has_fp8: bool = True) -> FormChoice:
    return choose_form(asked, place, cpu_obstacle=cpu_obstacle, has_fp8=has_fp8)


def test_weights_stay_as_stored_where_kernels_multiply_them() -> None:
    found = choose("auto")
    assert (found.quantization, found.keeps_bfloat16) == ("stored", True)


def test_without_kernels_they_are_widened_and_the_reason_is_said() -> None:
    found = choose("auto", cpu_obstacle="no C compiler was found")
    assert (found.quantization, found.keeps_bfloat16) == ("none", False)
    assert "widened" in found.reason
    assert "no C compiler was found" in found.reason


@pytest.mark.parametrize("asked", ["none", "stored", "fp8", "int8", "int4"])
def test_what_is_asked_for_is_done_on_a_cpu(asked: str) -> None:
    assert choose(asked, has_fp8=False).quantization == asked
    slow = choose(asked, cpu_obstacle="off", has_fp8=False)
    assert slow.quantization == asked
    assert ("each product widens" in slow.reason) == (asked != "none")


def test_gpus_keep_fp8_and_refuse_integers() -> None:
    assert choose("auto", GPU).quantization == "stored"
    assert choose("fp8", GPU).quantization == "stored"
    for asked in ("int8", "int4"):
        with pytest.raises(
            ValueError, match=f"quantization {asked} is for CPUs: the GPU kernels multiply only FP8 and bfloat16"
        ):
            choose(asked, GPU)
    with pytest.raises(ValueError, match="step3 convert SRC DST --to hf --dtype fp8"):
        choose("fp8", GPU, has_fp8=False)


def test_shards_of_emulated_devices_are_widened() -> None:
    assert choose("auto", CPUS).quantization == "none"
    assert choose("stored", CPUS).quantization == "stored"
    with pytest.raises(ValueError, match="for one CPU device"):
        choose("int8", CPUS)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="quantization is 'fp4'; allowed: auto, none, stored, fp8, int8, int4"):
        choose("fp4")


def test_the_message_says_what_the_kernels_multiply_in() -> None:
    for products in ("float32", "bfloat16"):
        found = choose_form("stored", CPU, cpu_obstacle=None, has_fp8=True, products=products)
        assert found.reason == f"as stored, CPU kernels multiply them in {products}"
