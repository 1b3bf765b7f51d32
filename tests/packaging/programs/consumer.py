"""A program that uses the public names, for type checkers, which see the package as its users do."""

from __future__ import annotations

import pathlib

from step3_jax import (
    LLM,
    EngineConfig,
    ModelConfig,
    Parallel,
    SamplingParams,
    StructuredOutputsParams,
    load_model,
    save_model,
)
from step3_jax.text.output_parser import parse_output


def ask(folder: pathlib.Path, questions: list[str]) -> dict[str, str]:
    """Answers to questions."""
    params = SamplingParams(temperature=0.0, max_tokens=16, seed=1)
    llm = LLM(folder, max_num_seqs=8)
    found: dict[str, str] = {}
    for question, output in zip(questions, llm.generate(questions, params), strict=True):
        completion = output.outputs[0]
        text: str = completion.text
        ids: list[int] = list(completion.token_ids)
        found[question] = parse_output(text).content or str(ids)
    llm.close()
    return found


def choose(folder: str) -> str:
    """One of two words."""
    form = StructuredOutputsParams(choice=["yes", "no"])
    llm = LLM(folder, config=EngineConfig(max_num_seqs=1), parallel=Parallel(dp=1, tp=1))
    answer: str = (
        llm.chat([{"role": "user", "content": "?"}], SamplingParams(structured_outputs=form))[0].outputs[0].text
    )
    return answer


def copy(source: str, target: str) -> int:
    """Number of layers of a checkpoint, which is rewritten."""
    model = load_model(source, dtype="float32")
    save_model(model, target)
    layers: int = ModelConfig.load(source).text.num_hidden_layers
    return layers
