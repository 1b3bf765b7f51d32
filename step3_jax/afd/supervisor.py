"""The supervisor beside a rank: it runs the rank's worker, and tells its user which rank failed when one does.

It is a process of its own without jax, so that no native code can hold it up or end it. The supervisors of all ranks
talk (`afd/star.py`); when a worker dies or stops moving, or a supervisor is lost, all of them kill their workers, print
who failed where, and leave with a code that is not 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from step3_jax.afd.line import Run, Verdict
from step3_jax.afd.noise import NoiseFilter
from step3_jax.afd.star import Hub, Spoke
from step3_jax.afd.watch import SETTLE_S, Failure, Report
from step3_jax.beacon import BEACON, BeaconFile, Reading

# Another rank failed; that of EX_TEMPFAIL, "try again".
LOST_PEER_CODE = 75
_TICK_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# From a signal to SIGKILL; less than `step3 launch` gives.
_GRACE_S = 3.0
# How long a supervisor whose worker has failed waits for the cause to be found.
_JUDGEMENT_S = SETTLE_S + 4.0
# Who did not fail stays a moment, so that `step3 launch` hears of the one that did before it ends all others.
_LINGER_S = 0.7
_SHORT_LINGER_S = 0.2
_LAST_OUTPUT_S = 2.0
# Nothing from outside of the process causes these, but somebody who means it.
_SUDDEN = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTERM, signal.SIGINT}


def supervise(command: Sequence[str], run: Run, *, does_interrupt_end: bool = True) -> int:
    """Runs a worker to its end.

    Args:
      command: Starts it, from the main thread of this process. Standard input and output are its own; its stderr passes
        through here. It finds STEP3_BEACON in its environment.
      run: Of the run.
      does_interrupt_end: Whether a worker that lives on after SIGINT is killed, as it is after SIGTERM and SIGHUP.

    Returns:
      The worker's exit code; 128 + n if signal n ended it or this process was told to end by it; 75 if another rank
      failed, or this one does not move.

    Raises:
      ValueError: If the supervisors' port cannot be opened.
      OSError: If the worker cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="step3-") as folder:
        beacon = BeaconFile(pathlib.Path(folder) / "beacon")
        try:
            return asyncio.run(_Supervisor(command, run, beacon, does_interrupt_end).run())
        finally:
            beacon.close()


class _Supervisor:
    """From the start of the worker to the exit code."""

    def __init__(self, command: Sequence[str], run: Run, beacon: BeaconFile, does_interrupt_end: bool) -> None:
        self._command = list(command)
        self._run = run
        self._beacon = beacon
        self._does_interrupt_end = does_interrupt_end
        self._signal: int | None = None

    async def run(self) -> int:
        """See `supervise`."""
        self._line = Hub(self._run, _note) if self._run.rank == 0 else Spoke(self._run)
        await self._line.open()
        self._worker = subprocess.Popen(
            self._command,
            # Not always descriptor 1: what native code writes there may have been turned to stderr.
            stdout=sys.stdout.fileno(),
            stderr=subprocess.PIPE,
            env=os.environ | {BEACON: str(self._beacon.path)},
        )
        assert self._worker.stderr is not None
        self._noise = NoiseFilter(self._worker.stderr, sys.stderr.fileno(), hold_s=self._run.deadline_s)
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._interrupt, number)
        self._ended = asyncio.create_task(asyncio.to_thread(self._worker.wait))
        self._stuck: asyncio.Future[Failure] = loop.create_future()
        ticker = asyncio.create_task(self._tick())
        try:
            await asyncio.wait((self._ended, self._stuck, self._line.verdict), return_when=asyncio.FIRST_COMPLETED)
            return await self._finish()
        finally:
            ticker.cancel()
            self._worker.kill()
            await self._ended

    async def _finish(self) -> int:
        """What happens once the worker has ended or stands still, or all are to end."""
        line = self._line
        if line.verdict.done():
            return await self._end_badly(None, line.verdict.result())
        if not self._ended.done():
            return await self._fail(self._stuck.result())
        code = self._ended.result()
        await asyncio.to_thread(self._noise.join, _LAST_OUTPUT_S)
        if code == 0:
            return await self._end_well()
        if self._signal is not None:
            return await self._end_interrupted()
        return await self._fail(self._explain(code))

    async def _fail(self, own: Failure) -> int:
        line = self._line
        line.fail(own)
        await asyncio.wait((line.verdict,), timeout=_JUDGEMENT_S)
        verdict = line.verdict.result() if line.verdict.done() else _blame_self(own, line.name)
        return await self._end_badly(own, verdict)

    async def _end_well(self) -> int:
        self._noise.release()
        line = self._line
        line.end()
        over = asyncio.create_task(line.is_over.wait())
        # Rank 0's stays as long as others may have something to tell each other.
        await asyncio.wait((over, line.verdict), return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if line.verdict.done():
            _note(f"{line.verdict.result().text}; this was {line.name}, which had ended normally")
        await line.close(_SHORT_LINGER_S)
        return 0

    async def _end_interrupted(self) -> int:
        number = self._signal or 0
        # Others that were interrupted with it may have been quicker: what native code says of that helps nobody.
        if not self._noise.has_lost_peer:
            self._noise.release()
        self._line.fail(Failure(self._run.rank, f"was told to end ({_signal_name(number)})", is_sudden=True))
        await self._line.close(_SHORT_LINGER_S)
        return 128 + number

    async def _end_badly(self, own: Failure | None, verdict: Verdict) -> int:
        where = self._beacon.read()
        self._worker.kill()
        code = await self._ended
        await asyncio.to_thread(self._noise.join, _LAST_OUTPUT_S)
        if self._signal is not None:
            return await self._end_interrupted()
        is_own = verdict.rank == self._run.rank
        if own is not None and own.is_explained and (is_own or verdict.is_explained):
            # It has said so itself; a mistake in the command is every rank's.
            self._noise.release()
        else:
            _note(f"error: {self._describe(verdict, where, is_own)}")
        await self._line.close(_SHORT_LINGER_S if is_own else _LINGER_S)
        if own is None or own.is_consequence or self._stuck.done():
            return LOST_PEER_CODE
        return 128 - code if code < 0 else code

    def _describe(self, verdict: Verdict, where: Reading, is_own: bool) -> str:
        words = [verdict.text]
        if is_own:
            self._noise.release()
        else:
            words[0] += f"; this was {self._line.name}, {where}"
            if path := self._noise.keep(f"step3-rank{self._run.rank}-"):
                words.append(f"What native code wrote here then is in {path}.")
        lost = "Requests that had not been answered are lost: start" if where.step >= 0 else "Start"
        words.insert(1, f"{lost} all processes again.")
        return " ".join([words[0] + ".", *words[1:]])

    def _explain(self, code: int) -> Failure:
        """Why the worker has ended, as far as this rank alone can tell."""
        noise, rank, where = self._noise, self._run.rank, self._beacon.read()
        if code < 0:
            number = -code
            if noise.has_lost_peer and number not in _SUDDEN:
                return Failure(rank, f"lost the connection to another rank, {where}", is_consequence=True)
            hint = "; out of memory?" if number == signal.SIGKILL else ""
            text = f"was killed ({_signal_name(number)}{hint}), {where}"
            return Failure(rank, text, is_sudden=number in _SUDDEN)
        if noise.has_lost_peer:
            return Failure(rank, f"lost the connection to another rank, {where}", is_consequence=True)
        said = noise.last_line.removeprefix("step3: error: ")[:500]
        return Failure(rank, f"failed with exit code {code}{': ' + said if said else ''}", is_explained=True)

    async def _tick(self) -> None:
        """Reads the beacon, reports, and lets time pass for the line."""
        run = self._run
        tick_s = min(_TICK_S, run.deadline_s / 4)
        before, beats, still_s = time.monotonic(), -1, 0.0
        while True:
            reading = self._beacon.read()
            now = time.monotonic()
            # Time in which this process was stopped itself tells nothing about others.
            elapsed_s, before = min(now - before, 2 * tick_s), now
            still_s = 0.0 if reading.beats != beats else still_s + elapsed_s
            beats = reading.beats
            is_running = not self._ended.done()
            report = Report(str(reading), reading.changes, bool(reading.place), reading.step, still_s * is_running)
            self._line.tick(report, elapsed_s)
            limit_s = run.deadline_s if reading.process_id else run.start_timeout_s
            if is_running and still_s > limit_s and not self._stuck.done():
                text = f"has not moved for {still_s:.0f} s (stopped, or no processor for it), {reading}"
                self._stuck.set_result(Failure(run.rank, text, is_sudden=True))
            await asyncio.sleep(tick_s)

    def _interrupt(self, number: int) -> None:
        is_passing = number == signal.SIGINT and not self._does_interrupt_end
        if self._signal is not None:
            self._worker.kill()
        elif not is_passing:
            self._signal = number
            asyncio.get_running_loop().call_later(_GRACE_S, self._worker.kill)
        # A terminal's Ctrl-C has reached the worker already, and a second one would hit it while it cleans up.
        if number != signal.SIGINT or not _is_foreground():
            self._worker.send_signal(number)


def _blame_self(own: Failure, name: str) -> Verdict:
    return Verdict(own.rank, f"{name} {own.text}", own.is_explained)


def _is_foreground() -> bool:
    """Whether this process and its worker are what the keys of a terminal interrupt."""
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDONLY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _note(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"step3: {text}", file=sys.stderr, flush=True)
