"""Which rank is to blame, when several fail one after the other."""

from __future__ import annotations

import pytest

from step3_jax.launch.watch import LOST_PEER_CODE, SETTLE_S, Failure, Report, Watch
from step3_jax.rank import name_rank

NAMES = {0: "attention 0 (rank 0 on a)", 1: "attention 1 (rank 1 on b)", 2: "ffn 0 (rank 2 on c)"}
DEADLINE_S = 10.0


@pytest.fixture
def watch() -> Watch:
    """Three ranks in decode."""
    found = Watch(NAMES, deadline_s=DEADLINE_S)
    hear_all(found, changes=1)
    return found


def hear_all(
    watch: Watch,
    *,
    changes: int = 0,
    still_s: tuple[float, ...] = (0, 0, 0),
    inside: bool = True,
    repeated: bool = True,
) -> None:
    for rank in range(3):
        where = f"in decode, call {rank + 5}"
        watch.hear(rank, Report(where, changes, inside, repeated, rank + 5, still_s[rank]))


def blamed(watch: Watch) -> str | None:
    """Which rank is blamed for what, once all that happened together was heard of."""
    watch.pass_time(SETTLE_S)
    failure = watch.judge()
    return None if failure is None else f"{watch.name(failure.rank)} {failure.text}"


def test_no_rank_is_blamed_while_all_make_progress(watch: Watch) -> None:
    for second in range(300):
        watch.pass_time(1)
        hear_all(watch, changes=second)
        assert watch.judge() is None


def test_a_consequence_is_judged_only_when_its_cause_could_have_been_heard(watch: Watch) -> None:
    watch.fail(Failure(0, "failed", 1, is_consequence=True))
    assert watch.judge() is None
    watch.fail(Failure(2, "was killed", 137))
    failure = watch.judge()
    assert failure is not None
    assert (failure.rank, failure.code) == (2, 137)


def test_a_rank_that_stood_still_is_blamed_for_the_others_losing_it(watch: Watch) -> None:
    hear_all(watch, still_s=(0, 4.0, 0))
    watch.fail(Failure(0, "failed", 1, is_consequence=True))
    assert blamed(watch) == "attention 1 (rank 1 on b) has made no progress for 4 s (stopped?), in decode, call 6"
    failure = watch.judge()
    assert failure is not None
    assert failure.code == LOST_PEER_CODE


def test_a_rank_whose_host_fell_silent_is_blamed_for_the_others_losing_it(watch: Watch) -> None:
    for _ in range(4):
        watch.pass_time(1)
        for rank in (0, 1):
            watch.hear(rank, Report("in decode", 9, True, True, 6))
    watch.fail(Failure(0, "failed", 1, is_consequence=True))
    watch.fail(Failure(1, "failed", 1, is_consequence=True))
    assert str(blamed(watch)).startswith("ffn 0 (rank 2 on c) has made no progress for 5 s")


def test_without_another_cause_the_first_loss_is_told(watch: Watch) -> None:
    watch.fail(Failure(1, "failed", 1, is_consequence=True))
    watch.fail(Failure(0, "failed", 1, is_consequence=True))
    assert blamed(watch) == "attention 1 (rank 1 on b) failed"


def test_a_rank_that_knows_of_another_s_failure_is_not_its_cause(watch: Watch) -> None:
    watch.fail(Failure(0, "left", LOST_PEER_CODE, is_consequence=True))
    watch.fail(Failure(2, "failed with exit code 1", 1, is_consequence=True))
    assert blamed(watch) == "ffn 0 (rank 2 on c) failed with exit code 1"


def test_a_mistake_comes_before_the_losses_it_caused(watch: Watch) -> None:
    watch.fail(Failure(0, "failed", 1, is_consequence=True))
    watch.fail(Failure(2, "failed with exit code 2", 2))
    assert blamed(watch) == "ffn 0 (rank 2 on c) failed with exit code 2"


def test_a_rank_that_does_not_move_for_the_deadline_is_lost(watch: Watch) -> None:
    hear_all(watch, still_s=(0, 0, DEADLINE_S - 0.1))
    assert blamed(watch) is None
    hear_all(watch, still_s=(0, 0, DEADLINE_S + 0.5))
    assert str(blamed(watch)).startswith(
        "ffn 0 (rank 2 on c) has made no progress for 10 s (stopped, or starved of CPU"
    )


@pytest.mark.parametrize(("leaver", "inside", "is_failure"), [(2, True, True), (2, False, False), (0, False, True)])
def test_a_good_end_is_a_failure_only_where_others_still_need_the_rank(
    watch: Watch, leaver: int, inside: bool, is_failure: bool
) -> None:
    hear_all(watch, changes=7, inside=inside)
    watch.end(leaver)
    # Not for the others' silence.
    for _ in range(13):
        watch.pass_time(1)
        hear_all(watch, changes=7, inside=inside)
    found = blamed(watch)
    assert (found is not None) == is_failure
    if found is not None:
        assert "has ended normally (exit code 0), and for" in found


def test_a_rank_that_makes_no_calls_may_work_on_after_rank_0_has_ended(watch: Watch) -> None:
    for rank in (1, 2):
        watch.hear(rank, Report("at the start", 2))
    watch.end(0)
    for _ in range(100):
        watch.pass_time(1)
    assert watch.judge() is None


def test_all_waiting_for_each_other_for_many_deadlines_is_told_with_all_places(watch: Watch) -> None:
    found = None
    for second in range(150):
        watch.pass_time(1)
        hear_all(watch, changes=7)
        found = watch.judge()
        if found is not None:
            assert second >= 10 * DEADLINE_S
            break
    assert found is not None
    assert found.rank == 0
    assert "no rank has made progress for 100 s" in found.text
    assert "ffn 0 (rank 2 on c) is in decode, call 7" in found.text


@pytest.mark.parametrize(("inside", "repeated"), [(True, False), (False, True)])
def test_a_call_that_may_compile_and_a_service_without_requests_are_not_hurried(
    watch: Watch, inside: bool, repeated: bool
) -> None:
    for _ in range(2000):
        watch.pass_time(1)
        hear_all(watch, changes=7, inside=inside, repeated=repeated)
        assert watch.judge() is None


def test_a_rank_without_a_role_is_named_once() -> None:
    assert name_rank("rank 3", 3, "b") == "rank 3 (on b)"
    assert name_rank("ffn 0", 3, "b") == "ffn 0 (rank 3 on b)"
