"""Several hosts on one machine: network namespaces with their own addresses on one bridge.

    unshare --net python cluster.py SCENARIO ROOT WORDS ...

Starts a stand-in for sshd in a namespace for each host, and the launcher outside of them, which reaches the hosts over
the bridge alone. SCENARIO is `run`; or `cut`, which takes the link of the second host down when all three ranks have said
that they work; or of two hosts `cut-RANK-PLACE`, with `start`, `prefill` or `decode`, which cuts off a rank of the command
there. Prints the exit code, what was shown, and seconds from the cut to the launcher's end, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from tests.launched import AT_PLACE, find_rank

HERE = pathlib.Path(__file__).resolve()
HOSTS = ("10.77.0.1", "10.77.0.2", "10.77.0.3")
OUTSIDE, PORT = "10.77.0.254", 2222
LIMIT_S = 90
# For a command that compiles.
LONG_LIMIT_S = 300


def ip(*words: str, inside: int | None = None) -> None:
    """Runs `ip`, in the namespace of a process if one is given."""
    enter = [] if inside is None else ["nsenter", "--net", "--target", str(inside)]
    subprocess.run([*enter, "ip", *words], check=True)


def serve() -> None:
    """The stand-in for sshd: runs the command of each caller with the connection as its input and output."""
    # gloo tells the others the address that this name resolves to.
    socket.sethostname(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("0.0.0.0", PORT)) as server:
        print("ready", flush=True)
        while True:
            caller, (address, port) = server.accept()
            command = caller.makefile("rb", buffering=0).readline().decode()
            environment = os.environ | {"SSH_CONNECTION": f"{address} {port} {caller.getsockname()[0]} {PORT}"}
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            subprocess.Popen(
                ["sh", "-c", json.loads(command)], stdin=caller, stdout=caller, stderr=caller, env=environment
            )
            caller.close()


def call() -> None:
    """The stand-in for ssh: HOST COMMAND, with our input and output over the network."""
    host, command = sys.argv[2:]
    with socket.create_connection((host, PORT), timeout=10) as server:
        server.settimeout(None)
        server.sendall(json.dumps(command).encode() + b"\n")
        if os.fork() == 0:
            while data := os.read(0, 65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
            os._exit(0)
        while data := server.recv(65536):
            os.write(1, data)


def drive() -> None:
    """Builds the cluster, runs the launcher, takes the cluster down."""
    scenario, root, *words = sys.argv[1:]
    servers = []
    try:
        ip("link", "set", "lo", "up")
        ip("link", "add", "name", "bridge0", "type", "bridge")
        ip("address", "add", f"{OUTSIDE}/24", "dev", "bridge0")
        ip("link", "set", "bridge0", "up")
        for number, host in enumerate(HOSTS):
            server = subprocess.Popen(
                ["unshare", "--net", "--uts", sys.executable, str(HERE), "serve", host], stdout=subprocess.PIPE
            )
            servers.append(server)
            assert server.stdout is not None
            server.stdout.readline()
            ip("link", "add", "name", f"host{number}", "type", "veth", "peer", "name", f"inner{number}")
            ip("link", "set", f"host{number}", "master", "bridge0", "up")
            ip("link", "set", f"inner{number}", "netns", str(server.pid))
            ip("address", "add", f"{host}/24", "dev", f"inner{number}", inside=server.pid)
            ip("link", "set", f"inner{number}", "up", inside=server.pid)
            ip("link", "set", "lo", "up", inside=server.pid)
        print(json.dumps(run(scenario, root, words)))
    finally:
        for server in servers:
            server.kill()
            server.wait()


def run(scenario: str, root: str, words: list[str]) -> dict[str, object]:
    """Runs the launcher over the hosts, cutting one off if asked to."""
    ssh = f"{sys.executable} {HERE} call"
    _, _, place = scenario.partition("-")
    options = [
        "--hosts",
        ",".join(HOSTS[:2] if place else HOSTS),
        "--ssh",
        ssh,
        "--deadline",
        "5",
        "--grace",
        "1",
        "--directory",
        root,
    ]
    program = [sys.executable, "-m", "step3_jax.cli.main", "launch", *options, *words]
    launcher = subprocess.Popen(program, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stderr is not None
    assert launcher.stdout is not None
    shown: list[str] = []
    cuts: list[float] = []
    if place:
        threading.Thread(target=cut_at_place, args=(*place.split("-"), cuts), daemon=True).start()
    try:
        signal.alarm(LONG_LIMIT_S if place else LIMIT_S)
        for line in launcher.stderr:
            shown.append(line)
            if scenario == "cut" and not cuts and sum("] pid " in part for part in shown) == len(HOSTS):
                cut(1, cuts)
        code = launcher.wait()
        took_s = time.monotonic() - cuts[0] if cuts else None
        return {"code": code, "stdout": launcher.stdout.read(), "stderr": "".join(shown), "seconds": took_s}
    finally:
        with contextlib.suppress(ProcessLookupError):
            launcher.kill()


def cut(host: int, cuts: list[float]) -> None:
    """Takes the link of a host down."""
    ip("link", "set", f"host{host}", "down")
    cuts.append(time.monotonic())


def cut_at_place(rank: str, place: str, cuts: list[float]) -> None:
    """Cuts off a rank's host (one rank per host) as soon as the rank is at a place."""
    while find_rank(os.getpid(), int(rank), AT_PLACE[place]) is None:
        time.sleep(0.01)
    cut(int(rank), cuts)


if __name__ == "__main__":
    {"serve": serve, "call": call}.get(sys.argv[1], drive)()
