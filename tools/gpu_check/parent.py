"""The parent's side of child processes: starts them, reads their reports, kills those that hang or run out of time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from pallas_kernels import tuning
from step3_jax.gpu import claim_memory
from tools.gpu_check.order import FIRST, STEP, Phase, Stage

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A child that is silent for this long is hanging, unless it has asked for longer: a barrier that never completes on a GPU
# looks like this. A child that makes progress reports it.
SILENCE_SECONDS = {"gpu": 60.0, "interpret": 300.0, "compile": 300.0}
# Python, jax and the kernels are imported before the first report.
STARTING_SECONDS = 120.0

Result = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all children of a run have in common.

    Attributes:
      mode: "gpu", "interpret" or "compile".
      out: Folder of the results.
      cache: Folder of compiled programs.
      tuning: File that better blocks go to.
      end: `time.time()` at which whatever still runs is killed; infinite if it may go on.
      is_quick: See the command's --quick.
    """

    mode: str
    out: pathlib.Path
    cache: pathlib.Path
    tuning: pathlib.Path
    end: float
    is_quick: bool = False


class Children:
    """Runs stages, each lane in a child that does as many cases as it can; after a crash or a hang a new one takes over.

    Attributes:
      settings: What all children have in common.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._running: set[subprocess.Popen[str]] = set()
        self._is_ending = False

    def run(
        self, stage: Stage, *, deadline: float, copy_rate: float | None = None
    ) -> Iterator[tuple[str, Result, bool]]:
        """Names and results as they come, and whether the phase is complete: a child may report a part first.

        Args:
          stage: What to do.
          deadline: `time.time()` after which nothing new is started.
          copy_rate: Measured bytes per second of a copy; without it, whatever needs it measures it.
        """
        said: queue.Queue[tuple[str, Result, bool] | None] = queue.Queue()

        def run_lane(names: tuple[str, ...]) -> None:
            try:
                left = list(names)
                while left and not self._is_ending:
                    command = self._command(left, stage.phase, deadline, copy_rate)
                    for name, result, is_all in self._run_child(command, left):
                        said.put((name, result, is_all))
                        left = left[left.index(name) + 1 :] if is_all else left
            finally:
                said.put(None)

        threads = [threading.Thread(target=run_lane, args=(lane,), daemon=True) for lane in stage.lanes]
        for thread in threads:
            thread.start()
        open_lanes = len(threads)
        try:
            while open_lanes:
                message = said.get()
                if message is None:
                    open_lanes -= 1
                else:
                    yield message
        finally:
            if open_lanes:
                self.end()

    def end(self) -> None:
        """Ends all children."""
        self._is_ending = True
        for child in list(self._running):
            child.kill()

    def _command(self, names: list[str], phase: Phase, deadline: float, copy_rate: float | None) -> list[str]:
        settings = self.settings
        options = ["--mode", settings.mode, "--phase", phase, "--deadline", str(deadline)]
        options += ["--tuning", str(settings.tuning), *(["--quick"] if settings.is_quick else [])]
        options += ["--copy-rate", str(copy_rate)] if copy_rate is not None else []
        return [sys.executable, "-m", "tools.gpu_check.child", *options, *names]

    def _environment(self, name: str) -> dict[str, str]:
        """The environment of a child that starts with the case `name`."""
        settings, environment = self.settings, dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        environment["JAX_PLATFORMS"] = "cuda" if settings.mode == "gpu" else "cpu"
        environment[tuning.ENVIRONMENT_VARIABLE] = str(settings.tuning)
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if settings.mode != "gpu":
            return environment
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(settings.cache))
        if name == STEP:
            # Weights and cache nearly fill the GPU: one block of memory, so that none is lost to fragmentation.
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
            claim_memory(environment)
        if name == FIRST:
            # XLA's description of this GPU, for compiling where there is none, is among what it dumps.
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_dump_to={settings.out / 'xla'}"
        return environment

    def _run_child(self, command: list[str], names: list[str]) -> Iterator[tuple[str, Result, bool]]:
        """Results of one child. If it dies early, the case it was at is over, and the rest is left to another."""
        usual = SILENCE_SECONDS[self.settings.mode]
        current, doing, allowed, partial = names[0], "starting", max(usual, STARTING_SECONDS), {}
        with (self.settings.out / "child.log").open("a") as log, self._start(command, names[0], log) as child:
            messages: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(target=_read, args=(child, messages), daemon=True)
            reader.start()
            while True:
                left = self.settings.end - time.time()
                try:
                    line = messages.get(timeout=max(min(allowed, left), 0.01))
                except queue.Empty:
                    if left <= allowed:
                        yield current, {"status": "SKIPPED", **partial, "reason": f"cut off ({doing})"}, True
                        self._is_ending = True
                    else:
                        yield current, _broken(partial, f"silent for {allowed:.0f} s ({doing}); killed"), True
                    return
                if line is None:
                    if current:
                        reason = f"the process ended with {child.wait()} ({doing}); child.log"
                        yield current, _broken(partial, reason), True
                    return
                message = json.loads(line)
                current, event = message.pop("name"), message.pop("event")
                doing, allowed = message.pop("doing", event), message.pop("allowed_s", None) or usual
                if event == "partial":
                    partial = message
                    yield current, message, False
                if event == "result":
                    yield current, message, True
                    current, partial = "", {}

    @contextlib.contextmanager
    def _start(self, command: list[str], name: str, log: object) -> Iterator[subprocess.Popen[str]]:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=self._environment(name),
            start_new_session=True,
        )
        self._running.add(child)
        try:
            yield child
        finally:
            child.kill()
            child.wait()
            self._running.discard(child)


def _broken(partial: Mapping[str, object], reason: str) -> Result:
    """The result of a case whose process is gone: what it had reported by then is kept."""
    return {**partial, "reason": reason} if partial else {"status": "FAIL", "reason": reason}


def _read(child: subprocess.Popen[str], messages: queue.Queue[str | None]) -> None:
    """Moves JSON lines to the queue; None at the end. Other lines were printed by some library."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            messages.put(line)
    child.stdout.close()
    messages.put(None)
