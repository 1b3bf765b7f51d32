"""Trains the tiny Step3 in two stages, the vision tower with throw-away heads, then the whole model; or goes on from one.

Trained together from scratch the decoder learns the form of the answers and ignores the picture; a tower that can
already see makes the difference. After that stage the heads stay on as a small extra loss. Copying from the prompt is not
learnt from a few recorded tool calls: two of the stages that go on from a finished model have text that asks for it, and a
third brings back the facts that those two lose. The mean of the weights before and after knows most of both.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from step3_jax import resources
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.save import save_model
from step3_jax.config import ModelConfig
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.model.arrangement import Arrangement
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.text.image_settings import ImageSettings
from step3_jax.train.loop import Metrics, train
from step3_jax.train.loss import token_loss
from step3_jax.train.optimizer import make_optimizer
from step3_jax.train.step import (
    Guide,
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
from tools.tiny.batches import IMAGE_TOKENS, NO_DIGIT, NUM_PLACES, NUM_SCORED, Pools
from tools.tiny.fetch import DEFAULT_DATA
from tools.tiny.stages import COPYING_STAGES, FIRST_STAGES, STAGES, joint_batches, tower_batches

NUM_THINGS = 80
PICTURE_WEIGHT, HEAD_WEIGHT, BALANCE_WEIGHT = 2.0, 0.6, 0.1
# Of tool calls and copies beside plain text, in the stages that have copies; elsewhere all tokens of text count the same.
GROUP_WEIGHT, COPY_WEIGHT = 1.0, 1.0
TEXT_PARTS = ("text", "tools", "copies")
# Layer and head of those that are told where to look in tools and copies: at what is copied, and at the token before. The
# second were the ones that did so most before; the last layers are where a copy can still become the next token.
COPYING_HEADS, PREVIOUS_HEADS = ((2, 6), (2, 7), (3, 0), (3, 7)), ((1, 2), (1, 5), (2, 1))
GUIDE_WEIGHT = 0.5
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


def mean_loss(*losses: RowLoss) -> Array:
    """Loss of a token in nats, over all rows given."""
    return sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)


def text_loss(losses: Mapping[str, RowLoss], text_weight: float) -> Array:
    """What the parts of text contribute to the loss of a step."""
    if "copies" not in losses:
        return mean_loss(*losses.values())
    text, tools, copies = (mean_loss(losses[name]) for name in TEXT_PARTS)
    return text_weight * text + GROUP_WEIGHT * tools + COPY_WEIGHT * copies


def guide(batch: PyTree, name: str) -> Guide | None:
    """Where heads should look in a part of text, if that is known."""
    sources = batch.get(f"{name}_sources")
    return None if sources is None else Guide(sources, COPYING_HEADS, PREVIOUS_HEADS)


def make_step(graphdef: nnx.GraphDef, optimizer, settings: ImageSettings, stage: str):
    """The jitted step of a stage: (state, batch, rate) -> (state, metrics)."""
    pixels = functools.partial(normalise_pixels, mean=tuple(settings.image_mean), std=tuple(settings.image_std))

    def encode(model: Step3, images: Array) -> Array:
        features = model.encode_images(pixels(images))
        return jax.lax.stop_gradient(features) if STAGES[stage].fixes_tower else features

    def tower_loss(params: PyTree, batch: PyTree) -> tuple[Array, Metrics]:
        model = nnx.merge(graphdef, params["model"])
        features = model.encode_images(pixels(batch["views"]))
        loss, metrics = head_loss(params["heads"], features, **batch["targets"])
        return loss, {"loss": loss} | metrics

    def joint_loss(params: PyTree, batch: PyTree) -> tuple[Array, Metrics]:
        model = nnx.merge(graphdef, params["model"])
        parts = [batch["views"], batch["extra_views"], batch["large_views"]]
        num_small, num_extra, num_large = (len(part) for part in parts)
        features = encode(model, jnp.concatenate(parts))
        num_seen = num_small + num_extra
        windows = batch["windows"].reshape(-1, *batch["windows"].shape[2:])
        window_features = encode(model, windows)
        width = features.shape[-1]
        small_features = features[:num_small]
        large_features = jnp.concatenate([window_features.reshape(num_large, -1, width), features[num_seen:]], axis=1)
        losses = {
            "small": row_loss(model, batch["small"], small_features.reshape(-1, width), num_scored=NUM_SCORED),
            "large": row_loss(model, batch["large"], large_features.reshape(-1, width), num_scored=NUM_SCORED),
        }
        texts = {name: row_loss(model, batch[name], guide=guide(batch, name)) for name in TEXT_PARTS if name in batch}
        picture_loss = mean_loss(losses["small"], losses["large"])
        every = [*losses.values(), *texts.values()]
        balance = sum(loss.balance for loss in every) / len(every)
        heads, metrics = head_loss(params["heads"], features[:num_seen], **batch["targets"])
        total = (
            PICTURE_WEIGHT * picture_loss
            + text_loss(texts, STAGES[stage].text_weight)
            + HEAD_WEIGHT * heads
            + BALANCE_WEIGHT * balance
        )
        strays = sum(loss.guide for loss in texts.values())
        total += GUIDE_WEIGHT * strays
        shares = texts["text"].shares
        parts_of_text = {name: mean_loss(loss) for name, loss in texts.items()}
        parts_of_text |= {f"{name}_right": loss.correct / loss.weight for name, loss in texts.items()}
        return total, {
            "loss": total,
            "picture": picture_loss,
            "large": mean_loss(losses["large"]),
            "balance": balance,
            "strays": strays,
            "max_share": jnp.max(shares) * shares.shape[1],
            "min_share": jnp.min(shares) * shares.shape[1],
        } | parts_of_text | metrics

    loss = tower_loss if stage == "tower" else joint_loss

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: PyTree, rate: Array) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(loss, has_aux=True)(state.params, batch)
        return apply_gradients(state, gradients, optimizer, rate), metrics

    return step


def stage_optimizer(stage: str, params: PyTree) -> optax.GradientTransformation:
    """The optimiser of a stage."""
    is_fixed = is_of_tower if STAGES[stage].fixes_tower else None
    return make_optimizer(params, is_block_matrix, weight_decay=0.02, clip_norm=1.0, is_fixed=is_fixed)


def is_of_tower(path: tuple[object, ...]) -> bool:
    """Whether a parameter belongs to the tower or the projector."""
    return bool({str(getattr(key, "key", key)) for key in path} & {"vision", "projector"})


def run_stage(
    name: str,
    folder: pathlib.Path,
    data: pathlib.Path,
    minutes: float,
    rate: float | None,
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
    optimizer = stage_optimizer(name, params)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    rng = np.random.default_rng()  # a resumed run goes on with other pictures, not the same again
    pools, stage = Pools(data), STAGES[name]
    batches = tower_batches(pools, rng) if name == "tower" else joint_batches(stage, data, shipped, pools, rng)
    step = make_step(graphdef, optimizer, ImageSettings.load(shipped), name)
    return train(state, step, batches, folder / name, minutes=minutes, schedule=stage.schedule(rate)).params


def average(before: PyTree, after: PyTree, share_before: float) -> PyTree:
    """The weighted mean of a model's weights before and after training (Wortsman et al. 2022, arXiv:2109.01903)."""
    return jax.tree.map(lambda old, new: share_before * old + (1 - share_before) * new, before, after)


def start_from(folder: pathlib.Path) -> PyTree:
    """The parameters of a finished model, and new heads. Layers are apart on every platform, as in a fresh model."""
    model = load_model(folder, "float32", quantization="none", arrangement=Arrangement())
    return {"model": split_model(model)[1], "heads": make_heads(model.config.text.hidden_size)}


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
    for name, stage in STAGES.items():
        parser.add_argument(f"--{name}-minutes", type=float, default=stage.minutes, help="default: %(default)s")
    parser.add_argument("--rate", type=float, help="peak learning rate of every stage (default: each its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from",
        dest="start",
        type=pathlib.Path,
        metavar="MODEL",
        help="go on from this model's weights with the stages `copy`, `calls` and `review`, not `tower` and `joint`",
    )
    parser.add_argument(
        "--start-share",
        type=float,
        default=0.2,
        help="of the weights of --from in those written (default: %(default)s)",
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for the finished weights (released format)")
    options = parser.parse_args()
    enable_compile_cache()
    run = options.run or options.data / "run"
    start = params = None
    if options.start:
        params = start_from(options.start)
        start = jax.tree.map(np.array, params["model"])  # a copy: training consumes what it starts from
    for name in COPYING_STAGES if options.start else FIRST_STAGES:
        minutes = getattr(options, f"{name}_minutes")
        params = run_stage(name, run, options.data, minutes, options.rate, options.seed, params)
    if options.out:
        if start is not None:
            params = {"model": average(start, params["model"], options.start_share)}
        export(params, options.out)


if __name__ == "__main__":
    main()
