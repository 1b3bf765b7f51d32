"""Stands in for jaxtyping where it is not installed, so that the check runs on a machine with jax and flax alone.

The kernels' shape annotations are text that only the tests evaluate; here only the import has to work. To be imported
before anything of `pallas_kernels`.
"""

from __future__ import annotations

import importlib.util
import sys
import types


class Anything:
    """Takes any subscript: Float[Array, "N D"]."""

    def __class_getitem__(cls, _: object) -> type[Anything]:
        return cls


def stand_in() -> types.ModuleType:
    """A module in which every name is `Anything`."""
    module = types.ModuleType("jaxtyping", "Stand-in: no annotation is checked.")
    module.__dict__["__getattr__"] = lambda name: Anything
    return module


if importlib.util.find_spec("jaxtyping") is None:
    sys.modules["jaxtyping"] = stand_in()
