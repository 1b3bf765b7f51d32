"""/v1/completions: prompts in, their continuations out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence

from step3_jax.engine.request import Logprob, Prompt, StreamPiece
from step3_jax.server.admission import Ticket
from step3_jax.server.chat import FINGERPRINT
from step3_jax.server.choice import FINISH_REASONS
from step3_jax.server.echo import echo_request
from step3_jax.server.error import bad_request
from step3_jax.server.exchange import Job
from step3_jax.server.generation import Generation
from step3_jax.server.logprob import CompletionLogprobWriter, join_logprobs
from step3_jax.server.prompt import build_completion_prompts, make_requests
from step3_jax.server.protocol.completion import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from step3_jax.server.sampling import SamplingPlan, check_logprobs, plan_sampling
from step3_jax.server.service import Service
from step3_jax.text.detokenize import Detokenizer
from step3_jax.text.tokenizer import Tokenizer

# OpenAI's and vLLM's.
DEFAULT_MAX_TOKENS = 16


async def plan_completion(service: Service, request: CompletionRequest, ticket: Ticket) -> CompletionJob:
    """Interprets a request, makes its prompts and has the engine check them.

    Raises:
      ApiError: 400, 404 or 503.
    """
    name, llm = service.choose_name(request.model), service.llm
    num_top = check_logprobs("logprobs", request.logprobs)
    if request.suffix:
        raise bad_request("suffix is given; the model cannot fill in the middle: leave it out", "suffix")
    is_scored = bool(request.echo) and num_top is not None
    max_tokens = request.max_tokens
    if is_scored and max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS
    plan = await plan_sampling(
        service,
        request,
        # Scoring only the prompt is allowed.
        max_tokens=1 if is_scored and max_tokens == 0 else request.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=num_top,
    )
    if is_scored and plan.form is not None:
        raise bad_request(
            f"{plan.form.param} cannot be combined with echo and logprobs, which score the prompt: leave out one of them",
            plan.form.param,
        )
    given = request.prompt
    num_prompts = 1 if isinstance(given, str) or isinstance(given[0], int) else len(given)
    ticket.add_completions(num_prompts * plan.n - 1)
    prompts = await build_completion_prompts(
        service, given, add_bos=request.add_special_tokens is not False, cache_salt=request.cache_salt or ""
    )
    ticket.add_tokens(sum(len(prompt.token_ids) for prompt in prompts))
    requests = await make_requests(service, prompts, plan, is_stream=bool(request.stream), param="prompt")
    if is_scored:
        eos_ids = () if plan.params.ignore_eos else llm.eos_ids
        scored = [echo_request(one, max_tokens, eos_ids) for one in requests]
        generation = Generation(service, scored, plan, [len(one.prompt.token_ids) - 1 for one in requests])
        return CompletionJob(generation, request, plan, name, llm.tokenizer, [one.prompt for one in requests])
    return CompletionJob(Generation(service, requests, plan), request, plan, name, llm.tokenizer)


class _Choice:
    """One completion as it grows.

    Attributes:
      text: Pieces of its text, starting with the prompt or the prompt's first token if it is echoed.
      num_echoed: Tokens that belong to the prompt.
      has_begun: Whether a stream has had a chunk of it.
      writer: Writes log-probabilities.
      first: Log-probabilities of the first token, if it belongs to the prompt.
    """

    def __init__(self, text: str, num_echoed: int, writer: CompletionLogprobWriter | None) -> None:
        self.text = [text]
        self.num_echoed = num_echoed
        self.has_begun = False
        self.writer = writer
        self.first: CompletionLogprobs | None = None
        self.token_ids: list[int] = []
        self.records: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None


class CompletionJob(Job):
    """Completions in progress: those of the first prompt come first."""

    def __init__(
        self,
        generation: Generation,
        request: CompletionRequest,
        plan: SamplingPlan,
        name: str,
        tokenizer: Tokenizer | None,
        scored: Sequence[Prompt] = (),
    ) -> None:
        """Starts empty completions.

        Args:
          generation: The engine's part.
          request: The request.
          plan: How each prompt is answered.
          name: The model's name.
          tokenizer: None serves only token ids.
          scored: Prompts whose tokens, except the first, are generated with their log-probabilities.
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
        self._prompts = list(scored) or [one.prompt for one in generation.requests]
        self._choices = [
            self._make_choice(prompt, is_scored=bool(scored)) for prompt in self._prompts for _ in range(plan.n)
        ]
        options = request.stream_options
        self._has_usage = bool(options and options.include_usage)
        self._has_running_usage = self._has_usage and bool(options and options.continuous_usage_stats)

    def start(self) -> list[bytes]:
        """The prompts, if they are to be echoed."""
        if not self._request.echo:
            return []
        return [
            self._chunk(index, choice.text[0], {"logprobs": choice.first}) for index, choice in enumerate(self._choices)
        ]

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
        own: list[int] = []
        if self._request.return_token_ids:
            values["token_ids"] = own = choice.token_ids[
                max(choice.num_echoed, len(choice.token_ids) - len(piece.token_ids)) :
            ]
        if not own and values["logprobs"] is None and not piece.text and choice.finish_reason is None:
            return []
        return [self._chunk(index, piece.text, values)]

    def end(self) -> list[bytes]:
        """The usage, if requested."""
        return (
            [Completion.of(self._head, choices=[], usage=self.generation.usage()).to_event()] if self._has_usage else []
        )

    def answer(self) -> Completion:
        """The whole response."""
        choices = []
        for index, choice in enumerate(self._choices):
            logprobs = choice.writer.write(choice.token_ids, choice.records) if choice.writer is not None else None
            if logprobs is not None and choice.first is not None:
                logprobs = join_logprobs(choice.first, logprobs)
            values: dict[str, object] = {"logprobs": logprobs}
            if self._request.return_token_ids:
                prompt = self._prompts[index // self._n]
                values |= {
                    "token_ids": choice.token_ids[choice.num_echoed :],
                    "prompt_token_ids": list(prompt.token_ids),
                }
            choices.append(self._choice(index, "".join(choice.text), values))
        return Completion.of(self._head, choices=choices, usage=self.generation.usage())

    def _chunk(self, index: int, text: str, values: Mapping[str, object]) -> bytes:
        if self._request.return_token_ids and not self._choices[index].has_begun:
            values = {"token_ids": [], "prompt_token_ids": list(self._prompts[index // self._n].token_ids)} | dict(
                values
            )
        self._choices[index].has_begun = True
        choice = self._choice(index, text, values)
        more: dict[str, object] = {}
        if self._has_running_usage:
            more["usage"] = self.generation.usage()
        elif self._has_usage:
            more["usage"] = None
        return Completion.of(self._head, choices=[choice], **more).to_event()

    def _choice(self, index: int, text: str, values: Mapping[str, object]) -> CompletionChoice:
        state = self._choices[index]
        return CompletionChoice.of(
            index=index,
            text=text,
            finish_reason=state.finish_reason,
            stop_reason=state.stop_reason,
            **values,
        )

    def _make_choice(self, prompt: Prompt, *, is_scored: bool) -> _Choice:
        ids, tokenizer = prompt.token_ids, self._tokenizer
        num_top = self._request.logprobs
        if tokenizer is None:
            return _Choice("", 0, None)
        if is_scored:
            text = tokenizer.decode(ids[:1], skip_special_tokens=self._skips_special)
        elif self._request.echo:
            text = tokenizer.decode(ids) if prompt.text is None else prompt.text
        else:
            text = ""
        if num_top is None:
            return _Choice(text, 0, None)
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=self._skips_special)
        writer = CompletionLogprobWriter(
            num_top,
            detokenizer,
            0 if is_scored else len(text),
            as_ids=bool(self._request.return_tokens_as_token_ids),
        )
        choice = _Choice(text, len(ids) - 1 if is_scored else 0, writer)
        if is_scored:
            choice.first = writer.write_first(ids[0], tokenizer.decode(ids[:1]), text)
        return choice
