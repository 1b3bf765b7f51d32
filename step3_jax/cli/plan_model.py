"""The model for `step3 plan memory` and `step3 plan search`."""

from __future__ import annotations

import pathlib

from step3_jax.config import PRESETS, ModelConfig
from step3_jax.nearest import describe_known
from step3_jax.planner.shape import list_shapes


def load_config(name: str) -> ModelConfig:
    """The configuration of a preset, or of a folder or file in Step3's form.

    Raises:
      ValueError: If it is not found, or only `step3 plan cost` knows it.
    """
    if name in PRESETS:
        return ModelConfig.preset(name)
    path = pathlib.Path(name).expanduser()
    if path.exists():
        return ModelConfig.load(path)
    if name in list_shapes():
        raise ValueError(
            f"--model {name}: memory can be planned only for models of Step3's form; for this one there is step3 plan cost "
            f"--model {name}"
        )
    raise ValueError(f"--model {name}: give a folder with a config.json, or a name{describe_known(name, PRESETS)}")
