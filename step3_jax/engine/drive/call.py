"""Rank 0's calls as messages of the channel, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from pallas_kernels.storage import STORAGES, Storage
from step3_jax.channel.message import Message, MessageError, Value
from step3_jax.engine.state import DecodeBatch, DecodeCall, HistoryUpdate, PrefillBatch
from step3_jax.sampling.batch import SamplingBatch
from step3_jax.sampling.speculation import Speculation

_BATCH, _SAMPLING, _HISTORY = "batch.", "sampling.", "history."


@dataclasses.dataclass(frozen=True)
class AllocateCache:
    """See `Executor.allocate_cache`."""

    place: ClassVar[str] = "allocating the cache"
    num_pages: int
    storage: Storage


@dataclasses.dataclass(frozen=True)
class MeasureMemory:
    """See `Executor.cache_memory_bytes`."""

    place: ClassVar[str] = "measuring memory"
    rows: int
    chunk_tokens: int
    step_tokens: int = 1
    history_tokens: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class EncodeImages:
    """See `Executor.encode_images`."""

    place: ClassVar[str] = "encoding images"
    pixels: Float[np.ndarray, "images 3 S S"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prefill:
    """See `Executor.prefill`."""

    place: ClassVar[str] = "prefill"
    batch: PrefillBatch


@dataclasses.dataclass(frozen=True, eq=False)
class Decode:
    """See `Executor.decode`."""

    place: ClassVar[str] = "decode"
    call: DecodeCall


@dataclasses.dataclass(frozen=True)
class CopyPages:
    """See `Executor.copy_pages`."""

    place: ClassVar[str] = "copying pages"
    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PrefillSizes:
    """A chunk of prompts for a process that needs only its size: its tokens, including padding."""

    place: ClassVar[str] = "prefill"
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """A decode call for a process that needs none of its batch; see `DecodeCall`. Each row has 1 + `num_guesses` tokens."""

    place: ClassVar[str] = "decode"
    num_rows: int
    num_steps: int
    max_steps: int
    num_guesses: int


Call = AllocateCache | MeasureMemory | EncodeImages | Prefill | Decode | CopyPages | PrefillSizes | DecodeSizes
_PLAIN: dict[str, type[AllocateCache | MeasureMemory | CopyPages | PrefillSizes | DecodeSizes]] = {
    kind.__name__: kind for kind in (AllocateCache, MeasureMemory, CopyPages, PrefillSizes, DecodeSizes)
}


def sizes_of(call: Call) -> Call | None:
    """What a process that takes no batches is told about a call; None if nothing."""
    if isinstance(call, Prefill):
        return PrefillSizes(call.batch.token_ids.shape[0])
    if isinstance(call, Decode):
        inner = call.call
        num_guesses = 0 if inner.speculation is None else inner.speculation.num_speculative_tokens
        return DecodeSizes(inner.batch.last.shape[0], inner.num_steps, inner.max_steps, num_guesses)
    return call if isinstance(call, MeasureMemory) else None


def to_message(call: Call) -> Message:
    """A call as plain data. Its arrays are not copied, and must not be changed afterwards."""
    kind = type(call).__name__
    fields: dict[str, Value]
    if isinstance(call, Prefill):
        return Message(kind, _chunk_fields(call.batch))
    if isinstance(call, Decode):
        inner = call.call
        fields = {"num_steps": inner.num_steps, "max_steps": inner.max_steps, "leave_early": bool(inner.leave_early)}
        fields["speculation"] = None if inner.speculation is None else list(dataclasses.astuple(inner.speculation))
        fields |= _named(_BATCH, inner.batch._asdict()) | _named(_SAMPLING, inner.sampling._asdict())
        fields |= {} if inner.history is None else _named(_HISTORY, inner.history._asdict())
        # Page tables, sampling parameters and masks are mostly those of the last call.
        return Message(kind, fields, keeps=True)
    if isinstance(call, EncodeImages):
        return Message(kind, {"pixels": call.pixels})
    if isinstance(call, CopyPages):
        return Message(kind, {"sources": [*map(int, call.sources)], "targets": [*map(int, call.targets)]})
    return Message(kind, dataclasses.asdict(call))


def from_message(message: Message) -> Call:
    """The call in a message.

    Raises:
      MessageError: If the message is not a call.
    """
    kind, fields, _ = message
    try:
        if kind == "Prefill":
            return Prefill(_read_chunk(dict(fields)))
        if kind == "Decode":
            batch = DecodeBatch(**_part(_BATCH, fields))
            sampling = SamplingBatch(**_part(_SAMPLING, fields))
            numbers = {name: int(fields[name]) for name in ("num_steps", "max_steps")}
            speculation = _read_speculation(fields["speculation"])
            kept = _part(_HISTORY, fields)
            more = {"speculation": speculation, "history": HistoryUpdate(**kept) if kept else None}
            return Decode(DecodeCall(batch, sampling, **numbers, leave_early=bool(fields["leave_early"]), **more))
        if kind == "EncodeImages":
            return EncodeImages(_array(fields["pixels"]))
        if kind == "AllocateCache" and fields["storage"] not in STORAGES:
            raise MessageError(f"{fields['storage']!r} is not a page format")
        plain = _PLAIN[kind]
        if plain is CopyPages:
            return CopyPages(tuple(fields["sources"]), tuple(fields["targets"]))
        return plain(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise MessageError(f"{kind} is not a call: {error}") from None


def _chunk_fields(batch: PrefillBatch) -> dict[str, Value]:
    fields: dict[str, Value] = batch._asdict()
    features, rows = fields["features"], fields["feature_rows"]
    if isinstance(features, np.ndarray) and isinstance(rows, np.ndarray):
        # What follows a token's own ids is padding, megabytes of it.
        fields |= {"features": features[: int(rows.max(initial=-1)) + 1], "num_features": len(features)}
    return fields


def _read_chunk(fields: dict[str, Value]) -> PrefillBatch:
    count, features = fields.pop("num_features", None), fields["features"]
    if isinstance(count, int):
        used = _array(features)
        whole = np.zeros((count, used.shape[1]), used.dtype)
        whole[: len(used)] = used
        fields["features"] = whole
    return PrefillBatch(**fields)


def _read_speculation(value: Value) -> Speculation | None:
    if value is None:
        return None
    names = [field.name for field in dataclasses.fields(Speculation)]
    if not isinstance(value, list):
        raise MessageError("speculation is not a list of numbers")
    return Speculation(**dict(zip(names, value, strict=True)))


def _array(value: Value) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise MessageError("an array is missing")
    return value


def _named(prefix: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    return {prefix + name: value for name, value in fields.items()}


def _part(prefix: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}


def page_numbers(pages: Sequence[int]) -> tuple[int, ...]:
    """Page numbers in the form that a call has them."""
    return tuple(map(int, pages))
