"""Fetches images from hosts that the operator has listed, and never from a private address."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import httpcore2

# Host and port to the numeric addresses they resolve to.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_REDIRECTS = 3
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
# Printable ASCII without the backslash, which browsers read as a slash and Python does not.
_PLAIN = re.compile(r"[!-\[\]-~]+")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# Addresses that embed an arbitrary IPv4 address, to which a network may forward.
_TUNNELS = tuple(ipaddress.IPv6Network(text) for text in ("::/96", "::ffff:0:0/96", "2002::/16", "2001::/32"))
# In an IPv6-only network, the resolver returns IPv4 addresses in this form.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class _Target(NamedTuple):
    """The parts of a URL."""

    scheme: str
    host: str
    port: int
    path: str


class MediaFetcher:
    """Fetches `http:` and `https:` URLs of listed hosts.

    A name is resolved once; the connection goes to one of the addresses that were checked then, so that a second answer from
    the name server changes nothing. Proxies from the environment are not used.
    """

    def __init__(
        self,
        allowed_domains: Iterable[str],
        *,
        timeout_s: float = 10.0,
        resolve: Resolve | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
    ) -> None:
        """Checks the list.

        Args:
          allowed_domains: Host names, such as `images.example.com`, or `images.example.com:8443` for a port other than the
            scheme's. No wildcards: a subdomain is another host.
          timeout_s: For name resolution, connection, redirects and all bytes together.
          resolve: Finds the addresses of a host; the system's resolver if absent.
          network: Makes the connections; the system's if absent.

        Raises:
          ValueError: For an entry that is not a host name.
        """
        self._timeout_s = timeout_s
        self._resolve = _resolve if resolve is None else resolve
        self._network = httpcore2.AnyIOBackend() if network is None else network
        self._hosts: set[str] = set()
        self._ports: set[tuple[str, int]] = set()
        for entry in allowed_domains:
            host, port = _parse_entry(entry)
            if port is None:
                self._hosts.add(host)
            else:
                self._ports.add((host, port))

    async def fetch(self, url: str, *, max_bytes: int) -> bytes:
        """The bytes at a URL.

        Args:
          url: As given in a request.
          max_bytes: Most bytes that are read.

        Raises:
          ValueError: If the URL is not allowed or does not answer in time with at most `max_bytes` bytes. The message names
            no address, so that nothing can be learned about the network from it.
        """
        shown = repr(url if len(url) <= 83 else url[:80] + "...")
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    found = await self._fetch_one(url, shown, max_bytes)
                    if isinstance(found, bytes):
                        return found
                    url = found
        except TimeoutError:
            raise ValueError(f"Image {shown} did not arrive within {self._timeout_s:g} s.") from None
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise ValueError(f"Image {shown} cannot be fetched: {type(error).__name__}.") from None
        raise ValueError(f"Image {shown} is redirected more than {MAX_REDIRECTS} times; give its last URL.")

    async def _fetch_one(self, url: str, shown: str, max_bytes: int) -> bytes | str:
        """The bytes, or the URL that the answer redirects to."""
        target = self._check(url, shown)
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(is_public(address) for address in addresses):
            raise ValueError(
                f"Image {shown}: {target.host} has no public address; only public addresses are fetched from."
            )
        scheme, host, port, path = target
        request = httpcore2.URL(scheme=scheme.encode(), host=host.encode(), port=port, target=path.encode())
        named = host if port == _DEFAULT_PORTS[scheme] else f"{host}:{port}"
        headers = [("Host", named), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "step3-jax")]
        network = _PinnedNetwork(self._network, addresses)
        async with (
            httpcore2.AsyncConnectionPool(network_backend=network) as pool,
            pool.stream("GET", request, headers=headers) as response,
        ):
            if response.status in _REDIRECTS:
                location = next((value for name, value in response.headers if name.lower() == b"location"), b"")
                return urljoin(url, location.decode("ascii", "replace"))
            if response.status != 200:
                raise ValueError(f"Image {shown} cannot be fetched: its server answers {response.status}.")
            data = bytearray()
            async for chunk in response.aiter_stream():
                data += chunk
                if len(data) > max_bytes:
                    raise ValueError(f"Image {shown} has more than {max_bytes:,} bytes, the most that are allowed.")
            return bytes(data)

    def _check(self, url: str, shown: str) -> _Target:
        """Splits an allowed URL. Anything that two URL parsers could interpret differently is refused."""
        try:
            parts = urlsplit(url) if _PLAIN.fullmatch(url) else None
            port = None if parts is None else parts.port
        except ValueError:
            parts = port = None
        if parts is None or parts.scheme not in _DEFAULT_PORTS or "@" in parts.netloc or not parts.hostname:
            raise ValueError(
                f"Image {shown} is not a URL that can be fetched: http://host/path or https://host/path in ASCII is needed, "
                "without user or password."
            )
        host, default = parts.hostname.lower(), _DEFAULT_PORTS[parts.scheme]
        port = default if port is None else port
        if not (host in self._hosts and port == default) and (host, port) not in self._ports:
            raise ValueError(f"Image {shown}: {host}:{port} is not among the hosts of --allowed-media-domains.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(parts.scheme, host, port, path)


def is_public(address: str) -> bool:
    """Whether a numeric address is on the public internet.

    Args:
      address: IPv4 or IPv6, as resolvers return it. Anything else is not public.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if any(found in tunnel for tunnel in _TUNNELS) or found.scope_id is not None:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _parse_entry(entry: str) -> tuple[str, int | None]:
    host, colon, port = entry.strip().lower().rpartition(":") if ":" in entry else (entry.strip().lower(), "", "")
    if not _HOST.fullmatch(host) or (colon and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(
            f"--allowed-media-domains has {entry!r}; the name of a host is needed, such as images.example.com or "
            "images.example.com:8443 (no scheme, no path, no wildcard)"
        )
    return host, int(port) if colon else None


class _PinnedNetwork(httpcore2.AsyncNetworkBackend):
    """A network in which every connection goes to one of a few addresses; TLS still verifies the name in the URL."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend, addresses: Sequence[str]) -> None:
        self._network, self._addresses = network, addresses

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        for address in self._addresses[:-1]:
            # If one does not answer, the next one may.
            with contextlib.suppress(httpcore2.ConnectError, httpcore2.ConnectTimeout):
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._network.connect_tcp(self._addresses[-1], port, timeout, local_address, socket_options)
