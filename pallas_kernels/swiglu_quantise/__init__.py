"""SwiGLU fused with quantisation to FP8."""

from pallas_kernels.swiglu_quantise.api import swiglu_quantise as swiglu_quantise
