"""Which rank runs where, with which device and which settings."""

from __future__ import annotations

import socket

import pytest

from step3_jax.launch.keeper import list_gpus
from step3_jax.launch.line import Message, decode, encode, pack_output, unpack_bytes
from step3_jax.launch.net import (
    check_versions,
    join_address,
    listen,
    parse_hosts,
    reach,
    split_coordinator,
    wait_for_name,
)
from step3_jax.launch.options import forwarded_environment, rank_environment
from step3_jax.launch.place import Host, Rank, choose_platform, count_processes, format_table, place_ranks, read_need
from step3_jax.layout.deployment import parse_topology

GPUS = tuple("01234567")
TWO = [Host("a", GPUS), Host("b", GPUS)]


def _place(host: Host, count: int, *, platform: str = "cuda", **extra: int) -> list[Rank]:
    return place_ranks(
        host,
        host_index=0,
        first_rank=extra.pop("first_rank", 0),
        count=count,
        platform=platform,
        topology=None,
        devices_per_process=extra.pop("devices_per_process", 1),
        **extra,
    )


def test_one_process_for_each_gpu() -> None:
    assert count_processes(TWO, per_host=None, platform="cuda", need=None, devices_per_process=1) == 8
    ranks = _place(TWO[1], 8, first_rank=8)
    assert [rank.rank for rank in ranks] == list(range(8, 16))
    assert [rank.gpu for rank in ranks] == list(GPUS)


def test_the_topology_decides_the_number_of_processes() -> None:
    need = read_need(["--afd", "1a1f", "--afd-devices", "4"])
    assert count_processes(TWO, per_host=None, platform="cuda", need=need, devices_per_process=1) == 4
    with pytest.raises(ValueError, match="needs 3 processes, which 2 hosts cannot divide evenly"):
        count_processes(TWO, per_host=None, platform="cpu", need=read_need(["--afd", "2a1f"]), devices_per_process=1)
    with pytest.raises(ValueError, match=r"--afd 1a1f needs 8 processes .* not 4: start 8"):
        count_processes(TWO, per_host=2, platform="cpu", need=need, devices_per_process=1)


def test_data_and_tensor_parallel_sizes_decide_it_too() -> None:
    need = read_need(["generate", "--dp", "4", "--tensor-parallel-size=2"])
    assert count_processes(TWO, per_host=None, platform="cuda", need=need, devices_per_process=1) == 4
    assert count_processes(TWO, per_host=2, platform="cpu", need=need, devices_per_process=2) == 2
    message = (
        r"--dp 4 --tp 2 needs 8 processes \(8 device\(s\), 1 in a process\), not 2: start 8, or 1 with --devices-per"
    )
    with pytest.raises(ValueError, match=message):
        count_processes(TWO, per_host=1, platform="cpu", need=need, devices_per_process=1)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="9 processes on a, which has 8 GPU"):
        _place(TWO[0], 9)


def test_tasks_of_a_scheduler_take_the_gpu_of_their_number_or_the_only_one_they_see() -> None:
    assert [rank.gpu for rank in _place(Host("a", GPUS), 1, first_rank=11, first_local=3, num_local=8)] == ["3"]
    assert [rank.gpu for rank in _place(Host("a", ("5",)), 1, first_rank=11, first_local=3, num_local=8)] == ["5"]
    with pytest.raises(ValueError, match="8 processes on a, which has 2 GPU"):
        _place(Host("a", ("0", "1")), 1, first_local=3, num_local=8)


def test_the_platform_is_cuda_only_where_all_hosts_have_it() -> None:
    none = Host("c")
    assert choose_platform("auto", TWO, {}) == "cuda"
    assert choose_platform("auto", [none], {}) == "cpu"
    assert choose_platform("auto", TWO, {"JAX_PLATFORMS": "cpu"}) == "cpu"
    assert choose_platform("cpu", TWO, {"JAX_PLATFORMS": "cuda"}) == "cpu"
    with pytest.raises(ValueError, match="c has no GPU that JAX can use, but others have"):
        choose_platform("auto", [*TWO, none], {})
    with pytest.raises(ValueError, match="c has no GPU that JAX can use"):
        choose_platform("cuda", [none], {})


def test_a_long_table_is_cut() -> None:
    lines = format_table(_place(Host("a", tuple(str(n) for n in range(100))), 100), [Host("a")])
    assert len(lines) == 66
    assert lines[-1] == "... and 36 more"


def test_roles_of_processes_with_several_devices() -> None:
    topology = parse_topology("1a1f", 2)
    for devices, roles in (
        (1, ["attention 0", "attention 0", "ffn 0", "ffn 0"]),
        (2, ["attention 0", "ffn 0"]),
        (4, ["all"]),
    ):
        ranks = place_ranks(
            Host("a"),
            host_index=0,
            first_rank=0,
            count=4 // devices,
            platform="cpu",
            topology=topology,
            devices_per_process=devices,
        )
        assert [rank.role for rank in ranks] == roles


def test_settings_of_a_rank_on_a_gpu() -> None:
    user = {"XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_gpu_shard_autotuning=true", "no_proxy": "internal"}
    found = rank_environment(rank=3, role="rank 3", num_processes=8, coordinator="a:1234", gpu="GPU-abc", user=user)
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert found["JAX_LOCAL_DEVICE_IDS"] == "0"
    assert found["JAX_PLATFORMS"] == "cuda,cpu"
    assert found["no_proxy"] == "internal,a"
    flags = found["XLA_FLAGS"].split()
    # The user's own settings win.
    assert flags[:2] == ["--xla_dump_to=/tmp/x", "--xla_gpu_shard_autotuning=true"]
    assert "--xla_gpu_nccl_terminate_on_error=true" in flags
    assert len(flags) == len({flag.partition("=")[0] for flag in flags})
    assert "STEP3_CPU_DEVICES" not in found


def test_settings_of_a_rank_on_cpu() -> None:
    found = rank_environment(
        rank=0, role="rank 0", num_processes=2, coordinator="[fe80::1]:9", gpu=None, cpu_devices=4, user={}
    )
    assert found == {
        "STEP3_COORDINATOR": "[fe80::1]:9",
        "STEP3_NUM_PROCESSES": "2",
        "STEP3_PROCESS_ID": "0",
        "STEP3_ROLE": "rank 0",
        "STEP3_CPU_DEVICES": "4",
        "JAX_PLATFORMS": "cpu",
        "JAX_LOCAL_DEVICE_IDS": "0",
        "no_proxy": "fe80::1",
    }


def test_devices_and_paths_of_one_host_do_not_go_to_another() -> None:
    here = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", "HF_HOME": "/models", "XLA_FLAGS": "x", "PYTHONPATH": "y"}
    assert forwarded_environment(here) == {"HF_HOME": "/models", "XLA_FLAGS": "x"}


def test_gpus_that_are_hidden_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.launch.keeper._GPU_PLUGINS", ("json",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-abc")
    assert list_gpus() == ["2", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list_gpus() == []
    # Without the plugin JAX could not use them.
    monkeypatch.setattr("step3_jax.launch.keeper._GPU_PLUGINS", ("no_such_plugin",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", None)), ("a:80", ("a", 80)), ("[fe80::1]:80", ("fe80::1", 80)), ("fe80::1", ("fe80::1", None))],
)
def test_addresses_of_the_coordinator(text: str, expected: tuple[str, int | None]) -> None:
    assert split_coordinator(text) == expected


def test_addresses_that_are_none() -> None:
    for text in (":80", "a:x", "a:0"):
        with pytest.raises(ValueError, match="give"):
            split_coordinator(text)
    assert join_address("fe80::1", 80) == "[fe80::1]:80"
    assert parse_hosts("a, me@b") == ("a", "me@b")
    with pytest.raises(ValueError, match="is not a host"):
        parse_hosts("a,,b")


def test_a_name_that_is_never_known_is_reported() -> None:
    with pytest.raises(ValueError, match=r"no-such-host\.invalid is not known on .* headless service"):
        wait_for_name("no-such-host.invalid", timeout_s=0)
    wait_for_name("localhost", timeout_s=0)


def test_a_port_that_listens_is_reached_and_is_free_again_afterwards() -> None:
    with listen(0) as listener:
        port = listener.getsockname()[1]
        assert reach("127.0.0.1", port, timeout_s=5) is None
        with pytest.raises(ValueError, match="is in use"):
            listen(port)
    assert reach("127.0.0.1", port, timeout_s=5) == "connection refused"
    with listen(port, "127.0.0.1") as again:
        assert again.family == socket.AF_INET


def test_messages_survive_and_noise_is_told_apart() -> None:
    data = bytes(range(256))
    message = decode(encode(pack_output(3, "stdout", data)))
    assert (message["kind"], message["rank"], unpack_bytes(message)) == ("output", 3, data)
    # A login shell that prints without an end of line.
    assert decode(b"Welcome! " + encode(Message(kind="beat")))["kind"] == "beat"
    for line in (b"Welcome\n", b"\x1estep3 {half\n", b"\x1estep3 [1]\n", b"\xff\xfe\n"):
        assert decode(line)["kind"] == "noise"


def test_hosts_with_different_versions_are_refused() -> None:
    hellos = [Message(kind="hello", versions={"jax": "0.10.2"}), Message(kind="hello", versions={"jax": "0.11.2"})]
    with pytest.raises(ValueError, match=r"jax is 0\.11\.2 on b and 0\.10\.2 on a"):
        check_versions(["a", "b"], hellos)
    with pytest.raises(ValueError, match="jax is not installed on b"):
        check_versions(["a", "b"], [hellos[0], Message(kind="hello", versions={})])
    check_versions(["a", "b"], [hellos[0], hellos[0]])
