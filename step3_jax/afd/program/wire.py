"""The exchange of executor `program`: one collective over all devices per tick, which carries both directions.

Every device sends every other one a slot of the same size: the payload's bytes, padded to the size of the larger
direction, and two more bytes:

- A count of the exchanges, which each exchange takes from the one before. So an exchange depends on the last one, whatever
  else the program does, and both roles' programs, which are compiled separately, have them in the same order.
- Whether any row of an attention device runs, and whether one of its rows ends the call: so all devices leave the
  decode loop together, and there is no other collective to keep in order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.call import Observe
from step3_jax.afd.topology import UNION, AfdTopology

_TAIL_BYTES = 2
_RUNS, _LEAVES = 1, 2

Slots = UInt8[Array, "N slot"]


class Wire:
    """The exchange for micro-batches of one size, inside `jax.shard_map` over `AfdTopology.union`.

    Attention devices come first among the N slots, as they do on the mesh.
    """

    def __init__(self, topology: AfdTopology, form: PayloadFormat, num_rows: int) -> None:
        """Takes the rows that each attention device has of a micro-batch, one for each of its tokens."""
        self._num_attention, self._num_ffn = topology.num_attention, topology.num_ffn
        self._form = form
        self._num_rows = num_rows
        self._payload_bytes = num_rows * max(form.row_bytes, form.output_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes from one device to another."""
        return self._payload_bytes + _TAIL_BYTES

    def empty(self) -> Slots:
        """What has arrived before the first exchange."""
        return jnp.zeros((self._num_attention + self._num_ffn, self.slot_bytes), jnp.uint8)

    def from_attention(
        self,
        rows: UInt8[Array, "rows row_bytes"],
        before: Slots,
        runs: Bool[Array, ""] | bool = True,
        leaves: Bool[Array, ""] | bool = False,
    ) -> Slots:
        """Sends an attention device's rows to all FFN devices.

        Args:
          rows: The rows.
          before: What the last exchange brought.
          runs: Whether any row of the device runs; see `is_over`.
          leaves: Whether one of its rows ends the call.

        Returns:
          What has arrived, a slot from each device.
        """
        payload = jnp.pad(rows.reshape(1, -1), ((0, 0), (0, self._payload_bytes - rows.size)))
        payload = jnp.pad(jnp.repeat(payload, self._num_ffn, axis=0), ((self._num_attention, 0), (0, 0)))
        status = jnp.asarray(runs, jnp.uint8) * _RUNS + jnp.asarray(leaves, jnp.uint8) * _LEAVES
        slots = self._close(payload, before[-1, -2], status)
        if self._is_pair:
            return jnp.stack([slots[0], self._swap(slots[1])])
        return self._exchange(slots)

    def from_ffn(self, outputs: UInt8[Array, "rows output_bytes"], before: Slots) -> Slots:
        """Sends an FFN device's outputs, one for each row of `rows`, back to the devices they came from."""
        payload = outputs.reshape(self._num_attention, -1)
        padding = self._payload_bytes - payload.shape[1]
        slots = self._close(jnp.pad(payload, ((0, self._num_ffn), (0, padding))), before[0, -2], jnp.uint8(0))
        if self._is_pair:
            return jnp.stack([self._swap(slots[0]), slots[1]])
        return self._exchange(slots)

    def rows(self, arrived: Slots) -> UInt8[Array, "rows row_bytes"]:
        """What arrived at an FFN device: the rows of all attention devices."""
        size = self._form.row_bytes
        return arrived[: self._num_attention, : self._num_rows * size].reshape(-1, size)

    def outputs(self, arrived: Slots) -> UInt8[Array, "rows output_bytes"]:
        """What came back to an attention device: each FFN device's part of all its rows."""
        size = self._form.output_bytes
        return arrived[self._num_attention :, : self._num_rows * size].reshape(-1, size)

    def is_over(self, arrived: Slots) -> Bool[Array, ""]:
        """Whether no row runs, or one of them ends the call; the same on all devices."""
        status = arrived[: self._num_attention, -1]
        return ~jnp.any(status & _RUNS > 0) | jnp.any(status & _LEAVES > 0)

    def tell(self, observe: Observe | None, step: Int[Array, ""], exchange: Int[Array, ""], arrived: Slots) -> None:
        """Calls `observe`, if there is one, once an exchange is complete."""
        if observe is not None:
            # The bytes make the call wait for the exchange, whichever role this is.
            jax.debug.callback(
                lambda step, exchange, *_: observe(int(step), int(exchange)), step, exchange, arrived[0, -2]
            )

    @property
    def _is_pair(self) -> bool:
        # With one partner each, no device sends unused slots.
        return self._num_attention == self._num_ffn == 1

    def _close(
        self, payload: UInt8[Array, "N bytes"], before: UInt8[Array, ""], status: UInt8[Array, ""] | np.uint8
    ) -> Slots:
        """Adds the two bytes; `before` is the other role's count from the last exchange."""
        tail = jnp.stack([before + jnp.uint8(1), status])
        return jnp.concatenate([payload, jnp.broadcast_to(tail, (payload.shape[0], _TAIL_BYTES))], axis=1)

    def _swap(self, slot: UInt8[Array, " slot"]) -> UInt8[Array, " slot"]:
        return jax.lax.ppermute(slot, UNION, [(0, 1), (1, 0)])

    def _exchange(self, slots: Slots) -> Slots:
        return jax.lax.all_to_all(slots, UNION, split_axis=0, concat_axis=0, tiled=True)
