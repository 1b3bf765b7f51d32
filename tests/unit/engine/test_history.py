"""The history on the devices: what sequences have, by writing only what came since the last call."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jaxtyping import Array

from step3_jax.engine.history import DeviceHistory, HistoryPacker
from step3_jax.engine.sequence import Sequence
from step3_jax.engine.state import HistoryUpdate
from tests.unit.engine.fake import FakeExecutor, expected
from tests.unit.engine.test_core import add, make_core, prompt_of, request

NUM_TOKENS, MAX_STEPS = 700, 32


class Tokens(types.SimpleNamespace):
    """What a packer looks at of a sequence."""

    token_ids: list[int]


def make_history() -> tuple[DeviceHistory, collections.Counter[str]]:
    traces: collections.Counter[str] = collections.Counter()

    def jit(function: Callable[..., Array], **options: object) -> jax.stages.Wrapped:
        def counted(*given: object) -> Array:
            traces[function.__name__] += 1
            return function(*given)

        return jax.jit(counted, **options)  # type: ignore[call-overload]

    return DeviceHistory(jit, None), traces


def sequence_of(count: int, start: int = 0) -> Sequence:
    return Tokens(token_ids=list(range(start, start + count)))  # type: ignore[return-value]


def check(history: np.ndarray, slots: list[Sequence | None]) -> None:
    for row, sequence in zip(history, slots, strict=True):
        if sequence is not None:
            assert row[: len(sequence.token_ids)].tolist() == sequence.token_ids


def test_the_devices_have_what_the_sequences_have_whatever_comes_and_goes() -> None:
    drawn, (history, traces) = random.Random(0), make_history()
    packer = HistoryPacker(NUM_TOKENS, MAX_STEPS)
    slots: list[Sequence | None] = [None] * 3
    for step in range(60):
        if step == 30:
            # Another number of slots: the places of all change.
            slots = [*slots, None, None]
        for slot, one in enumerate(slots):
            if one is None or len(one.token_ids) > 600 or drawn.random() < 0.1:
                slots[slot] = drawn.choice([None, sequence_of(drawn.choice([1, 40, 500]), drawn.randrange(99))])
            else:
                one.token_ids += [drawn.randrange(99) for _ in range(drawn.randrange(MAX_STEPS))]
        looked_at = [one if drawn.random() < 0.8 else None for one in slots]
        check(np.asarray(history.write(packer.pack(looked_at))), looked_at)
    assert traces["_write"] == 2, "one program for each number of slots"


def test_a_call_brings_only_what_is_new() -> None:
    packer, slots = HistoryPacker(2**16, MAX_STEPS), [sequence_of(9000), None, sequence_of(40)]
    first = packer.pack(slots)
    assert not first.continues
    assert first.places.shape == (-(-9040 // 256), 256)
    assert np.sum(first.places < 3 * 2**16) == 9040
    slots[0].token_ids += [5, 6, 7]
    second = packer.pack(slots)
    assert second.continues
    assert second.places[0, :4].tolist() == [9000, 9001, 9002, 3 * 2**16]
    assert second.tokens[0, :3].tolist() == [5, 6, 7]
    assert second.num_bytes == 2 * 4 * 256
    assert packer.pack(slots).num_bytes == 0
    # One whose place another has had begins anew, and so do all after a failure.
    assert packer.pack([sequence_of(3), None, slots[2]]).continues
    assert np.sum(packer.pack(slots).places < 3 * 2**16) == 9003
    packer.forget()
    again = packer.pack(slots)
    assert not again.continues
    assert np.sum(again.places < 3 * 2**16) == 9043


def test_a_sequence_that_has_ended_is_not_kept() -> None:
    packer, one = HistoryPacker(NUM_TOKENS, MAX_STEPS), sequence_of(3)
    packer.pack([one])
    known, _ = packer._known[0]
    assert known is not None
    assert known() is one
    del one
    assert known() is None


def test_tokens_of_another_engine_are_never_taken_for_ones_own() -> None:
    history, _ = make_history()
    mine, other = HistoryPacker(NUM_TOKENS, MAX_STEPS), HistoryPacker(NUM_TOKENS, MAX_STEPS)
    own, foreign = [sequence_of(30)], [sequence_of(20, start=50)]
    history.write(mine.pack(own))
    check(np.asarray(history.write(other.pack(foreign))), foreign)
    own[0].token_ids.append(4)
    update = mine.pack(own)
    with pytest.raises(RuntimeError, match="another engine has used this executor while sequences were under way"):
        history.write(update)
    mine.forget()
    check(np.asarray(history.write(mine.pack(own))), own)


def test_what_a_failed_call_left_is_not_touched() -> None:
    history, _ = make_history()
    packer, slots = HistoryPacker(NUM_TOKENS, MAX_STEPS), [sequence_of(30)]
    history.write(packer.pack(slots)).delete()
    packer.forget()
    check(np.asarray(history.write(packer.pack(slots))), slots)


def test_an_engine_that_guesses_sends_a_small_part_of_its_sequences() -> None:
    executor = FakeExecutor()
    speculation = {"method": "ngram", "num_speculative_tokens": 4}
    core = make_core(executor, num_pages=40, max_model_len=2048, speculative_config=speculation)
    sinks = [add(core, request(str(index), prompt_of(60, index), 300, steps=4)) for index in range(4)]
    while core.has_work:
        core.step()
    # The fake looks at each call's history.
    assert [sink.ids() for sink in sinks] == [expected(prompt_of(60, index), 300) for index in range(4)]
    num_calls = executor.calls.count("decode")
    assert executor.history is not None
    assert 0 < executor.history_bytes < num_calls * executor.history.nbytes / 8


def test_padding_is_written_nowhere() -> None:
    history, _ = make_history()
    padding = HistoryPacker(4, 1).pack_nothing(2, 1)
    tokens = padding._replace(tokens=np.full_like(padding.tokens, 9))
    assert isinstance(tokens, HistoryUpdate)
    assert not np.asarray(history.write(tokens)).any()


def test_the_figures_of_the_documentation_are_those_of_a_call() -> None:
    num_slots, num_tokens = 64, 32_768
    packer = HistoryPacker(num_tokens, MAX_STEPS)
    slots: list[Sequence | None] = [sequence_of(100) for _ in range(num_slots)]
    packer.pack(slots)
    for one in slots:
        assert one is not None
        one.token_ids += range(MAX_STEPS)
    assert packer.pack(slots).num_bytes == 16 * 2**10
    assert 4 * num_slots * num_tokens == 8 * 2**20
