"""One of several processes that run a model with executor `program`; process 0 drives them, and runs it on one device too.

    python program_rank.py CASES

CASES is a JSON list of {"do": name, ...}, done one after another; the answer is the list of their results. Models have
random weights, the same in each process.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from step3_jax.afd.placement import place_model
from step3_jax.afd.program.attention_process import AttentionProcess
from step3_jax.afd.program.executor import load_program_executor, make_program_executor
from step3_jax.afd.program.ffn_process import FfnProcess
from step3_jax.afd.topology import AfdTopology
from step3_jax.checkpoint.reader import TensorReader
from step3_jax.config import ModelConfig
from step3_jax.distributed import initialise_distributed
from step3_jax.engine.drive.worker import Worker
from step3_jax.engine.executor import Executor
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import DecodeBatch, PrefillBatch
from step3_jax.layout.deployment import parse_topology
from step3_jax.layout.parallel import Parallel
from step3_jax.model.step3 import Step3
from step3_jax.resources import find
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from tests.process import give_answer
from tests.small import small_text

Answer = dict[str, object]
T = TypeVar("T")
# No other axis of an array has this size.
NUM_PAGES = 38
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 1}


@functools.cache
def make_model(num_layers: int) -> Step3:
    """A dense layer, and others of experts; their number is divided by 2 and 3."""
    layers = tuple(range(1, num_layers))
    text = small_text(num_hidden_layers=num_layers, moe_layers=layers, moe_num_experts=6)
    config = ModelConfig(text=text, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)
    make = jax.jit(lambda: nnx.split(Step3(config, rngs=nnx.Rngs(3)))[1])
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(3))))[0], make())


def make_topology(case: Answer) -> AfdTopology:
    instances = parse_topology(str(case["afd"]), int(case.get("devices", 1)))  # type: ignore[call-overload]
    parallel = case.get("parallel")
    return AfdTopology.of(instances, Parallel(*parallel) if parallel else None)  # type: ignore[misc]


@functools.cache
def make_executor(key: str) -> AttentionProcess | FfnProcess:
    case = json.loads(key)
    topology = make_topology(case)
    return make_program_executor(
        place_model(make_model(case.get("layers", 2)), topology),
        topology,
        num_microbatches=case.get("microbatches", 3),
        payload=case.get("payload", "auto"),
    )


def executor_of(case: Answer) -> AttentionProcess | FfnProcess:
    names = ("afd", "devices", "parallel", "microbatches", "payload", "layers")
    return make_executor(json.dumps({name: case[name] for name in names if name in case}))


@functools.cache
def make_runner(num_layers: int) -> Runner:
    return Runner(make_model(num_layers))


def with_llm(executor: Executor | Worker, use: Callable[[LLM], T], **settings: object) -> T | None:
    """What rank 0 does with a model; the others make its calls, and give None."""
    shards = executor.num_shards
    sizes: dict[str, object] = {"max_num_seqs": 4 * shards, "max_num_batched_tokens": 32 * shards, **settings}
    try:
        llm = LLM.from_model(executor, max_model_len=64, **sizes)  # type: ignore[arg-type]
    except SystemExit:
        return None
    with contextlib.closing(llm):
        return use(llm)


def generate(
    executor: Executor | Worker, count: int, each: SamplingParams | None = None, **settings: int
) -> list[list[int]] | None:
    """Tokens of prompts that are longer than a chunk and more than there are rows, of which some end in every call."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, executor.config.text.vocab_size, 3 + 9 * index).tolist() for index in range(count)]
    params = [each or SamplingParams(temperature=0, max_tokens=4 + 3 * (index % 3)) for index in range(count)]

    def use(llm: LLM) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return [list(one.token_ids) for output in outputs for one in output.outputs]

    return with_llm(executor, use, **settings)


def run_both(case: Answer, count: int, each: SamplingParams | None = None, **settings: int) -> Answer:
    found: Answer = {"afd": generate(executor_of(case), count, each, **settings)}
    if jax.process_index() == 0:
        runner = make_runner(int(case.get("layers", 2)))  # type: ignore[call-overload]
        found["fused"] = generate(runner, count, each, **settings)
    return found


def tokens(case: Answer) -> Answer:
    """Greedy tokens next to the fused model's; `together` for prompts in one chunk that end at once: few programs."""
    if case.get("together"):
        return run_both(case, 4, SamplingParams(temperature=0, max_tokens=7), max_num_batched_tokens=128)
    return run_both(case, int(case.get("count", 6)))  # type: ignore[call-overload]


def features(case: Answer) -> Answer:
    """Seeded draws with penalties and log-probabilities, several per prompt, next to the fused model's."""
    params = SamplingParams(
        temperature=0.9, n=2, top_k=20, seed=11, max_tokens=6, repetition_penalty=1.3, logprobs=3, ignore_eos=True
    )
    return run_both(case, 2, params)


def guesses(case: Answer) -> Answer:
    """Tokens of greedy and seeded sequences that repeat themselves, with guesses, beside the fused model's without."""
    given = [{"prompt_token_ids": ids} for ids in ([5, 6, 7] * 6, [9, 4] * 3, [20])] * 2
    plain = [SamplingParams(temperature=0, max_tokens=20 + 5 * index, ignore_eos=True) for index in range(3)]
    drawn = [SamplingParams(temperature=0.4, top_k=3, seed=index, max_tokens=30) for index in range(3)]

    def use(llm: LLM) -> tuple[list[list[int]], int]:
        outputs = llm.generate(given, [*plain, *drawn])
        return [list(output.outputs[0].token_ids) for output in outputs], llm.stats.num_accepted_tokens

    own = with_llm(executor_of(case), use, speculative_config=NGRAM)
    if own is None:
        return {}
    fused = with_llm(make_runner(int(case.get("layers", 2))), use)  # type: ignore[call-overload]
    return {"afd": own[0], "accepted": own[1], "fused": None if fused is None else fused[0]}


def repeat(case: Answer) -> Answer:
    """Traces after a warm-up, and after work."""
    executor = executor_of(case)
    with_llm(executor, LLM.warm_up)
    before = dict(executor.num_traces)
    generate(executor, 6)
    return {"before": before, "after": dict(executor.num_traces)}


def places(case: Answer) -> Answer:
    """What this process holds: elements of its own weights and of the cache on its devices."""
    executor = executor_of(case)
    has_cache = isinstance(executor, AttentionProcess)
    cache = executor.allocate_cache(NUM_PAGES * executor.num_shards, "float32") if has_cache else ()
    own = set(jax.local_devices())
    weights = jax.tree.leaves(executor.weights)
    for array in (*weights, *jax.tree.leaves(cache)):
        assert {shard.device for shard in array.addressable_shards} == own
    topology = make_topology(case)
    placed = place_model(make_model(int(case.get("layers", 2))), topology)  # type: ignore[call-overload]
    return {
        "weights": sum(weight.addressable_data(0).size for weight in weights),
        "cache": sum(leaf.addressable_data(0).size for leaf in jax.tree.leaves(cache)),
        "placed": {
            name: sum(len(leaf.addressable_shards) > 0 for leaf in jax.tree.leaves(nnx.state(module)))
            for name, module in (
                ("ends", nnx.List([placed.text.embed_tokens, placed.text.norm, placed.text.lm_head])),
                ("attention", nnx.List([layer.attention for layer in placed.text.layers])),
                ("ffn", nnx.List([layer.ffn for layer in placed.text.layers])),
            )
        },
    }


def hlo(case: Answer) -> Answer:
    """What a compiled call does to arrays that have as many rows as a device's pool has pages.

    Without rows the call is that of a chunk of prompts.
    """
    executor = executor_of(case)
    if isinstance(executor, FfnProcess):
        return {}
    shards, num_rows, vocab_size = executor.num_shards, case.get("rows"), executor.config.text.vocab_size
    cache = executor.allocate_cache(NUM_PAGES * shards, str(case["storage"]))  # type: ignore[arg-type]
    if isinstance(num_rows, int):
        rows = shards * num_rows
        numbers = jnp.ones((rows,), jnp.int32)
        batch = DecodeBatch(numbers, numbers, numbers, numbers > 0, jnp.zeros((rows, 2), jnp.int32))
        sampling = sampling_batch([SamplingRow(SamplingParams(temperature=0), 8, (0, 0), ())] * rows, vocab_size, rows)
        program = executor.decode_program(cache, batch, sampling, max_steps=8)
    else:
        starts, lengths = jnp.array([0, 20, 30] * shards, jnp.int32), jnp.array([20, 10] * shards, jnp.int32)
        table = jnp.zeros((shards * 2, 2), jnp.int32)
        chunk = PrefillBatch(jnp.zeros((shards * 32,), jnp.int32), starts, lengths, table)
        program = executor.prefill_program(cache, chunk)
    num_pages = cache.keys.addressable_data(0).shape[0]
    done = re.findall(rf"= \w+\[{num_pages},\S+ ([\w-]+)\(", program.as_text() or "")
    return {"done": dict(collections.Counter(done))}


def callbacks(case: Answer) -> Answer:
    """Calls to Python in this process's lowered decode loop."""
    executor = executor_of(case)
    numbers = executor._numbers(1)
    if isinstance(executor, FfnProcess):
        lowered = executor._decode.lower(executor.weights, numbers, 2, 8, 0)
    else:
        size = 2 * executor.num_shards
        cache, rows = executor.allocate_cache(NUM_PAGES * executor.num_shards, "float32"), jnp.ones((size,), jnp.int32)
        batch = DecodeBatch(rows, rows, rows, rows > 0, jnp.zeros((size, 2), jnp.int32))
        row = SamplingRow(SamplingParams(temperature=0), 8, (0, 0), ())
        sampling = sampling_batch([row] * size, executor.config.text.vocab_size, size)
        given = batch, sampling, numbers, jnp.zeros((), bool)
        lowered = executor._decode.lower(executor.weights, cache, *given, 8, None)
    return {"count": lowered.as_text().count("callback")}


def loaded(case: Answer) -> Answer:
    """Bytes read of each tensor when a checkpoint is loaded."""
    read: collections.Counter[str] = collections.Counter()
    read_band = TensorReader.read_band

    def count(self: TensorReader, name: str, *given: object) -> int:
        num_bytes = read_band(self, name, *given)  # type: ignore[arg-type]
        read[name] += num_bytes
        return num_bytes

    TensorReader.read_band = count  # type: ignore[method-assign, assignment]
    load_program_executor(str(case["folder"]), make_topology(case))
    TensorReader.read_band = read_band  # type: ignore[method-assign]
    return {"read": read}


def shipped(case: Answer) -> Answer:
    """The shipped model's answers about a picture and to a question, next to the fused model's."""
    folder = find("models/step3-tiny")
    executor = load_program_executor(folder, make_topology(case), payload=str(case.get("payload", "auto")))
    picture = {"type": "image", "image": str(folder / "examples" / "number-6267.png")}
    contents = [[picture, {"type": "text", "text": "What number is this?"}], "What is the capital of France?"]
    params = SamplingParams(temperature=0, max_tokens=24)
    found: Answer = {}
    for name, one in (("afd", executor), ("fused", None)):
        if one is None and jax.process_index() > 0:
            continue
        try:
            llm = LLM(folder, executor=one, max_model_len=256)
        except SystemExit:
            continue
        with contextlib.closing(llm):
            outputs = llm.chat([[{"role": "user", "content": content}] for content in contents], params)
            found[name] = [list(output.outputs[0].token_ids) for output in outputs]
            found[f"{name}_text"] = outputs[0].outputs[0].text
    return found


def main() -> None:
    warnings.simplefilter("error")
    initialise_distributed()
    jax.config.update("jax_default_matmul_precision", "float32")
    # These programs run for milliseconds and take seconds to compile.
    jax.config.update("jax_disable_most_optimizations", True)
    functions = (tokens, features, guesses, repeat, places, hlo, callbacks, loaded, shipped)
    answers: dict[str, Callable[[Answer], Answer]] = {function.__name__: function for function in functions}
    found = [answers[str(case["do"])](case) for case in json.loads(sys.argv[1])]
    give_answer(found)


if __name__ == "__main__":
    main()
