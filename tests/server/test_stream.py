"""Streams: a sign of life at once, more in between, errors in their place, and an end when the client disconnects."""

from __future__ import annotations

import asyncio
import itertools

from step3_jax.engine.request import StreamPiece
from step3_jax.engine.state import DecodeCall, PrefillBatch
from step3_jax.server.exchange import Job, send_stream
from step3_jax.server.protocol.common import Answer
from step3_jax.server.stream import DONE, KEEP_ALIVE
from tests.server.client import Client, Reply, ask
from tests.server.conftest import Open

LONG = "</think>" + "word " * 400


def num_idle(client: Client) -> bool:
    core = client.service.llm.core
    return not core.has_work and core.allocator.num_free == core.allocator.num_pages


def test_the_role_comes_before_anything_is_generated(open_client: Open) -> None:
    with open_client() as client:

        async def run() -> None:
            client.executor.gate.clear()
            call = client.start("/v1/chat/completions", ask(stream=True))
            reply = await call.see(lambda reply: b'"role":"assistant"' in reply.body)
            assert reply.status == 200
            assert client.executor.num_decoded == 0
            client.executor.gate.set()
            assert (await call.finish()).events

        client.run(run())


def test_silence_is_filled_with_comments(open_client: Open) -> None:
    with open_client(sse_keep_alive_interval=0.01) as client:

        async def run() -> Reply:
            client.executor.gate.clear()
            call = client.start("/v1/chat/completions", ask(stream=True))
            await call.see(lambda reply: reply.body.count(b": keep-alive\n\n") >= 3)
            client.executor.gate.set()
            return await call.finish()

        assert client.run(run()).events[-1]["choices"][0]["finish_reason"] == "stop"


class UnsentTokens(Job):
    """A stream whose tokens are not sent, such as those of a tool call; it is its own generation."""

    def __init__(self) -> None:
        super().__init__(self, is_stream=True)  # type: ignore[arg-type]
        self.sent = b""
        self.num_taken = 0

    @property
    def is_over(self) -> bool:
        return self.sent.count(KEEP_ALIVE) == 3 or self.num_taken == 500_000

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, StreamPiece]]:
        self.num_taken += 1
        await asyncio.sleep(0)
        return [(0, StreamPiece(0, 0, "", (5,), None))]

    async def send(self, message: dict) -> None:
        self.sent += message.get("body", b"")

    def start(self) -> list[bytes]:
        return []

    def add(self, place: int, piece: StreamPiece) -> list[bytes]:
        return []

    def end(self) -> list[bytes]:
        return []

    def answer(self) -> Answer:
        raise AssertionError("it is a stream")


def test_tokens_that_are_not_sent_are_silence_too() -> None:
    job = UnsentTokens()
    asyncio.run(send_stream(job, job.send, 0.001))
    assert job.sent == KEEP_ALIVE * 3 + DONE


def test_pieces_come_as_they_are_generated(open_client: Open) -> None:
    with open_client(LONG, {"stream_interval": 2}) as client:
        events = client.chat(stream=True, max_tokens=100).events
        assert len(events) > 40


def test_a_failed_call_is_an_error_event_without_the_end_mark(open_client: Open) -> None:
    with open_client() as client:

        async def run() -> Reply:
            client.executor.gate.clear()
            call = client.start("/v1/chat/completions", ask(stream=True))
            await call.see(lambda reply: b"assistant" in reply.body)
            client.executor.failure = RuntimeError("out of memory at /secret")
            client.executor.gate.set()
            return await call.finish()

        reply = client.run(run())
        last = reply.body.decode().strip().split("\n\n")[-1]
        assert last.startswith('data: {"error":{"message":"')
        assert "[DONE]" not in reply.body.decode()
        assert "secret" not in reply.body.decode()
        assert client.metric("request_success_total", finished_reason="error") == 1
        assert client.chat().status == 200, "the next one is answered"


def test_a_failed_call_is_500_for_a_whole_answer(open_client: Open) -> None:
    with open_client() as client:
        client.executor.failure = RuntimeError("out of memory")
        reply = client.chat()
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert client.chat().status == 200


def test_a_client_that_leaves_ends_its_request(open_client: Open) -> None:
    for stream in (True, False):
        with open_client(LONG) as client:

            async def run(client: Client = client, stream: bool = stream) -> None:
                client.executor.gate.clear()
                call = client.start("/v1/chat/completions", ask(stream=stream))
                await client.wait_until(lambda: client.service.llm.core.num_running > 0)
                call.leave()
                await call.finish()
                client.executor.gate.set()
                await client.wait_until(lambda: num_idle(client))

            client.run(run())
            assert client.executor.num_decoded < 100
            assert client.service.admission.num_requests == 0
            assert client.service.admission.num_completions == 0
            assert client.service.admission.num_tokens == 0
            assert client.metric("http_requests_client_disconnected_total") == 1
            assert client.metric("request_success_total", finished_reason="abort") == 1
            assert client.metric("generation_tokens_total") == client.executor.num_decoded


def test_a_client_that_leaves_while_it_sends_frees_its_place(open_client: Open) -> None:
    with open_client() as client:

        async def run() -> None:
            call = client.start("/v1/chat/completions", b"{}", pieces=[])
            await client.wait_until(lambda: client.service.admission.num_requests == 1)
            call.leave()
            await call.finish()
            assert client.service.admission.num_requests == 0

        client.run(run())


def test_a_deadline_ends_a_request_with_length(open_client: Open) -> None:
    with open_client(LONG, request_timeout=0.2) as client:

        async def run(stream: bool) -> Reply:
            call = client.start("/v1/chat/completions", ask(stream=stream, n=2))
            client.executor.gate.clear()
            reply = await call.finish()
            client.executor.gate.set()
            await client.wait_until(lambda: num_idle(client))
            return reply

        whole = client.run(run(False))
        assert [choice["finish_reason"] for choice in whole.json()["choices"]] == ["length", "length"]
        assert client.run(run(True)).events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_goes_on_while_eight_long_prompts_are_prefilled(open_client: Open) -> None:
    with open_client(LONG, {"max_num_batched_tokens": 128, "max_num_seqs": 16, "stream_interval": 1}) as client:
        executor, calls = client.executor, []
        prefill, decode = executor.prefill, executor.decode

        def note_prefill(cache: object, batch: PrefillBatch) -> object:
            calls.append("prefill")
            return prefill(cache, batch)

        def note_decode(cache: object, call: DecodeCall) -> object:
            calls.append("decode")
            return decode(cache, call)

        async def run() -> None:
            stream = client.start("/v1/chat/completions", ask(stream=True, max_tokens=300))
            await stream.see(lambda reply: b'"content":"word' in reply.body)
            executor.prefill, executor.decode = note_prefill, note_decode
            executor.gate.clear()
            prompts = [
                client.start("/v1/chat/completions", ask(f"{number} " * 700, max_tokens=1)) for number in range(8)
            ]
            await client.wait_until(lambda: client.service.admission.num_tokens > 8 * 700)
            num_before = stream.reply.body.count(b"data: ")
            executor.gate.set()
            for call in prompts:
                assert (await call.finish()).status == 200
            assert stream.reply.body.count(b"data: ") - num_before > 8 * 700 // 128
            assert (await stream.finish()).events

        client.run(run())
    assert calls.count("prefill") > 8 * 700 // 128
    assert ("prefill", "prefill") not in itertools.pairwise(calls), "each chunk is followed by a step of the stream"


def test_many_streams_share_the_engine_and_each_gets_its_own(open_client: Open) -> None:
    with open_client(lambda prompt: "</think>" + prompt.rpartition("SAY ")[2].partition(" <|EOT|>")[0] * 20) as client:

        async def run() -> list[Reply]:
            calls = [
                client.start("/v1/chat/completions", ask(f"SAY {number}.", stream=number % 2 == 0))
                for number in range(40)
            ]
            return await asyncio.gather(*(call.finish() for call in calls))

        for number, reply in enumerate(client.run(run())):
            if number % 2:
                content = reply.json()["choices"][0]["message"]["content"]
            else:
                deltas = [event["choices"][0]["delta"] for event in reply.events]
                content = "".join(delta.get("content") or "" for delta in deltas)
            assert content == f"{number}." * 20
        assert client.service.admission.num_requests == 0
