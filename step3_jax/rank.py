"""What a process of a run is told of its place, in its environment, and how messages call it.

`step3 launch` sets these variables; a user who starts processes by hand sets the first three.
"""

from __future__ import annotations

# host:port of process 0 for `jax.distributed`, how many processes there are, and the number of this one.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "STEP3_COORDINATOR", "STEP3_NUM_PROCESSES", "STEP3_PROCESS_ID"
# Devices that one CPU is to look like.
CPU_DEVICES = "STEP3_CPU_DEVICES"
# Seconds that the processes may take to find each other.
START_TIMEOUT = "STEP3_START_TIMEOUT"
# What messages call the process, such as "ffn 0", or "rank 3" where all do the same.
ROLE = "STEP3_ROLE"
# host:port at which rank 0 listens for the other ranks, and a secret of the run in hexadecimal.
CHANNEL, SECRET = "STEP3_CHANNEL", "STEP3_SECRET"
# File through which the process tells its keeper where it is.
BEACON = "STEP3_BEACON"
# Set to 1, each decode step tells the host its number and that of its last exchange, for messages about a rank that hangs.
TRACE_STEPS = "STEP3_TRACE_STEPS"


def name_rank(role: str, rank: int, host: str) -> str:
    """A rank as messages call it: "ffn 0 (rank 1 on b)", or "rank 1 (on b)" where it has no role of its own."""
    return f"{role} (on {host})" if role == f"rank {rank}" else f"{role} (rank {rank} on {host})"
