"""RMSNorm fused with quantisation to FP8."""

from pallas_kernels.norm_quantise.api import norm_quantise as norm_quantise
