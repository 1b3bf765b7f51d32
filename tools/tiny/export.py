"""Writes the newest checkpoint of a run, also of one that is still training, as a model in the released format.

python -m tools.tiny.export FOLDER [--run DIR] [--stage calls]
"""

from __future__ import annotations

import argparse
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.model.step3 import Step3
from step3_jax.train.step import TrainState, split_model
from tools.tiny.fetch import DEFAULT_DATA, say
from tools.tiny.stages import STAGES
from tools.tiny.train import export, make_heads, stage_optimizer

TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
)


def first_state(stage: str) -> TrainState:
    """The state that a stage starts from; its shapes are those of every checkpoint of it."""
    config = ModelConfig.preset("step3-tiny")
    _, params = split_model(Step3(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    params = {"model": params, "heads": make_heads(config.text.hidden_size)}
    return TrainState(params, stage_optimizer(stage, params).init(params), jnp.zeros((), jnp.int32))


def restore_newest(checkpoints: Path, stage: str) -> TrainState:
    """Reads the newest checkpoint of a stage and changes nothing in the folder.

    Raises:
      ValueError: If there is none.
    """
    if not checkpoints.is_dir():
        raise ValueError(f"there is no folder {checkpoints}; give the folder of a run of tools.tiny.train")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(checkpoints.absolute(), options=options) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise ValueError(f"{checkpoints} holds no checkpoint yet; the first comes after some minutes of training")
        say(f"step {newest} of {checkpoints}")
        template = jax.tree.map(jnp.zeros_like, jax.eval_shape(functools.partial(first_state, stage)))
        return manager.restore(newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(template)))["state"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument("--run", type=Path, default=DEFAULT_DATA / "run", help="folder of the run")
    parser.add_argument("--stage", default="calls", choices=tuple(STAGES))
    options = parser.parse_args()
    shipped = resources.find("models/step3-tiny")
    checkpoints = options.run / options.stage / "checkpoints"
    export(restore_newest(checkpoints, options.stage).params, options.folder)
    if options.folder.resolve() != shipped.resolve():
        for name in TEXT_FILES:
            shutil.copyfile(shipped / name, options.folder / name)
    say(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
