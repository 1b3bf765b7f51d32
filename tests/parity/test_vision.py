"""Tower, projector and merged prompt against the numbers that the vendor's code gives."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from step3_jax.checkpoint.load import load_model
from step3_jax.config import NUM_CLASS_TOKENS
from step3_jax.layers.attention import attention_context
from step3_jax.model.step3 import Step3

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimised_file")]
TOLERANCE = 5e-5
PROMPT_TOLERANCE = 1e-4


def trace(model, pixels):
    """Every stage of the tower and the projector; convolutions NCHW as in the golden file."""
    hidden = model.vision.embeddings(pixels)
    found, layers = {"vit_embeddings": hidden}, []
    for layer in model.vision.layers:
        hidden = layer(hidden)
        layers.append(hidden)
    grid = round((hidden.shape[1] - NUM_CLASS_TOKENS) ** 0.5)
    image = hidden[:, NUM_CLASS_TOKENS:].reshape(hidden.shape[0], grid, grid, -1)
    down1 = model.projector.vit_downsampler(image)
    down2 = model.projector.vit_downsampler2(down1)
    return found | {
        "vit_layers": jnp.stack(layers),
        "down1": down1.transpose(0, 3, 1, 2),
        "down2": down2.transpose(0, 3, 1, 2),
        "features": model.encode_images(pixels),
    }


@pytest.fixture(scope="module")
def stages(models, arrays, run_jitted):
    """Stages of whole pictures and of windows."""
    golden, model = arrays["tiny_vl"], models["tiny_vl"]
    return {
        "image": run_jitted(trace, model, jnp.asarray(golden["pixel_values"])),
        "patch": run_jitted(trace, model, jnp.asarray(golden["patch_pixel_values"])),
    }


def run_prompt(model, ids, pixels, windows):
    """Merged features, the last norm's output for golden embeddings, and the logits of the whole prompt."""
    num_patches = [2, 0, 3]
    return {
        "features": model.image_features(pixels, windows, num_patches),
        "logits": model(ids, None, pixels, windows, num_patches)[0],
    }


@pytest.fixture(scope="module")
def prompt(models, arrays, run_jitted):
    """What we compute for the golden prompt with three pictures."""
    golden = arrays["tiny_vl"]
    assert golden["num_patches"].tolist() == [2, 0, 3]
    inputs = (golden["input_ids"].reshape(1, -1), golden["pixel_values"], golden["patch_pixel_values"])
    return run_jitted(run_prompt, models["tiny_vl"], *(jnp.asarray(array) for array in inputs))


@pytest.mark.parametrize("kind", ["image", "patch"])
@pytest.mark.parametrize("stage", ["vit_embeddings", "vit_layers", "down1", "down2", "features"])
def test_every_stage_equals_the_vendors_code(stages, arrays, kind, stage):
    np.testing.assert_allclose(stages[kind][stage], arrays["tiny_vl"][f"{kind}_{stage}"], rtol=0, atol=TOLERANCE)


def test_class_token_stands_four_times_in_front(stages):
    embeddings = np.asarray(stages["image"]["vit_embeddings"])
    for copy in range(1, NUM_CLASS_TOKENS):
        np.testing.assert_array_equal(embeddings[:, copy], embeddings[:, 0])
    assert np.abs(embeddings[:, NUM_CLASS_TOKENS] - embeddings[:, 0]).max() > 1e-3


def test_layer_norm_epsilon_is_the_vendors_and_not_the_configs(stages, arrays):
    difference = np.abs(np.asarray(stages["image"]["features"]) - arrays["tiny_vl"]["image_features_if_eps_1e5"]).max()
    assert difference > 1e-4


def test_windows_stand_before_the_whole_view(prompt, arrays):
    merged = np.concatenate([arrays["tiny_vl"][f"merged_features_{image}"] for image in range(3)])
    np.testing.assert_allclose(prompt["features"], merged, rtol=0, atol=TOLERANCE)


def test_whole_prompt_with_three_pictures(prompt, arrays):
    np.testing.assert_allclose(prompt["logits"], arrays["tiny_vl"]["logits"], rtol=0, atol=PROMPT_TOLERANCE)


def test_hidden_states_behind_merged_embeddings(models, arrays, run_jitted):
    golden = arrays["tiny_vl"]

    def run(model, hidden):
        context = attention_context(model.text.config, hidden.shape[:2])
        states = []
        for layer in model.text.layers:
            hidden, _, _ = layer(hidden, context)
            states.append(hidden[0])
        return jnp.stack(states), model.text.norm(hidden)[0]

    states, final = run_jitted(run, models["tiny_vl"], jnp.asarray(golden["embeds"])[None])
    np.testing.assert_allclose(states, golden["hidden_states"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(final, golden["final_norm"], rtol=0, atol=TOLERANCE)


def test_image_places_alone_are_overwritten(models, arrays, prompt):
    golden, model = arrays["tiny_vl"], models["tiny_vl"]
    is_place = golden["input_ids"] == model.config.image_token_id
    table = np.asarray(model.text.embed_tokens.weight[...])
    np.testing.assert_array_equal(table[golden["input_ids"]][~is_place], golden["embeds"][~is_place])
    np.testing.assert_allclose(prompt["features"], golden["embeds"][is_place], rtol=0, atol=TOLERANCE)


def test_bfloat16_runs_and_is_finite(goldens, arrays, run_jitted):
    golden = arrays["tiny_vl"]
    model = load_model(goldens / "tiny_vl", dtype="bfloat16")
    features = np.asarray(
        run_jitted(Step3.encode_images, model, jnp.asarray(golden["pixel_values"])).astype(np.float32)
    )
    assert np.isfinite(features).all()
    assert np.median(np.abs(features - golden["image_features"])) < 0.05
