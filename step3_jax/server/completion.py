"""/v1/completions: prompts in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from step3_jax.engine.request import Logprob, StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.chat import FINGERPRINT
from step3_jax.server.choice import FINISH_REASONS
from step3_jax.server.constraint import check_constraint
from step3_jax.server.error import bad_request
from step3_jax.server.exchange import Job
from step3_jax.server.generation import Generation
from step3_jax.server.logprob import CompletionLogprobWriter
from step3_jax.server.prompt import build_completion_prompts, check_requests
from step3_jax.server.protocol.completion import Completion, CompletionChoice, CompletionRequest
from step3_jax.server.sampling import SamplingPlan, check_logprobs, plan_sampling
from step3_jax.server.service import Service
from step3_jax.text.detokenize import Detokenizer
from step3_jax.text.tokenizer import Tokenizer

# OpenAI's and vLLM's.
DEFAULT_MAX_TOKENS = 16


async def plan_completion(service: Service, request: CompletionRequest, ticket: Ticket) -> CompletionJob:
    """Understands a request, makes its prompts and has the engine check them.

    Raises:
      ApiError: 400, 404 or 503.
    """
    name, llm = service.choose_name(request.model), service.llm
    check_constraint(request)
    num_top = check_logprobs("logprobs", request.logprobs)
    if request.suffix:
        raise bad_request("suffix is given; the model cannot fill in: leave it out", "suffix")
    if request.echo and num_top is not None:
        raise bad_request("echo and logprobs are both given; log-probabilities of prompts are not offered", "logprobs")
    plan = plan_sampling(
        request,
        llm,
        service.config,
        max_tokens=request.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=num_top,
    )
    given = request.prompt
    num_prompts = 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)
    ticket.add_completions(num_prompts * plan.n - 1)
    prompts = await build_completion_prompts(service, given, request.cache_salt or "")
    ticket.add_tokens(sum(len(prompt.token_ids) for prompt in prompts))
    generation = Generation(service, prompts, plan, is_stream=bool(request.stream))
    await check_requests(service, generation.requests, "max_tokens", "prompt")
    return CompletionJob(generation, request, plan, name, llm.tokenizer)


class _Choice:
    """One completion as it grows."""

    def __init__(self, prompt_text: str, writer: CompletionLogprobWriter | None) -> None:
        self.text = [prompt_text]
        self.token_ids: list[int] = []
        self.writer = writer
        self.records: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None


class CompletionJob(Job):
    """Completions under way: those of the first prompt come first."""

    def __init__(
        self,
        generation: Generation,
        request: CompletionRequest,
        plan: SamplingPlan,
        name: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        """Starts empty completions.

        Args:
          generation: The engine's part.
          request: What was asked for.
          plan: How each prompt is answered.
          name: Of the model.
          tokenizer: None serves token ids alone.
        """
        super().__init__(generation, is_stream=bool(request.stream))
        self._request = request
        self._n = plan.n
        self._tokenizer = tokenizer
        self._skips_special = plan.params.skip_special_tokens
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "system_fingerprint": FINGERPRINT,
        }
        self._choices = []
        for part in generation.requests:
            text = self._prompt_text(part.prompt.text, part.prompt.token_ids) if request.echo else ""
            self._choices += [_Choice(text, self._make_writer(len(text))) for _ in range(plan.n)]
        options = request.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_running_usage = self._has_usage and bool(options and options.continuous_usage_stats)

    def start(self) -> list[bytes]:
        """The prompts, if they are to be echoed."""
        if not self._request.echo:
            return []
        return [self._chunk(index, choice.text[0], {"logprobs": None}) for index, choice in enumerate(self._choices)]

    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        """Takes new output of one of the completions."""
        index = place * self._n + piece.completion
        choice = self._choices[index]
        choice.text.append(piece.text)
        choice.token_ids += piece.token_ids
        choice.records += piece.logprobs or ()
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = FINISH_REASONS[piece.finish_reason], piece.stop_reason
        if not self.is_stream:
            return []
        values: dict[str, object] = {"logprobs": None}
        if choice.writer is not None and piece.token_ids:
            values["logprobs"] = choice.writer.write(piece.token_ids, piece.logprobs or ())
        if self._request.return_token_ids and piece.token_ids:
            values["token_ids"] = list(piece.token_ids)
        if len(values) == 1 and values["logprobs"] is None and not piece.text and choice.finish_reason is None:
            return []
        return [self._chunk(index, piece.text, values)]

    def end(self) -> list[bytes]:
        """The usage, if it was asked for."""
        return (
            [Completion.of(self._head, choices=[], usage=self.generation.usage()).to_json()] if self._has_usage else []
        )

    def answer(self) -> Completion:
        """The whole response."""
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = choice.writer.write(choice.token_ids, choice.records) if choice.writer is not None else None
            values: dict[str, object] = {"logprobs": logprobs}
            if self._request.return_token_ids:
                prompt = self.generation.requests[index // self._n].prompt
                values |= {"token_ids": choice.token_ids, "prompt_token_ids": list(prompt.token_ids)}
            choices.append(self._choice(index, "".join(choice.text), values))
        return Completion.of(self._head, choices=choices, usage=self.generation.usage())

    def _chunk(self, index: int, text: str, values: Mapping[str, object]) -> bytes:
        choice = self._choice(index, text, values)
        more: dict[str, object] = {}
        if self._has_running_usage:
            more["usage"] = self.generation.usage()
        elif self._has_usage:
            more["usage"] = None
        return Completion.of(self._head, choices=[choice], **more).to_json()

    def _choice(self, index: int, text: str, values: Mapping[str, object]) -> CompletionChoice:
        state = self._choices[index]
        return CompletionChoice.of(
            index=index,
            text=text,
            finish_reason=state.finish_reason,
            stop_reason=state.stop_reason,
            **values,
        )

    def _prompt_text(self, text: str | None, token_ids: tuple[int, ...]) -> str:
        if text is not None:
            return text
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    def _make_writer(self, offset: int) -> CompletionLogprobWriter | None:
        if self._request.logprobs is None or self._tokenizer is None:
            return None
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=self._skips_special)
        return CompletionLogprobWriter(self._request.logprobs, detokenizer, offset)
