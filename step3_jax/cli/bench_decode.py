"""What `step3 bench decode` measures: our decode loop, yardsticks of the machine, and a PyTorch peer."""

from __future__ import annotations

import collections
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from step3_jax.afd.host import HostExecutor
from step3_jax.cache.paged import Cache, choose_storage
from step3_jax.checkpoint.save import save_model
from step3_jax.cli.afd_option import AfdChoice, place_executor
from step3_jax.config import ModelConfig, TextConfig
from step3_jax.engine.bucket_table import power_of_two
from step3_jax.engine.runner import Runner
from step3_jax.engine.sharded import ShardedRunner
from step3_jax.engine.state import DecodeBatch, DecodeCall, PrefillBatch
from step3_jax.layout.admission import STEPS_PER_CALL
from step3_jax.layout.page import pages_for
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.mesh import make_layout
from step3_jax.model.parallel import place_model
from step3_jax.model.step3 import Step3, abstract_step3
from step3_jax.sampling.batch import SamplingRow, sampling_batch
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
    graphdef, state = nnx.split(abstract_step3(config, "float32"))
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(leaf.shape[-1] ** -0.5)
        return jnp.asarray(values)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


class Ours:
    """The project's own prefill and decode loop, greedy, on a model in one dtype."""

    def __init__(self, model: Step3, parallel: Parallel | None = None, afd: AfdChoice | None = None) -> None:
        """Takes the model as it is to run, and the devices that it is to run on, if they are several."""
        self._model = model
        self._runner: HostExecutor | Runner | ShardedRunner
        if afd is not None:
            self._runner = place_executor(afd, model)
        elif parallel is None:
            self._runner = Runner(model)
        else:
            layout = make_layout(fit_parallel(parallel, model.config.text))
            self._runner = ShardedRunner(place_model(model, layout), layout)
        self._vocab_size = model.config.text.vocab_size
        self._storage = choose_storage("auto", self._runner.dtype, model.config.text.head_dim)
        self._cache: Cache = ()
        self._tokens: list[Int[np.ndarray, "B steps"]] = []

    def logits(self, ids: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T V"]:
        """Logits of every token, without a cache."""
        graphdef, state = nnx.split(self._model)
        return np.asarray(jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids))

    def prefill(self, ids: Int[np.ndarray, "B T"], room: int) -> float:
        """Reads prompts and makes the first tokens; `room` is the tokens that may follow. Returns seconds."""
        shards = self._runner.num_shards
        self._batch_size, length = ids.shape
        # As many rows in each shard, the last ones idle; the last token of each is left to the first decode step.
        each = -(-self._batch_size // shards)
        ids = np.pad(ids, ((0, each * shards - self._batch_size), (0, 0)))
        is_idle = np.arange(len(ids)) >= self._batch_size
        row = SamplingRow(SamplingParams(temperature=0.0), room + 1, (0, 0), ())
        self._sampling = sampling_batch([row] * len(ids), self._vocab_size, len(ids))
        width = power_of_two(pages_for(length + room))
        if not self._cache or self._cache[0].keys.shape[0] < len(ids) * width:
            self._cache = self._runner.allocate_cache(len(ids) * width, self._storage)
        first = np.arange(shards)[:, None] * (self._cache[0].keys.shape[0] // shards) + np.arange(each) * width
        table = (first.reshape(-1, 1) + np.arange(width)).astype(np.int32)
        lengths = np.where(is_idle, 0, length - 1).astype(np.int32)
        starts = np.zeros((shards, each + 1), np.int32)
        starts[:, 1:] = np.cumsum(lengths.reshape(shards, each), axis=1)
        packed = np.zeros((shards, power_of_two(each * (length - 1))), np.int32)
        packed[:, : each * (length - 1)] = ids[:, :-1].reshape(shards, -1)
        arrays = (packed.reshape(-1), starts.reshape(-1), lengths, table)
        chunk = PrefillBatch(*(jnp.asarray(array) for array in arrays))
        self._last, self._tokens, self._cached = ids[:, -1].astype(np.int32), [], lengths
        self._table, self._is_active = chunk.table, ~is_idle
        jax.block_until_ready(self._cache)
        begin = time.perf_counter()
        if length > 1:
            self._cache, _ = self._runner.prefill(self._cache, chunk)
        self.decode(1)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        """Makes `steps` tokens of each row in one call of the jitted loop. Returns seconds."""
        begin = time.perf_counter()
        call = DecodeCall(self._batch(), self._sampling, steps, max_steps=self._max_steps(steps))
        self._cache, started = self._runner.decode(self._cache, call)
        report = started.result()
        tokens = np.asarray(report.tokens)
        self._tokens.append(tokens[:, :steps])
        self._last, self._cached = tokens[:, steps - 1], self._cached + steps
        return time.perf_counter() - begin

    def tokens(self, count: int) -> Int[np.ndarray, "B count"]:
        """The first tokens made since the last prefill."""
        return np.concatenate(self._tokens, axis=1)[: self._batch_size, :count]

    def decode_text(self, steps: int = 1) -> str:
        """The compiled decode loop of the last prefill's bucket, as HLO text; "" where a loop is many programs."""
        if isinstance(self._runner, HostExecutor):
            return ""
        cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._cache)
        program = self._runner.decode_program(cache, self._batch(), self._sampling, max_steps=self._max_steps(steps))
        return program.as_text() or ""

    def _batch(self) -> DecodeBatch:
        num_generated = np.full(self._last.shape, sum(tokens.shape[1] for tokens in self._tokens), np.int32)
        last, cached, made, active = jax.device_put((self._last, self._cached, num_generated, self._is_active))
        return DecodeBatch(last, cached, made, active, self._table)

    @staticmethod
    def _max_steps(steps: int) -> int:
        return max(STEPS_PER_CALL, power_of_two(steps))


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
                # A group of its own: Ctrl-C is ours to answer.
                [python, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,
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
        if kind is not None:
            self._process.kill()
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


def prefill_products(config: TextConfig, length: int) -> dict[tuple[int, int, int], int]:
    """The matrix products of reading a prompt: how often each (M, N, K) occurs.

    Experts have the even share of rows each. The products of attention itself, which depend on the data's length twice,
    are not among them.
    """
    hidden, rank, head = config.hidden_size, config.share_q_dim, config.head_dim
    products: collections.Counter[tuple[int, int, int]] = collections.Counter()

    def add(count: int, rows: int, *sizes: tuple[int, int]) -> None:
        for outputs, inputs in sizes:
            products[rows, outputs, inputs] += count

    num_experts, num_moe = config.moe_num_experts, len(config.moe_layers)
    query = (rank, hidden), (config.query_size, rank), (hidden, config.query_size)
    add(config.num_hidden_layers, length, *query, (head, hidden), (head, hidden))
    for count, rows, width in (
        (config.num_hidden_layers - num_moe, length, config.intermediate_size),
        (num_moe, length, config.share_expert_dim),
        (num_moe * num_experts, max(1, length * config.moe_top_k // num_experts), config.moe_intermediate_size),
    ):
        add(count, rows, (width, hidden), (width, hidden), (hidden, width))
    add(num_moe, length, (num_experts, hidden))
    add(1, 1, (config.vocab_size, hidden))
    return {shape: count for shape, count in products.items() if count}


def product_rate(dtype: str, products: Mapping[tuple[int, int, int], int], repeats: int = 5) -> float:
    """FLOP/s of these products, each by itself at the best rate seen: XLA's, and for float32 also numpy's."""
    rng = np.random.default_rng(0)
    product = jax.jit(_product)
    operations, seconds = 0.0, 0.0
    for (rows, outputs, inputs), count in products.items():
        left, right = (rng.standard_normal((size, inputs), np.float32) for size in (rows, outputs))
        placed = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
        calls: list[Callable[[], object]] = [lambda placed=placed: product(*placed).block_until_ready()]  # type: ignore[misc]
        if dtype == "float32":
            calls.append(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        best = float("inf")
        for call in calls:
            call()
            for _ in range(repeats):
                begin = time.perf_counter()
                call()
                best = min(best, time.perf_counter() - begin)
        operations += count * 2 * rows * outputs * inputs
        seconds += count * best
    return operations / seconds


def _product(left: Float[Array, "M K"], right: Float[Array, "N K"]) -> Float[Array, "M N"]:
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
