"""Messages of a conversation, and whether the model's answer to them starts with reasoning."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from step3_jax.sampling.params import SamplingParams
from step3_jax.stored_file import read_text
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_input import open_image
from step3_jax.text.message import Message
from step3_jax.text.output_parser import THINK_END, is_thinking
from step3_jax.text.tool_call import Tool, collect_schemas


def user_message(text: str, images: Sequence[str] = ()) -> dict[str, object]:
    """The user's message: images first, as in the released model's training.

    Args:
      text: The question.
      images: Paths of images.
    """
    if not images:
        return {"role": "user", "content": text}
    items: list[dict[str, object]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def system_messages(text: str | None) -> list[dict[str, object]]:
    """The start of a conversation: a system message, or nothing."""
    return [] if text is None else [{"role": "system", "content": text}]


def check_images(images: Sequence[str]) -> None:
    """Raises ValueError if an image cannot be opened; cheap compared with loading a model for nothing."""
    for image in images:
        open_image(image)


def stop_in_answer(params: SamplingParams, *, starts_thinking: bool) -> SamplingParams:
    """The same parameters with stop strings that end the answer, not the reasoning before it."""
    return dataclasses.replace(params, stop_after=THINK_END) if params.stop and starts_thinking else params


def read_tools(path: str | None) -> list[Tool]:
    """The tools of a file: a JSON list of them, as in OpenAI's interface; none without a file.

    Raises:
      ValueError: If the file cannot be read or does not have this form.
    """
    if path is None:
        return []
    try:
        stored = json.loads(read_text(pathlib.Path(path).expanduser()))
    except FileNotFoundError:
        raise ValueError(f"--tools {path}: there is no such file") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--tools {path} is not valid JSON: {error}") from None
    if not isinstance(stored, list) or len(collect_schemas(filter(_is_object, stored))) != len(stored):
        raise ValueError(
            f"--tools {path} must hold a list of tools with distinct names, each "
            '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
        )
    return stored


def _is_object(stored: object) -> bool:
    return isinstance(stored, Mapping)


def starts_thinking(folder: pathlib.Path, messages: Sequence[Message]) -> bool:
    """Whether the checkpoint's template ends the prompt inside the reasoning."""
    return is_thinking(ChatTemplate.load(folder).render(messages))
