"""Requests on the shipped model that are aborted at any moment leave nothing behind and do not affect the others."""

from __future__ import annotations

import pathlib
import random

import pytest

from step3_jax.engine.core import EngineCore
from step3_jax.engine.llm import LLM
from step3_jax.engine.request import Prompt, Request
from step3_jax.sampling.params import SamplingParams
from tests.unit.engine.test_core import Sink


@pytest.mark.slow
def test_five_hundred_aborts_leave_nothing_behind(tiny_model_path: pathlib.Path) -> None:
    drawn = random.Random(0)
    llm = LLM(tiny_model_path, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128)
    core: EngineCore = llm._engine.core
    texts = [f"What is a {name}? " * drawn.randrange(1, 6) for name in ("violin", "guitar", "lake", "doctor")]
    prompts = [llm.prompts.from_text(text) for text in texts]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [llm.generate(list(prompt.token_ids), params)[0].outputs[0].token_ids for prompt in prompts]

    def start(name: str, prompt: Prompt) -> Sink:
        sink = Sink()
        core.add(Request(name, prompt, params, 0, drawn.choice([1, 4, 32])), sink)
        return sink

    sinks: list[tuple[int, Sink]] = []
    open_numbers: list[int] = []
    num_aborts = 0
    while num_aborts < 500:
        number = len(sinks)
        which = drawn.randrange(4)
        sinks.append((which, start(str(number), prompts[which])))
        open_numbers.append(number)
        if drawn.random() < 0.7:
            core.step()
        while len(open_numbers) > 6:
            core.abort(str(open_numbers.pop(drawn.randrange(len(open_numbers)))))
            num_aborts += 1
    while core.has_work:
        core.step()
    assert core.allocator.num_free == core.allocator.num_pages
    assert not core.scheduler.slots
    finished = [(which, sink) for which, sink in sinks if sink.finish() == "length"]
    assert len(finished) >= 6
    for which, sink in sinks:
        assert sink.ids() == expected[which][: len(sink.ids())]
        assert sink.finish() in ("length", "aborted")
