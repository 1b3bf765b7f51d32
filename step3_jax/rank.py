"""What a process of a run is told about its place, in its environment, and its name in messages.

`step3 launch` sets these variables; a user who starts processes by hand sets the first three.
"""

from __future__ import annotations

# host:port of process 0 for `jax.distributed`, how many processes there are, and the number of this one.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "STEP3_COORDINATOR", "STEP3_NUM_PROCESSES", "STEP3_PROCESS_ID"
# Devices that one CPU should look like.
CPU_DEVICES = "STEP3_CPU_DEVICES"
# Seconds that the processes may take to find each other.
START_TIMEOUT = "STEP3_START_TIMEOUT"
# The process's name in messages, such as "ffn 0", or "rank 3" where all do the same.
ROLE = "STEP3_ROLE"
# host:port at which rank 0 listens for the other ranks, and the run's secret in hexadecimal.
CHANNEL, SECRET = "STEP3_CHANNEL", "STEP3_SECRET"
# File through which the process reports to its keeper where it is.
BEACON = "STEP3_BEACON"
# If 1, each decode step reports its number and that of its last exchange to the host, for messages about a rank that hangs.
TRACE_STEPS = "STEP3_TRACE_STEPS"


def name_rank(role: str, rank: int, host: str) -> str:
    """A rank's name in messages: "ffn 0 (rank 1 on b)", or "rank 1 (on b)" if it has no special role."""
    return f"{role} (on {host})" if role == f"rank {rank}" else f"{role} (rank {rank} on {host})"
