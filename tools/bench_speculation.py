"""What guessed tokens save: `python -m tools.bench_speculation --json FILE`.

The same requests with and without `speculative_config`, alternately: how many steps they take, how many guesses are
right, and tokens per second. The outputs are compared as well.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from step3_jax import resources
from step3_jax.afd.host.executor import load_host_executor
from step3_jax.afd.topology import AfdTopology
from step3_jax.bench.machine import conditions, cpu_pressure, load_average
from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.workload import Lengths, random_prompts
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.engine.llm import LLM
from step3_jax.engine.prompt import PromptInput
from step3_jax.engine.runner import Runner
from step3_jax.layout.deployment import parse_topology
from step3_jax.mesh import force_cpu_devices
from step3_jax.sampling.params import SamplingParams

REPEATED = (
    "The capital of France is Paris. ",
    "one, two, three, four, ",
    '{"name": "cat", "legs": 4}, ',
    "A dog is an animal. A cat is an animal. ",
)
BEGINNINGS = ("The history of", "A river is", "In the morning", "She said that")
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is a river?",
    "What is the capital of Kenya?",
)
_MAX_MODEL_LEN = 512

Tokens = list[tuple[int, ...]]


class Work(NamedTuple):
    """Requests of one kind: prompts, and how they are sampled; `is_chat` if prompts are questions."""

    prompts: Sequence[PromptInput]
    params: SamplingParams
    is_chat: bool = False


class Measured(NamedTuple):
    """One run: tokens, seconds, and what the engine counted during it."""

    tokens: Tokens
    seconds: float
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int


def text_work(num_tokens: int) -> dict[str, Work]:
    """Text that repeats and text that does not, for a model that knows English."""
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, seed=1, max_tokens=num_tokens, ignore_eos=True)
    answer = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    return {
        "repetitive, greedy": Work([text * 6 for text in REPEATED], greedy),
        "ordinary, sampled": Work(list(BEGINNINGS), drawn),
        "answers, greedy": Work(list(QUESTIONS), answer, is_chat=True),
    }


def random_work(vocab_size: int, num_tokens: int) -> dict[str, Work]:
    """Token ids for a model with random weights: the best case, in which a bias repeats one token, and the worst."""
    prompts = random_prompts([Lengths(32, num_tokens)] * len(REPEATED), vocab_size, seed=0)
    best = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logit_bias={7: 100.0})
    drawn = SamplingParams(temperature=1.0, seed=1, max_tokens=num_tokens, ignore_eos=True)
    return {"random weights, one token": Work(prompts, best), "random weights, sampled": Work(prompts, drawn)}


def run(llm: LLM, work: Work, batch_size: int) -> Measured:
    """The requests, `batch_size` of them at a time."""
    stats = llm.stats
    before = stats.num_decode_steps, stats.num_draft_tokens, stats.num_accepted_tokens
    tokens: Tokens = []
    begin = time.perf_counter()
    for first in range(0, len(work.prompts), batch_size):
        part = work.prompts[first : first + batch_size]
        if work.is_chat:
            outputs = llm.chat([[{"role": "user", "content": str(text)}] for text in part], work.params, use_tqdm=False)
        else:
            outputs = llm.generate(list(part), work.params, use_tqdm=False)
        tokens += [output.outputs[0].token_ids for output in outputs]
    seconds = time.perf_counter() - begin
    counts = stats.num_decode_steps, stats.num_draft_tokens, stats.num_accepted_tokens
    return Measured(tokens, seconds, *(after - old for after, old in zip(counts, before, strict=True)))


def measure(
    sides: Mapping[int, LLM], works: Mapping[str, Work], batch_size: int, rounds: int
) -> list[dict[str, object]]:
    """All sides alternately, after an uncounted round that compiles all programs.

    Args:
      sides: Models by how many tokens they guess; 0 guesses none.
      works: Requests by name.
      batch_size: Requests at a time.
      rounds: How many rounds the medians are over.

    Returns:
      A row for each kind of requests and side.
    """
    rows = []
    for name, work in works.items():
        found: dict[int, list[Measured]] = {guesses: [] for guesses in sides}
        for number in range(rounds + 1):
            for guesses, llm in sides.items():
                one = run(llm, work, batch_size)
                if number:
                    found[guesses].append(one)
        plain = found[0]
        for guesses, runs in found.items():
            last, num_tokens = runs[-1], sum(map(len, runs[-1].tokens))
            rows.append(
                {
                    "requests": name,
                    "batch": batch_size,
                    "guesses": guesses,
                    "tokens": num_tokens,
                    "same_outputs": sum(map(tuple.__eq__, last.tokens, plain[-1].tokens)) / len(last.tokens),
                    "steps": last.num_steps,
                    "guessed": last.num_draft_tokens,
                    "right": last.num_accepted_tokens / max(1, last.num_draft_tokens),
                    "tokens_per_s": statistics.median(num_tokens / one.seconds for one in runs),
                    "speedup": statistics.median(a.seconds / b.seconds for a, b in zip(plain, runs, strict=True)),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the rows, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=PRESETS, help="a model with random weights, in place of the one that ships")
    model.add_argument("--afd", metavar="xAyF", help="attention and FFN on devices of their own, emulated on a CPU")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each output (default: %(default)s)")
    parser.add_argument(
        "--guesses", type=int, nargs="+", default=[2, 4, 8], help="tokens to guess (default: %(default)s)"
    )
    parser.add_argument("--lookup", type=int, nargs=2, metavar=("MIN", "MAX"), help="lengths of n-grams")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="requests at a time, 4 at most")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take medians over (default: %(default)s)")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args(argv)
    before = {"load_average_before": load_average(), "cpu_pressure_before": cpu_pressure()}
    lookup: dict[str, object] = {}
    if arguments.lookup is not None:
        least, most = arguments.lookup
        lookup = {"prompt_lookup_min": least, "prompt_lookup_max": most}
    executor = None
    if arguments.afd is not None:
        instances = parse_topology(arguments.afd)
        force_cpu_devices(instances.num_devices)
        executor = load_host_executor(resources.find("models/step3-tiny"), AfdTopology.of(instances))
    rows = []
    for batch_size in arguments.batches:
        settings = {"max_num_seqs": batch_size, "max_model_len": _MAX_MODEL_LEN, "enable_prefix_caching": False}
        sides: dict[int, LLM] = {}
        if arguments.preset is None:
            folder = resources.find("models/step3-tiny")
            sides[0] = LLM(folder, executor=executor, **settings)
            works = text_work(arguments.tokens)
        else:
            runner = Runner(random_model(bench_config(*PRESETS[arguments.preset])))
            sides[0] = LLM.from_model(runner, **settings)
            works = random_work(runner.config.text.vocab_size, arguments.tokens)
        for guesses in arguments.guesses:
            given = {"method": "ngram", "num_speculative_tokens": guesses} | lookup
            if arguments.preset is None:
                sides[guesses] = LLM(folder, executor=executor, speculative_config=given, **settings)
            else:
                sides[guesses] = LLM.from_model(runner, speculative_config=given, **settings)
        rows += measure(sides, works, batch_size, arguments.rounds)
    after = {"cpu_pressure_after": cpu_pressure()}
    given = {name: getattr(arguments, name) for name in ("preset", "afd", "tokens", "lookup", "rounds")}
    report = {"conditions": conditions() | before | after | given, "speculation": rows}
    print(json.dumps(report, indent=1))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
