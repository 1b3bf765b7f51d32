"""Makes the prompts of requests, in a thread, and the engine's requests from them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from step3_jax.engine.llm import LLM
from step3_jax.engine.request import ContextLengthError, Prompt, Request
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.sampling.structured import GrammarBusyError
from step3_jax.server.error import ApiError, bad_request, refused, unavailable
from step3_jax.server.message import check_variables, has_images, read_messages, read_tools
from step3_jax.server.protocol.chat import ChatMessage, Tool
from step3_jax.server.sampling import SamplingPlan
from step3_jax.server.service import Service
from step3_jax.text.message import Message
from step3_jax.text.output_parser import THINK_BEGIN, THINK_END
from step3_jax.text.tokenizer import Tokenizer

Made = TypeVar("Made")


async def build_chat_prompt(
    service: Service,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    template_kwargs: dict[str, object] | None = None,
    close_thinking: bool = False,
    cache_salt: str = "",
) -> Prompt:
    """A prompt of a conversation.

    Args:
      service: Has the model.
      messages: The conversation.
      tools: The tools that the model may call.
      add_generation_prompt: As in the request; None means yes, unless the last message is continued.
      continue_final_message: As in the request.
      template_kwargs: Further variables of the template.
      close_thinking: Whether the prompt closes the reasoning that it opens.
      cache_salt: See `Prompt`.

    Raises:
      ApiError: 400, for what the template or the image reader refuses.
    """
    if continue_final_message and add_generation_prompt:
        raise bad_request(
            "continue_final_message and add_generation_prompt are both true; set one of them to false",
            "continue_final_message",
        )
    llm, variables = service.llm, check_variables(template_kwargs)
    has_generation_prompt = add_generation_prompt is not False and not continue_final_message

    def build(read: Sequence[Message]) -> Prompt:
        prompt = llm.prompts.from_chat(
            read,
            tools=read_tools(tools),
            add_generation_prompt=has_generation_prompt,
            continue_final_message=bool(continue_final_message),
            template_kwargs=variables,
            allow_paths=False,
        )
        if close_thinking and is_thinking(llm, prompt):
            end = llm.get_tokenizer().control_id(THINK_END)
            prompt = dataclasses.replace(
                prompt, token_ids=(*prompt.token_ids, end), text=(prompt.text or "") + THINK_END
            )
        return dataclasses.replace(prompt, cache_salt=cache_salt)

    def start() -> Prompt | list[dict[str, object]]:
        read = read_messages(messages)
        return read if has_images(messages) else build(read)

    # Text takes one visit to a thread; images take several, as they may be fetched in between.
    made = await _call(service, start, "messages")
    if isinstance(made, Prompt):
        return made
    try:
        read = await service.media.read(made)
    except ValueError as error:
        raise _refuse(error, "messages") from None
    return await _call(service, lambda: build(read), "messages")


async def build_completion_prompts(
    service: Service,
    given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    add_bos: bool = True,
    cache_salt: str = "",
) -> list[Prompt]:
    """Prompts in the forms of /v1/completions: text, token ids, or a list of either.

    BOS is prepended to texts, unless it is there or `add_bos` is false.

    Raises:
      ApiError: 400, for anything that cannot be a prompt.
    """
    llm = service.llm
    is_single = isinstance(given, str) or isinstance(given[0], int)
    several = [given] if is_single else list(given)

    def build() -> list[Prompt]:
        # By its type a list of texts might hold ids; the request's model has ruled that out.
        made = [
            llm.prompts.from_text(one, add_bos=add_bos) if isinstance(one, str) else llm.prompts.from_ids(one)  # type: ignore[arg-type]
            for one in several
        ]
        return [dataclasses.replace(prompt, cache_salt=cache_salt) for prompt in made]

    return await _call(service, build, "prompt")


async def make_requests(
    service: Service, prompts: Sequence[Prompt], plan: SamplingPlan, *, is_stream: bool, param: str
) -> list[Request]:
    """Requests for the engine, checked by it; their structured outputs are compiled.

    Args:
      service: Has the engine.
      prompts: The prompts.
      plan: How each is answered.
      is_stream: Whether pieces are needed as they are generated.
      param: The field of the prompt.

    Raises:
      ApiError: 400, for requests that the engine cannot serve; 503, if too many grammars are being compiled.
    """
    llm = service.llm
    steps = llm.engine_config.stream_interval if is_stream else STEPS_PER_CALL

    def make() -> list[Request]:
        return [
            llm.new_request(prompt, plan.params, steps_per_call=steps, must_fit=plan.must_fit) for prompt in prompts
        ]

    start = time.monotonic()
    try:
        # Those whose grammar is known must not wait behind one that compiles for seconds.
        if llm.has_grammar(plan.params):
            return await service.call(make)
        made = await service.compile(make)
        service.metrics.observe_grammar(time.monotonic() - start)
        return made
    except GrammarBusyError as error:
        service.metrics.count_rejection("grammar_busy")
        raise unavailable("grammar_busy", str(error)) from None
    except ContextLengthError as error:
        text = str(error).replace("lower max_tokens", f"lower {plan.max_tokens_name}")
        raise bad_request(text, param, "context_length_exceeded") from None
    except ValueError as error:
        found = None if plan.form is None else plan.form.refuse(error)
        if found is None:
            found = refused(error, ["stop_token_ids", "logit_bias", "stop"])
            found.param = found.param or param
        raise found from None


def is_thinking(llm: LLM, prompt: Prompt) -> bool:
    """Whether a prompt ends inside the reasoning, by its control tokens: what users type does not count."""
    marks = thinking_ids(llm.tokenizer)
    if marks is None:
        return False
    return next((token == marks[0] for token in reversed(prompt.token_ids) if token in marks), False)


def thinking_ids(tokenizer: Tokenizer | None) -> tuple[int, int] | None:
    """Ids of the marks around the reasoning; None for a model without them."""
    names = {} if tokenizer is None else tokenizer.control_tokens
    if THINK_BEGIN not in names or THINK_END not in names:
        return None
    return names[THINK_BEGIN], names[THINK_END]


async def _call(service: Service, build: Callable[[], Made], param: str) -> Made:
    try:
        return await service.call(build)
    except ContextLengthError as error:
        raise bad_request(str(error), param, "context_length_exceeded") from None
    except ValueError as error:
        raise _refuse(error, param) from None


def _refuse(error: ValueError, param: str) -> ApiError:
    return bad_request(" ".join(str(error).split()), param, "invalid_prompt")
