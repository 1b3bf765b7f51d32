"""The Python API: `LLM(folder).generate(...)` and `.chat(...)`."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pages import PAGE_SIZE
from step3_jax import resources
from step3_jax.checkpoint.load import load_model
from step3_jax.config import DTYPES, ModelConfig
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.engine import Engine
from step3_jax.engine.executor import Executor
from step3_jax.engine.prompt import ImagesInput, PromptBuilder, PromptInput, split_prompts
from step3_jax.engine.request import Prompt, Request, RequestOutput, StreamPiece
from step3_jax.engine.runner import Runner
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.stats import EngineStats
from step3_jax.mesh import find_devices, make_layout
from step3_jax.model.step3 import Step3
from step3_jax.sampling.params import SamplingParams
from step3_jax.sharding import Parallel, fit_parallel
from step3_jax.text.chat_template import ChatTemplate
from step3_jax.text.image_input import ImageSource
from step3_jax.text.image_settings import ImageSettings
from step3_jax.text.json_file import read_json_object
from step3_jax.text.message import Message
from step3_jax.text.tokenizer import Tokenizer

Conversation = Sequence[Message]
ParamsInput = SamplingParams | Sequence[SamplingParams] | None

# Where a chat template may stand in a model's folder; see `ChatTemplate.load`.
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


class LLM:
    """A model that answers prompts.

    Attributes:
      config: The model's sizes.
      tokenizer: None if its folder has none.
      max_model_len: Most tokens of prompt and output together.
      default_sampling_params: What is used where none are given: vLLM's defaults, with those of the model's
        `generation_config.json` instead where it has them.
      prompts: Makes prompts for this model.
      stats: Counts and times so far.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int | None = 0,
        max_batch_size: int = 32,
        max_num_batched_tokens: int = 4096,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
        stream_interval: int = 4,
        executor: Executor | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        """Loads a model's folder.

        Args:
          path: Folder with `config.json`, the weights and, for text, `tokenizer.json`.
          dtype: "float32", "bfloat16" or "auto": the configuration's, but float32 on a CPU. A CPU computes in float32 in
            any case (see `Runner`).
          max_model_len: Most tokens of prompt and output together; the model's own limit if None.
          seed: Of requests that have none of their own. The same calls then give the same outputs; None gives others at
            every start.
          max_batch_size: Most sequences at once, rounded down to a power of two; others wait for their places.
          max_num_batched_tokens: Most prompt tokens read at once; longer prompts are read in chunks.
          kv_cache_dtype: "float32", "bfloat16", "fp8", "int4", or "auto": that of the activations. "fp8" and "int4" keep
            scales beside the values; "int4" needs a head size that is a multiple of 64.
          kv_cache_memory_bytes: Memory of the cache. None takes what the device has left (256 MiB where it does not say,
            or what one sequence of `max_model_len` needs), at most room for `max_batch_size` sequences of that length.
          stream_interval: Tokens between two pieces of a streamed completion.
          executor: Runs the model instead of loading it here; its weights must be those of the folder.
          parallel: How the model is spread over several devices; one device if None. Of several processes (see
            `mesh.initialise_distributed`) each makes the same calls.

        Raises:
          ValueError: If a file is missing or unusable, or a value is not allowed; if `parallel` does not divide the
            model, or there are too few devices, before anything is loaded.
        """
        if executor is not None and parallel is not None:
            raise ValueError("an executor has its devices already: give either executor or parallel")
        # Before the first use of a device: afterwards the number of CPU devices is fixed.
        find_devices(1 if parallel is None else parallel.num_devices)
        enable_compile_cache()
        folder = resources.find_folder(path)
        if dtype not in ("auto", *DTYPES):
            raise ValueError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
        if executor is None:
            wanted = None if dtype == "auto" else jnp.dtype(dtype)
            if dtype == "auto" and jax.default_backend() == "cpu":
                wanted = jnp.dtype("float32")
            executor = (
                Runner(load_model(folder, wanted)) if parallel is None else _load_sharded(folder, wanted, parallel)
            )
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
        has_template = any((folder / name).exists() for name in _TEMPLATE_FILES) or (
            read_json_object(folder / "tokenizer_config.json").get("chat_template") is not None
        )
        self._set_up(
            executor,
            tokenizer,
            template=ChatTemplate.load(folder) if has_template else None,
            settings=ImageSettings.load(folder),
            generation_config=read_json_object(folder / "generation_config.json"),
            max_model_len=max_model_len,
            seed=seed,
            max_batch_size=max_batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            stream_interval=stream_interval,
            source=str(path),
        )

    @classmethod
    def from_model(
        cls,
        model: Step3 | Executor,
        tokenizer: Tokenizer | None = None,
        *,
        template: ChatTemplate | None = None,
        settings: ImageSettings | None = None,
        generation_config: Mapping[str, object] | None = None,
        max_model_len: int | None = None,
        seed: int | None = 0,
        max_batch_size: int = 32,
        max_num_batched_tokens: int = 4096,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
        stream_interval: int = 4,
    ) -> LLM:
        """The same from parts in memory.

        Args:
          model: A module, or an executor that has its weights.
          tokenizer: None serves token ids alone.
          template: None serves no chats.
          settings: Of the image processor; None for the released ones.
          generation_config: What `generation_config.json` would hold.
          max_model_len: As for `LLM`, and so are the others.
          seed: See above.
          max_batch_size: See above.
          max_num_batched_tokens: See above.
          kv_cache_dtype: See above.
          kv_cache_memory_bytes: See above.
          stream_interval: See above.

        Raises:
          ValueError: If a value is not allowed.
        """
        llm = cls.__new__(cls)
        llm._set_up(
            Runner(model) if isinstance(model, Step3) else model,
            tokenizer,
            template=template,
            settings=settings,
            generation_config=generation_config or {},
            max_model_len=max_model_len,
            seed=seed,
            max_batch_size=max_batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            stream_interval=stream_interval,
            source="this model",
        )
        return llm

    def _set_up(
        self,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        template: ChatTemplate | None,
        settings: ImageSettings | None,
        generation_config: Mapping[str, object],
        max_model_len: int | None,
        seed: int | None,
        max_batch_size: int,
        max_num_batched_tokens: int,
        kv_cache_dtype: str,
        kv_cache_memory_bytes: int | None,
        stream_interval: int,
        source: str,
    ) -> None:
        self.config = executor.config
        limit = self.config.text.max_position_embeddings
        if max_model_len is not None and max_model_len > limit:
            raise ValueError(f"max_model_len is {max_model_len}; {source} has positions for at most {limit} tokens")
        if not isinstance(stream_interval, int) or stream_interval < 1:
            raise ValueError(f"stream_interval is {stream_interval!r}; a whole number of at least 1 is needed")
        self.tokenizer = tokenizer
        self.max_model_len = limit if max_model_len is None else max_model_len
        self.default_sampling_params = SamplingParams.from_generation_config(generation_config)
        self.prompts = PromptBuilder(self.config, tokenizer, template=template, settings=settings, source=source)
        self._stream_interval = stream_interval
        self._random = np.random.default_rng(seed)
        self._engine = Engine(
            executor,
            tokenizer,
            max_model_len=self.max_model_len,
            eos_ids=_end_tokens(generation_config.get("eos_token_id"), self.config.eos_token_ids),
            max_batch_size=max_batch_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
        )
        if isinstance(executor, ShardedRunner) and executor.layout.size("heads") > 1:
            copies, num_tokens = executor.layout.size("heads"), self._engine.allocator.num_pages * PAGE_SIZE
            warnings.warn(
                f"tensor parallel attention keeps each sequence's KV cache on {copies} devices, as there is one key/value "
                f"head: the same memory holds {num_tokens} tokens instead of {copies * num_tokens}. attention='data' "
                "keeps one copy",
                stacklevel=3,
            )

    @property
    def stats(self) -> EngineStats:
        """Counts and times so far."""
        return self._engine.stats

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: Literal[True],
    ) -> Iterator[StreamPiece]: ...

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: ParamsInput = None,
        *,
        images: ImagesInput | ImageSource | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        """Continues prompts.

        Args:
          prompts: One prompt or a list of them. A prompt is text (control tokens in it count, and the begin token is
            put in front), a list of token ids (taken as they are), or {"prompt": text} or {"prompt_token_ids": ids},
            either with {"multi_modal_data": {"image": picture or list}}.
          sampling_params: For all prompts, or one for each; `default_sampling_params` if None.
          images: For one prompt its pictures; for several a list for each (None for none). The prompt has one
            `<im_patch>` for each picture.
          stream: Whether to return an iterator of pieces as they are made, instead of whole outputs.

        Returns:
          Outputs in the order of the prompts, or the iterator.

        Raises:
          ValueError: If a prompt, a picture or a parameter cannot be used, before anything is computed.
        """
        pairs = split_prompts(prompts, images)
        return self._answer(
            [self.prompts.from_input(prompt, own_images) for prompt, own_images in pairs], sampling_params, stream
        )

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsInput = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        stream: Literal[False] = False,
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
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        """Answers conversations by the model's chat template; control tokens typed in messages stay text.

        Args:
          messages: One conversation (a list of {"role": ..., "content": ...}) or a list of them. Pictures are items of
            a content list: {"type": "image", "image": source} or {"type": "image_url", "image_url": {"url": source}}.
          sampling_params: As in `generate`.
          tools: JSON schemas of functions the model may call.
          stream: As in `generate`.
          add_generation_prompt: Whether the prompt ends with the begin of the assistant's turn.
          chat_template_kwargs: Further variables of the template.

        Returns:
          As `generate`.

        Raises:
          ValueError: As `generate`, and without a chat template.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise ValueError("messages must be a list of at least one {'role': ..., 'content': ...}")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        built = [
            self.prompts.from_chat(
                conversation,  # type: ignore[arg-type]
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self._answer(built, sampling_params, stream)

    def _answer(
        self, prompts: Sequence[Prompt], sampling_params: ParamsInput, stream: bool
    ) -> list[RequestOutput] | Iterator[StreamPiece]:
        params = self._spread(sampling_params, len(prompts))
        requests = [
            Request(index, prompt, own, self._seed(own))
            for index, (prompt, own) in enumerate(zip(prompts, params, strict=True))
        ]
        for request in requests:
            self._engine.check(request)
        if stream:
            return self._engine.stream(requests, self._stream_interval)
        return self._engine.generate(requests)

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

    def _seed(self, params: SamplingParams) -> int:
        return params.seed if params.seed is not None else int(self._random.integers(2**63))


def _load_sharded(folder: pathlib.Path, dtype: jnp.dtype | None, parallel: Parallel) -> ShardedRunner:
    """A model's folder, each part read to its device."""
    config = ModelConfig.load(folder)
    # As `load_model` decides it: on a CPU FP8 weights are dequantised.
    stays_fp8 = config.quantization is not None and jax.default_backend() != "cpu"
    block = config.quantization.weight_block_size if stays_fp8 and config.quantization is not None else None
    layout = make_layout(fit_parallel(parallel, config.text, fp8_block=block))
    return ShardedRunner(load_model(folder, dtype, layout=layout), layout)


def _end_tokens(stored: object, default: tuple[int, ...]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, a number or a list; the configuration's if it has none."""
    if stored is None:
        return default
    ids = stored if isinstance(stored, list | tuple) else [stored]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"generation_config.json: eos_token_id is {stored!r}; token ids are needed")
    return tuple(ids)
