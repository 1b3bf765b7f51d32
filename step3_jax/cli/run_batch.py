"""`step3 run-batch`: answers a file of requests with the model, and resumes where it was stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import pathlib
import sys

from tqdm import tqdm

from step3_jax.cli.arguments.run_batch import SETTINGS
from step3_jax.cli.choice import find_model
from step3_jax.cli.display import write_note
from step3_jax.cli.engine import load_llm, print_config, read_engine
from step3_jax.cli.precheck import check_before_loading
from step3_jax.cli.process import interrupt_note, interruptible
from step3_jax.cli.progress import show_progress
from step3_jax.cli.serve import read_server_config, require_libraries
from step3_jax.server.batch_file import BatchInput, BatchOutput

_GO_ON = "interrupted; the same command resumes where it was"
# Requests at a time per slot of the engine: the next ones are ready when one becomes free.
_PER_SLOT = 2
# For the engine's current step.
_CLOSE_S = 10


def run(arguments: argparse.Namespace) -> int:
    """Answers the requests that have no answer yet.

    Returns:
      0, even if there were errors: they are lines of the output.

    Raises:
      ValueError: For files that cannot be used, and everything that the checkpoint or the engine refuses.
      BatchStopped: If the engine has stopped.
    """
    if print_config(arguments):
        return 0
    require_libraries("run-batch")
    with contextlib.ExitStack() as stack:
        given = BatchInput(pathlib.Path(arguments.input_file))
        stack.callback(given.close)
        output = BatchOutput(pathlib.Path(arguments.output_file))
        stack.callback(output.close)
        unknown = output.done - {line.custom_id for line in given.lines}
        if unknown:
            raise ValueError(
                f"{arguments.output_file} has an answer to {min(unknown)!r}, which is not in {arguments.input_file}: "
                "give another file"
            )
        num_left = len(given.lines) - len(output.done)
        if num_left:
            stack.enter_context(interrupt_note(_GO_ON))
            _answer(arguments, given, output)
        write_note(f"{len(given.lines)} requests, {num_left} of them answered now")
    return 0


def _answer(arguments: argparse.Namespace, given: BatchInput, output: BatchOutput) -> None:
    # Modules of the service need its libraries.
    from step3_jax.server.app import build_app  # noqa: PLC0415
    from step3_jax.server.batch import run_batch  # noqa: PLC0415
    from step3_jax.server.protocol.completion import MAX_PROMPTS  # noqa: PLC0415

    choice = read_engine(arguments)
    config = read_server_config(arguments, SETTINGS)
    folder = find_model(arguments)
    check_before_loading(folder, max_model_len=choice.config.max_model_len, needs_template=False)
    with show_progress(f"loading {folder}"):
        llm = load_llm(choice, folder)
    concurrency = _PER_SLOT * llm.engine_config.max_num_seqs
    config = dataclasses.replace(
        config,
        served_model_name=config.served_model_name or (folder.resolve().name,),
        # `concurrency` is the limit: any request that it lets through must fit.
        max_num_queued_reqs=concurrency * config.max_n * MAX_PROMPTS,
    )
    app = build_app(llm, config)
    service = app.state.service
    num_errors = 0
    with tqdm(total=len(given.lines), initial=len(output.done), unit="request", disable=not sys.stderr.isatty()) as bar:
        try:
            with interruptible():
                num_errors = asyncio.run(
                    run_batch(app, given, output, concurrency=concurrency, tell=lambda _: bar.update())
                )
        finally:
            service.close(_CLOSE_S)
    if num_errors:
        write_note(f"{num_errors} of the answers are errors, see their status_code")
