"""The process of a command: its streams, and how Ctrl-C ends it. Each test starts one."""

from __future__ import annotations

import io
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable

import pytest

from step3_jax.cli import process
from step3_jax.cli.progress import show_progress
from tests.process import HARD_LIMIT_S, ROOT, environment

STEP3 = (sys.executable, "-m", "step3_jax")
# A command whose main thread waits in native code, as it does while a program is compiled.
STUCK = """
    import ctypes, threading
    from step3_jax.cli import process
    handler = process.handle_interrupts()
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    # Printed once the main thread is in there.
    threading.Timer(0.5, print, ["stuck"], {{"flush": True}}).start()
    with {where}:
        libc.pthread_mutex_lock(mutex)
"""


def run_shell(command: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A line of sh in which $STEP3 is the command."""
    line = command.replace("$STEP3", f'"{sys.executable}" -m step3_jax')
    return subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=environment(**more), capture_output=True, timeout=HARD_LIMIT_S, check=False
    )


def start(*words: str, **more: str) -> subprocess.Popen[str]:
    """A process that can be interrupted."""
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(has_come: Callable[[], object], running: subprocess.Popen[str]) -> None:
    give_up_at = time.monotonic() + HARD_LIMIT_S
    while not has_come():
        assert running.poll() is None, f"ended before: {running.communicate()}"
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def end(running: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr."""
    _, said = running.communicate(timeout=HARD_LIMIT_S)
    return running.returncode, said


def test_closed_output_ends_the_command_quietly() -> None:
    done = run_shell("$STEP3 inspect models/step3-tiny >&-")
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_reader_that_left_ends_the_command_quietly() -> None:
    done = run_shell("($STEP3 inspect models/step3-tiny; echo $? >&2) | true")
    assert done.stderr == b"141\n"


def test_a_mistake_has_its_code_where_stderr_is_closed_and_goes_nowhere_else() -> None:
    done = run_shell("$STEP3 inspect no-such-folder 2>&-")
    assert (done.returncode, done.stdout) == (2, b"")


def test_closed_input_is_an_empty_one() -> None:
    done = run_shell("$STEP3 generate -p - --max-model-len 100000 <&-")
    assert done.returncode == 2
    assert b"--max-model-len 100000" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
def test_what_an_encoding_lacks_is_shown_by_stand_ins(encoding: str) -> None:
    program = "from step3_jax.cli import process; process.repair_streams(); print('caf\\u00e9 \\U0001f3bb end')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(PYTHONIOENCODING=encoding), capture_output=True, check=True
    )
    assert done.stdout.decode(encoding).startswith("caf")
    assert done.stdout.endswith(b"? end\n")


def test_error_handling_that_the_user_chose_stays() -> None:
    program = "from step3_jax.cli import process; process.repair_streams(); print('\\u00e9')"
    chosen = environment(PYTHONIOENCODING="ascii:backslashreplace")
    done = subprocess.run([sys.executable, "-c", program], env=chosen, capture_output=True, check=True)
    assert done.stdout == b"\\xe9\n"


def test_an_interrupt_in_native_code_ends_the_process() -> None:
    with start(sys.executable, "-c", textwrap.dedent(STUCK.format(where="open('/dev/null')"))) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "stuck\n"
        running.send_signal(signal.SIGINT)
        assert end(running) == (130, "step3: interrupted\n")


def test_a_conversation_ends_at_the_second_interrupt_in_native_code() -> None:
    with start(sys.executable, "-c", textwrap.dedent(STUCK.format(where="process.interruptible()"))) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == "stuck\n"
        running.send_signal(signal.SIGINT)
        assert "Ctrl-C again leaves" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert end(running) == (130, "step3: interrupted\n")


def test_an_interrupt_while_programs_are_compiled_is_one_line(tmp_path: pathlib.Path) -> None:
    command = (*STEP3, "generate", "-p", "What is a violin?")
    with start(*command, JAX_COMPILATION_CACHE_DIR=str(tmp_path)) as running:
        wait_until(lambda: list(tmp_path.glob("*-cache")), running)
        running.send_signal(signal.SIGINT)
        assert end(running) == (130, "step3: interrupted\n")


def test_an_interrupted_plan_stops_its_compiler() -> None:
    with start(*STEP3, "plan", "memory", "2a2f") as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("compiling")
        children = pathlib.Path(f"/proc/{running.pid}/task/{running.pid}/children")
        if children.exists():
            wait_until(children.read_text, running)
        left = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        running.send_signal(signal.SIGINT)
        assert end(running) == (130, "step3: interrupted\n")
        # The compiler and multiprocessing's own helper.
        give_up_at = time.monotonic() + HARD_LIMIT_S
        while any(pathlib.Path(f"/proc/{pid}").exists() for pid in left):
            assert time.monotonic() < give_up_at
            time.sleep(0.05)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_byte_order_mark_is_no_part_of_what_is_piped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO("Was heißt das?\n".encode(encoding)), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    assert process.read_stdin() == "Was heißt das?\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_taken_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.cli.progress._PATIENCE_S", 0.0)
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with show_progress("loading a model"):
        while "loading a model ... 0 s" not in terminal.getvalue():
            time.sleep(0.01)
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_progress_is_not_written_to_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("step3_jax.cli.progress._PATIENCE_S", 0.0)
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with show_progress("loading a model"):
        time.sleep(0.05)
    assert log.getvalue() == ""


@pytest.mark.parametrize("words", [("--version",), ("generate", "--help")])
def test_python_m_is_the_same_command(words: tuple[str, ...]) -> None:
    done = subprocess.run([*STEP3, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step3" in done.stdout
