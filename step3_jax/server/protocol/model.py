"""Responses about the model and the server."""

from __future__ import annotations

from typing import Literal

from step3_jax.server.protocol.common import Answer


class ModelCard(Answer):
    """A name of the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Answer):
    """All names of the model."""

    object: Literal["list"]
    data: list[ModelCard]


class Status(Answer):
    """What the server is doing: starting, ok, stalled, draining or dead."""

    status: str


class Version(Answer):
    """The version of step3-jax."""

    version: str
