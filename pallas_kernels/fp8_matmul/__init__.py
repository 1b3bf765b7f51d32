"""Product of FP8 activations and FP8 weights, both scaled by blocks."""

from pallas_kernels.fp8_matmul.api import fp8_matmul as fp8_matmul
