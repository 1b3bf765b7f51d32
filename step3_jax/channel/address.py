"""Where rank 0 listens for the other ranks, and the secret of the run."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from collections.abc import Mapping

from step3_jax.rank import CHANNEL, COORDINATOR, SECRET

_MIN_SECRET_BYTES = 16
_MAX_PORT = 65535


@dataclasses.dataclass(frozen=True)
class ChannelAddress:
    """Where the ends of a run meet.

    Attributes:
      host: Rank 0's host, as the others reach it.
      port: Its port.
      secret: Known only to this run's processes; None on one machine, where the port is bound to the loopback address.
    """

    host: str
    port: int
    secret: bytes | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> ChannelAddress:
        """The address from the environment; without STEP3_CHANNEL the port after the coordinator's.

        Raises:
          ValueError: If neither address is set or one is malformed, or there is no secret and rank 0 is reached over a
            network.
        """
        name = CHANNEL if environment.get(CHANNEL) else COORDINATOR
        text = environment.get(name, "")
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= _MAX_PORT:
            raise ValueError(f"{name} is {text!r}; host:port of rank 0 is needed")
        number = int(port) if name == CHANNEL else port_beside(int(port))
        found = cls(host.strip("[]"), number, _read_secret(environment.get(SECRET, "")))
        if found.secret is None and not found.is_loopback:
            raise ValueError(
                f"{SECRET} is not set, and rank 0 is reached over a network: set it to the same secret in all processes, "
                'such as that of python -c "import secrets; print(secrets.token_hex(32))"'
            )
        return found

    @property
    def is_loopback(self) -> bool:
        """Whether all ranks are on one machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def listening(self) -> list[str]:
        """Endpoints to listen at, the narrowest first: the address itself, then all of this machine's.

        A name may be known only to the others, or belong to something that forwards to this machine.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            found = []
        endpoints = [_endpoint(str(address[0]), self.port) for _, _, _, _, address in found]
        return endpoints if self.is_loopback else [*endpoints, f"tcp://*:{self.port}"]

    @property
    def endpoint(self) -> str:
        """The endpoint that the other ranks connect to."""
        return _endpoint(self.host, self.port)


def port_beside(port: int) -> int:
    """The port after a given one."""
    return port + 1 if port < _MAX_PORT else port - 1


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _read_secret(text: str) -> bytes | None:
    if not text:
        return None
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) < _MIN_SECRET_BYTES:
        raise ValueError(f"{SECRET} is not hexadecimal of at least {2 * _MIN_SECRET_BYTES} digits")
    return secret
