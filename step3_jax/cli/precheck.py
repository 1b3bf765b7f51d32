"""Checks before the weights are read, which takes minutes for a large model."""

from __future__ import annotations

import pathlib

from step3_jax.checkpoint.names import is_vision_tensor
from step3_jax.checkpoint.shards import INDEX_FILE, SINGLE_FILE, Checkpoint
from step3_jax.config import ModelConfig
from step3_jax.text.chat_template import ChatTemplate


def check_before_loading(
    folder: pathlib.Path, *, max_model_len: int | None, num_images: int = 0, needs_template: bool = True
) -> ModelConfig:
    """Refuses what the model in `folder` cannot do.

    Args:
      folder: The model.
      max_model_len: The requested limit; None for the model's own.
      num_images: Images of the prompt.
      needs_template: Whether messages are rendered to a prompt.

    Returns:
      The model's configuration.

    Raises:
      ValueError: For a length beyond the model's positions, images for a model without vision tower, a missing or invalid
        chat template, or a configuration that cannot be used.
    """
    config = ModelConfig.load(folder)
    limit = config.text.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise ValueError(f"--max-model-len {max_model_len}: {folder} has positions for at most {limit:,} tokens")
    if num_images and not _has_vision(folder, config):
        raise ValueError(f"{folder} is a text-only model, without a vision tower: leave the images out")
    if needs_template:
        ChatTemplate.load(folder)
    return config


def _has_vision(folder: pathlib.Path, config: ModelConfig) -> bool:
    """Whether there is a vision tower, judging by tensor names, like the loader."""
    if config.vision is None or not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return config.vision is not None
    with Checkpoint(folder) as checkpoint:
        return any(is_vision_tensor(name) for name in checkpoint.tensors)
