"""One of several processes that run a checkpoint together: FOLDER PARALLEL, the latter as JSON.

Its answer: the tokens of some prompts and how many each expert got, from rank 0 only, and the bytes of each tensor that
this process has read.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sys

import jax
import numpy as np

from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.distributed import initialise_distributed
from step3_jax.engine.llm import LLM
from step3_jax.layout.parallel import Parallel
from step3_jax.sampling.params import SamplingParams
from tests.process import give_answer

PROMPTS = [[5, 9, 14, 3], [8], [40, 41, 42, 43, 44, 45, 46], [11, 12, 13]]


def main() -> None:
    folder, setting = sys.argv[1], json.loads(sys.argv[2])
    initialise_distributed()
    jax.config.update("jax_default_matmul_precision", "float32")
    read: collections.Counter[str] = collections.Counter()
    read_part = Checkpoint.read

    def count(self: Checkpoint, name: str, index: object = ...) -> np.ndarray:
        part = read_part(self, name, index)
        read[name] += part.nbytes
        return part

    Checkpoint.read = count
    parallel = Parallel(**setting) if setting else None
    tokens, expert_tokens = None, None
    # In the other processes it does not return until rank 0 has made its calls.
    with contextlib.suppress(SystemExit):
        llm = LLM(folder, max_model_len=128, max_num_seqs=4, parallel=parallel)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert llm.stats.expert_tokens is not None
        expert_tokens = llm.stats.expert_tokens.tolist()
        llm.close()
    give_answer({"tokens": tokens, "experts": expert_tokens, "read": read, "rank": jax.process_index()})


if __name__ == "__main__":
    main()
