"""What `step3 bench decode` measures: our decode loop, yardsticks of the machine, and a PyTorch peer."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.cache.contiguous import MIN_CACHE_LENGTH, bucket
from step3_jax.checkpoint.save import save_model
from step3_jax.config import ModelConfig, TextConfig
from step3_jax.engine.runner import Runner
from step3_jax.engine.state import PrefillBatch
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingMode, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

# Bigger than the caches of any CPU the benchmark is likely to run on.
READ_BYTES = 512 * 2**20
# Sums in float32 differ by rounding alone; in bfloat16 an expert may also change places with one as likely.
MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.05}


def bench_config(hidden_size: int, num_layers: int) -> ModelConfig:
    """A text-only model with Step3's proportions: one dense layer, then layers of 16 experts, 3 of them chosen.

    Raises:
      ValueError: If `hidden_size` is no multiple of 128, or there is not at least one layer.
    """
    if hidden_size < 128 or hidden_size % 128:
        raise ValueError(f"--hidden is {hidden_size}; a multiple of 128 is needed")
    if num_layers < 1:
        raise ValueError(f"--layers is {num_layers}; at least 1 is needed")
    text = TextConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        head_dim=128,
        share_q_dim=hidden_size // 2,
        moe_num_experts=16,
        moe_top_k=3,
        moe_intermediate_size=hidden_size * 3 // 4,
        share_expert_dim=hidden_size * 3 // 4,
        moe_layers=tuple(range(1, num_layers)),
        vocab_size=16 * hidden_size,
        max_position_embeddings=4096,
    )
    return ModelConfig(text=text, vision=None, dtype="float32", image_token_id=1, eos_token_id=0)


def random_model(config: ModelConfig) -> Step3:
    """A float32 model with normal weights of standard deviation fan_in^-0.5, and norms of ones."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Step3(config, dtype="float32", rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(leaf.shape[-1] ** -0.5)
        return jnp.asarray(values)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def active_parameters(config: TextConfig, num_tokens: int = 1) -> tuple[int, int]:
    """Weights of the layers, and of the head, that a step of `num_tokens` tokens multiplies with.

    For several tokens the number of chosen experts is the expected one if all are equally likely: E (1 - (1 - k/E)^n).
    """
    hidden, rank = config.hidden_size, config.share_q_dim
    attention = hidden * rank + rank * config.query_size + 2 * hidden * config.head_dim + config.query_size * hidden
    num_experts, num_moe = config.moe_num_experts, len(config.moe_layers)
    chosen = num_experts * (1 - (1 - config.moe_top_k / num_experts) ** num_tokens)
    moe = 3 * hidden * (chosen * config.moe_intermediate_size + config.share_expert_dim) + hidden * num_experts
    dense = 3 * hidden * config.intermediate_size
    layers = config.num_hidden_layers * attention + num_moe * moe + (config.num_hidden_layers - num_moe) * dense
    return round(layers), hidden * config.vocab_size


def prefill_flops(config: TextConfig, length: int) -> int:
    """Operations of reading a prompt: 2 a weight and token, the head once, and causal attention."""
    layers, head = active_parameters(config)
    attention = 2 * length**2 * config.query_size * config.num_hidden_layers
    return 2 * layers * length + 2 * head + attention


class Ours:
    """The project's own prefill and decode loop, greedy, on a model in one dtype."""

    def __init__(self, model: Step3) -> None:
        """Takes the model as it is to run."""
        self._model, self._runner, self._mode = model, Runner(model), SamplingMode()
        self._vocab_size = model.config.text.vocab_size

    def logits(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of every token, without a cache."""
        graphdef, state = nnx.split(self._model)
        return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids))

    def prefill(self, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Reads prompts; `room` is the tokens that may follow. Returns seconds."""
        batch_size, length = ids.shape
        limit = self._runner.config.text.max_position_embeddings
        row = SamplingRow(SamplingParams(temperature=0.0), room + 1, (0, 0), ())
        self._sampling = sampling_batch([row] * batch_size, self._vocab_size, batch_size)
        self._is_halted = np.zeros((batch_size,), bool)
        batch = PrefillBatch(jnp.asarray(ids, jnp.int32), jnp.full((batch_size,), length, jnp.int32))
        cache_length = bucket(length + room, MIN_CACHE_LENGTH, limit)
        begin = time.perf_counter()
        self._state, report = self._runner.prefill(batch, self._sampling, cache_length=cache_length, mode=self._mode)
        jax.block_until_ready(report)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        """Makes `steps` tokens of each row in one call of the jitted loop. Returns seconds."""
        begin = time.perf_counter()
        self._state, report = self._runner.decode(self._state, self._sampling, self._is_halted, steps, mode=self._mode)
        self._tokens = jax.block_until_ready(report).tokens
        return time.perf_counter() - begin

    def tokens(self, count: int) -> Int[np.ndarray, "B count"]:
        """The first tokens made since the last prefill."""
        return np.asarray(self._tokens)[:, :count]

    def decode_text(self) -> str:
        """The compiled decode loop of the last prefill's bucket, as HLO text."""
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._state)
        return self._runner.decode_program(state, self._sampling, mode=self._mode).as_text() or ""


class TorchPeer:
    """tools/torch_decoder.py in a process of its own, with our weights; a context manager."""

    def __init__(self, python: str, model: Step3, dtypes: Sequence[str], threads: int) -> None:
        """Starts the process and hands it the weights through a temporary folder.

        Args:
          python: Interpreter that has torch and numpy.
          model: In float32.
          dtypes: What to measure.
          threads: Threads it may use.

        Raises:
          ValueError: If the script is not there, or the interpreter has no torch.
        """
        script = pathlib.Path(__file__).parents[2] / "tools" / "torch_decoder.py"
        if not script.is_file():
            raise ValueError(f"--torch needs {script}, which is part of a checkout of the project, not of the package")
        if python == sys.executable and importlib.util.find_spec("torch") is None:
            raise ValueError(
                "--torch needs PyTorch: install step3-jax[bench], or name an interpreter that has it with --torch-python"
            )
        try:
            self._process = subprocess.Popen(
                [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ValueError(f"--torch-python {python} cannot be started: {error.strerror}") from None
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, pathlib.Path(folder) / "model")
            self.versions = self.ask(
                "open", folder=str(pathlib.Path(folder) / "model"), dtypes=list(dtypes), threads=threads
            )

    def __enter__(self) -> TorchPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.stdout.close()
        self._process.wait()

    def ask(self, request: str, **values: object) -> dict[str, object]:
        """One request of tools/torch_decoder.py.

        Raises:
          ValueError: If the process ended; what it said is on stderr.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the PyTorch process has no pipes")
        try:
            print(json.dumps({"do": request} | values), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(
                "the PyTorch process ended (see above): give --torch-python an interpreter with torch and numpy"
            )
        answer: dict[str, object] = json.loads(line)
        return answer

    def logits(self, dtype: str, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of every token."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "logits.npy")  # noqa: PTH118
            self.ask("logits", dtype=dtype, ids=ids.tolist(), file=file)
            return np.load(file)

    def prefill(self, dtype: str, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Seconds of reading prompts."""
        return cast(float, self.ask("prefill", dtype=dtype, ids=ids.tolist(), room=room)["seconds"])

    def decode(self, dtype: str, steps: int) -> float:
        """Seconds of making `steps` tokens of each row."""
        return cast(float, self.ask("decode", dtype=dtype, steps=steps)["seconds"])


def check_agreement(ours: Ours, peer: TorchPeer, dtype: str, ids: Int[np.ndarray, "B T"]) -> float:
    """The median over tokens of |ours - peer| / |peer|, both in the euclidean norm over the vocabulary.

    Raises:
      ValueError: If it is above `MAX_ERROR`: then the two do not run the same model, and no time means anything.
    """
    mine, theirs = ours.logits(ids), peer.logits(dtype, ids)
    errors = np.linalg.norm(mine - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    error = float(np.median(errors))
    if not error <= MAX_ERROR[dtype]:
        raise ValueError(
            f"logits of the {dtype} model differ from PyTorch's by {error:.2e}; at most {MAX_ERROR[dtype]:.0e} is allowed"
        )
    return error


def read_meter(num_threads: int) -> Callable[[], float]:
    """A function that measures the best rate, bytes/s, at which this process reads memory it does not write.

    Two ways are tried at each call and the better one counts: a sum in XLA, and numpy's dot product of each thread's
    part with itself.
    """
    data = np.ones(READ_BYTES // 4, np.float32)
    parts = np.array_split(data, num_threads)
    on_device = jax.device_put(data)
    total = jax.jit(jnp.sum)
    total(on_device).block_until_ready()
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def measure() -> float:
        begin = time.perf_counter()
        total(on_device).block_until_ready()
        middle = time.perf_counter()
        list(pool.map(np.dot, parts, parts))
        return READ_BYTES / min(middle - begin, time.perf_counter() - middle)

    return measure


def gemm_rate(dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """The best rate, FLOP/s, of a square matrix product: XLA's, and for float32 also numpy's."""
    host = np.random.default_rng(0).standard_normal((size, size), np.float32)
    array = jnp.asarray(host, dtype)
    product = jax.jit(_product)
    calls: list[Callable[[], object]] = [lambda: product(array, array).block_until_ready()]
    if dtype == "float32":
        calls.append(lambda: host @ host)
    best = float("inf")
    for call in calls:
        call()
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _product(left: Float[Array, "M K"], right: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
