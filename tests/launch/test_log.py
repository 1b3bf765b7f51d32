"""What the launcher shows of its ranks."""

from __future__ import annotations

import io

from step3_jax.launch.log import Log


def test_after_an_interrupt_only_rank_0_is_shown_and_the_tails_are_kept() -> None:
    stdout, stderr = io.BytesIO(), io.StringIO()
    log = Log(stdout, stderr)
    for rank in range(2):
        log.push(rank, "here", "stderr", b"before\n")
    log.interrupt()
    for rank in range(2):
        log.push(rank, "here", "stderr", b"after\n")
    log.push(0, "here", "stdout", b"an answer")
    assert stderr.getvalue() == "[0 here] before\n[1 here] before\n[0 here] after\n"
    assert stdout.getvalue() == b"an answer"
    assert log.tail(1) == ["before", "after"]
