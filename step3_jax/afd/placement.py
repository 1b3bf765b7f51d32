"""Models on the devices of a topology: each weight where its role needs it, and nowhere else."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp

from step3_jax.afd.topology import AfdTopology
from step3_jax.checkpoint.load import load_model
from step3_jax.config import ModelConfig
from step3_jax.layout.payload import choose_payload
from step3_jax.model import parallel
from step3_jax.model.cpu import choose_dtype
from step3_jax.model.step3 import Step3


def load_placed_model(
    path: str | os.PathLike[str],
    topology: AfdTopology,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    quantization: str = "auto",
    load_format: str = "auto",
    payload: str = "auto",
) -> Step3:
    """Loads a model's folder, each weight straight to the devices of its role.

    Only the parts that devices of this process hold are read of each weight.

    Args:
      path: Folder with `config.json` and the weights.
      topology: The devices.
      dtype: "float32" or "bfloat16"; if absent the configuration's. On a CPU it is float32.
      quantization: See `load_model`; each side's weights are held as its own devices take them.
      load_format: See there.
      payload: What crosses; checked before anything is loaded.

    Raises:
      ValueError: As `load_model` does, for an unknown payload, and if the model cannot be sharded so.
    """
    config = ModelConfig.load(pathlib.Path(path))
    if topology.devices[0].platform == "cpu":
        dtype = choose_dtype(dtype, quantization, is_apart=True)
    if topology.ffn_platform == "cpu" and quantization == "auto":
        # FP8 weights are dequantised there, unless they are in one piece.
        config = dataclasses.replace(config, quantization=None)
    choose_payload(payload, config.dtype if dtype is None else jnp.dtype(dtype).name)
    shardings = topology.shardings(config)
    return load_model(path, dtype, quantization=quantization, load_format=load_format, shardings=shardings)


def place_model(model: Step3, topology: AfdTopology) -> Step3:
    """A copy of a model in memory, each weight on the devices of its role. Every process has the same model.

    Raises:
      ValueError: If the FFN side cannot hold the model in shards.
    """
    topology.check(model.config)
    return parallel.place_model(model, topology)
