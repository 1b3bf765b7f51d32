"""A rank of real distributed JAX: gathers the ranks' numbers over gloo the given number of times; `loop` for ever."""

from __future__ import annotations

import os
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from step3_jax.distributed import initialise_distributed

initialise_distributed()
rank = jax.process_index()
count = 10**9 if sys.argv[1] == "loop" else int(sys.argv[1])
for step in range(count):
    gathered = multihost_utils.process_allgather(np.asarray([10 + rank, step]))
    if step == 0:
        print("gathered", gathered[:, 0].tolist(), flush=True)
        print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
    time.sleep(0.05 if sys.argv[1] == "loop" else 0)
