"""Mapped files whose reads fail: which file and what happened is said, also beside other handlers of the signal."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from step3_jax.cpu_kernels.loader import Unavailable, find_kernels
from tests.process import environment

pytestmark = pytest.mark.skipif(
    isinstance(find_kernels(), Unavailable), reason="the library that watches mapped files cannot be had here"
)

PROGRAM = """
import ctypes, faulthandler, mmap, os, pathlib, sys
from step3_jax.cpu_kernels.watch import map_file

folder = pathlib.Path(sys.argv[1])
page = mmap.PAGESIZE

def write(name):
    (folder / name).write_bytes(bytes(3 * page))
    return folder / name

def lose(address):
    "Pages that nothing can be read from, as of a disk that fails: those of an empty file."
    (folder / "empty").touch()
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
    with open(folder / "empty", "rb") as file:
        assert libc.mmap(address, page, mmap.PROT_READ, mmap.MAP_PRIVATE | 0x10, file.fileno(), 0) == address

"""

CASES = {
    "a file that is cut short": """
data = map_file(write("a"))
os.truncate(folder / "a", page)
data[2 * page]
""",
    "a disk that fails": """
data = map_file(write("a"))
lose(data.ctypes.data + page)
data[page]
""",
    "another library takes the signal": """
data = map_file(write("a"))
faulthandler.enable()
other = map_file(write("b"))
os.truncate(folder / "a", page)
data[2 * page]
""",
    "other memory, a handler from before": """
faulthandler.enable()
data = map_file(write("a"))
memory = mmap.mmap(-1, page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
lose(address)
ctypes.string_at(address, 1)
""",
    "other memory, handlers that hand it to each other": """
data = map_file(write("a"))
faulthandler.enable()
other = map_file(write("b"))
memory = mmap.mmap(-1, page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
lose(address)
ctypes.string_at(address, 1)
""",
}


def run(case, folder):
    command = [sys.executable, "-c", PROGRAM + CASES[case] + "print('went on')", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment(), timeout=100)
    assert "went on" not in done.stdout
    return done


@pytest.mark.parametrize("case", ["a file that is cut short", "another library takes the signal"])
def test_a_file_that_is_cut_short_is_named(case, tmp_path):
    done = run(case, tmp_path)
    assert done.stderr == (
        f"step3: error: {tmp_path}/a was cut short while its weights were in use (load_format mmap): the process ends\n"
    )
    assert done.returncode == 1


def test_a_read_that_fails_is_no_file_that_is_cut_short(tmp_path):
    done = run("a disk that fails", tmp_path)
    assert f"step3: error: {tmp_path}/a could not be read while its weights were in use: the disk" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("other memory")])
def test_signals_of_other_memory_go_to_the_handler_from_before(case, tmp_path):
    done = run(case, tmp_path)
    assert "Fatal Python error: Bus error" in done.stderr
    assert "step3: error" not in done.stderr
    assert done.returncode == -signal.SIGBUS
