"""What crosses between the roles, as bytes: one row per token in each direction.

| part | fp8 | bfloat16, float32 |
| --- | --- | --- |
| normed hidden state | D bytes, and ceil(D / 128) float32 scales (1 x 128 blocks) | D values |
| expert ids | top_k of 16 bits | the same |
| mixing weights | top_k of float32 | the same |
| back: FFN output | D values of bfloat16 | D values of the payload's dtype |

Rows of dense layers have the same layout, with zeros for the experts, so that one program serves every exchange.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from pallas_kernels.storage import BLOCK
from step3_jax.config import TextConfig

# What crosses from attention to FFN; "auto" is float32 for float32 activations, else fp8.
PAYLOADS = ("auto", "fp8", "bfloat16", "float32")
# Bytes of a value in each direction.
_HIDDEN_BYTES = {"fp8": 1, "bfloat16": 2, "float32": 4}
_OUTPUT_BYTES = {"fp8": 2, "bfloat16": 2, "float32": 4}
_SCALE_BYTES, _EXPERT_BYTES = 4, 2 + 4


def choose_payload(payload: str, dtype: str) -> str:
    """The payload that "auto" means: exact for float32 activations, FP8 for others.

    Args:
      payload: One of `PAYLOADS`.
      dtype: Name of the activations' dtype.

    Raises:
      ValueError: For an unknown payload.
    """
    if payload not in PAYLOADS:
        raise ValueError(f"the payload is {payload!r}; allowed: {', '.join(PAYLOADS)}")
    if payload != "auto":
        return payload
    return "float32" if dtype == "float32" else "fp8"


@dataclasses.dataclass(frozen=True)
class PayloadSize:
    """Bytes of a token's rows in both directions.

    Attributes:
      payload: "fp8", "bfloat16" or "float32".
      hidden_size: D.
      top_k: Experts per token; 0 for a model without experts.
    """

    payload: str
    hidden_size: int
    top_k: int

    @classmethod
    def of(cls, config: TextConfig, payload: str) -> Self:
        """The sizes for a model; `payload` must not be "auto".

        Raises:
          ValueError: For an unknown payload.
        """
        if payload not in _HIDDEN_BYTES:
            raise ValueError(f"the payload is {payload!r}; allowed: {', '.join(_HIDDEN_BYTES)}")
        return cls(payload, config.hidden_size, config.moe_top_k if config.moe_layers else 0)

    @property
    def num_scales(self) -> int:
        """Scales of a token."""
        return -(-self.hidden_size // BLOCK) if self.payload == "fp8" else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a token from attention to FFN."""
        values = self.hidden_size * _HIDDEN_BYTES[self.payload]
        return values + _SCALE_BYTES * self.num_scales + _EXPERT_BYTES * self.top_k

    @property
    def output_bytes(self) -> int:
        """Bytes of a token from FFN to attention."""
        return self.hidden_size * _OUTPUT_BYTES[self.payload]
