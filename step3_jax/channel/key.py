"""The keys of both ends, derived from the run's secret."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac

import zmq
from zmq.utils import z85


@dataclasses.dataclass(frozen=True)
class Keys:
    """CURVE keys of one end, and the public key of the other, in ZeroMQ's format."""

    public: bytes
    secret: bytes
    peer: bytes


def derive_keys(secret: bytes, *, is_driver: bool) -> Keys:
    """The keys of an end.

    The public keys are secret too, as both are derived: any peer that completes the handshake knows the run's secret.

    Args:
      secret: The run's secret.
      is_driver: Whether the end is rank 0's.
    """
    secrets = [_derive(secret, label) for label in (b"driver", b"worker")]
    own, other = secrets if is_driver else secrets[::-1]
    return Keys(zmq.curve_public(own), own, zmq.curve_public(other))


def _derive(secret: bytes, label: bytes) -> bytes:
    return z85.encode(hmac.digest(secret, b"step3 channel " + label, hashlib.sha256))
