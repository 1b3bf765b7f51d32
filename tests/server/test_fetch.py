"""Fetching images from listed hosts: the way that works, and every way that must not reach this machine or its network."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import httpcore2
import pytest
from starlette.applications import Starlette
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from step3_jax.server.fetch import MAX_REDIRECTS, MediaFetcher, is_public
from tests.server.stand_in import serve

PUBLIC = "93.184.216.34"


class Stream(httpcore2.AsyncMockStream):
    """Gives the answers it was given, and remembers what it was asked."""

    def __init__(self, network: Network, answer: bytes) -> None:
        super().__init__([answer[start : start + 1000] for start in range(0, len(answer), 1000)])
        self._network = network

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._network.sent += buffer

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        assert ssl_context.check_hostname
        self._network.tls_names.append(server_hostname)
        return self


class Network(httpcore2.AsyncNetworkBackend):
    """Connections to a web that is a dictionary."""

    def __init__(self, *answers: bytes, dead: Sequence[str] = ()) -> None:
        self.answers, self.dead = list(answers), dead
        self.connected: list[tuple[str, int]] = []
        self.tls_names: list[str | None] = []
        self.sent = b""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        self.connected.append((host, port))
        if host in self.dead:
            raise httpcore2.ConnectError("no answer")
        return Stream(self, self.answers.pop(0))


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def fetch(
    url: str,
    network: httpcore2.AsyncNetworkBackend,
    *,
    domains: Sequence[str] = ("images.example.com",),
    addresses: Sequence[str] = (PUBLIC,),
    max_bytes: int = 10_000,
) -> bytes:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        if isinstance(network, Network):
            assert len(asked) <= len(network.connected) + 1, "resolved twice for one connection"
        return addresses

    fetcher = MediaFetcher(domains, resolve=resolve, network=network)
    return asyncio.run(fetcher.fetch(url, max_bytes=max_bytes))


def test_a_listed_host_is_fetched_from_the_address_that_was_checked() -> None:
    network = Network(answer(b"picture" * 500))
    assert fetch("https://images.example.com/a.png?size=2", network) == b"picture" * 500
    assert network.connected == [(PUBLIC, 443)]
    assert network.tls_names == ["images.example.com"], "the certificate is the name's, not the address's"
    head = network.sent.decode().split("\r\n")
    assert head[0] == "GET /a.png?size=2 HTTP/1.1"
    assert "Host: images.example.com" in head


class Detour(httpcore2.AsyncNetworkBackend):
    """Real connections, which all go to one port of this machine."""

    def __init__(self, port: int) -> None:
        self._port, self._network = port, httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        assert host == PUBLIC
        return await self._network.connect_tcp("127.0.0.1", self._port, timeout, local_address, socket_options)


def test_a_real_server_is_fetched_from_whole_and_in_chunks() -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 1000

    app = Starlette(
        routes=[
            Route("/moved", lambda request: RedirectResponse("/chunks?a=1")),
            Route("/chunks", lambda request: StreamingResponse(stream())),
            Route("/whole", lambda request: Response(request.headers["host"])),
        ]
    )
    with serve(app) as url:
        network = Detour(int(url.rpartition(":")[2]))
        assert fetch("http://images.example.com/moved", network) == b"x" * 5000
        assert fetch("http://images.example.com/whole", network) == b"images.example.com"
        with pytest.raises(ValueError, match="answers 404"):
            fetch("http://images.example.com/nothing", network)


def test_a_port_is_fetched_from_where_it_is_listed() -> None:
    network = Network(answer(b"x"))
    assert fetch("http://images.example.com:8080/a", network, domains=["images.example.com:8080"]) == b"x"
    assert network.connected == [(PUBLIC, 8080)]
    assert b"Host: images.example.com:8080\r\n" in network.sent
    for port in ("", ":22"):
        with pytest.raises(ValueError, match="not among the hosts"):
            fetch(f"http://images.example.com{port}/a", network, domains=["images.example.com:8080"])


def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    network = Network(answer(b"x"), dead=["2606:2800:220:1::1"])
    assert fetch("http://images.example.com/a", network, addresses=["2606:2800:220:1::1", PUBLIC]) == b"x"
    assert [host for host, _ in network.connected] == ["2606:2800:220:1::1", PUBLIC]


def test_a_redirect_is_followed_to_listed_hosts_alone() -> None:
    moved = answer(b"", "302 Found", "Location: /b.png")
    assert fetch("https://images.example.com/a.png", Network(moved, answer(b"x"))) == b"x"
    for target in (
        "http://169.254.169.254/latest",
        "https://other.example.com/a",
        "file:///etc/passwd",
        "//localhost/",
    ):
        network = Network(answer(b"", "301 Moved", f"Location: {target}"))
        with pytest.raises(ValueError, match=r"not among|not a URL"):
            fetch("https://images.example.com/a.png", network)
        assert len(network.connected) == 1
    with pytest.raises(ValueError, match="redirected more than"):
        fetch("https://images.example.com/a.png", Network(*[moved] * (MAX_REDIRECTS + 1)))


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    network = Network()
    for bad in ("10.0.0.1", "fd00::1", "127.0.0.1"):
        with pytest.raises(ValueError, match="no public address"):
            fetch("https://images.example.com/", network, addresses=[PUBLIC, bad])
    with pytest.raises(ValueError, match="no public address"):
        fetch("https://images.example.com/", network, addresses=[])
    assert network.connected == []


def test_bytes_are_counted_while_they_arrive() -> None:
    with pytest.raises(ValueError, match="more than 9,999 bytes"):
        fetch("https://images.example.com/", Network(answer(bytes(10_000))), max_bytes=9_999)
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + bytes(1024) + b"\r\n"
    network = Network(endless + (b"400\r\n" + bytes(1024) + b"\r\n") * 20)
    with pytest.raises(ValueError, match="more than 10,000 bytes"):
        fetch("https://images.example.com/", network)


def test_seconds_are_limited() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    fetcher = MediaFetcher(["images.example.com"], timeout_s=0.01, resolve=resolve, network=Network())
    with pytest.raises(ValueError, match=r"within 0\.01 s"):
        asyncio.run(fetcher.fetch("http://images.example.com/", max_bytes=10))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (answer(b"gone", "404 Not Found"), "answers 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf", "cannot be fetched"),
        (b"SSH-2.0-OpenSSH\r\n", "cannot be fetched"),
    ],
)
def test_a_bad_answer_is_a_mistake_of_the_request(found: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fetch("http://images.example.com/", Network(found))


@pytest.mark.parametrize(
    "entry", ["", "https://a.example.com", "*.example.com", "a.example.com/x", "a:0", "a:b", "a b"]
)
def test_the_list_takes_names_of_hosts(entry: str) -> None:
    with pytest.raises(ValueError, match="--allowed-media-domains"):
        MediaFetcher([entry])


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1::1", True),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b::7f00:1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:93.184.216.34", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("fd12::1", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("no address", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_public(address: str, expected: bool) -> None:
    assert is_public(address) is expected


class Listener:
    """Counts connections on the loopback address."""

    def __init__(self) -> None:
        self.visits = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.port = int(self._socket.getsockname()[1])
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._socket.close()

    def _count(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._socket.accept()
                self.visits += 1
                connection.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


LOOPBACK = (
    "127.0.0.1",
    "127.0.0.2",
    "127.1",
    "127.0.1",
    "0x7f.1",
    "0x7f000001",
    "0177.0.0.1",
    "017700000001",
    "2130706433",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]",
    "images.example.com@127.0.0.1",
    "images.example.com:80@127.0.0.1",
    "127.0.0.1\\@images.example.com",
    "127.0.0.1%2f@images.example.com",
    "127。0。0。1",
    "①②⑦.⓪.⓪.①",
    "127.0.0.1\t",
    "%31%32%37.0.0.1",
)


def test_no_spelling_of_this_machine_is_visited_even_if_it_is_listed(listener: Listener) -> None:
    hosts = []
    for host in LOOPBACK:
        with contextlib.suppress(ValueError):
            MediaFetcher([f"{host}:{listener.port}"])
            hosts.append(f"{host}:{listener.port}")
    assert len(hosts) >= 12, "names and numbers in one piece can be listed"
    fetcher = MediaFetcher([*hosts, f"images.example.com:{listener.port}"], timeout_s=5)
    for host in LOOPBACK:
        for scheme in ("http", "https", "HTTP"):
            with pytest.raises(ValueError, match="Image "):
                asyncio.run(fetcher.fetch(f"{scheme}://{host}:{listener.port}/", max_bytes=10))
    assert listener.visits == 0


def test_the_listener_counts(listener: Listener) -> None:
    with socket.create_connection(("127.0.0.1", listener.port)) as connection:
        assert connection.recv(1) == b""
    assert listener.visits == 1
