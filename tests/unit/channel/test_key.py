"""The keys of a run."""

from __future__ import annotations

from step3_jax.channel.key import derive_keys


def test_both_ends_derive_each_others_keys_from_the_secret() -> None:
    driver, worker = (derive_keys(b"s" * 32, is_driver=is_driver) for is_driver in (True, False))
    assert (driver.peer, worker.peer) == (worker.public, driver.public)
    assert len({driver.public, driver.secret, worker.public, worker.secret}) == 4
    assert derive_keys(b"t" * 32, is_driver=True).public != driver.public
