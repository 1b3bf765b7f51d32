"""Speed of conversion and loading next to a plain copy of the same bytes and safetensors' own reader, in one run.

    python -m tools.bench_checkpoint --json out.json              # 8 experts of full width, 2.3 GB
    python -m tools.bench_checkpoint --full-layer --json out.json # one full layer of the 321B model, 11.1 GB

One mixture layer with random weights is made; then in each round every side runs right before or right after its
yardstick, taking turns to go first, with the source in the page cache ("warm") and without ("cold": `posix_fadvise`
drops what the kernel can drop). Before each the disk has come to rest, and memory for the result has been
touched: on a virtual machine the first touch of memory costs ten times the copy. All writers end with an fsync. The
result of a conversion is compared with the source, outside the timing, in the first round. A side's ratio is that of the
times in such a pair: 1 is as fast as the copy (or the plain read), for the same bytes of the source.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import safetensors

from step3_jax.checkpoint.convert import convert
from step3_jax.checkpoint.inspect import inspect_checkpoint
from step3_jax.checkpoint.load import load_model
from step3_jax.checkpoint.memory import anonymous_bytes
from step3_jax.checkpoint.plan import plan_conversion
from step3_jax.checkpoint.safetensors_io import DTYPES
from step3_jax.checkpoint.shards import Checkpoint
from step3_jax.checkpoint.source import open_source
from step3_jax.config import ModelConfig
from tools.make_checkpoint import make_checkpoint

EXPERTS, FULL_EXPERTS = 8, 48
COPY_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class Side:
    """One operation that is timed.

    Attributes:
      name: Its name.
      yardstick: Name of the side it is compared with; its own for a yardstick.
      run: Runs it, given the source and a folder that does not exist.
      is_conversion: Whether it writes a checkpoint.
    """

    name: str
    yardstick: str
    run: Callable[[pathlib.Path, pathlib.Path], object]
    is_conversion: bool = False


def layer_config(num_experts: int) -> ModelConfig:
    """One mixture layer of the released width, without vision tower, with a small vocabulary."""
    config = ModelConfig.preset("step3")
    text = dataclasses.replace(
        config.text,
        num_hidden_layers=1,
        moe_layers=(0,),
        moe_num_experts=num_experts,
        moe_top_k=min(config.text.moe_top_k, num_experts),
        vocab_size=1024,
    )
    return dataclasses.replace(config, text=text, vision=None)


def list_sides(num_workers: int, *, with_loading: bool) -> list[Side]:
    """All sides, each yardstick before what is compared with it."""

    def run_convert(form: str, dtype: str) -> Callable[[pathlib.Path, pathlib.Path], object]:
        def run(source: pathlib.Path, target: pathlib.Path) -> object:
            return convert(
                plan_conversion(open_source(source), form=form, dtype=dtype), target, num_workers=num_workers
            )

        return run

    sides = [
        Side("copy", "copy", copy_folder),
        Side("convert BF16 to BF16", "copy", run_convert("hf", "bf16"), True),
        Side("convert BF16 to Orbax", "copy", run_convert("orbax", "bf16"), True),
        Side("convert BF16 to FP8", "copy", run_convert("hf", "fp8"), True),
    ]
    if with_loading:
        sides += [
            Side("read", "read", read_plainly),
            Side("safetensors", "read", read_with_safetensors),
            Side("load_model", "read", load),
        ]
    return sides


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies every file, as `cp` does, and flushes it to disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def read_plainly(source: pathlib.Path, _: pathlib.Path) -> list[np.ndarray]:
    """Reads every tensor into its own memory, and keeps all of them as a loaded model does."""
    arrays = []
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            left = path.stat().st_size
            while left:
                array = np.empty(min(left, 2**28), np.uint8)
                position = 0
                while position < array.size:
                    position += file.readinto(memoryview(array)[position : position + COPY_BYTES])
                arrays.append(array)
                left -= array.size
    return arrays


def read_with_safetensors(source: pathlib.Path, _: pathlib.Path) -> list[np.ndarray]:
    """Every tensor by the reader of the `safetensors` package, for numpy."""
    arrays = []
    for path in sorted(source.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return arrays


def load(source: pathlib.Path, _: pathlib.Path) -> object:
    """The model as the engine would get it: checked, named, on the device."""
    return load_model(source, "bfloat16")


def run_rounds(source: pathlib.Path, scratch: pathlib.Path, sides: Sequence[Side], rounds: int) -> list[dict]:
    """Times each side with its yardstick `rounds` times, cold and warm; a row for each side and state of the cache."""
    yardsticks = {side.name: side for side in sides if side.yardstick == side.name}
    num_bytes = sum(path.stat().st_size for path in source.iterdir())
    seconds: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, int] = {}

    def run(side: Side, state: str) -> float:
        (drop_cache if state == "cold" else fill_cache)(source)
        settle(num_bytes)
        target = scratch / "result"
        before, start = anonymous_bytes(), time.perf_counter()
        with PeakMemory() as peak:
            kept = side.run(source, target)
            taken = time.perf_counter() - start
        del kept
        seconds.setdefault((side.name, state), []).append(taken)
        peaks[side.name] = max(peaks.get(side.name, 0), peak.num_bytes - before)
        if side.is_conversion and side.name not in checked:
            check_result(source, target)
            checked.add(side.name)
        shutil.rmtree(target, ignore_errors=True)
        print(f"{side.name:<24} {state}  {num_bytes / taken / 1e9:6.2f} GB/s", flush=True)
        return taken

    checked: set[str] = set()
    for number in range(rounds):
        for state in ("cold", "warm"):
            for side in sides:
                if side.name in yardsticks:
                    continue
                pair = [yardsticks[side.yardstick], side]
                taken = {each.name: run(each, state) for each in (pair if number % 2 == 0 else reversed(pair))}
                ratios.setdefault((side.name, state), []).append(taken[side.yardstick] / taken[side.name])
    rows = []
    for side in sides:
        for state in ("cold", "warm"):
            median = statistics.median(seconds[side.name, state])
            found = ratios.get((side.name, state), [1.0])
            rows.append(
                {
                    "side": side.name,
                    "cache": state,
                    "seconds": round(median, 3),
                    "gb_per_s": round(num_bytes / median / 1e9, 3),
                    "yardstick": side.yardstick,
                    "ratio": round(statistics.median(found), 3),
                    "ratio_range": [round(min(found), 3), round(max(found), 3)],
                    "peak_anonymous_mb": round(peaks[side.name] / 1e6),
                }
            )
    return rows


def check_result(source: pathlib.Path, target: pathlib.Path) -> None:
    """Checks that a conversion fits its configuration and that whatever is not quantised equals the source.

    Raises:
      ValueError: If it does not fit, or a tensor differs.
    """
    found = inspect_checkpoint(target)
    if found.problems:
        raise ValueError(f"{target} does not fit: {found.problems}")
    if found.form == "Orbax" or found.num_fp8:
        return
    with Checkpoint(source) as before, Checkpoint(target) as after:
        for name in before.tensors:
            view = DTYPES["I16"]
            if not np.array_equal(before.read(name).view(view), after.read(name).view(view)):
                raise ValueError(f"{name} differs")


def drop_cache(folder: pathlib.Path) -> None:
    """Tells the kernel that the files' pages are not needed; clean ones are dropped."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(folder: pathlib.Path) -> None:
    """Reads all files once."""
    buffer = memoryview(bytearray(COPY_BYTES))
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def settle(num_bytes: int) -> None:
    """Lets the disk come to rest, and touches memory for a result."""
    gc.collect()
    os.sync()
    memory = np.empty(num_bytes, np.uint8)
    memory[:: os.sysconf("SC_PAGE_SIZE")] = 1


class PeakMemory:
    """This process's peak anonymous memory, sampled every 20 ms."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.is_set():
            self.num_bytes = max(self.num_bytes, anonymous_bytes())
            self._done.wait(0.02)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def read_pressure(what: str) -> float | None:
    """Percent of the last 10 seconds in which something waited for `what` ("cpu", "io"); None if not reported."""
    try:
        text = pathlib.Path(f"/proc/pressure/{what}").read_text(encoding="ascii")
    except OSError:
        return None
    return float(text.split("avg10=")[1].split()[0])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench_checkpoint", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--full-layer", action="store_true", help=f"all {FULL_EXPERTS} experts: 11.1 GB of source")
    parser.add_argument("--experts", type=int, default=EXPERTS, metavar="N", help="experts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds to take medians over (default: 3)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads of conversion (default: 2)")
    parser.add_argument("--no-loading", action="store_true", help="skip the sides that hold the model in memory")
    parser.add_argument("--dir", metavar="PATH", help="folder on the disk to measure (default: the system's)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    arguments = parser.parse_args(argv)
    config = layer_config(FULL_EXPERTS if arguments.full_layer else arguments.experts)
    conditions = {
        "cpu_pressure_before": read_pressure("cpu"),
        "io_pressure_before": read_pressure("io"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "safetensors": safetensors.__version__,
        "rounds": arguments.rounds,
        "workers": arguments.workers,
        "experts": config.text.moe_num_experts,
    }
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=arguments.dir) as root:
        source = pathlib.Path(root) / "source"
        start = time.perf_counter()
        num_bytes = make_checkpoint(source, config, progress=sys.stderr.isatty())
        conditions |= {"source_bytes": num_bytes, "making_seconds": round(time.perf_counter() - start, 1)}
        free = shutil.disk_usage(root).free
        if free < 1.1 * num_bytes:
            raise ValueError(
                f"{1.1 * num_bytes / 1e9:.1f} GB are needed, but only {free / 1e9:.1f} GB are free; give --dir"
            )
        sides = list_sides(arguments.workers, with_loading=not arguments.no_loading)
        rows = run_rounds(source, pathlib.Path(root), sides, arguments.rounds)
    conditions |= {"cpu_pressure_after": read_pressure("cpu"), "io_pressure_after": read_pressure("io")}
    print(f"\n{'side':<24} {'cache':<5} {'GB/s':>6} {'of':>6} {'ratio':>6}  peak MB")
    for row in rows:
        print(
            f"{row['side']:<24} {row['cache']:<5} {row['gb_per_s']:6.2f} {row['yardstick']:>6} {row['ratio']:6.2f}  "
            f"{row['peak_anonymous_mb']}"
        )
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
