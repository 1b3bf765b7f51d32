"""`step3 plan search`: finds the deployment that decodes at the lowest cost within a target time.

Exit code 0 if one meets the target, 1 if none does, 2 for a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import get_args

from step3_jax.cli.display import write_note
from step3_jax.cli.plan_cost import read_measurements, read_prices
from step3_jax.cli.plan_model import load_config
from step3_jax.config import TextConfig
from step3_jax.layout.deployment import format_deployment
from step3_jax.layout.hardware import list_hardware
from step3_jax.planner.candidate import Kind, Pool, parse_pool
from step3_jax.planner.context import Contexts, parse_contexts, trace_contexts
from step3_jax.planner.cost import Prices
from step3_jax.planner.estimate import JUDGES
from step3_jax.planner.expert_load import even_load, read_load
from step3_jax.planner.front import find_front
from step3_jax.planner.front_picture import Front, check_picture, draw_fronts
from step3_jax.planner.query import Found, Query
from step3_jax.planner.search import Search
from step3_jax.planner.search_report import to_dict, to_lines
from step3_jax.planner.trace_file import read_trace

_NAME = re.compile(r"\d+a\d+f|(ep|tp)\d+")


def run(arguments: argparse.Namespace) -> int:
    """Prints the best deployments."""
    query = read_query(arguments)
    only = [_check_only(word) for word in arguments.only]
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: at least 1 deployment is needed")
    if arguments.picture is not None:
        check_picture(arguments.picture)
    if arguments.output is not None and pathlib.Path(arguments.output).suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output {arguments.output}: the name of a deployment file ends in .yaml")
    start = time.perf_counter()
    search = Search(query, only)
    answer = search.answer(arguments.top)
    seconds = time.perf_counter() - start
    if arguments.json or arguments.picture is not None:
        fronts = {name: find_front(search, is_apart=name == "afd") for name in ("afd", "ep")}
    if arguments.json:
        print(json.dumps(to_dict(answer, fronts, seconds)))
    else:
        print("\n".join(to_lines(answer, seconds)))
    best = answer.best[0] if answer.best else None
    if arguments.picture is not None:
        _draw(search, only, fronts, best, pathlib.Path(arguments.picture))
    if arguments.output is not None and best is not None:
        text_only = " --text-only" if query.text_only else ""
        described = f"{best.candidate.devices}, found by step3 plan search{text_only}"
        deployment = dataclasses.replace(best.deployment, description=described)
        _write(pathlib.Path(arguments.output), format_deployment(deployment).encode())
    return 0 if best is not None else 1


def read_query(arguments: argparse.Namespace) -> Query:
    """The search for the given options.

    Raises:
      ValueError: For a value that is not allowed.
    """
    config = load_config(arguments.model)
    contexts = _read_contexts(arguments, config.text)
    return Query(
        config=config,
        weights=arguments.weights,
        kv_cache=arguments.kv_cache_dtype,
        contexts=contexts,
        load=even_load(config.text) if arguments.expert_load is None else read_load(arguments.expert_load, config.text),
        pools=_read_pools(arguments.hardware, read_prices(arguments.price)),
        target_s=arguments.target_ms / 1e3,
        first_token_s=arguments.target_first_token_s,
        judge=arguments.judge,
        text_only=arguments.text_only,
        chunk_tokens=arguments.max_num_batched_tokens,
        memory_share=arguments.memory_share,
        measurements=read_measurements(arguments.measured, round(contexts.mean)),
    )


def _read_contexts(arguments: argparse.Namespace, config: TextConfig) -> Contexts:
    most = config.max_position_embeddings
    if arguments.trace is not None:
        return trace_contexts(pathlib.Path(arguments.trace).name, read_trace(arguments.trace, max_tokens=most))
    return parse_contexts(arguments.context or "8k", max_tokens=most)


def _read_pools(words: Sequence[str], prices: Prices) -> list[Pool]:
    """The inventory.

    Raises:
      ValueError: If it is empty, a kind is named twice, or one cannot be read.
    """
    pools = [parse_pool(word, prices) for text in words for word in text.split(",") if word.strip()]
    if not pools:
        raise ValueError(f"give the devices you have, such as --hardware h800:32; known: {', '.join(list_hardware())}")
    names = [pool.hardware.name for pool in pools]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--hardware names {twice[0]} twice: give the number of all its devices once")
    return pools


def _check_only(word: str) -> str:
    name, kinds = word.lower(), get_args(Kind)
    if name not in kinds and not _NAME.fullmatch(name):
        raise ValueError(f"--only {word}: give a deployment such as 2a2f, ep32 or tp8, or one of {', '.join(kinds)}")
    return name


def _draw(
    search: Search, only: Sequence[str], fronts: dict[str, list[Found]], best: Found | None, path: pathlib.Path
) -> None:
    """Draws the fronts of both judges."""
    query = search.query
    lines = [Front(fronts[name], name == "afd", query.judge) for name in fronts]
    for judge in JUDGES:
        if judge != query.judge:
            other = Search(dataclasses.replace(query, judge=judge), only)
            lines += [Front(find_front(other, is_apart=name == "afd"), name == "afd", judge) for name in fronts]
    _write(path, draw_fronts(lines, query, best, path.suffix.lower()))


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    new = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    write_note(f"wrote {path}")
