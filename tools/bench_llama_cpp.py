"""Decode compared with llama.cpp, batch 1, alternating in one run: bytes of weights per second.

    python -m venv .venv-peer && .venv-peer/bin/pip install xllamacpp gguf
    python -m tools.bench_llama_cpp --peer-python .venv-peer/bin/python --json benchmarks/decode-cpu.json

The peer is tools/llama_cpp_server.py: a mixture of experts as large as the 100M model of `step3 bench`, with random weights
in q8_0, as llama.cpp has no MFA. The models differ, so the comparison is of the rate at which active weights are read. The
peer's tokens are timed by its own clock, so that HTTP costs it nothing.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import time
import urllib.error
import urllib.request

import numpy as np

from step3_jax.bench.loop import Ours
from step3_jax.bench.machine import conditions, cpu_pressure
from step3_jax.bench.model import bench_config, hold_as, random_model, weight_sizes
from step3_jax.bench.report import format_report, write_section
from step3_jax.bench.yardstick import read_meter
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.cpu_count import count_cpus
from step3_jax.layout.count import active_parameters
from tools import llama_cpp_sizes as peer_sizes

START_S = 300
PORT = 8093


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="interpreter that has xllamacpp and gguf")
    parser.add_argument("--quantization", default="fp8,int8", help="ours (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json", type=pathlib.Path, help="also write all figures to this file, under llama_cpp")
    arguments = parser.parse_args()
    script = pathlib.Path(__file__).with_name("llama_cpp_server.py")
    threads = count_cpus()
    command = [arguments.peer_python, str(script), "--type", "q8_0", "--parallel", "1"]
    with subprocess.Popen(
        [*command, "--threads", str(threads), "--port", str(PORT)], stdout=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(server)
            result = measure(arguments.quantization.split(","), arguments.rounds, arguments.steps)
        finally:
            server.terminate()
    print(format_report(result))
    if arguments.json:
        write_section(arguments.json, "llama_cpp", result)


def measure(forms: list[str], rounds: int, steps: int) -> dict[str, object]:
    """Our rows and the peer's, medians over rounds."""
    config = bench_config(*PRESETS["100m"])
    model = random_model(config)
    sides = {form: Ours(hold_as(model, form)) for form in forms}
    ids = np.random.default_rng(0).integers(2, config.text.vocab_size, (1, 32))
    for side in sides.values():
        side.prefill(ids, steps * (rounds + 1))
        side.decode(steps)
    _ask(ids[0].tolist(), steps)
    read = read_meter(count_cpus())
    rates: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in (*sides, "llama.cpp q8_0")}
    before = cpu_pressure()
    for _ in range(rounds):
        rates.append(read())
        for form, side in sides.items():
            times[form].append(side.decode(steps) / steps)
        times["llama.cpp q8_0"].append(_ask(ids[0].tolist(), steps))
    layers, head = active_parameters(config.text)
    num_bytes = {form: np.dot(weight_sizes("float32", form), (layers, head)) for form in sides}
    num_bytes["llama.cpp q8_0"] = peer_sizes.active_parameters() * peer_sizes.Q8_BYTES
    read_rate = statistics.median(rates)
    rows = [
        {
            "model": name,
            "tokens_per_s": 1 / statistics.median(seconds),
            "step_mb": float(num_bytes[name]) / 1e6,
            "gb_per_s": float(num_bytes[name]) / statistics.median(seconds) / 1e9,
            "share_of_read": float(num_bytes[name]) / statistics.median(seconds) / read_rate,
        }
        for name, seconds in times.items()
    ]
    machine = conditions() | {"rounds": rounds, "cpu_pressure_before": before, "cpu_pressure_after": cpu_pressure()}
    return {"conditions": machine, "read_gb_per_s": read_rate / 1e9, "decode": rows}


def _ask(prompt: list[int], steps: int) -> float:
    """Seconds that the peer takes for one token."""
    body = {"prompt": prompt, "n_predict": steps, "temperature": 0.0, "ignore_eos": True, "cache_prompt": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_S) as reply:
        return float(json.load(reply)["timings"]["predicted_per_token_ms"]) / 1e3


def _wait_for(server: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < give_up_at:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit("llama.cpp's server did not start (see above)")


if __name__ == "__main__":
    main()
