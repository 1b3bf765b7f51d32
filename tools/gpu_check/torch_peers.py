"""What PyTorch reaches on the same GPU, if installed: attention and products at a few of the shapes.

Runs in a separate process, since two frameworks do not share a GPU's memory well.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

SCRIPT = """
import json, statistics, torch
import torch.nn.functional as F

def us(run, sets, runs=20):
    for inputs in sets:
        run(*inputs)
    times = []
    for _ in range(runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for inputs in sets:
            run(*inputs)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)

def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

results = {}
def record(name, make, run, num_sets):
    try:
        results[name] = us(run, [make() for _ in range(num_sets)])
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"[:160]

for batch, length in ((64, 8192), (8, 32768)):
    # All heads as the rows of one: the one key and value head is then read once.
    record(f"sdpa decode bf16 {batch}x{length}",
           lambda: (normal(batch, 1, 64, 256), normal(batch, 1, length, 256), normal(batch, 1, length, 256)),
           F.scaled_dot_product_attention, 2)
record("sdpa prefill bf16 8k causal", lambda: (normal(1, 64, 8192, 256), normal(1, 1, 8192, 256), normal(1, 1, 8192, 256)),
       lambda q, k, v: F.scaled_dot_product_attention(
           q, k.expand(-1, 64, -1, -1), v.expand(-1, 64, -1, -1), is_causal=True), 2)
record("sdpa vision 4x2708", lambda: tuple(normal(4, 16, 2708, 112) for _ in range(3)), F.scaled_dot_product_attention, 2)
for m, n, k in ((64, 7168, 16384), (64, 2048, 7168), (128, 5120, 7168), (4096, 7168, 16384)):
    def make():
        x, w = (normal(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device="cuda")
        return x, w.t(), one, one
    record(f"_scaled_mm fp8 {m}x{n}x{k}", make,
           lambda x, w, a, b: torch._scaled_mm(x, w, a, b, out_dtype=torch.bfloat16), 3)
print(json.dumps({"version": torch.__version__, "us": results}))
"""


def measure(seconds: float) -> dict[str, object] | str:
    """Microseconds of PyTorch at each shape, or why there are none."""
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=max(seconds, 1.0)
        )
    except subprocess.TimeoutExpired:
        return "took too long"
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else done.stderr[-400:]
