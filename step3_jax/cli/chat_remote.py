"""`step3 chat --url`: a conversation with a model that a service runs."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import pathlib
from collections.abc import Mapping, Sequence

from PIL import Image

from step3_jax.cli.display import Display, default_show_reasoning, write_cut
from step3_jax.cli.message import read_tools
from step3_jax.cli.process import interruptible
from step3_jax.cli.progress import show_progress
from step3_jax.cli.remote_option import read_key
from step3_jax.cli.talk import Talk, run_talk
from step3_jax.client import ServiceClient
from step3_jax.text.image_input import WEB_FORMATS, open_image, read_image
from step3_jax.text.message import collect_images, replace_images
from step3_jax.text.output_parser import OutputDelta, ToolCallDelta
from step3_jax.text.tool_call import Tool

# The largest file that is sent unchanged; a larger one is sent as JPEG.
_MAX_FILE_BYTES = 8 * 2**20
# Options that only this project and a few other services know: sent only if given.
_EXTENSIONS = {"top_k": 0, "min_p": 0.0, "ignore_eos": False}


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends; see `run_talk`.

    Raises:
      ValueError: For options that need a model loaded here, or an invalid address.
      ServiceError: If the service cannot be reached.
    """
    if arguments.model is not None:
        raise ValueError(f"--url names a service, and {arguments.model} is a model to load here: give one of them")
    key = read_key(arguments)
    model = arguments.served_model or asyncio.run(_find_model(arguments.url, key))
    show_reasoning = default_show_reasoning() if arguments.reasoning is None else arguments.reasoning
    talk = RemoteTalk(
        arguments.url,
        read_request(arguments, model),
        api_key=key,
        system=arguments.system,
        show_reasoning=show_reasoning,
        tools=read_tools(arguments.tools),
    )
    return run_talk(talk, f"{model} at {arguments.url}")


def read_request(arguments: argparse.Namespace, model: str) -> dict[str, object]:
    """The fields of each request, except its messages.

    Args:
      arguments: The options of `add_sampling`.
      model: The model's name.
    """
    request: dict[str, object] = {
        "model": model,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
    }
    if arguments.seed is not None:
        request["seed"] = arguments.seed
    if arguments.stop:
        request["stop"] = arguments.stop
    given = {name: getattr(arguments, name) for name in _EXTENSIONS}
    return request | {name: value for name, value in given.items() if value != _EXTENSIONS[name]}


class RemoteTalk(Talk):
    """A conversation with a model that a service runs."""

    def __init__(
        self,
        url: str,
        request: Mapping[str, object],
        *,
        api_key: str | None,
        system: str | None,
        show_reasoning: bool,
        tools: Sequence[Tool] = (),
    ) -> None:
        """Starts a conversation.

        Args:
          url: The service's address.
          request: The fields of each request, except its messages and tools.
          api_key: The service's key.
          system: A system message.
          show_reasoning: Whether reasoning is shown.
          tools: As in `Talk`.
        """
        super().__init__(system=system, show_reasoning=show_reasoning, tools=tools)
        self._url, self._api_key = url, api_key
        self._request = dict(request)
        if tools:
            self._request["tools"] = list(tools)

    def _check_vision(self) -> None:
        """Nothing to check: the service knows, and says so."""

    def _answer(self, messages: list[dict[str, object]]) -> None:
        display = Display(starts_thinking=False, show_reasoning=self._show_reasoning)
        reasons: list[str] = []
        # If interrupted, the answer ends where it is, and the conversation continues from there.
        try:
            with contextlib.suppress(KeyboardInterrupt), interruptible():
                asyncio.run(self._receive(messages, display, reasons))
        finally:
            display.finish()
            if display.answer or display.tool_calls or reasons:
                self._remember(messages, display)
        if "length" in reasons:
            write_cut(display, "--max-tokens or the end of the context")

    async def _receive(self, messages: list[dict[str, object]], display: Display, reasons: list[str]) -> None:
        """Shows an answer as it arrives; the reason why it ends goes into `reasons`."""
        body = {**self._request, "messages": _encode_messages(messages)}
        async with ServiceClient(self._url, api_key=self._api_key) as client:
            with contextlib.ExitStack() as waiting:
                waiting.enter_context(show_progress("waiting for the first token"))
                async with contextlib.aclosing(client.stream("chat/completions", body)) as chunks:
                    async for chunk in chunks:
                        delta, reason = _read_chunk(chunk)
                        if delta is not None:
                            waiting.close()
                            display.show([delta])
                        if reason is not None:
                            reasons.append(reason)


async def _find_model(url: str, key: str | None) -> str:
    async with ServiceClient(url, api_key=key) as client:
        return (await client.list_models())[0]


def _read_chunk(chunk: Mapping[str, object]) -> tuple[OutputDelta | None, str | None]:
    """What a chunk adds, and why the answer ends with it."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices:
        return None, None
    delta, reason = choices[0].get("delta") or {}, choices[0].get("finish_reason")
    calls = [
        ToolCallDelta(
            call.get("index", 0),
            call.get("id"),
            (call.get("function") or {}).get("name"),
            (call.get("function") or {}).get("arguments") or "",
        )
        for call in delta.get("tool_calls") or ()
    ]
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    content = delta.get("content") or ""
    found = OutputDelta(reasoning, content, tuple(calls)) if reasoning or content or calls else None
    return found, reason


def _encode_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Messages in the API's form: images as data URLs."""
    urls = [{"url": _read_data_url(pathlib.Path(str(path)))} for path in collect_images(messages)]
    encoded = replace_images(messages, ["" for _ in urls])
    left = iter(urls)
    for message in encoded:
        content = message.get("content")
        if isinstance(content, list):
            message["content"] = [
                {"type": "image_url", "image_url": next(left)} if item.get("type") == "image" else item
                for item in content
            ]
    return encoded


def _read_data_url(path: pathlib.Path) -> str:
    """An image file as services take it: unchanged, or re-encoded if it is large or of a rarer format."""
    data = path.read_bytes()
    try:
        data = read_image(data, formats=WEB_FORMATS, max_bytes=_MAX_FILE_BYTES)
        with Image.open(io.BytesIO(data)) as picture:
            kind = Image.MIME[str(picture.format)]
    except ValueError:
        buffer = io.BytesIO()
        open_image(path).save(buffer, "JPEG", quality=95)
        data, kind = buffer.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
