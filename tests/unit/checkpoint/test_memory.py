"""Available memory, read from a fake system."""

from __future__ import annotations

import resource

import pytest

from step3_jax.checkpoint.memory import anonymous_bytes, available_bytes, format_bytes

MEMINFO = "MemTotal: 16000 kB\nMemAvailable: 8000 kB\nSwapFree: 1000 kB\nHugePages_Total: 0\n"


@pytest.fixture
def system(tmp_path):
    """Writes a system's files and returns its root."""

    def write(**files):
        for name, text in {"proc/meminfo": MEMINFO, "proc/self/status": "VmSize: 100 kB\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_without_limits_it_is_what_the_machine_has_left_and_its_swap(system):
    assert available_bytes(system()) == 9000 * 1024


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path):
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("path", ["/job/step", "/"])
def test_the_least_that_a_control_group_leaves_counts(system, path):
    group = "sys/fs/cgroup" + path.rstrip("/")
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        f"{group}/memory.max": str(5000 * 1024),
        f"{group}/memory.current": str(4000 * 1024),
        f"{group}/memory.stat": f"anon 1\nactive_file {500 * 1024}\ninactive_file {1500 * 1024}\n",
    }
    assert available_bytes(system(**files)) == (5000 - 4000 + 2000 + 1000) * 1024
    assert available_bytes(system(**files | {f"{group}/memory.max": "max"})) == 9000 * 1024


def test_control_groups_of_the_older_form_count_too(system):
    group = "sys/fs/cgroup/memory/job"
    files = {
        "proc/self/cgroup": "3:cpu,cpuacct:/job\n4:memory:/job\n0::/\n",
        f"{group}/memory.limit_in_bytes": str(3000 * 1024),
        f"{group}/memory.usage_in_bytes": str(2000 * 1024),
        f"{group}/memory.stat": "total_inactive_file 0\n",
    }
    assert available_bytes(system(**files)) == 2000 * 1024
    assert available_bytes(system(**files | {f"{group}/memory.limit_in_bytes": str(2**63 - 4096)})) == 9000 * 1024


def test_the_limit_of_the_address_space_counts(system, monkeypatch):
    limits = {resource.RLIMIT_AS: 700 * 1024, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert available_bytes(system()) == 600 * 1024


def test_this_machine_tells():
    assert anonymous_bytes() > 2**20
    assert available_bytes() is None or available_bytes() > 0


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (641_939_825_664, "641.9 GB"), (10**16, "10.0 PB")]
)
def test_sizes_are_shown_in_their_own_unit(size, text):
    assert format_bytes(size) == text
