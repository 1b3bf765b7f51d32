"""Where rank 0 listens, and the keys of a run."""

from __future__ import annotations

import pytest

from step3_jax.channel.address import ChannelAddress, port_beside

SECRET = "ab" * 32


def test_the_port_beside_the_coordinators_is_taken_without_another() -> None:
    found = ChannelAddress.read({"STEP3_COORDINATOR": "127.0.0.1:5000"})
    assert (found.host, found.port, found.secret) == ("127.0.0.1", 5001, None)
    assert found.listening() == ["tcp://127.0.0.1:5001"]
    assert port_beside(65535) == 65534


def test_a_network_is_listened_at_by_its_address_or_by_all() -> None:
    found = ChannelAddress.read({"STEP3_CHANNEL": "[fd00::1]:7000", "STEP3_SECRET": SECRET})
    assert (found.host, found.port) == ("fd00::1", 7000)
    assert found.endpoint == "tcp://[fd00::1]:7000"
    assert found.listening() == ["tcp://[fd00::1]:7000", "tcp://*:7000"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "STEP3_COORDINATOR is ''; host:port"),
        ({"STEP3_CHANNEL": "here"}, "STEP3_CHANNEL is 'here'; host:port"),
        ({"STEP3_CHANNEL": "127.0.0.1:1", "STEP3_SECRET": "word"}, "STEP3_SECRET is not hexadecimal"),
        ({"STEP3_CHANNEL": "127.0.0.1:1", "STEP3_SECRET": "abcd"}, "of at least 32 digits"),
        ({"STEP3_CHANNEL": "10.0.0.1:1"}, "STEP3_SECRET is not set, and rank 0 is reached over a network"),
    ],
)
def test_what_cannot_be_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelAddress.read(variables)
