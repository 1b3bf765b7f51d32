"""How supervisors talk: rank 0's listens (`Hub`), each other one connects to it (`Spoke`).

A stranger who finds the port is turned away: where there is a token, only the run's own processes know it. Start order
does not matter, since a spoke tries until the hub is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from collections.abc import Callable

from step3_jax.afd.line import (
    MAX_LINE_BYTES,
    Message,
    Run,
    Verdict,
    pack_failure,
    pack_report,
    pack_verdict,
    read_failure,
    read_report,
    receive,
    send,
)
from step3_jax.afd.watch import Failure, Report, Watch, name_rank

_HELLO_S = 5.0
_RETRY_S = 0.1
_MAX_REFUSED = 5
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Hub:
    """Rank 0's side: hears all, judges, and tells all."""

    def __init__(self, run: Run, note: Callable[[str], None]) -> None:
        """Begins with nobody there; for use inside of a running loop.

        Args:
          run: Of this run.
          note: Takes a line for the user.
        """
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.is_over = asyncio.Event()
        self._run = run
        self._note = note
        self._num_refused = 0
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._has_spoken_last: set[int] = set()
        self._watch = Watch(run.roles, deadline_s=run.deadline_s, start_timeout_s=run.start_timeout_s)
        self._watch.come(0, socket.gethostname())
        self._server: asyncio.Server | None = None
        self._callers: set[asyncio.Task[None]] = set()

    @property
    def name(self) -> str:
        """This rank, as messages call it."""
        return self._watch.name(0)

    async def open(self) -> None:
        """Takes the port.

        Raises:
          ValueError: If it cannot be had.
        """
        host, port = self._run.host, self._run.port
        try:
            # What runs on one machine is not shown to others.
            where = host if host in _LOOPBACK else None
            self._server = await asyncio.start_server(self._accept, where, port, limit=MAX_LINE_BYTES)
        except OSError as error:
            raise ValueError(
                f"port {port}, on which the supervisors of the ranks meet, cannot be opened ({error.strerror}): another "
                "program has it, or a run before is not gone yet; name another by STEP3_WATCH=host:port in all processes"
            ) from None

    def tick(self, report: Report, elapsed_s: float) -> None:
        """Lets time pass, with the own worker's report."""
        self._watch.pass_time(elapsed_s)
        self._watch.hear(0, report)
        self._tell(pack_report(report))
        self._judge()

    def fail(self, failure: Failure) -> None:
        """Notes the own worker's failure."""
        self._watch.fail(failure)
        self._judge()

    def end(self) -> None:
        """Notes the own worker's good end."""
        self._watch.end(0)
        self._check_over()

    async def close(self, linger_s: float) -> None:
        """Leaves, after the others have had time to read what was said last."""
        await asyncio.sleep(linger_s)
        if self._server is not None:
            self._server.close()
        for caller in self._callers:
            caller.cancel()
        await asyncio.gather(*self._callers, return_exceptions=True)

    def _tell(self, message: Message) -> None:
        for writer in self._writers.values():
            send(writer, message)

    def _judge(self) -> None:
        if self.verdict.done() or (failure := self._watch.judge()) is None:
            return
        verdict = Verdict(failure.rank, f"{self._watch.name(failure.rank)} {failure.text}", failure.is_explained)
        self.verdict.set_result(verdict)
        self._tell(pack_verdict(verdict))

    def _check_over(self) -> None:
        if self._watch.is_over():
            self.is_over.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._callers.add(caller)
        caller.add_done_callback(self._callers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = 0
        try:
            hello = await asyncio.wait_for(receive(reader), _HELLO_S)
            problem = "it said nothing that a supervisor says" if hello is None else self._refuse(hello)
            if hello is None or problem:
                self._turn_away(writer, problem or "")
                return
            rank = hello["rank"]
            self._writers[rank] = writer
            self._watch.come(rank, str(hello.get("host", ""))[:100])
            send(writer, Message(kind="welcome", host=socket.gethostname()))
            if self.verdict.done():
                send(writer, pack_verdict(self.verdict.result()))
            while (message := await receive(reader)) is not None:
                self._take(rank, message)
        except (OSError, ValueError, TypeError, KeyError, TimeoutError):
            pass  # Gone, or no supervisor: both end here.
        finally:
            writer.close()
            if rank:
                self._leave(rank)

    def _take(self, rank: int, message: Message) -> None:
        kind = message["kind"]
        if kind == "report":
            self._watch.hear(rank, read_report(message))
        elif kind == "failed":
            self._has_spoken_last.add(rank)
            self._watch.fail(read_failure(message, rank))
            self._judge()
        elif kind == "ended":
            self._has_spoken_last.add(rank)
            self._watch.end(rank)
            self._check_over()

    def _leave(self, rank: int) -> None:
        del self._writers[rank]
        if rank not in self._has_spoken_last and not self.verdict.done():
            text = f"is gone: its supervisor ended without a word (killed?), {self._watch.where(rank)}"
            self._watch.fail(Failure(rank, text, is_sudden=True))
            self._judge()

    def _refuse(self, hello: Message) -> str | None:
        token, rank, count = hello.get("token"), hello.get("rank"), hello.get("num_processes")
        if not isinstance(token, str) or not hmac.compare_digest(token.encode(), self._run.token.encode()):
            return "it does not know the token of this run (STEP3_WATCH_TOKEN)"
        if count != len(self._run.roles):
            return f"it is one of {count} processes, and rank 0 one of {len(self._run.roles)}"
        if not isinstance(rank, int) or not 0 < rank < len(self._run.roles):
            return f"it calls itself rank {rank}"
        return f"there is a rank {rank} already" if self._watch.has_come(rank) else None

    def _turn_away(self, writer: asyncio.StreamWriter, problem: str) -> None:
        send(writer, Message(kind="refused", text=problem))
        self._num_refused += 1
        if self._num_refused <= _MAX_REFUSED:
            peer = writer.get_extra_info("peername") or ("?",)
            self._note(f"the supervisor of rank 0 turned away a connection from {peer[0]}: {problem}")


class Spoke:
    """The side of every other rank."""

    def __init__(self, run: Run) -> None:
        """Begins without a connection; for use inside of a running loop."""
        self.verdict: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.is_over = asyncio.Event()
        self._run = run
        self._writer: asyncio.StreamWriter | None = None
        self._is_connected = False
        self._last_words: Message | None = None
        self._task: asyncio.Task[None] | None = None
        self._hub_host = ""
        self._hub_where = Report().where
        self._problem = "it did not answer"
        self._silence_s = 0.0

    @property
    def name(self) -> str:
        """This rank, as messages call it."""
        return name_rank(self._run.roles, self._run.rank, socket.gethostname())

    async def open(self) -> None:
        """Begins to look for the hub."""
        self._task = asyncio.create_task(self._talk())

    def tick(self, report: Report, elapsed_s: float) -> None:
        """Lets time pass, with the own worker's report."""
        self._silence_s += elapsed_s
        run = self._run
        if self._writer is not None:
            self._send(pack_report(report))
            if self._silence_s > run.deadline_s:
                silence = f"has not been heard for {self._silence_s:.0f} s: its host, or the network to it, is gone"
                self._decide(f"{silence}; it was last {self._hub_where}")
        elif self._silence_s > (run.deadline_s if self._is_connected else run.start_timeout_s):
            self._decide(
                f"could not be reached at {run.host}:{run.port} within {self._silence_s:.0f} s ({self._problem}): is it "
                "running, is the port of the supervisors (STEP3_WATCH) open between the hosts?"
            )

    def fail(self, failure: Failure) -> None:
        """Tells the own worker's failure; as soon as there is a connection if there is none yet."""
        self._last_words = pack_failure(failure)
        self._send(self._last_words)

    def end(self) -> None:
        """Tells the own worker's good end."""
        self._last_words = Message(kind="ended")
        self._send(self._last_words)
        self.is_over.set()

    async def close(self, linger_s: float) -> None:
        """Leaves after a while."""
        await asyncio.sleep(linger_s)
        if self._task is not None:
            self._task.cancel()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(self._writer.wait_closed(), 1)

    async def _talk(self) -> None:
        run = self._run
        while not self.verdict.done():
            try:
                reader, writer = await asyncio.open_connection(run.host, run.port, limit=MAX_LINE_BYTES)
            except OSError as error:
                self._problem = error.strerror or str(error)
                await asyncio.sleep(_RETRY_S)
                continue
            if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
                # While nobody listens, the kernel may connect a free port to itself.
                writer.transport.abort()
                await asyncio.sleep(_RETRY_S)
                continue
            self._is_connected, self._silence_s, self._problem = True, 0.0, "it did not answer"
            send(
                writer,
                Message(
                    kind="hello",
                    rank=run.rank,
                    num_processes=len(run.roles),
                    host=socket.gethostname(),
                    token=run.token,
                ),
            )
            try:
                while (message := await receive(reader)) is not None:
                    self._take(writer, message)
            except (OSError, ValueError, TypeError, KeyError):
                pass  # Gone, or no hub.
            writer.close()
            self._is_connected = False
            if self._writer is not None:
                self._decide(f"is gone: its supervisor ended without a word (killed?), {self._hub_where}")
            await asyncio.sleep(_RETRY_S)

    def _take(self, writer: asyncio.StreamWriter, message: Message) -> None:
        self._silence_s = 0.0
        kind = message["kind"]
        if kind == "welcome":
            self._writer, self._hub_host = writer, str(message["host"])
            if self._last_words is not None:
                self._send(self._last_words)
        elif kind == "report":
            self._hub_where = read_report(message).where
        elif kind == "over":
            self._settle(Verdict(int(message["rank"]), str(message["text"]), bool(message["is_explained"])))
        elif kind == "refused":
            self._settle(
                Verdict(
                    self._run.rank,
                    f"{self.name} was turned away by the supervisor of rank 0 at {self._run.host}:{self._run.port}: "
                    f"{message['text']}",
                )
            )

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            send(self._writer, message)

    def _decide(self, text: str) -> None:
        """Rank 0 is the one that failed."""
        self._settle(Verdict(0, f"{name_rank(self._run.roles, 0, self._hub_host)} {text}"))

    def _settle(self, verdict: Verdict) -> None:
        if not self.verdict.done():
            self.verdict.set_result(verdict)
