"""Calls as messages: the same on the other side, and only the sizes for workers that need no batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from step3_jax.channel.message import Decoder, Encoder, Message, MessageError
from step3_jax.engine.drive.call import (
    AllocateCache,
    Call,
    CopyPages,
    Decode,
    DecodeSizes,
    EncodeImages,
    MeasureMemory,
    Prefill,
    PrefillSizes,
    from_message,
    sizes_of,
    to_message,
)
from step3_jax.engine.state import DecodeBatch, DecodeCall, HistoryUpdate, PrefillBatch
from step3_jax.sampling.batch import SamplingRow, sampling_batch
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.speculation import Speculation

SPECULATION = Speculation(num_speculative_tokens=3, prompt_lookup_max=5, prompt_lookup_min=1)


def carry(call: Call, encoder: Encoder | None = None, decoder: Decoder | None = None) -> tuple[Call, int]:
    """A call on the other side, and its bytes."""
    frames = [bytes(frame) for frame in (encoder or Encoder()).encode(to_message(call))]
    return from_message((decoder or Decoder()).decode(frames)), sum(map(len, frames))


def decode_call(history: np.ndarray | None = None) -> DecodeCall:
    rows = [SamplingRow(SamplingParams(temperature=0.5, logprobs=2), 9, (1, 2), (3,))] * 2
    numbers = np.array([4, 5], np.int32)
    table = np.arange(8, dtype=np.int32).reshape(2, 4)
    batch = DecodeBatch(numbers, numbers + 1, numbers, np.array([True, False]), table, history)
    update = HistoryUpdate(7, 2, 256, True, np.arange(256, dtype=np.int32)[None], np.ones((1, 256), np.int32))
    return DecodeCall(batch, sampling_batch(rows, 61, 2), 3, 32, True, SPECULATION, update)


def test_a_decode_call_arrives_as_it_was() -> None:
    given = decode_call(np.full((2, 256), 61, np.int32))
    found, _ = carry(Decode(given))
    assert isinstance(found, Decode)
    call = found.call
    assert (call.num_steps, call.max_steps, call.leave_early, call.speculation) == (3, 32, True, SPECULATION)
    assert call.history is not None
    assert given.history is not None
    assert call.history[:4] == given.history[:4]
    np.testing.assert_array_equal(call.history.places, given.history.places)
    np.testing.assert_array_equal(call.history.tokens, given.history.tokens)
    for name, array in (*given.batch._asdict().items(), *given.sampling._asdict().items()):
        got = getattr(call.batch if name in given.batch._fields else call.sampling, name)
        if array is None:
            assert got is None
        else:
            np.testing.assert_array_equal(got, array)


def test_a_call_that_writes_no_history_arrives_so() -> None:
    whole = decode_call()
    for history in (None, HistoryUpdate(0, 2, 256, False, np.zeros((0, 256), np.int32), np.zeros((0, 256), np.int32))):
        found, _ = carry(Decode(dataclasses.replace(whole, history=history)))
        assert isinstance(found, Decode)
        got = found.call.history
        assert got is None if history is None else got is not None and got.places.shape == (0, 256)


def test_what_did_not_change_since_the_last_call_is_not_sent() -> None:
    encoder, decoder = Encoder(), Decoder()
    given = decode_call(np.full((2, 4096), 61, np.int32))
    first, whole = carry(Decode(given), encoder, decoder)
    batch = given.batch._replace(last=given.batch.last + 1)
    again, rest = carry(Decode(DecodeCall(batch, given.sampling, 1, 32)), encoder, decoder)
    assert isinstance(first, Decode)
    assert isinstance(again, Decode)
    assert rest < 1000 < whole
    # The executor recognises by identity what is on its devices already.
    assert again.call.batch.history is first.call.batch.history
    assert again.call.sampling.bias_ids is first.call.sampling.bias_ids
    np.testing.assert_array_equal(again.call.batch.last, [5, 6])


def test_the_padding_of_features_is_not_sent() -> None:
    features = np.zeros((512, 32), np.float32)
    features[:3] = 1
    rows = np.full((512,), -1, np.int32)
    rows[10:13] = [0, 1, 2]
    numbers = np.zeros((512,), np.int32)
    batch = PrefillBatch(numbers, numbers[:3], numbers[:2], numbers[:4].reshape(2, 2), features, rows)
    found, num_bytes = carry(Prefill(batch))
    assert isinstance(found, Prefill)
    np.testing.assert_array_equal(found.batch.features, features)
    np.testing.assert_array_equal(found.batch.feature_rows, rows)
    assert num_bytes < features.nbytes / 4
    plain, _ = carry(Prefill(batch._replace(features=None, feature_rows=None)))
    assert isinstance(plain, Prefill)
    assert plain.batch.features is None
    # The warm-up's chunk has room for features, and none.
    idle, _ = carry(Prefill(batch._replace(feature_rows=np.full((512,), -1, np.int32))))
    assert isinstance(idle, Prefill)
    assert idle.batch.features is not None
    assert idle.batch.features.shape == features.shape


def test_other_calls_arrive_as_they_were() -> None:
    for call in (
        AllocateCache(64, "fp8"),
        MeasureMemory(8, 512),
        CopyPages((1, 2), (3, 4)),
        DecodeSizes(2, 3, 32, 3),
    ):
        assert carry(call)[0] == call
    pixels = np.ones((1, 3, 4, 4), np.float32)
    images, _ = carry(EncodeImages(pixels))
    assert isinstance(images, EncodeImages)
    np.testing.assert_array_equal(images.pixels, pixels)


def test_sizes_are_enough_where_no_batch_is_needed() -> None:
    assert sizes_of(Decode(decode_call())) == DecodeSizes(2, 3, 32, 3)
    numbers = np.zeros((32,), np.int32)
    assert sizes_of(Prefill(PrefillBatch(numbers, numbers, numbers, numbers[None]))) == PrefillSizes(32)
    for call in (AllocateCache(1, "fp8"), CopyPages((), ()), EncodeImages(np.zeros((1, 3, 4, 4), np.float32))):
        assert sizes_of(call) is None


@pytest.mark.parametrize(
    "message",
    [
        Message("import_module", {"name": "os"}),
        Message("AllocateCache", {"num_pages": 4, "storage": "float64"}),
        Message("AllocateCache", {"num_pages": 4}),
        Message("Decode", {"num_steps": 1, "max_steps": 1, "leave_early": False, "batch.other": 1}),
        Message("EncodeImages", {"pixels": 1}),
        Message("CopyPages", {"sources": 1, "targets": 2}),
    ],
    ids=str,
)
def test_what_is_no_call_is_refused(message: Message) -> None:
    with pytest.raises(MessageError):
        from_message(message)
