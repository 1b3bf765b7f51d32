"""Messages of a conversation, and whether the model's answer to them begins with reasoning."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from step3_jax.sampling.params import SamplingParams
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_input import open_image
from step3_jax.text.message import Message
from step3_jax.text.reasoning import CLOSING, is_thinking


def user_message(text: str, images: Sequence[str] = ()) -> dict[str, object]:
    """What the user says: pictures first, as the released model was shown them.

    Args:
      text: The question.
      images: Paths of pictures.
    """
    if not images:
        return {"role": "user", "content": text}
    items: list[dict[str, object]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def system_messages(text: str | None) -> list[dict[str, object]]:
    """The begin of a conversation: a system message, or nothing."""
    return [] if text is None else [{"role": "system", "content": text}]


def check_images(images: Sequence[str]) -> None:
    """Raises ValueError if a picture cannot be opened; cheap beside loading a model for nothing."""
    for image in images:
        open_image(image)


def stop_in_answer(params: SamplingParams, *, starts_thinking: bool) -> SamplingParams:
    """The same parameters with stop strings that end the answer and not the reasoning before it."""
    return dataclasses.replace(params, stop_after=CLOSING) if params.stop and starts_thinking else params


def starts_thinking(folder: pathlib.Path, messages: Sequence[Message]) -> bool:
    """Whether the checkpoint's template ends the prompt inside the reasoning."""
    return is_thinking(ChatTemplate.load(folder).render(messages))
