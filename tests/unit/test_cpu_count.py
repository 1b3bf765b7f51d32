"""Threads: as many as the process may keep busy, by its affinity and by the quotas of its control groups."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax.cpu_count import count_cpus, limit_threads
from step3_jax.mesh import find_devices


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)


def write(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 16),
        # The least of a group and those around it.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            2,
        ),
        # Version 1, whose mark for no limit is -1.
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
)
def test_a_quota_counts_as_the_affinity_does(tmp_path: pathlib.Path, files: dict[str, str], expected: int) -> None:
    root, environment = write(tmp_path, files), {}
    assert count_cpus(root) == expected
    limit_threads(environment, root)
    has_quota = any(text[0].isdigit() for name, text in files.items() if name.endswith(("cpu.max", "quota_us")))
    assert environment == ({"PJRT_NPROC": str(expected)} if has_quota else {})


@pytest.mark.parametrize("name", ["PJRT_NPROC", "NPROC"])
def test_a_number_that_was_given_stays(tmp_path: pathlib.Path, name: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    environment = {name: "2"}
    limit_threads(environment, root)
    assert environment == {name: "2"}


def test_devices_are_not_looked_for_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr("step3_jax.mesh.limit_threads", lambda: done.append("threads"))
    monkeypatch.setattr("jax.devices", lambda: done.append("devices"))
    find_devices()
    assert done == ["threads", "devices"]
