"""How many requests may be in progress, and what the others are told."""

from __future__ import annotations

import asyncio

import pytest

from step3_jax.server.admission import Admission
from step3_jax.server.error import ApiError
from tests.server.client import Reply, ask
from tests.server.conftest import Open


def test_what_is_beyond_the_queue_is_503_and_the_others_end(open_client: Open) -> None:
    with open_client(max_num_queued_reqs=3) as client:

        async def run() -> tuple[list[Reply], Reply, Reply]:
            client.executor.gate.clear()
            calls = [client.start("/v1/chat/completions", ask(stream=True)) for _ in range(3)]
            await client.wait_until(lambda: client.service.admission.num_completions == 3)
            beyond = await client.start("/v1/chat/completions", ask()).finish()
            status = await client.start("/health").finish()
            client.executor.gate.set()
            return await asyncio.gather(*(call.finish() for call in calls)), beyond, status

        replies, beyond, status = client.run(run())
        assert (beyond.status, beyond.error["code"]) == (503, "queue_full")
        assert int(beyond.headers["retry-after"]) > 0
        assert status.status == 200
        assert all(reply.events for reply in replies)
        assert client.metric("admission_rejections_total", reason="queue_full") == 1
        assert client.chat().status == 200


def test_n_counts_n(open_client: Open) -> None:
    with open_client(max_num_queued_reqs=3) as client:
        assert client.chat(n=3).status == 200
        prompts = {"prompt": ["a", "b"], "n": 2}
        for reply in (client.chat(n=4), client.call("/v1/completions", prompts)):
            assert (reply.status, reply.error["param"]) == (400, "n"), "it would never be let in"

        async def run() -> Reply:
            client.executor.gate.clear()
            first = client.start("/v1/chat/completions", ask(n=2))
            await client.wait_until(lambda: client.service.admission.num_completions == 2)
            second = await client.start("/v1/chat/completions", ask(n=2)).finish()
            client.executor.gate.set()
            assert (await first.finish()).status == 200
            return second

        assert client.run(run()).error["code"] == "queue_full"
        assert client.service.admission.num_completions == 0


def test_prompt_tokens_can_be_limited(open_client: Open) -> None:
    with open_client(max_num_queued_tokens=100) as client:
        assert client.chat("long " * 200).status == 200, "alone anything goes that the context has room for"

        async def run() -> Reply:
            client.executor.gate.clear()
            first = client.start("/v1/chat/completions", ask("long " * 60))
            await client.wait_until(lambda: client.service.admission.num_tokens > 0)
            second = await client.start("/v1/chat/completions", ask("long " * 60)).finish()
            client.executor.gate.set()
            assert (await first.finish()).status == 200
            return second

        reply = client.run(run())
        assert (reply.status, reply.error["code"]) == (503, "queue_full")
        assert client.metric("admission_rejections_total", reason="queue_tokens_full") == 1


def test_a_request_is_counted_before_its_body_is_read(open_client: Open) -> None:
    with open_client(max_num_queued_reqs=1) as client:

        async def run() -> None:
            slow = client.start("/v1/chat/completions", b"x", pieces=[])
            await client.wait_until(lambda: client.service.admission.num_requests == 1)
            assert (await client.start("/v1/chat/completions", b"{").finish()).status == 503
            slow.leave()
            await slow.finish()

        client.run(run())
        assert client.chat().status == 200


def test_a_refused_request_frees_what_it_had() -> None:
    admission = Admission(4, 10)
    with admission.enter() as ticket:
        ticket.add_tokens(5)
        with pytest.raises(ApiError):
            ticket.add_completions(4)
    assert (admission.num_requests, admission.num_completions, admission.num_tokens) == (0, 0, 0)
