"""Processes on this machine: what each is given, what is shown, how it ends."""

from __future__ import annotations

import io
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from step3_jax.cli import main
from step3_jax.launch.launcher import launch
from step3_jax.launch.net import listen
from step3_jax.launch.options import LaunchOptions
from tests.launch.conftest import Start
from tests.launched import wait_until_gone
from tests.process import ROOT


def test_every_rank_is_told_its_place(start: Start) -> None:
    names = ["STEP3_PROCESS_ID", "STEP3_NUM_PROCESSES", "STEP3_COORDINATOR", "JAX_PLATFORMS", "STEP3_CPU_DEVICES"]
    running = start("--local 3 --devices-per-process 2", [f"*:show={name}" for name in names])
    assert running.wait() == 0, running.stderr
    text = running.stderr
    for rank in range(3):
        assert f"[{rank} localhost] STEP3_PROCESS_ID={rank}\n" in text
        assert f"[{rank} localhost] STEP3_NUM_PROCESSES=3\n" in text
        assert f"[{rank} localhost] JAX_PLATFORMS=cpu\n" in text
        assert f"[{rank} localhost] STEP3_CPU_DEVICES=2\n" in text
    [address] = set(running.wait_for(r"STEP3_COORDINATOR=(\S+)"))
    assert f"coordinator {address}" in text
    assert address.startswith("127.0.0.1:")


def test_ranks_are_told_their_roles_and_where_rank_0_listens(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    names = ("STEP3_COORDINATOR", "STEP3_CHANNEL", "STEP3_SECRET", "STEP3_ROLE")
    shown = [f"*:show={name}" for name in names]
    for options, words, roles in (
        ("--local 2", ["--afd", "1a1f"], ["attention 0", "ffn 0"]),
        (f"--local 2 --port {port}", [], ["rank 0", "rank 1"]),
    ):
        running = start(options, [*shown, *words])
        assert running.wait() == 0, running.stderr
        [coordinator] = set(running.wait_for(r"STEP3_COORDINATOR=127.0.0.1:(\d+)"))
        [channel] = set(running.wait_for(r"STEP3_CHANNEL=127.0.0.1:(\d+)"))
        [secret] = set(running.wait_for(r"STEP3_SECRET=(\S+)"))
        assert len(secret) == 32
        assert channel != coordinator
        assert (int(channel) == int(coordinator) + 1) or "--port" not in options
        assert sorted(running.wait_for(r"STEP3_ROLE=(.+)")) == roles
    running = start("--local 1", shown)
    assert running.wait() == 0
    assert "STEP3_CHANNEL=\n" in running.stderr


def test_standard_output_of_rank_0_is_untouched_and_all_else_has_its_rank(start: Start) -> None:
    running = start("--local 2", ["*:bytes=400", "1:say=", "1:say=from one", "*:warn=a warning"])
    assert running.wait() == 0, running.stderr
    assert running.stdout == bytes(range(256)) * 400
    assert "[1 localhost] from one\n" in running.stderr
    assert all(f"[{rank} localhost] a warning\n" in running.stderr for rank in range(2))


def test_what_libraries_print_past_python_does_not_get_into_the_answer(start: Start) -> None:
    # gloo does when it connects.
    program = "import os; print('answer'); os.write(1, b'[Gloo] connected')"
    running = start("--local 1", [program], module="eval_rank")
    assert running.wait() == 0, running.stderr
    assert running.stdout == b"answer\n"
    assert "[0 localhost] [Gloo] connected\n" in running.stderr


def test_a_line_without_an_end_and_a_progress_bar_are_shown_once() -> None:
    stdout, stderr = io.BytesIO(), io.StringIO()
    program = "import sys; sys.stderr.write('10%\\r90%\\r\\nlast words')"
    code = launch(
        ["eval", program],
        LaunchOptions(local=1),
        module="tests.launch.programs.eval_rank",
        stdout=stdout,
        stderr=stderr,
    )
    assert code == 0, stderr.getvalue()
    assert "[0 localhost] 90%\n[0 localhost] last words\n" in stderr.getvalue()
    assert "10%" not in stderr.getvalue()


def test_the_table_shows_roles(start: Start) -> None:
    running = start("--local 3", ["*:exit=0", "--afd", "2a1f"])
    running.wait()
    lines = [line.split() for line in running.stderr.splitlines() if line.startswith("step3 launch:   ")]
    assert lines[0][2:] == ["rank", "host", "device", "role"]
    assert [line[2:] for line in lines[1:4]] == [
        ["0", "localhost", "cpu", "attention", "0"],
        ["1", "localhost", "cpu", "attention", "1"],
        ["2", "localhost", "cpu", "ffn", "0"],
    ]


@pytest.mark.parametrize(("action", "code"), [("exit=7", 7), ("kill=9", 137), ("kill=11", 139)])
def test_the_exit_code_is_that_of_the_rank_that_failed(
    start: Start, action: str, code: int, tmp_path: pathlib.Path
) -> None:
    go = tmp_path / "go"
    running = start("--local 3", ["*:pid", f"1:wait={go}", "1:warn=why it failed", f"1:{action}", "*:sleep=300"])
    pids = running.pids(3)
    go.touch()
    assert running.wait() == code, running.stderr
    report = running.stderr.rpartition("step3 launch: rank 1 (on localhost) ")[2]
    assert "its last lines:" in report
    assert "  | why it failed\n" in report
    assert "ended the other 2 rank(s)" in report
    wait_until_gone(pids)


def test_a_rank_deaf_to_sigterm_is_killed_after_the_grace_period_with_all_that_it_started(start: Start) -> None:
    running = start("--local 2 --grace 0.5", ["*:deaf", "*:pid", "*:child", "*:sleep=300"])
    pids = running.pids(4)
    running.process.send_signal(signal.SIGTERM)
    assert running.wait() == 143
    wait_until_gone(pids)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_to_the_launcher_end_all_ranks(start: Start, number: signal.Signals, code: int) -> None:
    running = start("--local 2", ["*:pid", "*:sleep=300"])
    pids = running.pids(2)
    running.process.send_signal(number)
    assert running.wait() == code, running.stderr
    wait_until_gone(pids)


def test_a_second_interrupt_does_not_wait_for_the_grace_period(start: Start) -> None:
    running = start("--local 2 --grace 300", ["*:deaf", "*:pid", "*:sleep=300"])
    pids = running.pids(2)
    running.process.send_signal(signal.SIGINT)
    running.wait_for("SIGINT: ending")
    running.process.send_signal(signal.SIGINT)
    assert running.wait() == 130, running.stderr
    wait_until_gone(pids)


def test_a_launcher_that_is_killed_leaves_nothing_behind(start: Start) -> None:
    running = start("--local 2 --grace 0.5", ["*:deaf", "*:pid", "*:child", "*:sleep=300"])
    pids = running.pids(4)
    running.process.kill()
    wait_until_gone(pids)


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="only Linux ends children with their parent")
def test_a_keeper_that_is_killed_leaves_no_rank_behind_and_is_reported(start: Start) -> None:
    running = start("--local 2", ["*:deaf", "*:pid", "*:sleep=300"])
    pids = running.pids(2)
    parents = {
        pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1] for pid in pids
    }
    [keeper] = parents
    os.kill(int(keeper), signal.SIGKILL)
    assert running.wait() == 255
    assert "the connection to localhost ended (exit code -9) while rank 0, 1 ran there" in running.stderr
    wait_until_gone(pids)


def test_a_reader_that_leaves_ends_all() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stderr = io.StringIO()
    with os.fdopen(writing, "wb", buffering=0) as stdout, pytest.raises(BrokenPipeError):
        launch(
            ["*:pid", "0:say=hello", "*:sleep=300"],
            LaunchOptions(local=2, grace_s=0.5),
            module="tests.launch.programs.scripted_rank",
            stdout=stdout,
            stderr=stderr,
        )
    wait_until_gone([int(pid) for pid in re.findall(r"pid (\d+)", stderr.getvalue())])


def test_launch_works_outside_of_the_main_thread() -> None:
    codes: list[int] = []
    stderr = io.StringIO()

    def run() -> None:
        options = LaunchOptions(local=1)
        module = "tests.launch.programs.scripted_rank"
        codes.append(launch(["*:exit=3"], options, module=module, stdout=io.BytesIO(), stderr=stderr))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert codes == [3], stderr.getvalue()


def test_a_module_that_is_not_there_is_a_failure_with_its_reason(start: Start) -> None:
    running = start("--local 1", ["x"], module="no_such_module")
    assert running.wait() == 1
    assert "  | " in running.stderr
    assert "No module named no_such_module" in running.stderr


def test_the_port_is_checked_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert main.main(["launch", "--local", "2", "--port", str(port), "--", "env"]) == 2
    error = capsys.readouterr().err
    assert f"port {port} on" in error
    assert "is in use: choose another with --port" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--local 3 -- generate --afd 1a1f", "--afd 1a1f needs 2 processes"),
        ("--local 2 -- generate --afd=2a2f", "--afd 2a2f needs 4 processes"),
        ("--local 3 -- generate --afd 1a1f --afd-devices 2", "--afd 1a1f needs 4 processes"),
        ("--local 2 -- generate --afd 2x2", "give the instances of attention and FFN as xAyF"),
        ("--local 2", "what to start?"),
        ("-- env", "where to start?"),
        ("--local 2 --hosts a,b -- env", "give one of them"),
        ("--local 0 -- env", "--local is 0: give 1 or more"),
        ("--local 2 --processes-per-host 2 -- env", "leave out --processes-per-host"),
        ("--local 2 --platform cuda -- env", "no GPU that JAX can use"),
        ("--local 2 --port 70000 -- env", "is not a port"),
        ("--local 2 --deadline 0.1 -- env", "--deadline is 0.1"),
        ("--local 2 --rank-deadline 1 -- env", "--rank-deadline is 1: give 2 s or more"),
        ("--local 2 --grace -1 -- env", "--grace is -1"),
        ("--local 2 -- serve --shutdown-timeout soon", "in the command to launch: argument --shutdown-timeout"),
        ("--local 2 --env NOT_SET_ANYWHERE -- env", "--env NOT_SET_ANYWHERE"),
        ("--hosts a,a -- env", "a appears twice"),
        ("--hosts -oProxyCommand=x,b -- env", "expected one argument"),
        ("--hosts=-oProxyCommand=x,b -- env", "is not a host"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    argv: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main.main(["launch", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_variables_for_all_ranks(start: Start) -> None:
    running = start("--local 2 --env ONE=1 --env HOME", ["*:show=ONE", "*:show=HOME"])
    assert running.wait() == 0
    assert all(f"[{rank} localhost] ONE=1\n" in running.stderr for rank in range(2))
    assert f"HOME={os.environ.get('HOME', '')}\n" in running.stderr


def test_ranks_have_no_standard_input(start: Start) -> None:
    running = start("--local 1", ["import sys; sys.exit(len(sys.stdin.read()))"], module="eval_rank")
    assert running.wait() == 0, running.stderr


def test_the_door_in_tools_is_the_same_command(environment: dict[str, str]) -> None:
    program = [sys.executable, str(ROOT / "tools" / "launch_multihost.py"), "--help"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert "step3 launch (--local N | --hosts A,B,..." in done.stdout


@pytest.mark.parametrize(("words", "expected"), [(["-"], "one\ntwo"), ([], "")], ids=["asked for", "not asked for"])
def test_rank_0_has_the_standard_input_that_its_command_reads(
    environment: dict[str, str], words: list[str], expected: str
) -> None:
    code = "import os, sys; print(os.environ['STEP3_PROCESS_ID'], repr(sys.stdin.read()), flush=True)"
    options = ["launch", "--local", "2", "--module", "eval_rank", "--", *words, code]
    done = subprocess.run(
        [sys.executable, "-m", "step3_jax.cli.main", *options],
        cwd=ROOT,
        env=environment,
        input="one\ntwo",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"0 {expected!r}\n"
    assert "[1 localhost] 1 ''\n" in done.stderr


def test_the_end_of_a_rank_that_reads_is_not_waited_for_by_its_input(environment: dict[str, str]) -> None:
    """As when `chat` is quit with /quit while the terminal is still there."""
    options = ["launch", "--local", "1", "--module", "eval_rank", "--", "-", "print(input())"]
    with subprocess.Popen(
        [sys.executable, "-m", "step3_jax.cli.main", *options],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        print("word", file=process.stdin, flush=True)
        assert process.stdout.readline() == "word\n"
        assert process.wait(60) == 0
