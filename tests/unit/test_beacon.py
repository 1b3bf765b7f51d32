"""What a worker tells its supervisor: its place, and its stderr."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Callable

import pytest

from step3_jax.afd.noise import NoiseFilter
from step3_jax.beacon import BEACON, Beacon, BeaconFile, read_beacon
from step3_jax.cli.supervise import read_run

ORDINARY = b"19 tokens, 80 tokens/s\n[Gloo] Rank 0 is connected to 1 peer ranks. Expected number: 1\n"
STACK = (
    b"F1122 02:03:11.053001 5686 x.cc:86] Terminating process\n*** Check failure stack trace: ***\n    @     0x7f2\n"
)
LOST = b"ValueError: UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:538] Connection reset by peer\n"


def wait_until(is_true: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_a_beacon_tells_where_its_worker_is(tmp_path: pathlib.Path) -> None:
    file = BeaconFile(tmp_path / "beacon")
    assert str(file.read()) == "in the start"
    beacon = Beacon.from_environment({BEACON: str(file.path)})
    beacon.enter("decode")
    beacon.step(17, 1033)
    found = file.read()
    assert str(found) == str(read_beacon(file.path)) == "in decode, step 17, last exchange 1033"
    assert found.process_id == os.getpid()
    before = file.read()
    # Another one of the same process writes to the same file.
    Beacon.from_environment({BEACON: str(file.path)}).leave()
    assert str(file.read()) == "between two calls, step 17, last exchange 1033"
    assert file.read().changes > before.changes
    assert file.read().since_s >= before.since_s
    wait_until(lambda: file.read().beats > before.beats)
    file.close()
    assert not file.path.exists()


def test_a_long_place_is_cut(tmp_path: pathlib.Path) -> None:
    file = BeaconFile(tmp_path / "beacon")
    Beacon(file.path).enter("é" * 200)
    assert file.read().place == "é" * 48


def test_without_a_supervisor_nothing_is_written(tmp_path: pathlib.Path) -> None:
    beacon = Beacon.from_environment({})
    beacon.enter("decode")
    beacon.step(1, 1)
    beacon.leave()
    assert not list(tmp_path.iterdir())


def test_what_is_no_beacon_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no beacon"):
        read_beacon(tmp_path / "other")


class Pipe:
    """A filter between two pipes."""

    def __init__(self, hold_s: float) -> None:
        reader, self._writer = os.pipe()
        self._shown, out = os.pipe()
        os.set_blocking(self._shown, False)
        self._out = out
        self.noise = NoiseFilter(os.fdopen(reader, "rb"), out, hold_s=hold_s)
        self.text = b""

    def write(self, data: bytes) -> None:
        os.write(self._writer, data)

    def read(self) -> bytes:
        """All that was shown so far."""
        with contextlib.suppress(BlockingIOError):
            self.text += os.read(self._shown, 2**16)
        return self.text

    def close(self) -> None:
        os.close(self._writer)
        self.noise.join(20)

    def discard(self) -> None:
        for handle in (self._shown, self._out):
            os.close(handle)


def test_ordinary_lines_and_unfinished_ones_pass_at_once() -> None:
    pipe = Pipe(hold_s=1000)
    pipe.write(ORDINARY + b"an answer that gro")
    wait_until(lambda: pipe.read() == ORDINARY + b"an answer that gro")
    assert not pipe.noise.has_lost_peer
    pipe.close()
    assert pipe.noise.keep("x") is None
    pipe.discard()


def test_a_stack_waits_and_can_be_kept_or_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for is_kept in (True, False):
        pipe = Pipe(hold_s=1000)
        pipe.write(b"before\n" + STACK + LOST + b"after\n")
        pipe.close()
        assert pipe.read() == b"before\n"
        assert pipe.noise.has_lost_peer
        assert pipe.noise.last_line == "after"
        if is_kept:
            path = pipe.noise.keep("step3-rank0-")
            assert path is not None
            assert re.fullmatch(r"step3-rank0-\w+\.log", path.name)
            assert path.read_bytes() == STACK + LOST + b"after\n"
        else:
            pipe.noise.release()
            assert pipe.read() == b"before\n" + STACK + LOST + b"after\n"
        pipe.discard()


def test_a_stack_of_a_worker_that_lives_on_is_shown() -> None:
    pipe = Pipe(hold_s=0.2)
    pipe.write(STACK + LOST)
    wait_until(lambda: pipe.read() == STACK + LOST)
    assert not pipe.noise.has_lost_peer
    pipe.close()
    pipe.discard()


VARIABLES = {"STEP3_COORDINATOR": "a:1000", "STEP3_NUM_PROCESSES": "3", "STEP3_PROCESS_ID": "2"}
WORDS = ["generate", "--afd", "2a1f", "-p", "x"]


def test_a_rank_finds_its_run_in_words_and_variables() -> None:
    run = read_run([*WORDS, "--afd-deadline", "7"], VARIABLES | {"STEP3_WATCH_TOKEN": "t", "STEP3_START_TIMEOUT": "9"})
    assert run is not None
    assert (run.rank, run.roles) == (2, ("attention 0", "attention 1", "ffn 0"))
    assert (run.host, run.port, run.token) == ("a", 1001, "t")
    assert (run.deadline_s, run.start_timeout_s) == (7.0, 9)


@pytest.mark.parametrize(
    ("more", "host", "port"),
    [
        ({"STEP3_COORDINATOR": "a:65535"}, "a", 65534),
        ({"STEP3_COORDINATOR": "[fe80::1]:9"}, "fe80::1", 10),
        ({"STEP3_WATCH": "b:77"}, "b", 77),
    ],
)
def test_supervisors_meet_beside_the_coordinator_or_where_it_is_said(
    more: dict[str, str], host: str, port: int
) -> None:
    run = read_run(WORDS, VARIABLES | more)
    assert run is not None
    assert (run.host, run.port) == (host, port)


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["generate", "-p", "x"], {}),
        (WORDS, {"STEP3_NUM_PROCESSES": "1", "STEP3_PROCESS_ID": "0"}),
        (WORDS, {"STEP3_COORDINATOR": ""}),
        (WORDS, {BEACON: "somewhere"}),
    ],
)
def test_one_process_without_a_role_or_a_worker_is_not_supervised(words: list[str], more: dict[str, str]) -> None:
    assert read_run(words, VARIABLES | more) is None


@pytest.mark.parametrize(
    ("words", "more", "said"),
    [
        (["--afd-deadline", "0"], {}, "--afd-deadline is 0: give more than 0 s"),
        (["--afd-deadline", "soon"], {}, "invalid float value"),
        ([], {"STEP3_WATCH": "77"}, "STEP3_WATCH is '77'; host:port is needed"),
        ([], {"STEP3_WATCH": "b:x"}, "x is no port"),
    ],
)
def test_what_cannot_be_read_is_told(words: list[str], more: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read_run([*WORDS, *words], VARIABLES | more)
