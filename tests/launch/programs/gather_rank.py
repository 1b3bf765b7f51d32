"""A rank of real distributed JAX: gathers the ranks' numbers over gloo, as often as it is told; `loop` for ever."""

from __future__ import annotations

import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

rank = int(os.environ["STEP3_PROCESS_ID"])
jax.config.update("jax_num_cpu_devices", int(os.environ["STEP3_CPU_DEVICES"]))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    os.environ["STEP3_COORDINATOR"], int(os.environ["STEP3_NUM_PROCESSES"]), rank, initialization_timeout=60
)
count = 10**9 if sys.argv[1] == "loop" else int(sys.argv[1])
for step in range(count):
    gathered = multihost_utils.process_allgather(np.asarray([10 + rank, step]))
    if step == 0:
        print("gathered", gathered[:, 0].tolist(), flush=True)
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
    time.sleep(0.05 if sys.argv[1] == "loop" else 0)
