"""SwiGLU whose result is quantised to FP8 at once."""

from pallas_kernels.swiglu_quantise.api import swiglu_quantise as swiglu_quantise
