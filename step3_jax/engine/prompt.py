"""Turns prompts as users give them into prompts ready for the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from step3_jax.config import ModelConfig
from step3_jax.engine.request import ContextLengthError, Prompt
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_input import ImageSource, open_image
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.images import ProcessedImage, expand_image_tokens, process
from step3_jax.text.message import Message, collect_images
from step3_jax.text.tokenizer import Tokenizer

# Text, token ids, or a mapping as in vLLM: {"prompt": text} or {"prompt_token_ids": ids}, either with
# {"multi_modal_data": {"image": image or list of images}}.
PromptInput = str | Sequence[int] | Mapping[str, object]
ImagesInput = Sequence[ImageSource | Sequence[ImageSource] | None]

# Sequences of whole numbers, but not token ids: text must be str.
_BYTES = bytes | bytearray | memoryview
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt")


class PromptBuilder:
    """Makes prompts for one model."""

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        *,
        template: ChatTemplate | None = None,
        settings: ImageSettings | None = None,
        max_model_len: int | None = None,
        source: str = "this model",
    ) -> None:
        """Takes what a model's folder has.

        Args:
          config: The model's sizes.
          tokenizer: None serves only token ids.
          template: None serves no chats.
          settings: Settings of the image processor; None for the released ones.
          max_model_len: Texts that cannot have so few tokens are refused before they are encoded; None for no limit.
          source: The model's name in messages.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._template = template
        self._settings = settings or ImageSettings()
        self._max_model_len = max_model_len
        self._source = source

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Sides of views and windows in pixels; empty where no prompt can have images."""
        if self._config.vision is None or self._tokenizer is None:
            return ()
        try:
            self._check_settings()
        except ValueError:
            return ()
        return self._settings.image_size, self._settings.window_size

    def from_text(self, text: str, images: Sequence[ImageSource] = (), *, add_bos: bool = True) -> Prompt:
        """A prompt from text, in which control tokens are control tokens.

        Args:
          text: With one `<im_patch>` per image.
          images: The images, in the order of their places.
          add_bos: Prepend BOS unless it is there.

        Raises:
          ValueError: Without a tokenizer, or if the images do not match their places or cannot be read.
          ContextLengthError: If the text cannot fit in the context.
        """
        tokenizer = self._require_tokenizer("a prompt of text")
        self._check_length(text)
        ids = tokenizer.encode(text)
        bos = _begin_token(tokenizer) if add_bos else None
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        return self.from_ids(ids, images, text=text)

    def from_ids(
        self, token_ids: Sequence[int], images: Sequence[ImageSource] = (), *, text: str | None = None
    ) -> Prompt:
        """A prompt from token ids, unchanged except for image places.

        Args:
          token_ids: With one `<im_patch>` per image.
          images: The images, in the order of their places.
          text: The text of the ids, returned with the output.

        Raises:
          ValueError: If an id is not a whole number, or the images do not match their places or cannot be read.
        """
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise ValueError(f"the prompt has a token id {token!r}; whole numbers are needed")
        ids = list(token_ids)
        has_vision = self._config.vision is not None
        if not images:
            place = self._image_place() if has_vision else None
            if place is not None and place in ids:
                raise ValueError(f"the prompt has {ids.count(place)} image place(s) for 0 images; give the images")
            return Prompt(tuple(ids), text)
        if not has_vision:
            raise ValueError(f"{self._source} is a text-only model: it takes no images")
        tokens = self._require_tokenizer("a prompt with images").image_token_ids()
        if ids.count(tokens.im_patch) != len(images):
            # Checked before any image is opened.
            raise ValueError(
                f"the prompt has {ids.count(tokens.im_patch)} image place(s) for {len(images)} image(s); write exactly "
                "one <im_patch> for each image"
            )
        self._check_settings()
        processed = tuple(self._process(source) for source in images)
        ids = expand_image_tokens(ids, [image.plan for image in processed], tokens)
        places = tuple(index for index, token in enumerate(ids) if token == tokens.im_patch)
        return Prompt(tuple(ids), text, processed, places)

    def from_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
        allow_paths: bool = True,
    ) -> Prompt:
        """A prompt from a conversation; control tokens typed in messages stay text.

        Args:
          messages: See `ChatTemplate.render`; images are taken from their items.
          tools: JSON schemas of functions the model may call.
          add_generation_prompt: Whether the prompt ends with the start of the assistant's turn.
          continue_final_message: Whether the model continues the text of the last message, an assistant's.
          template_kwargs: Further variables of the template.
          allow_paths: Whether an image may be given by its path; False on a server.

        Raises:
          ValueError: Without tokenizer or template, or if messages or images cannot be used.
          ContextLengthError: If the text cannot fit in the context.
        """
        tokenizer = self._require_tokenizer("a chat")
        if self._template is None:
            raise ValueError(f"{self._source} has no chat template; give the prompt as plain text to generate()")
        sources = collect_images(messages)
        ids = self._template.encode_chat(
            tokenizer,
            messages,
            tools,
            add_generation_prompt,
            continue_final_message,
            self._check_length,
            **dict(template_kwargs or {}),
        )
        # Files are decoded one at a time, where they are processed: sixteen large ones at once would take gigabytes.
        images = [one if isinstance(one, bytes) else open_image(one, allow_paths=allow_paths) for one in sources]
        return self.from_ids(ids, images, text=tokenizer.decode(ids))

    def from_input(self, prompt: PromptInput, images: Sequence[ImageSource] = ()) -> Prompt:
        """A prompt in any of the forms of `PromptInput`.

        Raises:
          ValueError: For another form, or as `from_text` and `from_ids`.
        """
        check_form(prompt)
        if isinstance(prompt, str):
            return self.from_text(prompt, images)
        if not isinstance(prompt, Mapping):
            return self.from_ids(prompt, images)
        own = _as_images((prompt.get("multi_modal_data") or {}).get("image"))  # type: ignore[attr-defined]
        if own and images:
            raise ValueError("images are given both in the prompt's multi_modal_data and as images=; give them once")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        built = self.from_input(cast(PromptInput, ids if text is None else text), own or images)
        return dataclasses.replace(built, cache_salt=str(prompt.get("cache_salt") or ""))

    def _check_length(self, text: str) -> None:
        """Raises ContextLengthError for a text that cannot fit: encoding tens of megabytes takes a minute."""
        longest = None if self._tokenizer is None else self._tokenizer.longest
        if self._max_model_len is not None and longest and len(text) > longest * self._max_model_len:
            raise ContextLengthError(
                f"the prompt has {len(text)} characters, at least {-(-len(text) // longest)} tokens; at most max_model_len "
                f"= {self._max_model_len} are allowed: shorten the prompt, or load with a larger max_model_len"
            )

    def _process(self, source: ImageSource) -> ProcessedImage:
        return process(open_image(source), self._settings)

    def _image_place(self) -> int:
        names = self._tokenizer.control_tokens if self._tokenizer is not None else {}
        return names.get(self._config.im_patch_token, self._config.image_token_id)

    def _check_settings(self) -> None:
        """The processor's sizes must match the tower's, or features would not fit their places."""
        config, settings = self._config, self._settings
        size = config.vision.image_size if config.vision is not None else 0
        ours = (size, config.image_token_len, config.patch_token_len)
        theirs = (settings.image_size, settings.image_token_len, settings.patch_token_len)
        if ours != theirs:
            raise ValueError(
                f"preprocessor_config.json and config.json of {self._source} do not match: image_size, image_token_len "
                f"and patch_token_len are {theirs} and {ours}"
            )

    def _require_tokenizer(self, purpose: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(
                f"{self._source} has no tokenizer.json, so {purpose} cannot be read: give token ids, or add the file"
            )
        return self._tokenizer


def check_form(prompt: object) -> None:
    """Raises ValueError if a prompt is in none of the forms of `PromptInput`; its content is not checked."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Mapping):
        if not isinstance(prompt, Sequence) or isinstance(prompt, _BYTES):
            raise ValueError(f"a prompt is {type(prompt).__name__}; text, a list of token ids or a mapping is needed")
        return
    given = [key for key in _PROMPT_KEYS[:2] if prompt.get(key) is not None]
    if set(prompt) - set(_PROMPT_KEYS) or len(given) != 1:
        raise ValueError(
            f"the prompt has keys {sorted(map(str, prompt))}; allowed: 'prompt' (text) or 'prompt_token_ids', "
            "'multi_modal_data' and 'cache_salt'"
        )
    value, media, salt = prompt[given[0]], prompt.get("multi_modal_data") or {}, prompt.get("cache_salt")
    if given[0] == "prompt" and not isinstance(value, str):
        raise ValueError(f"the prompt's 'prompt' is {type(value).__name__}; text is needed")
    if given[0] == "prompt_token_ids" and isinstance(value, str | Mapping):
        raise ValueError(f"the prompt's 'prompt_token_ids' is {type(value).__name__}; a list of token ids is needed")
    check_form(value)
    if not isinstance(media, Mapping) or set(media) - {"image"}:
        raise ValueError("multi_modal_data must be {'image': image or list of images}")
    if salt is not None and not isinstance(salt, str):
        raise ValueError(f"the prompt's 'cache_salt' is {salt!r}; text is needed")


def split_prompts(
    prompts: PromptInput | Sequence[PromptInput], images: ImagesInput | ImageSource | None
) -> list[tuple[PromptInput, list[ImageSource]]]:
    """Pairs prompts with their images.

    Args:
      prompts: One prompt or a list of them; a list of numbers is one prompt of token ids.
      images: For one prompt, its image or a list of its images; for a list of prompts, an entry for each: an image,
        a list of images, or None.

    Raises:
      ValueError: If there are no prompts, one is in none of the forms, or images are not one entry per prompt.
    """
    if not isinstance(prompts, Sequence | Mapping) or isinstance(prompts, _BYTES):
        raise ValueError(f"prompts is {prompts!r}; text, a list of token ids, a mapping, or a list of them is needed")
    is_single = isinstance(prompts, str | Mapping) or _is_ids(prompts)
    several: list[PromptInput] = (
        [cast(PromptInput, prompts)] if is_single else list(cast(Sequence[PromptInput], prompts))
    )
    if not several:
        raise ValueError("no prompts are given; at least one is needed")
    for place, prompt in enumerate(several):
        try:
            check_form(prompt)
        except ValueError as error:
            raise ValueError(error if is_single else f"prompt {place} of {len(several)}: {error}") from None
    if images is None:
        return [(prompt, []) for prompt in several]
    entries = list(images) if isinstance(images, list | tuple) else [images]
    if len(several) == 1 and not any(isinstance(entry, list | tuple) for entry in entries):
        return [(several[0], _as_images([entry for entry in entries if entry is not None]))]
    if len(entries) != len(several):
        raise ValueError(
            f"{len(entries)} entries of images are given for {len(several)} prompt(s); give a list of images for each "
            "prompt, or None"
        )
    return [(prompt, _as_images(entry)) for prompt, entry in zip(several, entries, strict=True)]


def _is_ids(prompts: object) -> bool:
    return isinstance(prompts, Sequence) and bool(prompts) and all(isinstance(item, int) for item in prompts)


def _as_images(value: object) -> list[ImageSource]:
    """One or several images as a list; anything that is not an image is refused when it is opened."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [cast(ImageSource, value)]


def _begin_token(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.bos_id
    except ValueError:  # The checkpoint names none, so none is prepended.
        return None
