"""/v1/chat/completions: a conversation in, the assistant's next message out."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence

from step3_jax import __version__
from step3_jax.engine.request import Logprob, StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.choice import ChoiceForm, ChoiceState
from step3_jax.server.error import bad_request
from step3_jax.server.exchange import Job
from step3_jax.server.generation import Generation
from step3_jax.server.logprob import chat_logprobs
from step3_jax.server.message import read_tools
from step3_jax.server.prompt import build_chat_prompt, is_thinking, make_requests, thinking_ids
from step3_jax.server.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    MadeFunction,
    MadeToolCall,
)
from step3_jax.server.sampling import check_logprobs, plan_sampling
from step3_jax.server.service import Service
from step3_jax.text.tokenizer import Tokenizer

FINGERPRINT = f"step3-jax-{__version__}"


@dataclasses.dataclass(frozen=True)
class PreparedChat:
    """A chat request that the engine has checked.

    Attributes:
      generation: The engine's part.
      form: How the text of answers is split.
      name: The model's name.
      n: Number of answers.
    """

    generation: Generation
    form: ChoiceForm
    name: str
    n: int


async def plan_chat(service: Service, request: ChatCompletionRequest, ticket: Ticket) -> ChatJob:
    """Interprets a request, makes its prompt and has the engine check it.

    Raises:
      ApiError: 400, 404 or 503.
    """
    is_newer = request.max_completion_tokens is not None
    name = "max_completion_tokens" if is_newer else "max_tokens"
    prepared = await prepare_chat(service, request, ticket, prompt_name="messages", max_tokens_name=name)
    return ChatJob(prepared, request, service.llm.get_tokenizer())


async def prepare_chat(
    service: Service, request: ChatCompletionRequest, ticket: Ticket, *, prompt_name: str, max_tokens_name: str
) -> PreparedChat:
    """Makes the prompt of a chat and has the engine check it.

    Args:
      service: Has the engine.
      request: The request.
      ticket: Counts its completions and tokens.
      prompt_name: The client's name for `messages`.
      max_tokens_name: The client's name for `max_tokens`.

    Raises:
      ApiError: 400, 404 or 503.
    """
    name, llm = service.choose_name(request.model), service.llm
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs is given without logprobs; set logprobs to true", "top_logprobs")
    num_top = (check_logprobs("top_logprobs", request.top_logprobs) or 0) if request.logprobs else None
    newer = request.max_completion_tokens
    plan = await plan_sampling(
        service,
        request,
        max_tokens=request.max_tokens if newer is None else newer,
        max_tokens_name=max_tokens_name,
        default_max_tokens=None,
        logprobs=num_top,
    )
    ticket.add_completions(plan.n - 1)
    prompt = await build_chat_prompt(
        service,
        request.messages,
        request.tools,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=request.chat_template_kwargs,
        close_thinking=request.reasoning_effort == "none",
        cache_salt=request.cache_salt or "",
    )
    ticket.add_tokens(len(prompt.token_ids))
    requests = await make_requests(service, [prompt], plan, is_stream=bool(request.stream), param=prompt_name)
    tools = None if request.tool_choice == "none" else read_tools(request.tools)
    if tools:
        service.metrics.count_tool_parse()
    is_parsed = service.config.reasoning_parser != "none"
    form = ChoiceForm(
        tools,
        starts_thinking=is_parsed and is_thinking(llm, prompt),
        thinking_ids=thinking_ids(llm.tokenizer) if is_parsed else None,
        is_parsed=is_parsed,
        has_reasoning=request.include_reasoning is not False,
    )
    return PreparedChat(Generation(service, requests, plan), form, name, plan.n)


class ChatJob(Job):
    """A chat in progress."""

    def __init__(self, prepared: PreparedChat, request: ChatCompletionRequest, tokenizer: Tokenizer) -> None:
        """Starts empty answers.

        Args:
          prepared: The chat.
          request: The request.
          tokenizer: For log-probabilities.
        """
        super().__init__(prepared.generation, is_stream=bool(request.stream))
        self._request = request
        self._form = prepared.form
        self._tokenizer = tokenizer
        self._choices = [ChoiceState(prepared.form) for _ in range(prepared.n)]
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": prepared.name,
            "system_fingerprint": FINGERPRINT,
        }
        options = request.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_running_usage = self._has_usage and bool(options and options.continuous_usage_stats)

    def start(self) -> list[bytes]:
        """The role of each answer, so that the client sees a first event immediately."""
        first: dict[str, object] = {}
        if self._request.return_token_ids:
            first["prompt_token_ids"] = list(self.generation.requests[0].prompt.token_ids)
        chunks = []
        for index in range(len(self._choices)):
            chunks.append(self._chunk(index, Delta(role="assistant", content=""), head=first))
            first = {}
        return chunks

    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        """Takes new output of one of the answers."""
        choice = self._choices[piece.completion]
        deltas = choice.add(piece)
        self.generation.num_reasoning_tokens = sum(one.num_reasoning_tokens for one in self._choices)
        if not self.is_stream:
            return []
        # Token ids and log-probabilities come with the first chunk, even if some of the text is held back.
        values = self._token_values(piece.token_ids, piece.logprobs)
        if values and not deltas:
            deltas = [Delta()]
        chunks = []
        for delta in deltas:
            chunks.append(self._chunk(piece.completion, delta, values))
            values = {}
        if choice.finish_reason is not None:
            last = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            chunks.append(self._chunk(piece.completion, Delta(), last))
        return chunks

    def end(self) -> list[bytes]:
        """The usage, if requested."""
        if not self._has_usage:
            return []
        chunk = ChatCompletionChunk.of(
            self._head, object="chat.completion.chunk", choices=[], usage=self.generation.usage()
        )
        return [chunk.to_event()]

    def answer(self) -> ChatCompletion:
        """The whole response."""
        values: dict[str, object] = {}
        if self._request.return_token_ids:
            values["prompt_token_ids"] = list(self.generation.requests[0].prompt.token_ids)
        return ChatCompletion.of(
            self._head,
            object="chat.completion",
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(self._choices)],
            usage=self.generation.usage(),
            **values,
        )

    def _chunk(
        self,
        index: int,
        delta: Delta,
        values: Mapping[str, object] | None = None,
        head: Mapping[str, object] | None = None,
    ) -> bytes:
        more = dict(head or {})
        choice = ChunkChoice.of({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, values or {})
        if self._has_running_usage:
            more["usage"] = self.generation.usage()
        elif self._has_usage:
            more["usage"] = None
        chunk = ChatCompletionChunk.of(self._head, object="chat.completion.chunk", choices=[choice], **more)
        return chunk.to_event()

    def _token_values(
        self, token_ids: Sequence[int], records: Sequence[Mapping[int, Logprob]] | None
    ) -> dict[str, object]:
        values: dict[str, object] = {}
        if self._request.logprobs and token_ids:
            values["logprobs"] = self._logprobs(token_ids, records or ())
        if self._request.return_token_ids and token_ids:
            values["token_ids"] = list(token_ids)
        return values

    def _whole_choice(self, index: int, choice: ChoiceState) -> ChatChoice:
        message: dict[str, object] = {"role": "assistant", "content": choice.content, "refusal": None}
        if self._form.is_parsed and self._form.has_reasoning:
            message |= {"reasoning": choice.reasoning, "reasoning_content": choice.reasoning}
        if choice.tool_calls:
            message["tool_calls"] = [
                MadeToolCall(
                    id=call.id, type="function", function=MadeFunction(name=call.name, arguments=call.arguments)
                )
                for call in choice.tool_calls
            ]
        values: dict[str, object] = {"logprobs": None} | self._token_values(choice.token_ids, choice.logprobs)
        return ChatChoice.of(
            index=index,
            message=message,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            **values,
        )

    def _logprobs(self, token_ids: Sequence[int], records: Sequence[Mapping[int, Logprob]]) -> ChoiceLogprobs:
        return chat_logprobs(
            token_ids,
            records,
            self._request.top_logprobs or 0,
            self._tokenizer,
            as_ids=bool(self._request.return_tokens_as_token_ids),
        )
