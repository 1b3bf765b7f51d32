"""What a structured request costs a stream running next to it: `python -m tools.bench_structured --json FILE`.

A stream of a random model of 100 million active parameters is measured alone, next to another free request, and next to
one that must follow a JSON schema, alternately. With a mask a call generates one token, and the mask is filled between
two calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from step3_jax.bench.machine import conditions, cpu_pressure, load_average
from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.report import write_section
from step3_jax.bench.workload import Lengths, random_prompts
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.engine.config import EngineConfig
from step3_jax.engine.llm import LLM
from step3_jax.sampling.params import SamplingParams
from step3_jax.sampling.structured import StructuredOutputsParams
from step3_jax.text.tokenizer import Tokenizer
from step3_jax.text.vocabulary import byte_alphabet

# More than any run generates, so that the structured output never ends before the stream does.
_ITEMS = 10_000
SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 99}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "minItems": _ITEMS,
}
SIDES = ("alone", "beside free", "beside form")
_END = "<end>"


def piece_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer of single bytes, random pieces of text, and an end token.

    Args:
      vocab_size: V.
    """
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz" + "ETAOINS" + "0123456789" + "Ġ.,:\"'{}[]()-_<>/"))
    pieces = dict(byte_alphabet())
    while len(pieces) < vocab_size - 1:
        for row, length, has_space in zip(
            rng.choice(letters, (vocab_size, 8)).tolist(),
            rng.integers(2, 9, vocab_size),
            rng.random(vocab_size) < 0.4,
            strict=True,
        ):
            if len(pieces) < vocab_size - 1:
                pieces.setdefault(("Ġ" if has_space else "") + "".join(row[:length]), len(pieces))
    description = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": vocab_size - 1,
                "content": _END,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": pieces, "merges": []},
    }
    return Tokenizer(json.dumps(description), eos=[_END], source="the pieces")


def make_llm(preset: str, vocab_size: int, engine: EngineConfig) -> LLM:
    """A random model of a preset of `step3 bench`, with a vocabulary of the given size."""
    config = bench_config(*PRESETS[preset])
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, vocab_size=vocab_size), eos_token_id=vocab_size - 1
    )
    return LLM.from_model(random_model(config), piece_tokenizer(vocab_size), config=engine)


def stream_rate(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int, side: str) -> float:
    """Tokens per second of a stream, from its first piece to its last.

    Args:
      llm: The model.
      prompts: Of the stream and of the request next to it.
      num_tokens: Tokens of the stream; the other request ends with it.
      side: One of `SIDES`.
    """
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=num_tokens, ignore_eos=True)
    form = SamplingParams(
        temperature=1.0, seed=2, max_tokens=4 * num_tokens, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    beside = {"alone": [], "beside free": [dataclasses.replace(free, max_tokens=4 * num_tokens)], "beside form": [form]}
    params = [free, *beside[side]]
    times: list[float] = []
    counts: list[int] = []
    pieces = llm.generate([list(ids) for ids in prompts[: len(params)]], params, stream=True)
    for piece in pieces:
        if piece.index:
            continue
        times.append(time.perf_counter())
        counts.append(len(piece.token_ids))
        if piece.finish_reason is not None:
            break
    pieces.close()  # type: ignore[attr-defined]
    return sum(counts[1:]) / (times[-1] - times[0])


def measure(llm: LLM, *, num_tokens: int, rounds: int) -> dict[str, object]:
    """Rates of all sides, measured alternately, after an uncounted round."""
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        prompts = random_prompts([Lengths(32, num_tokens)] * 2, llm.config.text.vocab_size - 1, seed=number)
        for side in SIDES:
            rate = stream_rate(llm, prompts, num_tokens, side)
            if number:
                rates[side].append(rate)
                print(f"round {number} of {rounds}: {side} {rate:.1f} tokens/s", file=sys.stderr, flush=True)

    def ratio(base: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(rates[SIDES[2]], rates[base], strict=True))

    return {
        "stream_interval": llm.engine_config.stream_interval,
        "tokens_per_s": {side: statistics.median(found) for side, found in rates.items()},
        "kept_of_beside_free": ratio(SIDES[1]),
        "kept_of_alone": ratio(SIDES[0]),
        "rounds": rates,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the rates, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="100m", help="size of the model (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=128_815, help="entries of the vocabulary (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of the stream (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians over (default: %(default)s)")
    parser.add_argument("--json", help="file to add the figures to, next to those of other benchmarks")
    arguments = parser.parse_args(argv)
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    found = []
    for interval in (1, 4):
        engine = EngineConfig(max_num_seqs=2, max_model_len=1024, stream_interval=interval)
        llm = make_llm(arguments.preset, arguments.vocab, engine)
        found.append(measure(llm, num_tokens=arguments.tokens, rounds=arguments.rounds))
        del llm
    given = {name: getattr(arguments, name) for name in ("preset", "vocab", "tokens")}
    report = {"conditions": conditions() | before | {"cpu_pressure_after": cpu_pressure()} | given, "streams": found}
    print(json.dumps(report, indent=1))
    if arguments.json:
        write_section(arguments.json, "structured", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
