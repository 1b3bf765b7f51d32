"""What each side computes in which tick, and when it crosses: fixed before anything runs, so nothing is negotiated.

Time is divided into ticks. In each, attention computes one item (a layer of a micro-batch), the FFN side one, and there
is one exchange that carries both directions. A rotation is the ticks of one step: all layers of all micro-batches.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

# Ticks that attention's, and the FFN side's, results wait for their exchange, by the number of micro-batches.
# Without waiting, a side computes and then sends in the same tick; with it, it sends the previous tick's result
# while it computes, which takes one tick longer and so needs one more micro-batch to fill.
_LAGS = {1: (0, 0), 2: (0, 0), 3: (1, 0), 4: (1, 1)}


class Item(NamedTuple):
    """One layer of one micro-batch."""

    layer: int
    microbatch: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of work for L layers and n micro-batches.

    Attention computes item (l, m) in tick l * period + m. It crosses `attention_lag` ticks later, the FFN side computes
    it in the tick after that, and its output crosses `ffn_lag` ticks later: the micro-batch's next layer can be computed
    `depth` ticks after the item.

    Attributes:
      num_layers: L.
      num_microbatches: n, 1 to 4.
    """

    num_layers: int
    num_microbatches: int

    @property
    def attention_lag(self) -> int:
        """Ticks from an attention half to its exchange."""
        return _LAGS[self.num_microbatches][0]

    @property
    def ffn_lag(self) -> int:
        """Ticks from an FFN half to its exchange."""
        return _LAGS[self.num_microbatches][1]

    @property
    def depth(self) -> int:
        """Ticks from one layer of a micro-batch to the next one."""
        return 2 + self.attention_lag + self.ffn_lag

    @property
    def period(self) -> int:
        """Ticks of a layer; those beyond the micro-batches are idle."""
        return max(self.num_microbatches, self.depth)

    @property
    def num_idle_ticks(self) -> int:
        """Idle ticks for each item: only a single micro-batch has any."""
        return self.period - self.num_microbatches

    @property
    def num_late_items(self) -> int:
        """Items of the last layer that the FFN side computes in the next rotation, before that rotation's own."""
        return sum(self.is_from_before(tick) and self.ffn_item(tick) is not None for tick in range(self.period))

    @property
    def num_ticks(self) -> int:
        """Ticks of a rotation."""
        return self.num_layers * self.period

    @property
    def num_last_exchanges(self) -> int:
        """Exchanges after the last rotation until everything in flight has come back."""
        return self.num_microbatches - 1 + self.depth - self.period

    def attention_item(self, tick: int) -> Item | None:
        """What attention computes in a tick of the rotation; None for nothing."""
        return self._item(tick)

    def ffn_item(self, tick: int) -> Item | None:
        """What the FFN side computes in a tick of the rotation; in the first ones, what the previous rotation sent."""
        return self._item((tick - 1 - self.attention_lag) % self.num_ticks)

    def is_from_before(self, tick: int) -> bool:
        """Whether the previous rotation sent what the FFN side computes in a tick."""
        return tick <= self.attention_lag

    def _item(self, slot: int) -> Item | None:
        layer, microbatch = divmod(slot, self.period)
        return Item(layer, microbatch) if microbatch < self.num_microbatches else None
