"""How many processes the launched command needs."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax.launch.place import Need, read_need, read_topology
from step3_jax.layout.deployment import Topology, parse_topology


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generate -p Hello", None),
        ("generate --afd off", None),
        ("generate --afd 2a1f -p x", Topology("2a1f", 2, 1, 1)),
        ("generate --afd=16A2F", Topology("16A2F", 16, 2, 1)),
        ("generate --afd 1a1f --afd-devices 8", Topology("1a1f", 1, 1, 8)),
        # An option that only begins alike is another one.
        ("serve --afd-config afd.yaml", None),
    ],
)
def test_the_topology_is_found_among_the_words(words: str, expected: Topology | None) -> None:
    assert read_topology(words.split()) == expected


@pytest.mark.parametrize(
    "words", ["--afd 0a1f", "--afd 1a", "--afd 1f1a", "--afd 1a1f --afd-devices 0", "--afd", "--afd="]
)
def test_what_cannot_be_read_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="--afd"):
        read_topology(["generate", *words.split()])


@pytest.mark.parametrize(
    ("spec", "per_instance", "per_process", "processes"),
    [("1a1f", 1, 1, 2), ("2a2f", 1, 1, 4), ("2a2f", 8, 1, 32), ("2a1f", 4, 2, 6), ("2a2f", 1, 4, 1)],
)
def test_processes_of_a_topology(spec: str, per_instance: int, per_process: int, processes: int) -> None:
    need = read_need(["generate", "--afd", spec, "--afd-devices", str(per_instance)])
    assert need is not None
    assert need.processes(per_process) == processes


def test_a_process_cannot_hold_parts_of_two_instances() -> None:
    with pytest.raises(ValueError, match="2a2f has 3 device"):
        Need("--afd 2a2f", 12, parse_topology("2a2f", 3)).processes(2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generate -p Hello", None),
        ("generate --dp 2 -p Hello", Need("--dp 2", 2)),
        ("generate --data-parallel-size=2 --tp 4 --ep 8", Need("--dp 2 --tp 4", 8)),
        ("generate --ep 4", Need("--ep 4", 4)),
        ("generate --afd off --tp 4", Need("--tp 4", 4)),
    ],
)
def test_parallel_sizes_are_found_among_the_words(words: str, expected: Need | None) -> None:
    assert read_need(words.split()) == expected


def test_the_ffn_sides_sizes_are_no_need_of_their_own() -> None:
    need = read_need("generate --afd 1a1f --afd-devices 2 --tp 2".split())
    assert need is not None
    assert need.num_devices == 4


def test_parallel_sizes_that_cannot_be_are_refused() -> None:
    for words in ("--dp 0", "--tp x"):
        with pytest.raises(ValueError, match=r"--(dp 0|tp x); a whole number of at least 1 is needed"):
            read_need(["generate", *words.split()])
    with pytest.raises(ValueError, match="--dp 4 is for 4 devices, which processes of 3 do not divide evenly"):
        Need("--dp 4", 4).processes(3)


def test_attention_comes_first() -> None:
    roles = [parse_topology("2a1f", 2).role_of(device) for device in range(6)]
    assert roles == ["attention 0", "attention 0", "attention 1", "attention 1", "ffn 0", "ffn 0"]


def test_a_configuration_file_says_what_the_words_do_not(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "engine.yaml"
    words = ["generate", "--config", str(file), "-p", "Hello"]
    file.write_text("deployment:\n  afd: 1a2f\n", encoding="utf-8")
    need = read_need(words)
    assert need is not None
    assert (need.num_devices, need.topology.spec if need.topology else None) == (3, "1a2f")
    assert read_topology([*words, "--afd", "off"]) is None
    file.write_text("tensor_parallel_size: 4\ndata-parallel-size: 2\n", encoding="utf-8")
    assert (read_need(words).num_devices, read_need([*words, "--dp", "1"]).num_devices) == (8, 4)
    file.write_text("deployment: {afd: off, devices: 6}\n", encoding="utf-8")
    assert read_need(words).num_devices == 6
    file.write_text("max_num_seqs: 2\n", encoding="utf-8")
    assert read_need(words) is None
