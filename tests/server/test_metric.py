"""Metrics: vLLM's names behind a prefix, and counts that are right."""

from __future__ import annotations

import re

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from step3_jax.engine.state import DraftCounts, Report
from tests.server.client import Call, ask
from tests.server.conftest import Open

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    *("prompt_tokens", "prompt_tokens_cached", "generation_tokens", "num_preemptions", "prefix_cache_queries"),
    *("prefix_cache_hits", "mm_cache_queries", "mm_cache_hits", "http_requests_client_disconnected"),
    *("tool_call_parser_invocations", "compile_seconds", "compilations", "decode_call_seconds", "mask_seconds"),
    "image_encode_seconds",
)
HISTOGRAMS = (
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_max_tokens", "request_params_n", "iteration_tokens_total"),
    *("decode_steps_per_call", "grammar_compile_seconds"),
)


@pytest.mark.parametrize("prefix", ["step3", "vllm"])
def test_all_names_are_there_from_the_start(open_client: Open, prefix: str) -> None:
    with open_client(metrics_prefix=prefix) as client:
        reply = client.call("/metrics")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = reply.body.decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        for name in GAUGES:
            assert families[f"{prefix}:{name}"].type == "gauge"
        for name in COUNTERS:
            assert re.search(rf'^{prefix}:{name}_total{{engine="0",model_name="toy"}} 0.0$', text, re.MULTILINE), name
        for name in HISTOGRAMS:
            assert families[f"{prefix}:{name}"].type == "histogram", name
        for reason in ("stop", "length", "abort", "error"):
            assert f'{prefix}:request_success_total{{engine="0",finished_reason="{reason}"' in text
        for reason in ("capacity", "deferred"):
            assert (
                f'{prefix}:num_requests_waiting_by_reason{{engine="0",model_name="toy",reason="{reason}"}} 0.0' in text
            )
        assert f"{prefix}:cache_config_info{{" in text


def test_counts_are_those_of_the_answers(open_client: Open) -> None:
    with open_client() as client:
        usages = [client.chat("count " * 50, **values).json()["usage"] for values in ({}, {"max_tokens": 3}, {"n": 2})]
        assert client.metric("request_success_total", finished_reason="stop") == 3
        assert client.metric("request_success_total", finished_reason="length") == 1
        assert client.metric("prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
        # Equal answers are computed once.
        generated = [usage["completion_tokens"] for usage in usages]
        assert client.metric("generation_tokens_total") == generated[0] + generated[1] + generated[2] / 2
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert client.metric("prefix_cache_hits_total") == client.metric("prompt_tokens_cached_total") == cached
        assert client.metric("request_generation_tokens_sum") == sum(generated)
        assert client.metric("request_params_n_sum") == 4
        assert client.metric("request_params_max_tokens_count") == 1
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert client.metric(f"{name}_count") == 3
        assert client.metric("inter_token_latency_seconds_count") > 0
        # The last token of each prompt is part of its first decode step.
        num_prefilled = sum(usage["prompt_tokens"] for usage in usages) - cached - len(usages)
        assert client.metric("iteration_tokens_total_sum") == client.metric("generation_tokens_total") + num_prefilled


def test_each_of_n_sequences_waits_for_itself(open_client: Open) -> None:
    with open_client(engine={"max_num_seqs": 1}) as client:

        async def run() -> None:
            client.executor.gate.clear()
            call = client.start("/v1/chat/completions", ask(n=3, temperature=1))
            await client.wait_until(lambda: client.metric("num_requests_running") == 1)
            assert client.metric("num_requests_waiting") == 2
            reasons = [
                client.metric("num_requests_waiting_by_reason", reason=reason) for reason in ("capacity", "deferred")
            ]
            assert sum(reasons) == 2
            client.executor.gate.set()
            assert (await call.finish()).status == 200
            assert client.metric("num_requests_waiting") == 0

        client.run(run())


def test_aborts_take_no_place_of_requests_and_what_is_refused_is_counted(open_client: Open) -> None:
    with open_client(max_num_queued_reqs=2) as client:

        async def start(has_left: bool = False) -> Call:
            call = client.start("/v1/chat/completions", ask(stream=True))
            await call.see(lambda reply: b"assistant" in reply.body)
            if has_left:
                call.leave()
                await call.finish()
            return call

        async def run() -> None:
            client.executor.gate.clear()
            first = await start()
            await client.wait_until(lambda: client.service.llm.core.num_running == 1)
            # The engine sees neither these nor their end while its call goes on.
            for _ in range(2):
                assert (await start(has_left=True)).reply.status == 200
            reply = (await start()).reply
            assert (reply.status, reply.error["code"]) == (503, "queue_full")
            assert client.metric("admission_rejections_total", reason="queue_full") == 1
            client.executor.gate.set()
            assert (await first.finish()).events
            await client.wait_until(lambda: not client.service.llm.core.has_work)

        client.run(run())
        assert client.chat().status == 200


def test_what_became_of_guesses_is_there_where_tokens_are_guessed(open_client: Open) -> None:
    names = "spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"
    with open_client() as client:
        assert "spec_decode" not in client.call("/metrics").body.decode()
    speculation = {"method": "ngram", "num_speculative_tokens": 2}
    with open_client(engine={"speculative_config": speculation}) as client:
        stats = client.service.llm.stats
        counts = DraftCounts(np.array([3, 2]), np.array([[3, 2], [1, 0]]), np.array([[2, 1], [1, 0]]))
        for _ in range(2):
            stats.count_decode(Report(np.zeros((2, 4)), np.array([6, 3]), np.zeros((2,)), None, counts), 0.1)
        assert [client.metric(f"{name}_total") for name in names] == [8, 12, 8]
        for place, count in enumerate((6, 2)):
            name = "spec_decode_num_accepted_tokens_per_pos_total"
            assert client.metric(name, position=str(place)) == count
        assert stats.num_decode_steps == 6
        assert stats.acceptance_rate == 8 / 12


def test_the_cache_is_used_by_running_sequences_alone(open_client: Open) -> None:
    with open_client() as client:
        client.chat("page " * 200)
        assert client.service.llm.core.allocator.num_cached > 0
        assert client.metric("kv_cache_usage_perc") == 0
        assert client.metric("num_requests_running") == 0


def test_steps_of_decode_calls_and_loads_of_experts_are_shown(open_client: Open) -> None:
    with open_client() as client:
        client.chat(max_tokens=40)
        llm = client.service.llm
        assert client.metric("decode_steps_per_call_sum") == llm.stats.num_decode_steps
        assert client.metric("decode_steps_per_call_count") == llm.stats.num_decode_calls
        assert "expert_load{" not in client.call("/metrics").body.decode()
        llm.stats.count_experts(np.asarray([[6, 2, 0, 0], [1, 1, 1, 1]]))
        llm.stats.count_experts(np.asarray([[0, 4, 4, 0], [1, 1, 1, 1]]))
        assert (client.metric("expert_load", layer="0"), client.metric("expert_load", layer="1")) == (1.5, 1.0)
        assert "afd_wait" not in client.call("/metrics").body.decode()
        llm.stats.afd_wait_s = 2.5
        assert client.metric("afd_wait_seconds_total") == 2.5
