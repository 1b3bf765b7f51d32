"""Answers questions about sharded models in a process that has several CPU devices.

    python worker.py NUM_DEVICES

Reads one JSON object per line, {"do": name, ...}, and writes one for each. Models have random weights, the same each time.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.names import parameters_of
from step3_jax.checkpoint.save import save_model
from step3_jax.config import ModelConfig, TextConfig, VisionConfig
from step3_jax.engine.executor import Executor
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.layers.collective import Group
from step3_jax.layers.expert_exchange import ShardedExperts, capacity
from step3_jax.layers.moe import STACKS, Experts
from step3_jax.layers.router import Routing
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import Layout, force_cpu_devices, make_layout
from step3_jax.model.arrangement import Arrangement, unstack
from step3_jax.model.parallel import place_model
from step3_jax.model.step3 import Step3, stack_model
from step3_jax.quant import quantise
from step3_jax.sampling.params import SamplingParams
from step3_jax.stack import pick
from tests.rule import run_ruled

Answer = dict[str, object]


@functools.cache
def make_model(kind: str) -> Step3:
    """ "plain": sizes that 2, 3, 4, 6 and 8 divide, except the vocabulary; "fp8": blocks that two devices divide."""
    if kind == "plain":
        text = TextConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            head_dim=12,
            share_q_dim=24,
            moe_num_experts=12,
            moe_top_k=3,
            moe_intermediate_size=48,
            share_expert_dim=48,
            moe_layers=(1,),
            vocab_size=131,
            max_position_embeddings=512,
        )
    else:
        text = TextConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=64,
            share_q_dim=32,
            moe_num_experts=4,
            moe_top_k=2,
            moe_intermediate_size=256,
            share_expert_dim=256,
            moe_layers=(1,),
            vocab_size=64,
            max_position_embeddings=512,
        )
    vision = VisionConfig(
        hidden_size=16,
        output_hidden_size=8,
        image_size=32,
        intermediate_size=24,
        num_attention_heads=4,
        num_hidden_layers=1,
        patch_size=8,
    )
    config = ModelConfig(
        text=text,
        vision=vision if kind == "plain" else None,
        dtype="float32",
        image_token_len=1,
        image_token_id=1,
        eos_token_id=0,
    )

    def build() -> Step3:
        model = Step3(config, rngs=nnx.Rngs(3))
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            if path[-1] == "bias":
                # In a new model they are zeros, where adding them twice would not show.
                variable.set_value(jnp.sin(jnp.arange(variable.get_value().size, dtype=jnp.float32)))
            if kind == "fp8" and any(str(part).endswith("_proj") for part in path):
                variable.set_value(quantise(variable.get_value()))
        return model

    # Compiled as one program: operation by operation takes seconds.
    return nnx.jit(build)()


@functools.cache
def make_runner(kind: str, parallel: Parallel, *, is_stacked: bool = False) -> ShardedRunner:
    model = stack_model(make_model(kind)) if is_stacked else make_model(kind)
    layout = make_layout(fit_parallel(parallel, model.config.text, fp8_block=(128, 128) if kind == "fp8" else None))
    return ShardedRunner(place_model(model, layout), layout)


@functools.cache
def make_alone(kind: str) -> Runner:
    """On one device."""
    return Runner(make_model(kind))


def read_parallel(request: Answer) -> Parallel:
    return Parallel(**request["parallel"])  # type: ignore[arg-type]


def generate(request: Answer) -> Answer:
    """Tokens and log-probabilities of some prompts, on one device or on several."""
    kind = str(request.get("kind", "plain"))
    executor: Executor
    if request["parallel"]:
        executor = make_runner(kind, read_parallel(request), is_stacked=bool(request.get("stacked", False)))
    else:
        executor = make_alone(kind)
    vocab_size = executor.config.text.vocab_size
    prompts = [
        {"prompt_token_ids": [int(token) for token in np.random.default_rng(seed).integers(2, vocab_size, length)]}
        for seed, length in enumerate(request["lengths"])
    ]
    params = [
        SamplingParams(temperature=0 if seed is None else 1.0, seed=seed, max_tokens=count, ignore_eos=True, logprobs=3)
        for count, seed in zip(request["counts"], request.get("seeds", [None] * len(prompts)), strict=True)
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        llm = LLM.from_model(
            executor,
            max_model_len=256,
            max_num_batched_tokens=int(request.get("chunk", 512)),
            max_num_seqs=int(request.get("batch", 8)),
            speculative_config=request.get("speculation"),
        )
    outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
    engine = llm._engine.core
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs
        ],
        "warnings": [str(one.message) for one in said],
        "accepted": llm.stats.num_accepted_tokens,
        "free_pages": engine.allocator.num_free,
        "pages": engine.allocator.num_pages,
        "shards": engine.allocator.num_shards,
    }


def prefix(request: Answer) -> Answer:
    """Greedy tokens of prompts that share their start, with the prefix cache and without; several samples too."""
    executor: Executor = make_runner("plain", read_parallel(request)) if request["parallel"] else make_alone("plain")
    rng = np.random.default_rng(3)
    start = rng.integers(2, executor.config.text.vocab_size, 150).tolist()
    prompts = [{"prompt_token_ids": [*start, 5 + index]} for index in range(3)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    several = SamplingParams(temperature=1, seed=3, n=3, max_tokens=6, ignore_eos=True)
    found: Answer = {}
    for name, is_enabled in (("warm", True), ("cold", False)):
        llm = LLM.from_model(executor, max_model_len=256, max_num_seqs=8, enable_prefix_caching=is_enabled)
        outputs = [llm.generate(prompt, params)[0] for prompt in prompts]
        outputs.append(llm.generate(prompts[0], several)[0])
        found[name] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        found[f"{name}_cached"] = [output.num_cached_tokens for output in outputs]
        allocator = llm._engine.core.allocator
        found[f"{name}_free"] = allocator.num_free == allocator.num_pages
    return found


def describe(request: Answer) -> Answer:
    """Where the arrays of a sharded model and of its cache lie: elements on the first device, by name."""
    runner = make_runner("plain", read_parallel(request))
    layout = runner.layout
    placed = place_model(make_model("plain"), layout)
    found = {
        ".".join(map(str, path)): [variable.get_value().size, variable.get_value().addressable_shards[0].data.size]
        for path, variable in nnx.to_flat_state(nnx.state(placed))
    }
    cache = runner.allocate_cache(16 * runner.num_shards, "float32")
    keys = cache.keys
    distinct = {str(shard.index) for shard in keys.addressable_shards}
    return {
        "weights": found,
        "pages": keys.shape[0],
        "pages_each": keys.addressable_shards[0].data.shape[0],
        "cache_parts": len(distinct),
        "is_original_whole": make_model("plain").text.lm_head.weight.get_value().shape == (131, 48),
    }


def encode(request: Answer) -> Answer:
    """Difference of image features from those of one device, and their shape."""
    count = int(request["images"])
    pixels = np.random.default_rng(0).standard_normal((count, 3, 32, 32), np.float32)
    alone = np.asarray(make_model("plain").encode_images(pixels))
    found = np.asarray(make_runner("plain", read_parallel(request)).encode_images(pixels))
    return {
        "shape": list(found.shape),
        "error": float(np.abs(found - alone).max()),
        "largest": float(np.abs(alone).max()),
    }


def reload(request: Answer) -> Answer:
    """A model, saved from one device and from several; and what loading it gives, compared with placing it."""
    folder = pathlib.Path(str(request["folder"]))
    model = make_model("plain")
    layout = make_layout(fit_parallel(read_parallel(request), model.config.text))
    placed = place_model(model, layout)
    save_model(model, folder / "alone")
    save_model(placed, folder / "spread")
    loaded = parameters_of(load_model(folder / "alone", layout=layout))
    arranged = load_model(folder / "alone", layout=layout, arrangement=Arrangement(stacks=True, fuses=True))
    names = ("config.json", "model.safetensors")
    return {
        "is_same_file": all((folder / "alone" / n).read_bytes() == (folder / "spread" / n).read_bytes() for n in names),
        "different": [
            str(path)
            for path, variable in parameters_of(placed).items()
            if not is_same(variable.get_value(), loaded[path].get_value())
        ],
        "different_stacked": [
            str(path)
            for path, variable in parameters_of(unstack(arranged)).items()
            if not bool((pick(variable.get_value()) == loaded[path].get_value()).all())
        ],
    }


def is_same(left: jax.Array, right: jax.Array) -> bool:
    """Whether two arrays have the same elements in the same places."""
    return left.sharding == right.sharding and left.shape == right.shape and bool((left == right).all())


def exchange(request: Answer) -> Answer:
    """All-to-all of tokens against the experts on one device; `skew` sends all tokens to the same experts."""
    model = make_model("plain")
    layout = make_layout(read_parallel(request))
    experts = model.text.layers[1].ffn.moe
    num_tokens, top_k, num_experts = int(request["tokens"]), 3, 12
    num_devices = layout.parallel.num_devices
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((num_devices * num_tokens, 48)).astype(np.float32)
    ids = np.argsort(rng.random((num_devices * num_tokens, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    if request["skew"]:
        ids[:] = np.arange(top_k)
    weights = rng.random((num_devices * num_tokens, top_k)).astype(np.float32)
    alone = experts(jnp.asarray(hidden), jnp.asarray(weights), jnp.asarray(ids))
    rows, specs = layout.spec("rows"), [layout.parameter(("ffn", "moe", name)).spec for name in STACKS]

    def run(stacks: list[jax.Array], hidden: jax.Array, weights: jax.Array, ids: jax.Array) -> jax.Array:
        own = Experts(1, 1, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
        for name, stack in zip(STACKS, stacks, strict=True):
            getattr(own, name).set_value(stack)
        sharded = ShardedExperts(
            own,
            Group(layout.axes("rows")),
            expert_axes=layout.axes("experts"),
            width=Group(layout.axes("expert_width")),
            num_experts=num_experts,
            use_all_to_all=True,
        )
        return sharded(hidden, Routing(weights, ids, jnp.zeros((hidden.shape[0], num_experts))))

    stacks = [getattr(experts, name).get_value() for name in STACKS]
    call = jax.jit(
        jax.shard_map(run, mesh=layout.mesh, in_specs=(specs, rows, rows, rows), out_specs=rows, check_vma=False)
    )
    spread = call(stacks, hidden, weights, ids)
    return {
        "error": float(jnp.abs(spread - alone).max()),
        # Of the tokens of a width group.
        "room": capacity(layout.size("expert_width") * num_tokens, top_k, layout.size("experts")),
        # Whether devices ask each other if everything fits.
        "has_choice": "pmax" in str(jax.make_jaxpr(call)(stacks, hidden, weights, ids)),
    }


def traces(request: Answer) -> Answer:
    """Programs of a warm-up and of the work after it."""
    runner = make_runner("plain", read_parallel(request))
    before = runner.num_traces.copy()
    LLM.from_model(runner, max_model_len=256, max_num_batched_tokens=512, max_num_seqs=8).warm_up()
    warm = runner.num_traces.copy()
    generate({"parallel": request["parallel"], "lengths": [20, 50, 3, 200, 20, 20, 20, 20], "counts": [6] * 8})
    return {"warm_up": warm - before, "work": runner.num_traces - warm}


def masks(request: Answer) -> Answer:
    """Tokens of constrained sequences and of one running with them, on one device and on several."""
    sizes = {"max_model_len": 256, "max_num_batched_tokens": 512}
    spread = run_ruled(make_runner("plain", read_parallel(request)), **sizes)
    return {"alone": run_ruled(make_alone("plain"), **sizes), "spread": spread}


def layout_error(request: Answer) -> Answer:
    """Why a setting is refused."""
    found: Layout = make_layout(read_parallel(request))
    return {"devices": found.mesh.size}


COMMANDS: dict[str, Callable[[Answer], Answer]] = {
    function.__name__: function
    for function in (generate, prefix, describe, encode, reload, exchange, traces, masks, layout_error)
}


def main() -> None:
    force_cpu_devices(int(sys.argv[1]))
    jax.config.update("jax_default_matmul_precision", "float32")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = COMMANDS[request.pop("do")](request)
        except Exception as error:
            answer = {"error_type": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
