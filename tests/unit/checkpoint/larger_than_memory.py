"""Answers with mapped weights and says what it read: run by `test_larger_than_memory.py`, in a control group or without.

python larger_than_memory.py FOLDER [GROUP]
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

if len(sys.argv) > 2:
    # Before anything else is taken.
    (pathlib.Path(sys.argv[2]) / "cgroup.procs").write_text(str(os.getpid()))

import jax
from flax import nnx

from step3_jax.checkpoint.load import load_model
from step3_jax.cpu_kernels.watch import count_reads
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams

NUM_TOKENS = 24


def read_bytes() -> int:
    """What this process made the disk read."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def major_faults() -> int:
    return int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])


def main() -> None:
    begin = time.perf_counter()
    model = load_model(sys.argv[1], "float32", load_format="mmap")
    load_s = time.perf_counter() - begin
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    llm = LLM.from_model(model, max_num_seqs=1, max_model_len=128, max_num_batched_tokens=64, seed=0)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(2, 10))}
    llm.generate(prompt, params)
    before, read, faults, begin = count_reads(), read_bytes(), major_faults(), time.perf_counter()
    output = llm.generate(prompt, params)[0]
    counts = count_reads().since(before)
    found = {
        "tokens": list(output.outputs[0].token_ids),
        "load_s": load_s,
        "held_bytes": held,
        "ms_a_token": (time.perf_counter() - begin) / NUM_TOKENS * 1000,
        "read_mb_a_token": (read_bytes() - read) / NUM_TOKENS / 1e6,
        "major_faults_a_token": (major_faults() - faults) / NUM_TOKENS,
        "experts_mb_a_token": counts.used_bytes / NUM_TOKENS / 1e6,
        "hit_rate": counts.hit_rate,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
