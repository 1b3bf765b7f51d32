"""Decode attention over a paged cache with one key/value head."""

from pallas_kernels.mfa_decode.api import KERNEL_STORAGES as KERNEL_STORAGES
from pallas_kernels.mfa_decode.api import mfa_decode as mfa_decode
from pallas_kernels.mfa_decode.api import mfa_decode_quantised as mfa_decode_quantised
from pallas_kernels.mfa_decode.api import plan_decode as plan_decode
from pallas_kernels.mfa_decode.plan import Plan as Plan
