"""A peer to compare the service with: llama.cpp's server on a random-weight model with as many active parameters.

    python -m venv .venv-peer && .venv-peer/bin/pip install xllamacpp gguf
    .venv-peer/bin/python tools/llama_cpp_server.py --type f32 --port 8081

Needs only xllamacpp, gguf and numpy, so it runs without jax. llama.cpp has no MFA: the model is its "llama"
form with one key and value head and 16 experts, four of them chosen instead of three plus a shared one, with the widths of
the 100M model of `step3 bench`. Its vocabulary is w0, w1 and so on; prompts are token ids.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import gguf
import numpy as np
import xllamacpp

# In this script's folder: it runs where the project is not installed.
from llama_cpp_sizes import CHOSEN, CONTEXT, EXPERT_WIDTH, EXPERTS, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCABULARY

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write_model(path: pathlib.Path, kind: str) -> None:
    """Writes the model as a GGUF file; matrices in `kind`, the others in float32."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(EXPERT_WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"w{number}" for number in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["w 0"])  # It requires some, though all prompts are ids.
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
        if kind == "f32" or "gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, TYPES[kind]), raw_dtype=TYPES[kind])

    add("token_embd.weight", VOCABULARY, HIDDEN)
    add("output.weight", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{norm}.weight", np.ones(HIDDEN, np.float32))
        add(f"{block}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"{block}.attn_k.weight", HEAD_DIM, HIDDEN)
        add(f"{block}.attn_v.weight", HEAD_DIM, HIDDEN)
        add(f"{block}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"{block}.ffn_gate_inp.weight", EXPERTS, HIDDEN)
        add(f"{block}.ffn_gate_exps.weight", EXPERTS, EXPERT_WIDTH, HIDDEN)
        add(f"{block}.ffn_up_exps.weight", EXPERTS, EXPERT_WIDTH, HIDDEN)
        add(f"{block}.ffn_down_exps.weight", EXPERTS, HIDDEN, EXPERT_WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--type", choices=TYPES, default="f32", help="type of the matrices (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=32, help="sequences at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8081, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.gguf"
        write_model(path, arguments.type)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = arguments.parallel
        params.n_ctx = 512 * arguments.parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
        params.port = arguments.port
        server = xllamacpp.Server(params)
        print(f"listening at {server.listening_address}", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
