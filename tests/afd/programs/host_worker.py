"""Answers questions about the host executor in a process that has several CPU devices.

    python host_worker.py NUM_DEVICES

Reads one JSON object per line, {"do": name, ...}, and writes one for each. Models have random weights, the same each time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from step3_jax.afd.host.calls import Flow
from step3_jax.afd.host.executor import HostExecutor, load_host_executor
from step3_jax.afd.host.flight import Flight
from step3_jax.afd.placement import place_model
from step3_jax.afd.roles import arrays_by_role
from step3_jax.afd.topology import AfdTopology
from step3_jax.config import ModelConfig, TextConfig, VisionConfig
from step3_jax.engine.executor import Executor
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import PrefillBatch
from step3_jax.layout.deployment import default_ffn_parallel, parse_topology
from step3_jax.layout.parallel import Parallel
from step3_jax.mesh import force_cpu_devices
from step3_jax.model.step3 import Step3
from step3_jax.resources import find
from step3_jax.sampling.params import SamplingParams
from step3_jax.timeline.event import Stage
from step3_jax.timeline.trace import measure, to_chrome
from tests.rule import run_ruled

Answer = dict[str, object]
VOCAB_SIZE, NUM_LAYERS = 97, 3
# No other axis of an array has this size.
NUM_PAGES = 38
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}


@functools.cache
def make_model() -> Step3:
    """A dense layer, and two of experts; sizes that 2 and 3 divide."""
    text = TextConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=NUM_LAYERS, num_attention_heads=2, head_dim=16,
        share_q_dim=24, moe_num_experts=6, moe_top_k=2, moe_intermediate_size=24, share_expert_dim=48,
        moe_layers=(1, 2), vocab_size=VOCAB_SIZE, max_position_embeddings=256,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=16, output_hidden_size=8, image_size=32, intermediate_size=24, num_attention_heads=2,
        num_hidden_layers=1, patch_size=8,
    )  # fmt: skip
    config = ModelConfig(
        text=text, vision=vision, dtype="float32", image_token_len=1, patch_token_len=1, image_token_id=1, eos_token_id=0
    )  # fmt: skip
    make = jax.jit(lambda: nnx.split(Step3(config, rngs=nnx.Rngs(3)))[1])
    return nnx.merge(nnx.split(nnx.eval_shape(lambda: Step3(config, rngs=nnx.Rngs(3))))[0], make())


def make_topology(request: Answer) -> AfdTopology:
    instances = parse_topology(str(request["afd"]), int(request.get("devices", 1)))  # type: ignore[call-overload]
    parallel = request.get("parallel")
    own = Parallel(*parallel) if parallel else default_ffn_parallel(instances)  # type: ignore[misc]
    return AfdTopology.of(instances, dataclasses.replace(own, vision=request.get("vision", "weights")))  # type: ignore[arg-type]


@functools.cache
def make_executor(key: str) -> HostExecutor:
    request = json.loads(key)
    topology = make_topology(request)
    return HostExecutor(
        place_model(make_model(), topology),
        topology,
        num_microbatches=request.get("microbatches", 3),
        payload=request.get("payload", "auto"),
    )


def executor_of(request: Answer) -> HostExecutor:
    names = ("afd", "devices", "parallel", "microbatches", "payload", "vision")
    return make_executor(json.dumps({name: request[name] for name in names if name in request}))


@functools.cache
def make_runner() -> Runner:
    return Runner(make_model())


def make_llm(executor: Executor, **settings: object) -> LLM:
    sizes: dict[str, object] = {"max_num_seqs": 8, "max_model_len": 192, **settings}
    return LLM.from_model(executor, **sizes)  # type: ignore[arg-type]


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = np.random.default_rng(5)
    return [rng.integers(2, VOCAB_SIZE, 3 + 5 * index).tolist() for index in range(count)]


def generate(llm: LLM, count: int, **params: object) -> list[list[list[int]]]:
    """Token ids of prompts that end after different numbers of tokens."""
    each = [SamplingParams(temperature=0, max_tokens=4 + 3 * index, seed=index, **params) for index in range(count)]  # type: ignore[arg-type]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts(count)], each)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def tokens(request: Answer) -> Answer:
    """Greedy tokens next to the fused model's."""
    count = int(request.get("count", 5))  # type: ignore[call-overload]
    return {
        "afd": generate(make_llm(executor_of(request)), count),
        "fused": generate(make_llm(make_runner()), count),
    }


def guesses(request: Answer) -> Answer:
    """Tokens of greedy and of seeded sequences, which often repeat themselves, beside the fused model's without guesses."""
    llm = make_llm(executor_of(request), speculative_config=NGRAM)
    found = {"afd": generate_repeating(llm), "fused": generate_repeating(make_llm(make_runner()))}
    return found | {"accepted": llm.stats.num_accepted_tokens, "drafted": llm.stats.num_draft_tokens}


def generate_repeating(llm: LLM) -> list[list[int]]:
    """Each prompt greedily and drawn, more of them than there are slots, with penalties and ends of all kinds."""
    given = [{"prompt_token_ids": ids} for ids in ([5, 6, 7] * 6, [9, 4] * 3, [20], list(range(30, 60)) * 2)] * 3
    plain = [SamplingParams(temperature=0, max_tokens=20 + 7 * index, ignore_eos=True) for index in range(4)]
    drawn = [SamplingParams(temperature=0.4, top_k=3, seed=index, max_tokens=30) for index in range(4)]
    mixed = [SamplingParams(temperature=0, max_tokens=12 + index, repetition_penalty=1.1) for index in range(4)]
    outputs = llm.generate(given, [*plain, *drawn, *mixed])
    return [list(output.outputs[0].token_ids) for output in outputs]


def masks(request: Answer) -> Answer:
    """Tokens of constrained sequences and of one beside them, beside the fused model's."""
    speculation = NGRAM if request.get("guesses") else None
    return {
        "afd": run_ruled(executor_of(request), max_model_len=192, speculative_config=speculation),
        "fused": run_ruled(make_runner(), max_model_len=192),
    }


def features(request: Answer) -> Answer:
    """Sampling, penalties, several completions, log-probabilities and chunks, next to the fused model's."""
    given = [{"prompt_token_ids": ids} for ids in (prompts(1)[0], prompts(8)[-1] * 3)]
    params = SamplingParams(
        temperature=0.9, n=2, top_k=20, seed=11, max_tokens=6, repetition_penalty=1.3, logprobs=3, ignore_eos=True
    )
    found: Answer = {}
    for name, executor in (("afd", executor_of(request)), ("fused", make_runner())):
        # Chunks of 32 tokens, for each attention device.
        llm = make_llm(executor, max_num_batched_tokens=32 * executor.num_shards)
        outputs = llm.generate(given, params)
        found[name] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        found[f"{name}_logprobs"] = [one.cumulative_logprob for output in outputs for one in output.outputs]
    return found


def images(request: Answer) -> Answer:
    """Difference of image features from the fused model's, and a device's parts of the tower's weights."""
    executor = executor_of(request)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)
    fused, found = (one.encode_images(pixels) for one in (make_runner(), executor))
    placed = place_model(make_model(), make_topology(request))
    weight = placed.vision.layers[0].mlp.fc1.weight.get_value()  # type: ignore[union-attr]
    return {
        "shape": list(found.shape),
        "error": float(np.abs(found - fused).max()),
        "largest": float(np.abs(fused).max()),
        "parts": weight.size // weight.addressable_shards[0].data.size,
        "devices": sorted(device.id for device in weight.devices()),
    }


def prefix(request: Answer) -> Answer:
    """Tokens of prompts that share their start, with the prefix cache and without, and of several samples."""
    start = np.random.default_rng(3).integers(2, VOCAB_SIZE, 130).tolist()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    several = SamplingParams(temperature=1, seed=3, n=3, max_tokens=5, ignore_eos=True)
    found: Answer = {}
    for name, is_enabled in (("warm", True), ("cold", False)):
        llm = make_llm(executor_of(request), enable_prefix_caching=is_enabled)
        outputs = [llm.generate([*start, 5 + index], params)[0] for index in range(3)]
        outputs.append(llm.generate([*start, 5], several)[0])
        found[name] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        found[f"{name}_cached"] = [output.num_cached_tokens for output in outputs]
    return found


def repeat(request: Answer) -> Answer:
    """Traces of all calls after a warm-up, and after prompts of several lengths, without images."""
    executor = executor_of(request)
    llm = make_llm(executor, max_num_batched_tokens=32 * executor.num_shards)
    llm.warm_up()
    before = dict(executor.num_traces)
    generate(llm, 5)
    generate(llm, 2, logit_bias={3: 1.0}, logprobs=2, presence_penalty=1.0)
    return {"before": before, "after": dict(executor.num_traces)}


def places(request: Answer) -> Answer:
    """Devices of every array: of the weights by role, of the cache, and of the parts that the calls hold."""
    topology = make_topology(request)
    model = place_model(make_model(), topology)
    executor = executor_of(request)
    cache = executor.allocate_cache(NUM_PAGES, "float32")
    by_role = {
        role: sorted({d.id for a in arrays for d in a.devices()}) for role, arrays in arrays_by_role(model).items()
    }
    gate = model.text.layers[1].ffn.moe.gate_proj.get_value()
    return {
        "weights": by_role,
        "num_weights": len(jax.tree.leaves(nnx.state(model))),
        "cache": sorted({device.id for array in jax.tree.leaves(cache) for device in array.devices()}),
        "pages_each": cache.keys.addressable_shards[0].data.shape[0],
        "gate_proj": list(gate.shape),
        "gate_proj_each": list(gate.addressable_shards[0].data.shape),
        "attention": [device.id for device in topology.attention.mesh.devices.flat],
        "ffn": [device.id for device in topology.ffn.mesh.devices.flat],
    }


def loaded(request: Answer) -> Answer:
    """The shipped model on a topology: devices of its weights, and bytes that each role's devices hold."""
    topology = make_topology(request)
    executor = load_host_executor(find("models/step3-tiny"), topology, payload=str(request.get("payload", "auto")))
    parts = executor.calls
    return {
        "attention": sorted({d.id for part in parts._attention for a in part.leaves for d in a.devices()}),
        "ffn": sorted({d.id for part in parts._ffn for a in part.leaves for d in a.devices()}),
        "ends": sorted({d.id for a in parts._ends.leaves for d in a.devices()}),
        "dtype": str(executor.dtype),
    }


def hlo(request: Answer) -> Answer:
    """What the compiled attention steps do to arrays that have as many rows as a device's pool has pages."""
    executor = executor_of(request)
    storage = str(request["storage"])
    num_rows = request["rows"]
    cache = executor.allocate_cache(NUM_PAGES * executor.num_shards, storage)  # type: ignore[arg-type]
    shards = executor.num_shards
    num_pages = cache.num_pages // shards
    batch = PrefillBatch(
        jnp.zeros((shards * 32,), jnp.int32),
        jnp.tile(jnp.array([0, 20, 30], jnp.int32), shards),
        jnp.tile(jnp.array([20, 10], jnp.int32), shards),
        jnp.zeros((shards * 2, 2), jnp.int32),
    )
    flow = executor.calls.begin_chunk(batch, NUM_PAGES)[0]
    if isinstance(num_rows, int):
        flow = Flow(
            jnp.zeros((shards * num_rows, 1, flow.hidden.shape[2])),
            tuple(jnp.zeros((shards * num_rows, piece.shape[1]), jnp.uint8) for piece in flow.returned),
            flow.context._replace(
                cos=jnp.zeros((shards * num_rows, 1, flow.context.cos.shape[2])),
                sin=jnp.zeros((shards * num_rows, 1, flow.context.sin.shape[2])),
                step=flow.context.step._replace(
                    table=jnp.zeros((shards * num_rows, 2), jnp.int32),
                    lengths=jnp.ones((shards * num_rows,), jnp.int32),
                    query_starts=None,
                ),
                page_ids=jnp.zeros((shards * num_rows,), jnp.int32),
                slots=jnp.zeros((shards * num_rows,), jnp.int32),
            ),
        )
    done = []
    jax.config.update("jax_disable_most_optimizations", False)
    for layer in (0, 1):
        text = executor.calls.attention_program(layer, flow, cache).as_text() or ""
        done += re.findall(rf"= \w+\[{num_pages},\S+ ([\w-]+)\(", text)
    jax.config.update("jax_disable_most_optimizations", True)
    return {"done": sorted(set(done)), "writes": done.count("scatter") + done.count("dynamic-update-slice")}


def deadline(request: Answer) -> Answer:
    """An FFN step that does not end."""
    executor = executor_of(request)
    llm = make_llm(executor)
    generate(llm, 4)
    kept, executor._flight = executor._flight, Flight(0.5)
    push = executor._flight.push

    class Stuck:
        def is_ready(self) -> bool:
            return False

    def push_stuck(stage: Stage, array: jax.Array, limit: int) -> None:
        is_it = stage.lane == "ffn" and stage.phase == "decode" and (stage.layer, stage.microbatch) == (1, 1)
        push(stage, Stuck() if is_it else array, limit)  # type: ignore[arg-type]

    executor._flight.push = push_stuck  # type: ignore[method-assign]
    begin = time.monotonic()
    try:
        generate(llm, 4)
    except RuntimeError as error:
        elapsed = time.monotonic() - begin
        executor._flight = kept
        again = generate(llm, 4) == generate(make_llm(make_runner()), 4)
        return {"message": str(error), "elapsed_s": elapsed, "works_again": again}
    return {"message": None}


def mixed(request: Answer) -> Answer:
    """A run whose sides pretend to be different platforms, in a process whose default backend pretends to be a GPU.

    Implicit copies between devices are refused; those of the exchange are listed.
    """
    topology, payload = make_topology(request), str(request["payload"])
    copies: list[Answer] = []
    put = jax.device_put

    def watch(arrays: object, devices: object, **more: object) -> object:
        # Only the exchange passes a list of devices.
        if isinstance(arrays, list) and isinstance(devices, list):
            for array, device in zip(arrays, devices, strict=True):
                (source,) = array.devices()
                copies.append(
                    {"from": source.id, "to": device.id, "dtype": str(array.dtype), "columns": array.shape[1]}
                )
        return put(arrays, devices, **more)  # type: ignore[arg-type]

    with (
        mock.patch.object(AfdTopology, "is_mixed", property(lambda self: True)),
        mock.patch("jax.device_put", watch),
        mock.patch("jax.default_backend", return_value="gpu"),
    ):
        executor = HostExecutor(place_model(make_model(), topology), topology, num_microbatches=2, payload=payload)
        llm = make_llm(executor)
        # The first call moves what stays in place afterwards.
        generate(llm, 1)
        copies.clear()
        with jax.transfer_guard_device_to_device("disallow"):
            found = generate(llm, 5)
    return {
        "afd": found,
        "fused": generate(make_llm(make_runner()), 5),
        "copies": [dict(pairs) for pairs in sorted({tuple(sorted(copy.items())) for copy in copies})],
        "row_bytes": executor.form.row_bytes,
        "output_bytes": executor.form.output_bytes,
    }


def trace(request: Answer) -> Answer:
    """A recorded run."""
    executor = executor_of(request)
    llm = make_llm(executor)
    generate(llm, 5)
    executor.start_recording()
    generate(llm, 5)
    events = executor.stop_recording()
    found = measure(events)
    return {"chrome": to_chrome(events), "efficiency": found.efficiency, "tick_s": found.tick_s}


def quality(request: Answer) -> Answer:
    """The shipped model's answers to questions, one with a picture, fused and with each payload."""
    folder = find("models/step3-tiny")
    questions: list[object] = ["What is a violin?", "What is the capital of France?", "What is the capital of Peru?"]
    picture = {"type": "image", "image": str(folder / "examples" / "number-6267.png")}
    questions.append([picture, {"type": "text", "text": "What number is this?"}])
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=1)
    found: Answer = {}
    for payload in (None, "float32", "fp8"):
        executor = None
        if payload is not None:
            executor = load_host_executor(folder, make_topology(request), payload=payload)
        llm = LLM(folder, executor=executor, max_model_len=256)
        outputs = llm.chat([[{"role": "user", "content": content}] for content in questions], params)
        found[payload or "fused"] = [
            {
                "text": output.outputs[0].text,
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(record.values())).logprob for record in output.outputs[0].logprobs or ()],
            }
            for output in outputs
        ]
    return found


def main() -> None:
    warnings.simplefilter("error")
    force_cpu_devices(int(sys.argv[1]))
    jax.config.update("jax_default_matmul_precision", "float32")
    answers: dict[str, Callable[[Answer], Answer]] = {
        function.__name__: function
        for function in (
            tokens,
            guesses,
            masks,
            features,
            images,
            prefix,
            repeat,
            places,
            loaded,
            hlo,
            deadline,
            mixed,
            trace,
            quality,
        )
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = answers[request["do"]](request)
        except Exception as error:
            answer = {"error_type": type(error).__name__, "error": str(error), "trace": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
