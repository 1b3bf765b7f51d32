"""What a process tells its keeper about its progress."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

from step3_jax.beacon import Beacon, BeaconFile, read_beacon
from step3_jax.rank import BEACON


def make(path: pathlib.Path) -> BeaconFile:
    with path.open("w+b") as file:
        return BeaconFile(file)


def test_a_beacon_tells_where_its_process_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "beacon"
    file = make(path)
    assert file.read().process_id == 0
    assert str(file.read()) == "at the start"
    beacon = Beacon.from_environment({BEACON: str(path)})
    assert file.read().process_id == os.getpid()
    call = beacon.enter("decode")
    assert str(file.read()) == str(read_beacon(path)) == "in decode, call 1"
    # Only where steps are traced.
    beacon.step(17, 1033)
    assert str(file.read()) == "in decode, call 1, step 17, last exchange 1033"
    before = file.read()
    beacon.leave(call)
    assert str(file.read()) == "after call 1, step 17, last exchange 1033"
    assert file.read().changes > before.changes
    give_up_at = time.monotonic() + 20
    while file.read().beats == before.beats:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    file.close()


def test_a_second_beacon_of_the_process_writes_to_the_same_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "beacon"
    file = make(path)
    first, second = Beacon(path), Beacon(path)
    first.enter("prefill")
    second.enter("decode")
    assert str(file.read()) == "in decode, call 2"


def test_of_two_calls_under_way_the_later_one_is_the_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "beacon"
    file, beacon = make(path), Beacon(path)
    calls = [beacon.enter("prefill"), beacon.enter("decode"), beacon.enter("decode")]
    beacon.leave(calls[0])
    beacon.leave(calls[1])
    assert file.read().place == "decode"
    beacon.leave(calls[2])
    assert file.read().place == ""


def test_a_call_of_a_kind_that_has_returned_is_repeated(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "beacon"
    file, beacon = make(path), Beacon(path)
    for is_repeated in (False, True):
        call = beacon.enter("decode")
        assert file.read().is_repeated is is_repeated
        beacon.leave(call)
    beacon.enter("prefill")
    assert not file.read().is_repeated


def test_a_long_place_is_cut(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "beacon"
    file = make(path)
    Beacon(path).enter("é" * 200)
    assert file.read().place == "é" * 48


def test_without_a_keeper_nothing_is_written(tmp_path: pathlib.Path) -> None:
    beacon = Beacon.from_environment({})
    beacon.leave(beacon.enter("decode"))
    beacon.step(1, 1)
    assert not list(tmp_path.iterdir())


def test_what_is_no_beacon_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a beacon"):
        read_beacon(tmp_path / "other")
