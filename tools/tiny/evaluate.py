"""Measures the tiny Step3 on all held-out sets and prints it beside simple baselines.

Every answer comes out of `LLM.chat`, greedily, and is right only if the whole sentence is. Pictures, fonts, numbers
and sentences are held out; facts are not (a fact cannot be guessed), so their line is recall and says so.

    python -m tools.tiny.evaluate [MODEL] [--data DIR] [--quick N] [--json FILE] [--samples]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from step3_jax import resources
from step3_jax.checkpoint.load import load_model
from step3_jax.config import ModelConfig
from step3_jax.engine.compile_cache import enable_compile_cache
from step3_jax.engine.llm import LLM
from step3_jax.engine.runner import Runner
from step3_jax.layout.count import count_parameters
from step3_jax.layout.weight_form import QUANTIZATIONS
from step3_jax.model.arrangement import Arrangement
from step3_jax.model.cpu import find_model_kernels, prepare_for_cpu
from step3_jax.text.tokenizer import Tokenizer
from tools.tiny.evaluate_answers import Reply, ask_all, share_right, share_right_digits, share_right_functions
from tools.tiny.evaluate_cases import load_sets
from tools.tiny.evaluate_text import TextScore, score_text
from tools.tiny.fetch import DEFAULT_DATA, say, write_json

# Written down before the training began, that of tool calls before the stages that teach copying; text in bits per byte.
AIMS = {
    "unseen": 0.70,
    "seen": 0.85,
    "handwriting": 0.95,
    "numbers": 0.80,
    "capitals": 0.95,
    "tool-calls": 0.80,
    "text": 2.09,
}
NUM_SAMPLES = 3
WIDTH = 150  # of the table, where the output is no terminal


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      name: Key of the measure.
      title: What was measured.
      unit: "share" (of 1, more is better) or "bits/byte" (less is better).
      model: The model's figure.
      count: Questions, digits or bytes.
      baseline: The best simple method's figure, None if there is none.
      method: That method, "" if there is none.
      aim: What the figure should reach, None if nothing was set.
    """

    name: str
    title: str
    unit: str
    model: float
    count: int
    baseline: float | None = None
    method: str = ""
    aim: float | None = None

    @property
    def is_reached(self) -> bool | None:
        """Whether the aim is reached; None without one."""
        if self.aim is None:
            return None
        return self.model >= self.aim if self.unit == "share" else self.model < self.aim


def load_baselines(data: Path) -> dict[str, tuple[float, str]]:
    """The best simple method for each measure: its figure and its name."""
    entries = json.loads((data / "picture-baselines.json").read_text(encoding="utf-8"))
    text = json.loads((data / "text-baselines.json").read_text(encoding="utf-8"))

    def best(test: str, *, without: str = "") -> tuple[float, str]:
        found = [entry for entry in entries if entry["test"] == test and entry["method"] != without]
        top = max(found, key=lambda entry: entry["accuracy"])
        return top["accuracy"], top["method"]

    clean, mild = best("unseen artist, centred on white"), best("unseen artist, mildly augmented")
    per_digit = next(entry for entry in entries if entry["method"] == "chance, per digit")
    return {
        "unseen-clean": clean,
        "unseen-mild": mild,
        "unseen": ((clean[0] + 2 * mild[0]) / 3, clean[1]),  # two mildly augmented pictures for each plain one
        "seen": best("new augmentation of a seen drawing"),
        "numbers": best("numbers", without=per_digit["method"]),
        "numbers-digits": (per_digit["accuracy"], per_digit["method"]),
        "handwriting": best("handwriting"),
        "text": (min(text["byte_6gram"], text["byte_6gram_sentences_only"]), "byte 6-gram, Witten-Bell"),
    }


def collect_results(
    replies: Mapping[str, Sequence[Reply]],
    titles: Mapping[str, str],
    text: TextScore,
    baselines: Mapping[str, tuple[float, str]],
) -> list[Result]:
    """Puts figures, baselines and aims together, in the order of the table."""
    rows = [(name, titles[name], share_right(part), len(part)) for name, part in replies.items()]
    both = [*replies["unseen-clean"], *replies["unseen-mild"]]
    rows.insert(2, ("unseen", "drawings, unseen artist, both of these", share_right(both), len(both)))
    place = [name for name, *_ in rows].index("numbers") + 1
    num_digits = sum(sum(letter.isdigit() for letter in reply.case.answer) for reply in replies["numbers"])
    digits = ("numbers-digits", "the same, digit by digit", share_right_digits(replies["numbers"]), num_digits)
    rows.insert(place, digits)
    calls = replies["tool-calls"]
    title = "the same, well-formed with the right function, whatever the arguments"
    place = [name for name, *_ in rows].index("tool-calls") + 1
    rows.insert(place, ("tool-functions", title, share_right_functions(calls), len(calls)))
    results = []
    for name, title, figure, count in rows:
        baseline, method = baselines.get(name, (None, ""))
        results.append(Result(name, title, "share", figure, count, baseline, method, AIMS.get(name)))
    baseline, method = baselines["text"]
    title = "held-out sentences, 8 lines at a time"
    results.append(
        Result("text", title, "bits/byte", text.bits_per_byte, text.num_bytes, baseline, method, AIMS["text"])
    )
    return results


def show(results: Sequence[Result], shares: np.ndarray, console: Console) -> None:
    """Prints the table and the load of the routers."""
    table = Table("measure", "count", "model", "baseline", "aim", "method of the baseline")
    for result in results:
        cells = [show_figure(figure, result.unit) for figure in (result.model, result.baseline, result.aim)]
        mark = {None: "", True: " reached", False: " missed"}[result.is_reached]
        table.add_row(result.title, str(result.count), *cells[:2], cells[2] + mark, result.method)
    console.print(table)
    even = 1 / shares.shape[1]
    for layer, part in enumerate(shares):
        console.print(
            f"mixture layer {layer}: busiest expert {part.max() / even:.2f} times its even share of the sentences' "
            f"tokens, idlest {part.min() / even:.2f} times"
        )


def show_figure(figure: float | None, unit: str) -> str:
    """A figure as the table has it: "87.5%", "2.162 bits/byte", or "" for none."""
    if figure is None:
        return ""
    return f"{figure:.1%}" if unit == "share" else f"{figure:.3f} {unit}"


def show_samples(replies: Mapping[str, Sequence[Reply]], console: Console) -> None:
    """Prints a few questions of each set with what the model said, wrong answers first."""
    for name, part in replies.items():
        console.print(f"[bold]{name}[/bold]")
        for reply in sorted(part, key=lambda reply: reply.is_right)[:NUM_SAMPLES]:
            console.print(f"  {reply.case.question}\n    said  {reply.text!r}", markup=False)
            console.print(f"    truth {reply.case.answer!r}", markup=False)


def evaluate(
    model: Path,
    data: Path,
    quick: int | None,
    kv_cache_dtype: str = "auto",
    *,
    quantization: str = "none",
    quantise_activations: bool = False,
) -> tuple[dict[str, list[Reply]], dict[str, str], TextScore]:
    """Asks everything.

    Args:
      model: Folder of the model.
      data: Data folder.
      quick: Cases of each set and sentences / 8; None for all.
      kv_cache_dtype: Of the answers' cache; the sentences are read without one.
      quantization: What weights are held in, as of `load_model`; a form is multiplied by the CPU kernels, or dequantised
        where there are none, which gives the same.
      quantise_activations: Whether weights in FP8 stay so and meet quantised activations, as on GPUs.

    Returns:
      Replies and titles of each set, and the score of the sentences.

    Raises:
      ValueError: If a file is missing.
    """
    arrangement = Arrangement(quantises=quantise_activations)
    form = "stored" if quantise_activations else quantization
    loaded = load_model(model, "float32", quantization=form, arrangement=arrangement)
    if quantization != "none":
        loaded = prepare_for_cpu(loaded, find_model_kernels("float32"))
    llm = LLM(model, executor=Runner(loaded), dtype="float32", kv_cache_dtype=kv_cache_dtype, max_num_seqs=64)
    replies, titles = {}, {}
    for cases in load_sets(data):
        start = time.perf_counter()
        part = cases.take(quick)
        replies[part.name], titles[part.name] = ask_all(llm, part.cases), part.title
        seconds = time.perf_counter() - start
        say(f"{part.title}: {share_right(replies[part.name]):.1%} of {len(part.cases)}, {seconds:.0f} s")
    lines = (data / "text-sentences-heldout.txt").read_text(encoding="utf-8").splitlines()
    lines = lines[: 8 * quick] if quick else lines
    return replies, titles, score_text(loaded, Tokenizer.load(model), lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="model folder (default: the shipped tiny model)")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help=f"data folder (default {DEFAULT_DATA})")
    parser.add_argument("--kv-cache-dtype", default="auto", metavar="DTYPE", help="as of step3 generate (default auto)")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="of weights, as of step3 generate (default none)"
    )
    parser.add_argument(
        "--quantise-activations", action="store_true", help="of a model in FP8: as GPUs do before FP8 products"
    )
    parser.add_argument("--quick", type=int, metavar="N", help="only N questions of each set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--samples", action="store_true", help="also print some answers of each set")
    options = parser.parse_args()
    if options.quick is not None and options.quick < 1:
        parser.error(f"--quick is {options.quick}; give at least 1, or leave it out for everything")
    enable_compile_cache()
    model = options.model or resources.find("models/step3-tiny")
    wall, cpu = time.perf_counter(), time.process_time()
    replies, titles, text = evaluate(
        model,
        options.data,
        options.quick,
        options.kv_cache_dtype,
        quantization=options.quantization,
        quantise_activations=options.quantise_activations,
    )
    results = collect_results(replies, titles, text, load_baselines(options.data))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    show(results, text.shares, console)
    if options.samples:
        show_samples(replies, console)
    seconds = {"wall_s": round(time.perf_counter() - wall), "cpu_s": round(time.process_time() - cpu)}
    console.print(f"{seconds['wall_s']} s, {seconds['cpu_s']} CPU s")
    if options.json:
        count = count_parameters(ModelConfig.load(model))
        record = {
            "parameters": count._asdict(),
            "quick": options.quick,
            "kv_cache_dtype": options.kv_cache_dtype,
            "quantization": options.quantization,
            "quantise_activations": options.quantise_activations,
            "results": [asdict(result) for result in results],
            "router_shares": text.shares.round(5).tolist(),
            "wrong": {
                name: [[r.case.question, r.case.answer, r.answer] for r in part if not r.is_right][:10]
                for name, part in replies.items()
            },
            **seconds,
        }
        write_json(options.json, record)


if __name__ == "__main__":
    main()
