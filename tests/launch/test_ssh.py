"""Other hosts over ssh, with an `ssh` on PATH that runs the command here, without this process's environment."""

from __future__ import annotations

import os
import pathlib
import signal
import sys

import pytest

from step3_jax.cli import main
from step3_jax.launch.net import keeper_command
from tests.launch.conftest import PROGRAMS, Start
from tests.launched import wait_until_gone
from tests.process import ROOT

_SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do
  [ "$1" = -o ] && shift
  shift
done
host=$1; shift
case $host in
  down) echo "ssh: connect to host down port 22: No route to host" >&2; exit 255 ;;
esac
echo "$host $$" >> {log}
echo "Welcome to $host"
exec env -i HOME=/tmp PATH=/usr/bin:/bin PYTHONPATH={programs} {connection} sh -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: pathlib.Path, environment: dict[str, str]) -> pathlib.Path:
    """Puts the stand-in on the launcher's PATH; the file of its calls."""
    return _write_ssh(tmp_path, environment)


def _write_ssh(tmp_path: pathlib.Path, environment: dict[str, str], connection: str = "") -> pathlib.Path:
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir(exist_ok=True)
    path = folder / "ssh"
    path.write_text(_SSH.format(log=log, programs=PROGRAMS, connection=connection), encoding="utf-8")
    path.chmod(0o755)
    if str(folder) not in environment["PATH"]:
        environment["PATH"] = f"{folder}:{environment['PATH']}"
    return log


def test_hosts_are_reached_once_each_and_ranks_are_shared_out(start: Start, ssh: pathlib.Path) -> None:
    options = "--hosts me@a,b --processes-per-host 2 --coordinator localhost"
    running = start(options, ["*:show=STEP3_PROCESS_ID", "0:say=the answer"])
    assert running.wait() == 0, running.stderr
    assert running.stdout == b"the answer\n"
    for rank, host in enumerate(["me@a", "me@a", "b", "b"]):
        assert f"[{rank} {host}] STEP3_PROCESS_ID={rank}\n" in running.stderr
    assert [line.split()[0] for line in ssh.read_text(encoding="utf-8").splitlines()] in (["me@a", "b"], ["b", "me@a"])
    assert "[b] Welcome to b\n" in running.stderr


def test_the_topology_shares_the_processes_out_over_the_hosts(start: Start, ssh: pathlib.Path) -> None:
    running = start("--hosts a,b --coordinator localhost", ["*:exit=0", "--afd", "2a2f"])
    running.wait()
    assert "4 process(es) on 2 host(s)" in running.stderr
    assert "3     b     cpu     ffn 1" in running.stderr


def test_settings_go_along_but_not_the_whole_environment(start: Start, ssh: pathlib.Path) -> None:
    words = ["*:show=HF_TOKEN", "*:show=NCCL_DEBUG", "*:show=PRIVATE", "*:show=HOME"]
    running = start("--hosts a", words, HF_TOKEN="secret", NCCL_DEBUG="INFO", PRIVATE="private")
    assert running.wait() == 0, running.stderr
    assert "[0 a] HF_TOKEN=secret\n" in running.stderr
    assert "[0 a] NCCL_DEBUG=INFO\n" in running.stderr
    assert "[0 a] PRIVATE=\n" in running.stderr
    assert "[0 a] HOME=/tmp\n" in running.stderr


def test_words_survive_the_shell_on_the_other_side(start: Start, ssh: pathlib.Path) -> None:
    text = "a b 'c' \"d\" $HOME ; `x` \\ é\n*"
    running = start("--hosts a", [f"0:say={text}"])
    assert running.wait() == 0, running.stderr
    assert running.stdout.decode() == text + "\n"


def test_the_coordinator_is_the_address_that_ssh_arrived_at(
    start: Start, tmp_path: pathlib.Path, environment: dict[str, str]
) -> None:
    _write_ssh(tmp_path, environment, connection="SSH_CONNECTION='127.0.0.9 999 127.0.0.1 22'")
    running = start("--hosts a,b", ["*:show=STEP3_COORDINATOR"])
    assert running.wait() == 0, running.stderr
    assert running.stderr.count("STEP3_COORDINATOR=127.0.0.1:") == 2


def test_a_host_that_cannot_be_reached_is_named_and_nothing_starts(start: Start, ssh: pathlib.Path) -> None:
    running = start("--hosts a,down,b", ["*:say=started"])
    assert running.wait() == 2
    assert "step3: error: cannot start on down: exit code 255 (ssh: connect to host down port 22" in running.stderr
    assert running.stdout == b""


def test_a_coordinator_that_cannot_be_reached_is_named_and_nothing_starts(start: Start, ssh: pathlib.Path) -> None:
    running = start("--hosts a,b --coordinator no-such-host.invalid --deadline 4", ["*:say=started"])
    assert running.wait() == 2
    assert "b cannot reach the coordinator no-such-host.invalid:" in running.stderr
    assert "on a: the name is not known" in running.stderr
    assert running.stdout == b""


def test_this_machine_cannot_be_the_first_of_several_by_a_name_that_means_itself(
    start: Start, ssh: pathlib.Path
) -> None:
    running = start("--hosts localhost,b", ["*:say=started"])
    assert running.wait() == 2
    assert "the others cannot reach localhost" in running.stderr


def test_other_interpreters_and_folders(start: Start, ssh: pathlib.Path, tmp_path: pathlib.Path) -> None:
    running = start(f"--hosts a --directory {tmp_path / 'none'}", ["*:exit=0"])
    assert running.wait() == 2
    assert "cannot start on a" in running.stderr
    assert "none" in running.stderr
    running = start("--hosts a --python /no/such/python", ["*:exit=0"])
    assert running.wait() == 2
    assert "/no/such/python" in running.stderr
    running = start(f"--hosts a --directory {ROOT} --python {sys.executable}", ["*:exit=0"])
    assert running.wait() == 0


def test_a_rank_that_fails_ends_the_ranks_of_other_hosts(
    start: Start, ssh: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    go = tmp_path / "go"
    words = ["*:pid", f"1:wait={go}", "1:warn=no memory", "1:exit=5", "*:sleep=300"]
    running = start("--hosts a,b,c --coordinator localhost", words)
    pids = running.pids(3)
    go.touch()
    assert running.wait() == 5
    assert "rank 1 (on b) failed with exit code 5, at the start, its last lines:" in running.stderr
    wait_until_gone(pids)


def test_a_connection_that_breaks_ends_all_and_leaves_nothing_on_that_host(start: Start, ssh: pathlib.Path) -> None:
    running = start(
        "--hosts a,b --coordinator localhost --grace 1", ["*:deaf", "*:pid", "*:sleep=300"], module="scripted_rank"
    )
    pids = running.pids(2)
    calls = dict(line.split() for line in ssh.read_text(encoding="utf-8").splitlines())
    os.kill(int(calls["b"]), signal.SIGKILL)
    assert running.wait() == 255
    assert "the connection to b ended (exit code -9: Welcome to b) while rank 1 ran there" in running.stderr
    wait_until_gone(pids)


def test_ssh_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["launch", "--hosts", "a", "--ssh", "/no/such/ssh -x", "--", "env"]) == 2
    assert "/no/such/ssh is not on this machine" in capsys.readouterr().err


def test_the_command_asks_no_questions_and_is_safe_from_the_shell() -> None:
    command = keeper_command("a", deadline_s=15, grace_s=5, python="/opt/my python", directory="/a b; rm x")
    assert command[:3] == ["ssh", "-o", "BatchMode=yes"]
    assert command[-2] == "a"
    assert command[-1] == (
        "cd '/a b; rm x' && exec '/opt/my python' -m step3_jax.launch.keeper --deadline 15 --grace 5"
    )
