"""Bytes that cross between the roles, against the published ones."""

from __future__ import annotations

import pytest

from step3_jax.config import ModelConfig, TextConfig
from step3_jax.layout.payload import PayloadSize, choose_payload

STEP3 = ModelConfig.preset("step3").text


def test_rows_of_the_released_model() -> None:
    """7,168 values and 56 scales there, 7,168 values of bfloat16 back (arXiv 2507.19427, section 5.4), and 3 experts."""
    size = PayloadSize.of(STEP3, "fp8")
    assert (size.row_bytes, size.output_bytes) == (7168 + 4 * 56 + 3 * (2 + 4), 2 * 7168)
    assert PayloadSize.of(STEP3, "bfloat16").row_bytes == 2 * 7168 + 18
    assert PayloadSize.of(STEP3, "float32").output_bytes == 4 * 7168


def test_a_model_without_experts_sends_no_choice() -> None:
    assert PayloadSize.of(TextConfig(moe_layers=()), "bfloat16").row_bytes == 2 * 7168


def test_auto_is_exact_for_exact_activations() -> None:
    assert choose_payload("auto", "float32") == "float32"
    assert choose_payload("auto", "bfloat16") == "fp8"
    assert choose_payload("bfloat16", "float32") == "bfloat16"
    with pytest.raises(ValueError, match="payload is 'fp4'; allowed: auto, fp8"):
        choose_payload("fp4", "float32")
    with pytest.raises(ValueError, match="payload is 'auto'; allowed: fp8"):
        PayloadSize.of(STEP3, "auto")
