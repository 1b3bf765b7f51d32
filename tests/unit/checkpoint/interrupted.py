"""Run as a script: converts, is killed at random points, resumes, and compares with an uninterrupted run.

A fork for each run, as importing jax takes longer than the conversion. The points are calls that change files (a write
that is hit is half done), counted in an uninterrupted run, so that all of them are equally likely;
with `--timed` they are moments, and the kill comes from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import threading
import time
import traceback

from step3_jax.checkpoint import convert as conversion
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.source import open_source

HOOKED = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir")


class Killer:
    """Counts the calls of `HOOKED`, and kills the process in the call with a given number."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._lock = threading.Lock()
        for name in HOOKED:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, function):
        def call(*args, **kwargs):
            with self._lock:
                self.count += 1
                is_last = self.count == self._kill_at
                if is_last:
                    if name in ("pwrite", "write"):
                        function(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def run(options, target, *, resume, kill_at=None, kill_after=None):
    """One run in a fork: how it ended, its calls, the units it did, and its seconds."""
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            killer = Killer(kill_at)
            units = []
            do_unit = conversion.do_unit

            def log_unit(plan, places, task, number, band, buffers):
                units.append((task.name, number))
                return do_unit(plan, places, task, number, band, buffers)

            conversion.do_unit = log_unit
            plan = plan_conversion(
                open_source(options.source), form=options.to, dtype=options.dtype, shard_bytes=300_000, unit_bytes=8192
            )
            conversion.convert(plan, target, resume=resume)
            with os.fdopen(writer, "w") as file:
                file.write(json.dumps({"calls": killer.count, "units": units}))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(said or "{}"), time.monotonic() - start


def recorded(target):
    """Units that the record of an unfinished conversion has."""
    path = conversion.partial_folder(target) / conversion.MANIFEST_FILE
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    entries = [json.loads(line) for line in lines[1:]]
    return [(entry["tensor"], entry["band"]) for entry in entries if "tensor" in entry]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(condition, *about):
    if not condition:
        raise SystemExit(f"FAILED: {about}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--to")
    parser.add_argument("--dtype")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", action="store_true")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    whole = options.folder / "whole"
    code, said, seconds = run(options, whole, resume=False)
    check(code == 0, "uninterrupted run", code)
    right, total = files(whole), said["calls"]
    num_kills = num_kept = 0
    while num_kills < options.kills:
        target = options.folder / f"target-{num_kills}"
        resume = False
        for _ in range(rng.choice((1, 1, 2, 3))):
            before = set(recorded(target))
            if options.timed:
                code, _, _ = run(options, target, resume=resume, kill_after=rng.uniform(0, seconds))
            else:
                code, _, _ = run(options, target, resume=resume, kill_at=rng.randint(1, total))
            check(code in (0, -signal.SIGKILL), "killed run", code)
            check(before <= set(recorded(target)) or target.exists(), "a kill lost what was recorded")
            check(not target.exists() or files(target) == right, "a half-written result has the name")
            resume = True
            num_kills += code != 0
        before = recorded(target)
        code, said, _ = run(options, target, resume=True)
        check(code == 0, "resumed run", code)
        check(not set(before) & {tuple(unit) for unit in said["units"]}, "a recorded unit was done twice")
        check(files(target) == right, "not the same files")
        check(not conversion.partial_folder(target).exists(), "the unfinished folder is still there")
        num_kept += len(before)
        shutil.rmtree(target)
    print(json.dumps({"kills": num_kills, "kept_units": num_kept, "calls": total}))


if __name__ == "__main__":
    main()
