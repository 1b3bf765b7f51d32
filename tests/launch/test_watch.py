"""Who is to blame, when several ranks fail one after the other."""

from __future__ import annotations

import pytest

from step3_jax.afd.watch import SETTLE_S, Failure, Report, Watch

ROLES = ["attention 0", "attention 1", "ffn 0"]
DEADLINE_S, START_S = 10.0, 60.0


@pytest.fixture
def watch() -> Watch:
    """Three ranks that have come, and are in decode."""
    found = Watch(ROLES, deadline_s=DEADLINE_S, start_timeout_s=START_S)
    for rank, host in enumerate("abc"):
        found.come(rank, host)
    hear_all(found, changes=1)
    return found


def hear_all(watch: Watch, *, changes: int = 0, still_s: tuple[float, ...] = (0, 0, 0), inside: bool = True) -> None:
    for rank in range(3):
        watch.hear(rank, Report(f"in decode, step {rank + 5}", changes, inside, rank + 5, still_s[rank]))


def blamed(watch: Watch) -> str | None:
    """Who is blamed for what, once all that happened together was heard of."""
    watch.pass_time(SETTLE_S)
    failure = watch.judge()
    return None if failure is None else f"{watch.name(failure.rank)} {failure.text}"


def test_nobody_is_blamed_while_all_come_forward(watch: Watch) -> None:
    for second in range(100):
        watch.pass_time(1)
        hear_all(watch, changes=second)
        assert watch.judge() is None


def test_a_consequence_is_judged_only_when_its_cause_could_have_been_heard(watch: Watch) -> None:
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    assert watch.judge() is None
    watch.fail(Failure(2, "was killed", is_sudden=True))
    failure = watch.judge()
    assert failure is not None
    assert failure.rank == 2
    assert watch.name(failure.rank) == "ffn 0 (rank 2 on c)"


def test_who_stood_still_is_blamed_for_the_others_losing_it(watch: Watch) -> None:
    hear_all(watch, still_s=(0, 4.0, 0))
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    assert blamed(watch) == "attention 1 (rank 1 on b) has not moved for 4 s (stopped?), in decode, step 6"


def test_who_fell_silent_is_blamed_for_the_others_losing_it(watch: Watch) -> None:
    for _ in range(4):
        watch.pass_time(1)
        for rank in (0, 1):
            watch.hear(rank, Report("in decode", 9, True, 6, 0.0))
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    watch.fail(Failure(1, "lost the connection", is_consequence=True))
    assert str(blamed(watch)).startswith("ffn 0 (rank 2 on c) has not moved for 5 s")


def test_who_never_came_is_blamed_for_the_others_losing_it() -> None:
    watch = Watch(ROLES[1:], deadline_s=DEADLINE_S, start_timeout_s=START_S)
    watch.come(0, "a")
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    assert blamed(watch) == "ffn 0 (rank 1) was lost before its supervisor had been heard of"


def test_without_another_cause_the_first_loss_is_told(watch: Watch) -> None:
    watch.fail(Failure(1, "lost the connection", is_consequence=True))
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    assert blamed(watch) == "attention 1 (rank 1 on b) lost the connection"


def test_a_mistake_that_was_explained_comes_before_the_losses_it_caused(watch: Watch) -> None:
    watch.fail(Failure(0, "lost the connection", is_consequence=True))
    watch.fail(Failure(2, "failed with exit code 2: no such file", is_explained=True))
    assert blamed(watch) == "ffn 0 (rank 2 on c) failed with exit code 2: no such file"


def test_a_silent_host_is_lost_after_the_deadline(watch: Watch) -> None:
    for second in range(20):
        watch.pass_time(1)
        for rank in (0, 1):
            watch.hear(rank, Report("in decode", second, True, 6, 0.0))
        failure = watch.judge()
        assert (failure is not None) == (second + 1 > DEADLINE_S)
        if failure is not None:
            assert failure.rank == 2
            assert "has not been heard for 11 s" in failure.text
            assert failure.text.endswith("it was last in decode, step 7")
            break


def test_who_does_not_come_is_named_after_the_workers_had_their_say() -> None:
    watch = Watch(ROLES, deadline_s=1000, start_timeout_s=START_S)
    watch.come(0, "a")
    watch.come(2, "c")
    watch.pass_time(START_S + 1)
    assert watch.judge() is None
    watch.pass_time(20)
    assert str(blamed(watch)).startswith("attention 1 (rank 1) has not come within 60 s")


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
    assert not watch.is_over()


def test_all_waiting_for_each_other_for_many_deadlines_is_told_with_all_places(watch: Watch) -> None:
    found = None
    for second in range(60):
        watch.pass_time(1)
        hear_all(watch, changes=7)
        found = watch.judge()
        if found is not None:
            assert second >= 5 * DEADLINE_S
            break
    assert found is not None
    assert found.rank == 0
    assert "no process has come forward for 50 s" in found.text
    assert "ffn 0 (rank 2 on c) is in decode, step 7" in found.text


def test_before_the_first_step_nobody_is_hurried() -> None:
    watch = Watch(["attention 0", "ffn 0"], deadline_s=DEADLINE_S, start_timeout_s=START_S)
    for rank in (0, 1):
        watch.come(rank, "a")
    for _ in range(1000):
        watch.pass_time(1)
        for rank in (0, 1):
            watch.hear(rank, Report("in loading weights", 2, True, -1, 0.0))
        assert watch.judge() is None
