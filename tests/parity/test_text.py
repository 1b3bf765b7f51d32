"""The decoder against the numbers that the vendor's code gives (tests/goldens/tiny_text/README.md)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.checkpoint.load import load_model
from step3_jax.layers.attention import attention_context
from step3_jax.model.step3 import Step3

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimised_file")]
CASES = (("tiny_text", 0), ("tiny_text", 1), ("tiny_fp8", 0), ("tiny_fp8 as stored", 0))
TOLERANCE = 5e-5


def trace(model, ids):
    """Every intermediate result of a forward pass, under the golden files' names."""
    text = model.text
    hidden = text.embed_tokens(ids)
    context = attention_context(text.config, hidden.shape[:2])
    found, states = {"embeds": hidden[0]}, []
    for index, layer in enumerate(text.layers):
        out = layer.attention(hidden, context)
        found[f"attn_out_{index}"] = (out.residual - hidden)[0]
        if out.routing is not None:
            found[f"router_logits_{index}"] = out.routing.logits
            found[f"moe_out_{index}"] = layer.ffn.moe(out.normed, out.routing.weights, out.routing.experts)
            found[f"share_out_{index}"] = layer.ffn.share_expert(out.normed)
        hidden = out.residual + layer.ffn(out.normed, out.routing).reshape(hidden.shape)
        states.append(hidden[0])
    final = text.norm(hidden)
    found |= {"hidden_states": jnp.stack(states), "final_norm": final[0], "logits": text.logits(final)[0]}
    return found | {"call": model(ids)[0]}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, models, arrays, run_jitted):
    """What we compute, and what the golden file contains, by name."""
    name, number = request.param
    if name not in models:
        pytest.skip("no CPU kernels")
    prefix = f"c{number}_"
    golden = {key[len(prefix) :]: value for key, value in arrays[name].items() if key.startswith(prefix)}
    return models[name], run_jitted(trace, models[name], jnp.asarray(golden["input_ids"])[None]), golden


@pytest.mark.parametrize(
    "name",
    ["embeds", "attn_out", "router_logits", "moe_out", "share_out", "hidden_states", "final_norm", "logits"],
)
def test_every_stage_equals_the_vendors_code(case, name):
    _, found, golden = case
    keys = [key for key in golden if key == name or (key.startswith(name + "_") and key[len(name) + 1 :].isdigit())]
    assert keys, f"the golden file has no {name}"
    for key in keys:
        np.testing.assert_allclose(found[key], golden[key], rtol=0, atol=TOLERANCE, err_msg=key)


def test_model_call_gives_the_same_logits(case):
    _, found, golden = case
    np.testing.assert_allclose(found["call"], golden["logits"], rtol=0, atol=TOLERANCE)


def test_given_positions_are_rotary_positions(models, arrays, run_jitted):
    golden = arrays["tiny_text"]
    ids = jnp.asarray(golden["c0_input_ids"])[None]
    logits = run_jitted(Step3.__call__, models["tiny_text"], ids, 200 + jnp.arange(ids.shape[1])[None])
    np.testing.assert_allclose(logits[0], golden["c0_logits_positions_from_200"], rtol=0, atol=TOLERANCE)


def test_router_weights_are_not_renormalised(case):
    model, found, golden = case
    layer = model.text.config.moe_layers[0]
    logits = golden[f"router_logits_{layer}"]
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    top = -np.sort(-probabilities)[:, : model.text.config.moe_top_k]
    routing = model.text.layers[layer].attention.router
    assert top.sum(-1).max() < 0.999
    assert not routing.renormalise
    np.testing.assert_allclose(
        jax.lax.top_k(jax.nn.softmax(found[f"router_logits_{layer}"]), top.shape[1])[0], top, atol=1e-5
    )


def test_dequantised_weights_equal_the_probe(goldens, models):
    probe = np.load(goldens / "tiny_fp8" / "dequant_probe.npz")
    text = models["tiny_fp8"].text
    found = {
        "model.layers.1.moe.gate_proj.weight": text.layers[1].ffn.moe.gate_proj,
        "model.layers.1.moe.down_proj.weight": text.layers[1].ffn.moe.down_proj,
        "model.layers.0.self_attn.wq.weight": text.layers[0].attention.self_attn.wq.weight,
        "model.layers.0.mlp.down_proj.weight": text.layers[0].ffn.mlp.down_proj.weight,
        "model.layers.1.share_expert.up_proj.weight": text.layers[1].ffn.share_expert.up_proj.weight,
    }
    assert set(found) == set(probe)
    for name, parameter in found.items():
        flat = np.asarray(parameter[...]).reshape(-1)
        np.testing.assert_array_equal(flat[:: max(1, flat.size // 512)][:512], probe[name], err_msg=name)


def test_fp8_weights_kept_on_the_device_give_the_same_logits(goldens, arrays, run_jitted):
    model = load_model(goldens / "tiny_fp8", dtype="float32", quantization="stored")
    golden = arrays["tiny_fp8"]
    logits = run_jitted(Step3.__call__, model, jnp.asarray(golden["c0_input_ids"])[None])
    np.testing.assert_allclose(logits[0], golden["c0_logits"], rtol=0, atol=TOLERANCE)


def test_bfloat16_runs_and_stays_near(goldens, arrays, run_jitted):
    model = load_model(goldens / "tiny_fp8")
    golden = arrays["tiny_fp8"]
    logits = np.asarray(run_jitted(Step3.__call__, model, jnp.asarray(golden["c0_input_ids"])[None])[0])
    assert model.text.embed_tokens.weight[...].dtype == jnp.bfloat16
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    # Logits are about 8 in size; an expert may flip, so only the bulk of them is close.
    assert np.median(np.abs(logits - golden["c0_logits"])) < 0.1
