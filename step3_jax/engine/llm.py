"""The Python API: `LLM(folder).generate(...)` and `.chat(...)`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pathlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, overload

import numpy as np
from tqdm import tqdm

from pallas_kernels.storage import PAGE_SIZE
from step3_jax import resources
from step3_jax.config import ModelConfig
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.core import EngineCore
from step3_jax.engine.drive.start import drive, is_shared, take_part
from step3_jax.engine.drive.worker import Worker
from step3_jax.engine.engine import Engine, Refused
from step3_jax.engine.executor import Executor
from step3_jax.engine.grammar import ConstraintMaker
from step3_jax.engine.loading import ExecutorInput, choose_length, end_tokens, load_executor, read_parallel
from step3_jax.engine.output import OutputProcessor
from step3_jax.engine.prompt import ImagesInput, PromptBuilder, PromptInput, split_prompts
from step3_jax.engine.request import Prompt, Request, RequestOutput, StreamPiece
from step3_jax.engine.runner import Runner
from step3_jax.engine.stats import EngineStats
from step3_jax.engine.warm_up import Progress
from step3_jax.gpu import claim_memory
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.layout.parallel import Parallel
from step3_jax.mesh import find_devices
from step3_jax.model.step3 import Step3
from step3_jax.sampling.params import SamplingParams, pick_defaults
from step3_jax.stored_file import read_json_object, require_folder
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_input import ImageSource
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.message import Message
from step3_jax.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)

Conversation = Sequence[Message]
ParamsInput = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model that answers prompts; several threads may use it at once.

    Attributes:
      config: The model's sizes.
      engine_config: The engine's settings.
      tokenizer: None if its folder has none.
      max_model_len: Most tokens of prompt and output together.
      eos_ids: The tokens that end an output.
      default_sampling_params: Used where none are given: vLLM's defaults, overridden by the model's
        `generation_config.json`.
      sampling_defaults: The values from that file, under the names of `SamplingParams`.
      prompts: Makes prompts for this model.
      stats: Counts and times so far.
    """

    def __init__(
        self,
        model: str | pathlib.Path,
        *,
        executor: ExecutorInput = None,
        parallel: Parallel | None = None,
        config: EngineConfig | None = None,
        **settings: object,
    ) -> None:
        """Loads a model's folder.

        Where several processes (see `distributed.initialise_distributed`) share a model, only rank 0 returns from here. The
        others run its calls, and end when it does.

        Args:
          model: Folder with `config.json`, the weights and, for text, `tokenizer.json`.
          executor: An executor that has the model already, or a function that loads one; its weights must be the
            folder's.
          parallel: How the model is spread over devices, instead of the settings for it.
          config: Settings to start from; the defaults if None.
          **settings: Fields of `EngineConfig`, such as `max_model_len=4096`.

        Raises:
          ValueError: If a file is missing or unusable, or a value is not allowed or unknown; if the model does not divide
            over the devices, or there are too few, before anything is loaded.
          RunLostError: If another process of the run fails.
          SystemExit: In a process above rank 0, when rank 0 has ended.
        """
        own = _configure(config, settings)
        claim_memory(share=own.gpu_memory_utilization)
        parallel = parallel or (read_parallel(own) if executor is None else None)
        if executor is not None and parallel is not None:
            raise ValueError("an executor has its devices already: give either executor or parallel")
        # Before the first use of a device: it fixes the number of CPU devices.
        find_devices(1 if parallel is None else parallel.num_devices)
        enable_compile_cache()
        folder = require_folder(resources.find_folder(model))
        load = functools.partial(load_executor, folder, own, parallel, executor)
        is_spread = parallel is not None or callable(executor) or is_shared(executor)
        channel = take_part(load) if is_spread else None
        with contextlib.ExitStack() as stack:
            if channel is not None:
                stack.callback(channel.close)
            # Small files are read first, so that a mistake is reported before the weights are loaded.
            choose_length(own, ModelConfig.load(folder), str(model))
            tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
            image_settings, generation = ImageSettings.load(folder), read_json_object(folder / "generation_config.json")
            self._set_up(
                drive(load(), channel),
                tokenizer,
                own,
                template=ChatTemplate.find(folder),
                settings=image_settings,
                generation_config=generation,
                source=str(model),
            )
            stack.pop_all()

    @classmethod
    def from_model(
        cls,
        model: Step3 | Executor | Worker,
        tokenizer: Tokenizer | None = None,
        *,
        template: ChatTemplate | None = None,
        image_settings: ImageSettings | None = None,
        generation_config: Mapping[str, object] | None = None,
        config: EngineConfig | None = None,
        **settings: object,
    ) -> LLM:
        """The same from parts in memory.

        Args:
          model: A module, or an executor that has its weights. If several processes share it, rank 0 drives it and the
            others do not return from here, see `LLM`.
          tokenizer: None serves only token ids.
          template: None serves no chats.
          image_settings: Settings of the image processor; None for the released ones.
          generation_config: The contents that `generation_config.json` would have.
          config: As for `LLM`.
          **settings: As for `LLM`.

        Raises:
          ValueError: If a value is not allowed or unknown.
        """
        executor = Runner(model) if isinstance(model, Step3) else model
        channel = take_part(lambda: executor) if is_shared(executor) else None
        llm = cls.__new__(cls)
        llm._set_up(
            drive(executor, channel),
            tokenizer,
            _configure(config, settings),
            template=template,
            settings=image_settings,
            generation_config=generation_config or {},
            source="this model",
        )
        return llm

    def _set_up(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        template: ChatTemplate | None,
        settings: ImageSettings | None,
        generation_config: Mapping[str, object],
        source: str,
    ) -> None:
        self.config = executor.config
        self._executor = executor
        self.engine_config = config
        self.tokenizer = tokenizer
        self.max_model_len = choose_length(config, self.config, source)
        self.default_sampling_params = SamplingParams.from_generation_config(generation_config)
        self.sampling_defaults = pick_defaults(generation_config)
        length = self.max_model_len
        self.prompts = PromptBuilder(
            self.config, tokenizer, template=template, settings=settings, max_model_len=length, source=source
        )
        self._random = np.random.default_rng(config.seed)
        self._random_lock = threading.Lock()
        self.eos_ids = eos_ids = end_tokens(generation_config.get("eos_token_id"), self.config.eos_token_ids, tokenizer)
        core = EngineCore(
            executor,
            config,
            max_model_len=self.max_model_len,
            eos_ids=eos_ids,
            image_sizes=self.prompts.image_sizes,
        )
        constraints = ConstraintMaker(tokenizer, self.config.text.vocab_size, eos_ids)
        self._engine = Engine(core, tokenizer, eos_ids, constraints)
        parallel = executor.role.parallel
        if parallel.attention == "tensor" and parallel.tp > 1:
            copies, num_tokens = parallel.tp, core.allocator.num_pages * PAGE_SIZE
            warnings.warn(
                f"tensor parallel attention keeps each sequence's KV cache on {copies} devices, as there is one key/value "
                f"head: the same memory holds {num_tokens} tokens instead of {copies * num_tokens}. "
                "attention_parallelism='data' keeps one copy",
                stacklevel=3,
            )

    def close(self) -> None:
        """Ends the run where several processes share the model: the others leave. Nothing can be generated afterwards.

        It happens by itself when the interpreter exits.
        """
        self._executor.close()

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          ValueError: If the model has none.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer.json: it takes and returns token ids")
        return self.tokenizer

    @property
    def stats(self) -> EngineStats:
        """Counts and times so far."""
        return self._engine.core.stats

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles every program a request can need, or reads it from the compile cache: none is compiled later.

        Without this, each is compiled when it is first needed, which is quicker for a few calls.

        Args:
          progress: Called with the numbers of ready programs and of all programs, before the first and after each.
        """
        self._engine.warm_up(progress)

    @property
    def core(self) -> EngineCore:
        """The engine core. `generate` and `chat` step it too, so any other code that steps it must be its only user."""
        return self._engine.core

    def new_processor(self) -> OutputProcessor:
        """Turns the core's outputs into text, for one thread."""
        return self._engine.new_processor()

    def new_request(
        self, prompt: Prompt, params: SamplingParams, *, steps_per_call: int = STEPS_PER_CALL, must_fit: bool = False
    ) -> Request:
        """A checked request for the core. Any thread may call it; compiling structured outputs may take seconds.

        Args:
          prompt: What is continued.
          params: How it is sampled; without a seed, the model draws its next one.
          steps_per_call: Most decode steps between two of its outputs.
          must_fit: See `Request`.

        Raises:
          ValueError: If it cannot be served; the message says what could be. GrammarBusyError if it can be later.
        """
        seed = self._draw_seed(params)
        request = self._engine.new_request(prompt, params, seed, steps_per_call, must_fit=must_fit)
        self._engine.check(request)
        return request

    def has_grammar(self, params: SamplingParams) -> bool:
        """Whether `new_request` has no grammar to compile for these; never waits."""
        return self._engine.has_grammar(params)

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: Literal[False] = False,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: Literal[True],
        use_tqdm: bool = True,
    ) -> Iterator[StreamPiece]: ...

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: bool = False,
        use_tqdm: bool = True,
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        """Continues prompts.

        Args:
          prompts: One prompt or a list of them. A prompt is text (control tokens in it count, and BOS is prepended), a
            list of token ids (taken unchanged), or {"prompt": text} or {"prompt_token_ids": ids}, either with
            {"multi_modal_data": {"image": image or list}} and {"cache_salt": text}.
          sampling_params: For all prompts, or one per prompt; `default_sampling_params` if None. `max_tokens` is an upper
            bound: an output also ends, with finish_reason "length", where the context does.
          images: One prompt's images, or for several prompts a list each (None for none). The prompt has one
            `<im_patch>` per image.
          stream: Whether to return an iterator of pieces as they are generated, instead of whole outputs.
          use_tqdm: Whether to show a progress bar if stderr is a terminal; streams have none.

        Returns:
          Outputs in the order of the prompts, or the iterator. If some of several prompts cannot be answered, the
          others are, and the outputs of the failed ones say why in `RequestOutput.error`.

        Raises:
          ValueError: If no prompt can be used, so that there would be no answer at all; for streams, if any cannot.
          RuntimeError: If the calls on the device failed for all prompts (for a stream, its only one).
        """
        pairs = split_prompts(prompts, images)
        build = [functools.partial(self.prompts.from_input, prompt, own_images) for prompt, own_images in pairs]
        return self._answer(build, sampling_params, stream, use_tqdm)

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsInput = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        stream: Literal[False] = False,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsInput = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        stream: Literal[True],
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Iterator[StreamPiece]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsInput = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        stream: bool = False,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        """Answers conversations with the model's chat template; control tokens typed in messages stay text.

        Args:
          messages: One conversation (a list of {"role": ..., "content": ...}) or a list of them. Images are items of
            a content list: {"type": "image", "image": source} or {"type": "image_url", "image_url": {"url": source}}.
          sampling_params: As in `generate`.
          tools: JSON schemas of functions the model may call.
          stream: As in `generate`.
          add_generation_prompt: Whether the prompt ends with the start of the assistant's turn.
          chat_template_kwargs: Further variables of the template.

        Returns:
          As `generate`.

        Raises:
          ValueError: As `generate`, and without a chat template.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise ValueError("messages must be a list of at least one {'role': ..., 'content': ...}")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        build = [
            functools.partial(
                self.prompts.from_chat,
                conversation,  # type: ignore[arg-type]
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self._answer(build, sampling_params, stream, use_tqdm)

    def _answer(
        self, build: Sequence[Callable[[], Prompt]], sampling_params: ParamsInput, stream: bool, use_tqdm: bool
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        params = self._spread(sampling_params, len(build))
        if not stream:
            return self._collect(self._make_requests(build, params), len(build), use_tqdm)
        requests: list[Request] = []
        for place, request in enumerate(self._make_requests(build, params, self.engine_config.stream_interval)):
            error = request.error if isinstance(request, Refused) else self._find_error(request)
            if error is not None:
                raise ValueError(_named(place, len(build), error))
            requests.append(request)  # type: ignore[arg-type]
        return self._stream(requests)

    def _make_requests(
        self, build: Sequence[Callable[[], Prompt]], params: Sequence[SamplingParams], steps: int = STEPS_PER_CALL
    ) -> Iterator[Request | Refused]:
        """Yields requests one by one, so that their prompts (and images) need not be in memory all at once."""
        for make, own in zip(build, params, strict=True):
            seed = self._draw_seed(own)
            prompt = None
            try:
                prompt = make()
                request = self._engine.new_request(prompt, own, seed, steps)
            except ValueError as error:
                yield Refused(prompt, str(error))
            else:
                yield request

    def _find_error(self, request: Request) -> str | None:
        try:
            self._engine.check(request)
        except ValueError as error:
            return str(error)
        return None

    def _collect(self, requests: Iterator[Request | Refused], count: int, use_tqdm: bool) -> list[RequestOutput]:
        """Whole outputs in the order of the prompts."""
        outputs: dict[int, RequestOutput] = {}
        refused: set[int] = set()
        with tqdm(total=count, desc="prompts", disable=None if use_tqdm and count > 1 else True) as bar:
            for event in self._engine.run(requests):
                if event.output is None:
                    continue
                outputs[event.output.index] = event.output
                if event.is_refused:
                    refused.add(event.output.index)
                bar.update()
        failed = [place for place, output in sorted(outputs.items()) if output.error is not None]
        for place in failed:
            text = _named(place, count, str(outputs[place].error))
            outputs[place] = dataclasses.replace(outputs[place], error=text)
        if len(failed) == count:
            kind = ValueError if failed[0] in refused else RuntimeError
            raise kind(str(outputs[failed[0]].error))
        for place in failed:
            _LOGGER.warning("%s", outputs[place].error)
        return [outputs[place] for place in range(count)]

    def _stream(self, requests: Sequence[Request]) -> Iterator[StreamPiece]:
        for event in self._engine.run(requests):
            piece = event.piece
            if piece is None:
                continue
            if piece.error is not None and len(requests) == 1:
                raise RuntimeError(piece.error)
            yield piece

    def _spread(self, sampling_params: ParamsInput, num_prompts: int) -> list[SamplingParams]:
        if sampling_params is None:
            return [self.default_sampling_params] * num_prompts
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        params = list(sampling_params) if isinstance(sampling_params, Sequence) else []
        if not params or not all(isinstance(one, SamplingParams) for one in params):
            raise ValueError(f"sampling_params is {sampling_params!r}; SamplingParams(...) or a list of them is needed")
        if len(params) != num_prompts:
            raise ValueError(f"{len(params)} sampling_params are given for {num_prompts} prompt(s); one for each")
        return params

    def _draw_seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        with self._random_lock:
            return int(self._random.integers(2**63))


def _configure(config: EngineConfig | None, settings: Mapping[str, object]) -> EngineConfig:
    base = {} if config is None else config.to_dict()
    return EngineConfig.of(base | dict(settings))


def _named(place: int, count: int, error: str) -> str:
    """An error of one prompt; it names the prompt if there are several."""
    return error if count == 1 else f"prompt {place} of {count}: {error}"
