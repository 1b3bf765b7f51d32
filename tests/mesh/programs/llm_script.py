"""A user's script: the same in every rank, of which only rank 0 reaches its end."""

from __future__ import annotations

import json
import sys

from step3_jax import LLM, SamplingParams
from step3_jax.distributed import initialise_distributed
from step3_jax.resources import find


def main() -> None:
    initialise_distributed()
    folder = find("models/step3-tiny")
    llm = LLM(folder, tensor_parallel_size=2, max_model_len=256, max_num_seqs=2, max_num_batched_tokens=64)
    llm.warm_up()
    warm = llm.stats.num_compilations
    content = [
        {"type": "image", "image": str(folder / "examples" / "number-6267.png")},
        {"type": "text", "text": "What number is this?"},
    ]
    [output] = llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=24))
    print(json.dumps({"text": output.outputs[0].text, "warm": warm, "compiled": llm.stats.num_compilations}))


if __name__ == "__main__":
    sys.exit(main())
