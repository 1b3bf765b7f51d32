"""The order of ticks: each role computes what the other has sent it, in time, whatever is in flight."""

from __future__ import annotations

import pytest

from step3_jax.layout.schedule import Item, Schedule

CASES = [(layers, count) for layers in (1, 2, 5) for count in (1, 2, 3, 4)]


def run_rotations(schedule: Schedule, num_rotations: int) -> list[tuple[int, Item | None, Item | None]]:
    """For each tick of some rotations: the tick, what has come back to attention, and what the FFN side has."""
    found = []
    # What waits for its exchange, and what arrived with the last one.
    fresh: dict[str, Item | None] = {"attention": None, "ffn": None}
    arrived: dict[str, Item | None] = {"attention": None, "ffn": None}
    for tick in range(num_rotations * schedule.num_ticks):
        found.append((tick, arrived["attention"], arrived["ffn"]))
        place = tick % schedule.num_ticks
        computed = {"attention": schedule.attention_item(place), "ffn": arrived["ffn"]}
        sent = {
            "attention": fresh["attention"] if schedule.attention_lag else computed["attention"],
            "ffn": fresh["ffn"] if schedule.ffn_lag else computed["ffn"],
        }
        fresh, arrived = computed, {"attention": sent["ffn"], "ffn": sent["attention"]}
    return found


@pytest.mark.parametrize(("layers", "count"), CASES)
def test_every_item_is_computed_once_a_rotation_by_each_role(layers: int, count: int) -> None:
    schedule = Schedule(layers, count)
    items = sorted(Item(layer, index) for layer in range(layers) for index in range(count))
    for item_of in (schedule.attention_item, schedule.ffn_item):
        assert sorted(item for tick in range(schedule.num_ticks) if (item := item_of(tick)) is not None) == items


@pytest.mark.parametrize(("layers", "count"), CASES)
def test_each_role_computes_what_has_come_by_the_last_exchange(layers: int, count: int) -> None:
    schedule = Schedule(layers, count)
    for tick, back, sent in run_rotations(schedule, 3):
        place = tick % schedule.num_ticks
        is_first = tick < schedule.num_ticks
        if not (is_first and schedule.is_from_before(place)):
            assert schedule.ffn_item(place) == sent
        item = schedule.attention_item(place)
        if item is not None and not (is_first and item.layer == 0):
            assert back == Item((item.layer - 1) % layers, item.microbatch)


@pytest.mark.parametrize(("layers", "count"), CASES)
def test_all_has_come_back_after_the_last_exchanges(layers: int, count: int) -> None:
    schedule = Schedule(layers, count)
    steps = run_rotations(schedule, 2)[schedule.num_ticks :]
    back = [item for _, item, _ in steps[: schedule.num_last_exchanges + 1] if item is not None]
    assert [item.microbatch for item in back if item.layer == layers - 1] == list(range(count))


@pytest.mark.parametrize(("layers", "count"), CASES)
def test_items_that_come_late_are_the_last_ones_of_the_rotation_before(layers: int, count: int) -> None:
    schedule = Schedule(layers, count)
    items = [item for tick in range(schedule.num_ticks) if (item := schedule.ffn_item(tick)) is not None]
    every = [Item(layer, index) for layer in range(layers) for index in range(count)]
    late = schedule.num_late_items
    assert items == every[len(every) - late :] + every[: len(every) - late]


@pytest.mark.parametrize(("count", "idle"), [(1, 1), (2, 0), (3, 0), (4, 0)])
def test_only_a_lone_micro_batch_leaves_ticks_idle(count: int, idle: int) -> None:
    schedule = Schedule(3, count)
    assert [schedule.attention_item(tick) for tick in range(schedule.num_ticks)].count(None) == 3 * idle
    assert schedule.num_idle_ticks == idle
