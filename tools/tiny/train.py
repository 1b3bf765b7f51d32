"""Trains the tiny Step3 in two stages: the vision tower with throw-away heads, then the whole model.

Trained together from scratch the decoder learns the form of the answers and ignores the picture; a tower that can
already see makes the difference. In the joint stage the heads stay on as a small extra loss.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from step3_jax import resources
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.save import save_model
from step3_jax.config import ModelConfig
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.text.image_settings import ImageSettings
from step3_jax.train.data import pack_rows
from step3_jax.train.loop import Metrics, Schedule, train
from step3_jax.train.loss import token_loss
from step3_jax.train.optimizer import make_optimizer
from step3_jax.train.step import (
    RowLoss,
    TrainState,
    apply_gradients,
    is_block_matrix,
    normalise_pixels,
    prepare_for_training,
    row_loss,
    set_capacity,
    split_model,
)
from tools.tiny.batches import (
    IMAGE_TOKENS,
    NO_DIGIT,
    NUM_PLACES,
    NUM_SCORED,
    TEXT_LENGTH,
    TEXT_SHARES,
    TOOL_LENGTH,
    TOOL_SHARES,
    Dialogues,
    PictureBatch,
    Pools,
    digit_places,
    picture_batches,
    text_examples,
)
from tools.tiny.fetch import DEFAULT_DATA

NUM_THINGS = 80
TOWER_COUNTS = (64, 56, 16)  # drawings, numbers, handwriting in a step of the first stage
JOINT_COUNTS = (12, 32, 4)
EXTRA_COUNTS = (4, 60, 0)  # for the tower and its heads alone, which is cheap: numbers need the most pictures
NUM_LARGE, NUM_TEXT_ROWS, NUM_TOOL_ROWS = 12, 6, 1
PICTURE_WEIGHT, HEAD_WEIGHT, BALANCE_WEIGHT = 2.0, 0.6, 0.1
CAPACITY_FACTOR, BRANCH_GAIN = 1.5, 0.25


def head_loss(
    heads: PyTree, features: Float[Array, "B tokens D"], is_drawing: Array, labels: Array, places: Array
) -> tuple[Array, Metrics]:
    """Loss of the throw-away heads on the 16 tokens of the view: which thing, which digits."""
    flat = features.reshape(features.shape[0], -1)
    flat = flat * jax.lax.rsqrt(jnp.mean(jnp.square(flat), axis=1, keepdims=True) + 1e-6)
    things = flat @ heads["thing"]
    digits = (flat @ heads["digits"]).reshape(-1, NUM_PLACES, NO_DIGIT + 1)
    thing_loss = token_loss(things, jnp.where(is_drawing, labels, 0))
    digit_loss = token_loss(digits.reshape(-1, NO_DIGIT + 1), places.reshape(-1)).reshape(-1, NUM_PLACES).sum(1)
    num_drawings = jnp.sum(is_drawing)
    right_things = jnp.sum((jnp.argmax(things, axis=1) == labels) * is_drawing) / num_drawings
    right = jnp.all(jnp.argmax(digits, axis=2) == places, axis=1)
    right_numbers = jnp.sum(right * ~is_drawing) / jnp.sum(~is_drawing)
    loss = jnp.mean(jnp.where(is_drawing, thing_loss, 0.5 * digit_loss))
    return loss, {"head_things": right_things, "head_numbers": right_numbers}


def make_heads(width: int) -> PyTree:
    """The throw-away heads, zero at first."""
    flat = IMAGE_TOKENS * width
    return {"thing": jnp.zeros((flat, NUM_THINGS)), "digits": jnp.zeros((flat, NUM_PLACES * (NO_DIGIT + 1)))}


def head_targets(batch: PictureBatch) -> dict[str, np.ndarray]:
    """What the heads are to say about each picture."""
    return {
        "is_drawing": batch.kinds == 0,
        "labels": np.where(batch.kinds == 0, batch.labels, -1).astype(np.int32),
        "places": digit_places(batch.kinds, batch.labels),
    }


def tower_batches(pools: Pools, rng: np.random.Generator) -> Iterator[PyTree]:
    """Endless batches of the first stage."""
    while True:
        batch = pools.draw(TOWER_COUNTS, rng)
        yield {"views": batch.views, "targets": head_targets(batch)}


def joint_batches(data: pathlib.Path, model: pathlib.Path, pools: Pools, rng: np.random.Generator) -> Iterator[PyTree]:
    """Endless batches of the second stage."""
    dialogues = Dialogues(data, model)
    texts = text_examples(data, dialogues, TEXT_SHARES, rng)
    tools = text_examples(data, dialogues, TOOL_SHARES, rng)
    for small, large in picture_batches(pools, dialogues, JOINT_COUNTS, NUM_LARGE, rng):
        extra = pools.draw(EXTRA_COUNTS, rng)
        yield {
            "views": small.views,
            "extra_views": extra.views,
            "targets": jax.tree.map(lambda *parts: np.concatenate(parts), head_targets(small), head_targets(extra)),
            "small": small.rows,
            "large_views": large.views,
            "windows": large.windows,
            "large": large.rows,
            "text": pack_rows(texts, num_rows=NUM_TEXT_ROWS, length=TEXT_LENGTH),
            "tools": pack_rows(tools, num_rows=NUM_TOOL_ROWS, length=TOOL_LENGTH),
        }


def mean_loss(*losses: RowLoss) -> Array:
    """Loss of a token in nats, over all rows given."""
    return sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)


def make_step(graphdef: nnx.GraphDef, optimizer, settings: ImageSettings, stage: str):
    """The jitted step of a stage: (state, batch, rate) -> (state, metrics)."""
    pixels = functools.partial(normalise_pixels, mean=tuple(settings.image_mean), std=tuple(settings.image_std))

    def tower_loss(params: PyTree, batch: PyTree) -> tuple[Array, Metrics]:
        model = nnx.merge(graphdef, params["model"])
        features = model.encode_images(pixels(batch["views"]))
        loss, metrics = head_loss(params["heads"], features, **batch["targets"])
        return loss, {"loss": loss} | metrics

    def joint_loss(params: PyTree, batch: PyTree) -> tuple[Array, Metrics]:
        model = nnx.merge(graphdef, params["model"])
        parts = [batch["views"], batch["extra_views"], batch["large_views"]]
        num_small, num_extra, num_large = (len(part) for part in parts)
        features = model.encode_images(pixels(jnp.concatenate(parts)))
        num_seen = num_small + num_extra
        windows = batch["windows"].reshape(-1, *batch["windows"].shape[2:])
        window_features = model.encode_images(pixels(windows))
        width = features.shape[-1]
        small_features = features[:num_small]
        large_features = jnp.concatenate([window_features.reshape(num_large, -1, width), features[num_seen:]], axis=1)
        losses = {
            "small": row_loss(model, batch["small"], small_features.reshape(-1, width), num_scored=NUM_SCORED),
            "large": row_loss(model, batch["large"], large_features.reshape(-1, width), num_scored=NUM_SCORED),
            "text": row_loss(model, batch["text"]),
            "tools": row_loss(model, batch["tools"]),
        }
        picture_loss = mean_loss(losses["small"], losses["large"])
        text_loss = mean_loss(losses["text"], losses["tools"])
        balance = sum(loss.balance for loss in losses.values()) / len(losses)
        heads, metrics = head_loss(params["heads"], features[:num_seen], **batch["targets"])
        total = PICTURE_WEIGHT * picture_loss + text_loss + HEAD_WEIGHT * heads + BALANCE_WEIGHT * balance
        shares = losses["text"].shares
        return total, {
            "loss": total,
            "picture": picture_loss,
            "large": mean_loss(losses["large"]),
            "text": mean_loss(losses["text"]),
            "tools": mean_loss(losses["tools"]),
            "balance": balance,
            "max_share": jnp.max(shares) * shares.shape[1],
            "min_share": jnp.min(shares) * shares.shape[1],
        } | metrics

    loss = tower_loss if stage == "tower" else joint_loss

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: PyTree, rate: Array) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params, batch)
        return apply_gradients(state, gradients, optimizer, rate), metrics

    return step


def run_stage(
    stage: str,
    folder: pathlib.Path,
    data: pathlib.Path,
    minutes: float,
    rate: float,
    seed: int,
    start: PyTree | None,
) -> PyTree:
    """Trains one stage and returns its parameters."""
    shipped = resources.find("models/step3-tiny")
    config = ModelConfig.preset("step3-tiny")
    model = Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    prepare_for_training(model, capacity_factor=CAPACITY_FACTOR, branch_gain=BRANCH_GAIN)
    graphdef, params = split_model(model)
    params = start or {"model": params, "heads": make_heads(config.text.hidden_size)}
    optimizer = make_optimizer(params, is_block_matrix, weight_decay=0.02, clip_norm=1.0)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    rng = np.random.default_rng()  # a resumed run goes on with other pictures, not the same again
    pools = Pools(data)
    batches = tower_batches(pools, rng) if stage == "tower" else joint_batches(data, shipped, pools, rng)
    step = make_step(graphdef, optimizer, ImageSettings.load(shipped), stage)
    return train(state, step, batches, folder / stage, minutes=minutes, schedule=Schedule(rate)).params


def export(params: PyTree, folder: pathlib.Path) -> None:
    """Writes the weights in the released checkpoint format."""
    config = ModelConfig.preset("step3-tiny")
    model = abstract_step3(config, jnp.float32)
    set_capacity(model, None)
    graphdef, _ = nnx.split(model)
    save_model(nnx.merge(graphdef, params["model"]), folder, dtype="bfloat16", overwrite=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=DEFAULT_DATA, help="prepared data (tools.tiny.fetch)")
    parser.add_argument("--run", type=pathlib.Path, default=None, help="folder of this run (default: DATA/run)")
    parser.add_argument("--tower-minutes", type=float, default=25)
    parser.add_argument("--joint-minutes", type=float, default=100)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start",
        type=pathlib.Path,
        metavar="MODEL",
        help="go on from this model's weights; the first stage is left out",
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the finished weights (released format)")
    options = parser.parse_args()
    enable_compile_cache()
    run = options.run or options.data / "run"
    common = {"data": options.data, "rate": options.rate, "seed": options.seed}
    if options.start:
        model = load_model(options.start, "float32", quantization="none")
        params = {"model": split_model(model)[1], "heads": make_heads(model.config.text.hidden_size)}
    else:
        params = run_stage("tower", minutes=options.tower_minutes, start=None, folder=run, **common)
    params = run_stage("joint", minutes=options.joint_minutes, start=params, folder=run, **common)
    if options.out:
        export(params, options.out)


if __name__ == "__main__":
    main()
