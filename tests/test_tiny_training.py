"""Trains a smaller Step3 from scratch for twenty steps, by the tiny model's own recipe, on pictures made here."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.model.arrangement import Arrangement
from step3_jax.model.step3 import Step3
from step3_jax.text.image_settings import ImageSettings
from step3_jax.train.data import pack_rows
from step3_jax.train.optimizer import make_optimizer
from step3_jax.train.step import TrainState, is_block_matrix, prepare_for_training, split_model
from tools.tiny.batches import Dialogues, PictureBatch, picture_batches
from tools.tiny.drawings import THINGS, answer_for
from tools.tiny.stages import head_targets
from tools.tiny.text_corpus import PICTURES
from tools.tiny.train import average, make_heads, make_step, start_from

NUM_STEPS = 20
COLOURS = ((220, 40, 40), (40, 180, 60), (50, 70, 220))
FACTS = (("What is the capital of France?", "Paris"), ("What is the capital of Japan?", "Tokyo"))


class ColourPools:
    """Plain squares of a colour instead of painted pictures: thing, number and digit are the colour's index."""

    def draw(self, counts: tuple[int, int, int], rng: np.random.Generator) -> PictureBatch:
        labels = rng.integers(0, len(COLOURS), sum(counts)).astype(np.int32)
        kinds = np.repeat(np.arange(3, dtype=np.int32), counts)
        return PictureBatch(self._paint(labels, (64, 64), rng), None, None, kinds, labels, None)

    def draw_large(self, count: int, rng: np.random.Generator) -> PictureBatch:
        labels = rng.integers(0, len(COLOURS), count).astype(np.int32)
        windows = np.stack([self._paint(labels, (48, 48), rng) for _ in range(4)], axis=1)
        num_windows = np.resize([2, 4], count).astype(np.int32)
        kinds = np.zeros(count, np.int32)
        return PictureBatch(self._paint(labels, (64, 64), rng), windows, num_windows, kinds, labels, None)

    def _paint(self, labels: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        noise = rng.normal(0, 12, (len(labels), *size, 3))
        return np.clip(np.array(COLOURS)[labels][:, None, None] + noise, 0, 255).astype(np.uint8)


def _config() -> ModelConfig:
    """The shipped model's shape, so that its tokenizer and its picture sizes fit, but smaller."""
    whole = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(
        whole.text, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, moe_layers=(0,),
        head_dim=32, share_q_dim=32, moe_num_experts=4, moe_intermediate_size=32, share_expert_dim=64,
    )  # fmt: skip
    vision = dataclasses.replace(
        whole.vision, hidden_size=32, output_hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    return dataclasses.replace(whole, text=text, vision=vision)


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    """The few files of the data folder that dialogues are made from."""
    (tmp_path / "chat-pictures.json").write_text(json.dumps(PICTURES))
    things = [{"answer": answer_for(name)} for name, *_ in THINGS]
    (tmp_path / "things.json").write_text(json.dumps(things))
    return tmp_path


@pytest.mark.thorough
def test_loss_falls_in_twenty_steps_of_the_joint_stage(data: pathlib.Path) -> None:
    shipped, config = resources.find("models/step3-tiny"), _config()
    model = nnx.jit(lambda: Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))()
    prepare_for_training(model, capacity_factor=1.5, branch_gain=0.25)
    graphdef, params = split_model(model)
    params = {"model": params, "heads": make_heads(config.text.hidden_size)}
    optimizer = make_optimizer(params, is_block_matrix, weight_decay=0.02, clip_norm=1.0)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    step = make_step(graphdef, optimizer, ImageSettings.load(shipped), "joint")

    rng, dialogues = np.random.default_rng(0), Dialogues(data, shipped)
    # Tool calls are rows of their own; here they are facts as well.
    facts = [
        dialogues.record({"question": question, "reasoning": "I know.", "answer": f"It is {city}."})
        for question, city in FACTS
    ]
    history = []
    for small, large in picture_batches(ColourPools(), dialogues, (6, 3, 3), 4, rng):
        batch = {
            "views": small.views,
            "extra_views": small.views,
            "targets": jax.tree.map(lambda part: np.concatenate([part, part]), head_targets(small)),
            "small": small.rows,
            "large_views": large.views,
            "windows": large.windows,
            "large": large.rows,
            "text": pack_rows(iter(facts * 8), num_rows=2, length=96),
            "tools": pack_rows(iter(facts * 8), num_rows=1, length=96),
        }
        state, metrics = step(state, batch, jnp.float32(5e-3))
        history.append(jax.device_get(metrics))
        if len(history) == NUM_STEPS:
            break

    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    first, last = history[0], history[-1]
    for name in ("loss", "picture", "large", "text", "tools"):
        assert last[name] < 0.6 * first[name], (name, first[name], last[name])
    # The twelve small pictures of each step are new, so they cannot be memorised.
    assert np.mean([metrics["head_things"] for metrics in history[-5:]]) > 0.6
    assert int(state.step) == NUM_STEPS


def test_weights_written_are_the_mean_of_those_before_and_after() -> None:
    before, after = {"a": np.float32([1, 2]), "b": np.float32(0)}, {"a": np.float32([3, 2]), "b": np.float32(5)}
    mean = average(before, after, 0.2)
    np.testing.assert_allclose(mean["a"], [2.6, 2.0])
    np.testing.assert_allclose(mean["b"], 4.0)


def test_a_finished_model_is_taken_apart_for_training_also_where_loading_stacks(
    tiny_model_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default on GPUs.
    monkeypatch.setattr(Arrangement, "of", classmethod(lambda cls, platform, dtype: cls(stacks=True, fuses=True)))
    params = start_from(tiny_model_path)
    config = ModelConfig.load(tiny_model_path)
    fresh = jax.eval_shape(lambda: split_model(Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))[1])
    assert jax.tree.structure(params["model"]) == jax.tree.structure(fresh)
