"""Step3 in JAX: the model, its checkpoints, and an engine that generates from text and images, offline or as a service.

The names in `__all__` are imported on first use, so that `step3 --help` does not wait for jax.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step3_jax.checkpoint.load import load_model
    from step3_jax.checkpoint.save import save_model
    from step3_jax.config import ModelConfig
    from step3_jax.engine.config import EngineConfig
    from step3_jax.engine.llm import LLM
    from step3_jax.layout.parallel import Parallel
    from step3_jax.sampling.params import SamplingParams
    from step3_jax.sampling.structured import StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EngineConfig",
    "ModelConfig",
    "Parallel",
    "SamplingParams",
    "StructuredOutputsParams",
    "load_model",
    "save_model",
]

_PLACES = {
    "EngineConfig": "step3_jax.engine.config",
    "LLM": "step3_jax.engine.llm",
    "ModelConfig": "step3_jax.config",
    "Parallel": "step3_jax.layout.parallel",
    "SamplingParams": "step3_jax.sampling.params",
    "StructuredOutputsParams": "step3_jax.sampling.structured",
    "load_model": "step3_jax.checkpoint.load",
    "save_model": "step3_jax.checkpoint.save",
}


# Silent unless the program enables it: logging.getLogger("step3_jax").setLevel("INFO"), and a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
