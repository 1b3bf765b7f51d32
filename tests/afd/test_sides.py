"""Each side of executor `host` is prepared for its own devices: a GPU for attention, this machine's memory for the FFN."""

from __future__ import annotations

import types
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from step3_jax.afd.host.executor import _prepare_sides
from step3_jax.afd.topology import AfdTopology
from step3_jax.checkpoint.form_choice import Place
from step3_jax.checkpoint.load import _choose_arrangement
from step3_jax.checkpoint.names import is_fp8_tensor, parameters_of, released_name
from step3_jax.config import ModelConfig
from step3_jax.cpu_kernels.loader import Kernels, find_kernels
from step3_jax.layers.router import Routing
from step3_jax.layout.deployment import parse_topology
from step3_jax.layout.parallel import Parallel
from step3_jax.layout.role import is_ffn
from step3_jax.model.arrangement import arrange
from step3_jax.model.step3 import Step3
from step3_jax.model.text import FfnBlock
from step3_jax.quant import BlockScaled, quantise
from tests.small import small_text

USERS = "Linear", "Embedding", "Router", "Experts", "SwiGLU"


@pytest.fixture
def kernels() -> Kernels:
    found = find_kernels()
    if not isinstance(found, Kernels):
        pytest.skip(found.reason)
    return found


def prepare(attention: str, ffn: str) -> Step3:
    """A model in bfloat16 with matrices in FP8, arranged and prepared for sides on these platforms."""
    config = ModelConfig(text=small_text(), vision=None, dtype="bfloat16", image_token_id=1, eos_token_id=0)
    model = Step3(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    flat = parameters_of(model)
    for path, weight in flat.items():
        if is_fp8_tensor(released_name(path)):
            weight.set_value(quantise(weight.get_value(), "fp8"))
    places = {path: Place(ffn if is_ffn(path) else attention, 1) for path in flat}
    model = arrange(model, _choose_arrangement(places, config.dtype))
    devices = tuple(types.SimpleNamespace(platform=platform) for platform in (attention, ffn))
    topology = AfdTopology(parse_topology("1a1f", 1), Parallel(), devices)  # type: ignore[arg-type]
    # Nothing may follow from the process's own devices.
    with mock.patch("jax.default_backend", return_value="gpu" if attention == "cpu" else "cpu"):
        return _prepare_sides(model, topology)


def kernels_of(module: nnx.Module) -> dict[str, object]:
    """The kernels of the products in a module, by path; those inside of a SwiGLU are the SwiGLU's."""
    found = {}
    for path, part in nnx.iter_modules(module):
        is_inside = any(name in path for name in ("mlp", "share_expert")) and type(part).__name__ == "Linear"
        if type(part).__name__ in USERS and not is_inside:
            found["/".join(map(str, path))] = part.cpu_kernels  # type: ignore[attr-defined]
    return found


def sides_of(model: Step3) -> tuple[dict[str, object], dict[str, object]]:
    """The same of attention with both ends of the decoder, and of the FFN."""
    found = kernels_of(model.text)
    ffn = {path: one for path, one in found.items() if "ffn" in path}
    return {path: one for path, one in found.items() if path not in ffn}, ffn


def trace(block: FfnBlock) -> str:
    """The operations of a mixture."""
    routing = Routing(jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 4)))
    return str(jax.make_jaxpr(lambda rows: block(rows, routing))(jnp.ones((2, 32))))


def test_beside_a_gpu_the_cpu_multiplies_fp8_weights_with_its_kernels(kernels: Kernels) -> None:
    model = prepare("gpu", "cpu")
    attention, ffn = sides_of(model)
    assert len(ffn) == 3
    assert set(ffn.values()) == {kernels}
    assert set(attention.values()) == {None}
    dense, mixture = model.text.layers
    for layer in (dense, mixture):
        # Attention's activations are quantised as on any GPU, and not those that the CPU multiplies with.
        assert layer.attention.self_attn.wq.takes_rows
        assert layer.attention.input_layernorm.quantises
        assert not layer.attention.post_attention_layernorm.quantises
    assert not any(part.takes_rows for part in (dense.ffn.mlp, mixture.ffn.moe, mixture.ffn.share_expert))
    # Nothing was widened on either side.
    for stored in (mixture.ffn.moe.gate_proj, dense.attention.self_attn.wq.weight):
        assert isinstance(stored.get_value(), BlockScaled)
    assert dense.attention.input_layernorm.weight.get_value().dtype == jnp.bfloat16
    assert kernels.target("experts") in trace(mixture.ffn)


def test_on_gpus_alone_there_are_no_cpu_kernels() -> None:
    model = prepare("gpu", "gpu")
    assert {one for side in sides_of(model) for one in side.values()} == {None}


def test_on_cpus_both_sides_have_them(kernels: Kernels) -> None:
    model = prepare("cpu", "cpu")
    attention, ffn = sides_of(model)
    assert set(attention.values()) == set(ffn.values()) == {kernels}
    assert not model.text.layers[1].attention.input_layernorm.quantises
