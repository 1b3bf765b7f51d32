"""`step3 afd trace`: records when each side computes which micro-batch of which layer, and draws it."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from step3_jax.afd.executor import load_afd_executor, place_executor
from step3_jax.afd.host.executor import HostExecutor
from step3_jax.bench.model import bench_config, random_model
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.cli.choice import find_model
from step3_jax.cli.display import write_note
from step3_jax.cli.engine import read_engine
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.timeline.picture import write_picture
from step3_jax.timeline.trace import measure, read_trace, write_trace


def run(arguments: argparse.Namespace) -> int:
    """Makes a trace, or reads one, and draws it.

    Raises:
      ValueError: For impossible sizes, and for whatever the executor refuses.
    """
    for name in ("batch", "prompt_tokens", "max_tokens", "layers_shown"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; at least 1 is needed")
    if arguments.source is not None:
        events, title = read_trace(arguments.source), pathlib.Path(arguments.source).stem
    else:
        executor, llm = _load(arguments)
        _generate(llm, arguments)  # Compiles.
        executor.start_recording()
        _generate(llm, arguments)
        events = executor.stop_recording()
        title = (
            f"{executor.topology.instances.spec.upper()}, {arguments.batch} sequences, payload {executor.form.payload}"
        )
        if arguments.out:
            write_trace(arguments.out, events)
            write_note(f"trace: {arguments.out} (open it at ui.perfetto.dev)")
    write_picture(arguments.picture, events, title=title, num_ticks=arguments.layers_shown)
    found = measure(events)
    busy = ", ".join(f"{name} {time * 1e3:.2f}" for name, time in found.busy_s.items())
    print(f"{found.tick_s * 1e3:.2f} ms a layer and micro-batch (busy: {busy}), efficiency {found.efficiency:.2f}")
    write_note(f"picture: {arguments.picture}")
    return 0


def _load(arguments: argparse.Namespace) -> tuple[HostExecutor, LLM]:
    engine = read_engine(arguments)
    choice = engine.afd
    if choice is not None and choice.executor != "host":
        raise ValueError(
            "a trace needs executor host, whose single process sees all stages: start it without step3 launch"
        )
    enable_compile_cache()
    config = engine.config.replace(max_num_seqs=arguments.batch)
    if choice is None:
        raise ValueError("--afd off leaves nothing to trace: give xAyF")
    if arguments.preset is None:
        folder = find_model(arguments)
        executor = load_afd_executor(choice, folder, config)
        llm = LLM(folder, executor=executor, config=config)
    else:
        executor = place_executor(choice, random_model(bench_config(*PRESETS[arguments.preset])))
        llm = LLM.from_model(executor, config=config)
    assert isinstance(executor, HostExecutor)
    return executor, llm


def _generate(llm: LLM, arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, llm.config.text.vocab_size // 2, (arguments.batch, arguments.prompt_tokens))
    params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, ignore_eos=True)
    llm.generate([{"prompt_token_ids": row.tolist()} for row in prompts], params)
