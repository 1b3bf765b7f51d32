"""Rows of a mixture of experts: sorted by expert and padded, and summed back."""

from pallas_kernels.moe_permute.api import combine_rows as combine_rows
from pallas_kernels.moe_permute.api import permute_rows as permute_rows
from pallas_kernels.moe_permute.api import permute_scales as permute_scales
from pallas_kernels.moe_permute.api import permute_weights as permute_weights
from pallas_kernels.moe_permute.api import plan_permutation as plan_permutation
