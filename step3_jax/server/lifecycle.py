"""What the server is doing, and whether it takes requests."""

from __future__ import annotations

import enum

from step3_jax.server.error import unavailable


class State(enum.Enum):
    """What the server is doing."""

    STARTING = "starting"
    OK = "ok"
    DRAINING = "draining"
    DEAD = "dead"


_CLOSED = {
    State.STARTING: ("not_ready", "the model is being loaded: try again a little later"),
    State.DRAINING: ("shutting_down", "the server is shutting down and takes no more requests"),
    State.DEAD: ("engine_dead", "the engine has stopped, and the server is shutting down"),
}


class Lifecycle:
    """From starting to ok, then draining; from anywhere to dead. Only for the event loop.

    Attributes:
      state: The current state.
    """

    def __init__(self) -> None:
        self.state = State.STARTING

    @property
    def is_dead(self) -> bool:
        """Whether the engine has stopped."""
        return self.state is State.DEAD

    def become_ready(self) -> None:
        """The model is loaded and its programs are compiled."""
        if self.state is State.STARTING:
            self.state = State.OK

    def drain(self) -> None:
        """No new requests are taken."""
        if self.state is not State.DEAD:
            self.state = State.DRAINING

    def die(self) -> None:
        """Nothing is answered from now on."""
        self.state = State.DEAD

    def require_open(self) -> None:
        """Raises ApiError 503 unless requests are taken."""
        if self.state in _CLOSED:
            raise unavailable(*_CLOSED[self.state])
