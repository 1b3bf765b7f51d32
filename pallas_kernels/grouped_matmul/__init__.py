"""The routed experts: products of rows, sorted by expert, with each expert's own weights."""

from pallas_kernels.grouped_matmul.api import grouped_down as grouped_down
from pallas_kernels.grouped_matmul.api import grouped_gate_up as grouped_gate_up
from pallas_kernels.grouped_matmul.api import moe_ffn as moe_ffn
