"""Proof of the kernels on one Hopper GPU in ten minutes: python -m tools.gpu_check --out DIR.

Needs Python 3.12, jax 0.11.2 with its CUDA plugin, flax and numpy, and a copy of this tree; nothing is installed. What
runs on the GPU runs in child processes, each with a time limit, so that a kernel that hangs costs only one case.
"""

from tools.gpu_check import bare as bare
