"""`step3 bench`: speed on this machine, as ratios measured in one run."""

from __future__ import annotations

import argparse
import sys

from step3_jax.bench.decode import measure_decode
from step3_jax.bench.model import bench_config
from step3_jax.bench.report import format_report, write_sections
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.cli.bench_engine import run_engine_bench
from step3_jax.cli.display import write_note
from step3_jax.cli.engine import read_engine
from step3_jax.cli.process import interruptible


def run(arguments: argparse.Namespace) -> int:
    """Measures, and prints tables.

    Raises:
      ValueError: For impossible sizes, a peer that does not start, or logits that differ from the peer's.
    """
    if arguments.what != "decode":
        return run_engine_bench(arguments, *PRESETS[arguments.preset])
    for name in ("steps", "rounds", "prompt", "prefill"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; at least 1 is needed")
    hidden_size, num_layers = PRESETS[arguments.preset]
    config = bench_config(arguments.hidden or hidden_size, num_layers if arguments.layers is None else arguments.layers)
    longest = max(arguments.prompt + arguments.steps * (arguments.rounds + 1) + 1, arguments.prefill + 1)
    if longest > config.text.max_position_embeddings:
        raise ValueError(
            f"{longest} tokens are needed, at most {config.text.max_position_embeddings} are allowed: lower --steps, "
            "--rounds, --prompt or --prefill"
        )
    devices = read_engine(arguments)
    with interruptible():
        found = measure_decode(
            config,
            dtypes=arguments.dtype,
            quantizations=arguments.quantization,
            batches=arguments.batch,
            steps=arguments.steps,
            rounds=arguments.rounds,
            prompt_length=arguments.prompt,
            prefill_length=arguments.prefill,
            torch_python=arguments.torch_python or (sys.executable if arguments.torch else None),
            parallel=devices.parallel,
            afd=devices.afd,
            tell=write_note,
        )
    print(format_report(found), flush=True)
    if arguments.json:
        write_sections(arguments.json, found)
    if found["is_partial"]:
        raise KeyboardInterrupt("interrupted; what had been measured until then is above")
    return 0
