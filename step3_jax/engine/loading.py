"""What `LLM` determines before it has an engine: how the model is spread, its context length, its end tokens."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax.numpy as jnp

from step3_jax.checkpoint.load import load_model
from step3_jax.config import ModelConfig
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.drive.worker import Worker
from step3_jax.engine.executor import Executor
from step3_jax.engine.runner import Runner
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.layout.role import fp8_block
from step3_jax.mesh import find_devices, make_layout
from step3_jax.model.cpu import choose_dtype
from step3_jax.text.tokenizer import Tokenizer

# An executor, or a function that loads one. With several processes, ranks above 0 may have another kind of worker.
ExecutorInput = Executor | Worker | Callable[[], Executor | Worker] | None


def read_parallel(config: EngineConfig) -> Parallel | None:
    """How the settings spread a model over devices; None for one device."""
    if not config.is_parallel:
        return None
    dp, tp, ep = config.data_parallel_size, config.tensor_parallel_size, config.expert_parallel_size
    if ep is not None and dp * tp == 1:
        # As in vLLM: experts are spread over all the devices, with no other setting for them.
        dp = ep
    forms = config.attention_parallelism, config.expert_exchange, config.mm_encoder_tp_mode
    return Parallel(dp, tp, ep, *forms)  # type: ignore[arg-type]


def choose_length(config: EngineConfig, sizes: ModelConfig, source: str) -> int:
    """Most tokens of prompt and output together.

    Raises:
      ValueError: If it is more than the model has positions for.
    """
    limit = sizes.text.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len is {config.max_model_len}; {source} has positions for at most {limit} tokens")
    return config.max_model_len or limit


def load_executor(
    folder: pathlib.Path, config: EngineConfig, parallel: Parallel | None, executor: ExecutorInput
) -> Executor | Worker:
    """The given executor, or one for the model in `folder`."""
    if executor is not None:
        return executor() if callable(executor) else executor
    is_on_cpu = find_devices(1 if parallel is None else parallel.num_devices)[0].platform == "cpu"
    wanted = None if config.dtype == "auto" else jnp.dtype(config.dtype)
    form, load_format = config.quantization, config.load_format
    if is_on_cpu:
        wanted = choose_dtype(wanted, form, is_apart=parallel is not None)
    if parallel is None:
        return Runner(load_model(folder, wanted, quantization=form, load_format=load_format))
    sizes = ModelConfig.load(folder)
    # As `load_model` decides it: sharded over emulated devices of a CPU FP8 weights are dequantised unless asked for.
    is_widened = form == "none" or (form == "auto" and is_on_cpu)
    layout = make_layout(fit_parallel(parallel, sizes.text, fp8_block=None if is_widened else fp8_block(sizes)))
    return ShardedRunner(load_model(folder, wanted, quantization=form, load_format=load_format, layout=layout), layout)


def end_tokens(stored: object, configured: tuple[int, ...], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, a number or a list; else the configuration's, else the tokenizer's."""
    if stored is None:
        return configured or (tokenizer.eos_ids if tokenizer is not None else ())
    ids = stored if isinstance(stored, list | tuple) else [stored]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"generation_config.json: eos_token_id is {stored!r}; token ids are needed")
    return tuple(ids)
