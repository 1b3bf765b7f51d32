"""Attention of many query tokens: causal over a paged cache with one key/value head, or dense with several heads."""

from pallas_kernels.mfa_prefill.api import dense_attention as dense_attention
from pallas_kernels.mfa_prefill.api import mfa_prefill as mfa_prefill
