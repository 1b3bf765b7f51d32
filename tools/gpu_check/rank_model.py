"""One of eight ranks of Step3, as the product runs it: its decoder and decode loop, random weights of a rank's shapes.

The rank is one of `--tp 8`: it has its own sequences with their cache, all weights of attention but the o-projection,
and an eighth of everything else, including 6 of the 48 experts. What the ranks would exchange is copied locally: the tokens
of all ranks are this rank's own, eight times, with the chosen experts rotated by one rank's share each time, so that every
pair falls on this rank's experts exactly once; the eight parts of a sum are then added. So the bytes and the arithmetic are
a rank's, the network is left out, and the tokens mean nothing.
"""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.pages import KVPages
from pallas_kernels.storage import PAGE_SIZE, Storage, bytes_per_token
from step3_jax.cache.paged import empty_cache
from step3_jax.checkpoint.shapes import abstract_model
from step3_jax.config import ModelConfig, QuantConfig, TextConfig
from step3_jax.engine.runner import SplitModel, TracedCalls, Weights
from step3_jax.engine.state import DecodeBatch
from step3_jax.layers.collective import Group
from step3_jax.layers.expert_exchange import ShardedExperts
from step3_jax.layout.parallel import Parallel, fit_parallel
from step3_jax.layout.table import AXES
from step3_jax.mesh import Layout
from step3_jax.model.arrangement import Arrangement, arrange
from step3_jax.model.layers import layer_modules
from step3_jax.model.parallel import ShardedFfn, parallelise, place_shapes
from step3_jax.model.step3 import Step3
from step3_jax.sampling.batch import SamplingBatch, SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams

SMALL_TEXT = TextConfig(
    hidden_size=1024,
    intermediate_size=1024,
    num_hidden_layers=4,
    share_q_dim=1024,
    moe_num_experts=16,
    moe_intermediate_size=128,
    share_expert_dim=1024,
    moe_layers=(1, 2),
    vocab_size=256,
)


@dataclasses.dataclass(frozen=True)
class RankSizes:
    """Sizes of the model, of the batch, and of a rank's part. Defaults are Step3's, 128 sequences of 4,096 tokens.

    Attributes:
      text: The whole model's configuration.
      num_ranks: Ranks that it is sharded across.
      batch: Sequences of the rank.
      context: Tokens of each in the cache.
      storage: Of the cache.
      max_steps: Most steps per call.
    """

    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    num_ranks: int = 8
    batch: int = 128
    context: int = 4096
    storage: Storage = "fp8"
    max_steps: int = 8

    @property
    def layer_pages(self) -> int:
        """Pages of one layer: for what is cached and for the new tokens."""
        return self.batch * -(-(self.context + self.max_steps) // PAGE_SIZE)


def small_sizes() -> RankSizes:
    """Four narrow layers, for a CPU."""
    return RankSizes(SMALL_TEXT, batch=2, context=70)


class RankModel:
    """The rank's program, and the shapes of what it takes.

    Attributes:
      sizes: Of everything.
      calls: The functions that the engine's executors compile.
      shapes: Of the weights.
    """

    def __init__(self, sizes: RankSizes) -> None:
        self.sizes = sizes
        model = _make_model(sizes)
        split = SplitModel(model)
        self.calls = TracedCalls(split.build, collections.Counter(), sizes.text)
        self.shapes: Weights = split.weights
        paths = jax.tree_util.tree_leaves_with_path(nnx.state(model))
        self._are_norms = ["norm" in jax.tree_util.keystr(path) for path, _ in paths]
        embedding = sizes.text.vocab_size * sizes.text.hidden_size // sizes.num_ranks
        self._num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in self.shapes) - 2 * embedding

    @property
    def step_bytes(self) -> int:
        """The least that a step reads and writes: every weight once, every cached token once; activations not counted."""
        text, sizes = self.sizes.text, self.sizes
        token = text.num_hidden_layers * bytes_per_token(text.head_dim, sizes.storage)
        return self._num_bytes + sizes.batch * sizes.context * token

    def make_weights(self, seed: int = 0) -> Weights:
        """Random weights: e4m3 numbers of magnitude below 2, none of them NaN, and scales that keep activations in range."""
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(self.shapes))
        given = zip(keys, self.shapes, self._are_norms, strict=True)
        return [_make_leaf(key, leaf, is_norm=is_norm) for key, leaf, is_norm in given]

    def make_cache(self) -> KVPages:
        """Pages of random keys and values."""
        pages = empty_cache(self.sizes.text, self.sizes.layer_pages, self.sizes.storage)
        if pages.keys.dtype != jnp.float8_e4m3fn:
            return pages
        keys = jax.random.split(jax.random.key(1, impl="rbg"), 2)
        made = [_random_e4m3(key, pages.keys.shape) for key in keys]
        return pages._replace(keys=made[0], values=made[1])

    def make_batch(self) -> tuple[DecodeBatch, SamplingBatch]:
        """Sequences of `context` tokens that continue greedily."""
        sizes = self.sizes
        each = (sizes.batch,)
        batch = DecodeBatch(
            last=jnp.arange(sizes.batch, dtype=jnp.int32),
            cached=jnp.full(each, sizes.context, jnp.int32),
            num_generated=jnp.zeros(each, jnp.int32),
            is_active=jnp.ones(each, bool),
            table=jnp.arange(sizes.layer_pages, dtype=jnp.int32).reshape(sizes.batch, -1),
        )
        row = SamplingRow(SamplingParams(temperature=0), 2 * sizes.max_steps, (0, 0), ())
        return batch, sampling_batch([row] * sizes.batch, sizes.text.vocab_size, sizes.batch)


def _make_model(sizes: RankSizes) -> Step3:
    """The product's model as one device of the ranks has it, its exchanges replaced by copies."""
    config = ModelConfig(
        text=sizes.text,
        vision=None,
        dtype="bfloat16",
        image_token_id=0,
        eos_token_id=0,
        quantization=QuantConfig(),
    )
    parallel = fit_parallel(Parallel(tp=sizes.num_ranks, exchange="gather"), sizes.text, fp8_block=(128, 128))
    layout = Layout(AbstractMesh(parallel.mesh_shape, AXES), parallel)  # type: ignore[arg-type]
    placed = arrange(place_shapes(abstract_model(config), layout), Arrangement.of("gpu", config.dtype))
    graphdef, state = nnx.split(placed)
    model = parallelise(nnx.merge(graphdef, jax.tree.map(_own_part, state)), layout)
    for _, module in nnx.iter_modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, Group) and value.split:
                setattr(module, name, LocalGroup(value.split, value.copies, sizes.num_ranks))
    for layer in layer_modules(model.text.layers):
        ffn: ShardedFfn = layer.ffn
        if ffn.moe is not None:
            ffn.moe = RankExperts(ffn.moe, sizes.num_ranks)
    return model


def _own_part(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)


@dataclasses.dataclass(frozen=True)
class LocalGroup(Group):
    """A group of which this device plays every part: all have the same tokens.

    Attributes:
      size: Devices.
    """

    size: int = 1

    def gather(self, rows: Num[Array, "N *rest"]) -> Num[Array, "M *rest"]:
        """See `Group.gather`."""
        return jnp.tile(rows, (self.size, *[1] * (rows.ndim - 1)))

    def reduce(self, parts: Float[Array, "M D"]) -> Float[Array, "N D"]:
        """See `Group.reduce`."""
        return parts.reshape(self.size, -1, parts.shape[1]).astype(jnp.float32).sum(0).astype(parts.dtype)

    def join_columns(self, part: Float[Array, "M part"]) -> Float[Array, "N whole"]:
        """See `Group.join_columns`."""
        rows = part.shape[0] // self.size
        return part.reshape(self.size, rows, -1).swapaxes(0, 1).reshape(rows, -1)

    def split_columns(self, whole: Float[Array, "N whole"]) -> Float[Array, "M part"]:
        """See `Group.split_columns`."""
        rows, columns = whole.shape
        return whole.reshape(rows, self.size, -1).swapaxes(0, 1).reshape(-1, columns // self.size)


class RankExperts(nnx.Module):
    """A rank's experts; each copy of the tokens counts the experts from another rank's first."""

    def __init__(self, inner: ShardedExperts, num_ranks: int) -> None:
        self.inner = inner
        self.num_ranks = num_ranks
        inner.expert_axes = ()

    def sum_part(
        self, hidden: Float[Array, "N D"], weights: Float[Array, "N top_k"], experts: Int[Array, "N top_k"]
    ) -> Float[Array, "N D"]:
        """See `ShardedExperts.sum_part`."""
        rank = jnp.arange(len(experts), dtype=jnp.int32) // (len(experts) // self.num_ranks)
        turned = experts + rank[:, None] * (self.inner.num_experts // self.num_ranks)
        return self.inner.sum_part(hidden, weights, turned % self.inner.num_experts)


def _make_leaf(key: Array, leaf: jax.ShapeDtypeStruct, *, is_norm: bool) -> Array:
    if leaf.dtype == jnp.float8_e4m3fn:
        return _random_e4m3(key, leaf.shape)
    if leaf.dtype == jnp.float32:
        # Scales, one per 128 columns of weights.
        return jnp.full(leaf.shape, (128 * leaf.shape[-1]) ** -0.5, leaf.dtype)
    if is_norm:
        return jax.random.uniform(key, leaf.shape, leaf.dtype, 0.5, 1.5)
    return jax.random.uniform(key, leaf.shape, leaf.dtype, -1, 1) * jnp.asarray(leaf.shape[-1] ** -0.5, leaf.dtype)


def _random_e4m3(key: Array, shape: tuple[int, ...]) -> Array:
    """Random bits with the exponent's highest bit cleared, in pieces: the words of all would need four times the memory."""

    def one(part: Array) -> Array:
        bits = jax.random.bits(part, shape[1:], jnp.uint8) & jnp.uint8(0b1011_1111)
        return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)

    return lax.map(one, jax.random.split(key, shape[0]))
