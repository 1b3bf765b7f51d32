"""The content of a Containerfile, and its steps run in a folder that serves as root."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Mapping

# Settings that reach the package index from here, for steps that install.
_PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL")
_CERTIFICATES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
# It may not be in the images' own PATH.
CHROOT = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot"
STEP_LIMIT_S = 1200


@dataclasses.dataclass(frozen=True)
class Containerfile:
    """The instructions of a file, in order, as (name, rest of the line)."""

    instructions: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: pathlib.Path) -> Containerfile:
        """Reads a file; a backslash at the end continues a line."""
        lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        words = [line.split(None, 1) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        return cls(tuple((name.upper(), rest) for name, rest in words))

    def last(self, name: str) -> str:
        """The rest of the last instruction of a name."""
        return [rest for one, rest in self.instructions if one == name][-1]

    def words(self, name: str) -> list[str]:
        """The words of an instruction in JSON form; for HEALTHCHECK those after CMD."""
        rest = self.last(name)
        words: list[str] = json.loads(rest[rest.index("[") :])
        return words

    @property
    def environment(self) -> dict[str, str]:
        """The variables that all ENV instructions set."""
        pairs = [
            tuple(word.split("=", 1)) for name, rest in self.instructions if name == "ENV" for word in shlex.split(rest)
        ]
        return dict(pairs)

    def build(self, root: pathlib.Path, context: pathlib.Path) -> None:
        """Runs the steps (RUN and COPY) in a root, as its user 0.

        Args:
          root: Holds the image named by FROM.
          context: Where COPY copies from; .dockerignore there says which files.
        """
        shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
        for name, rest in self.instructions:
            if name == "COPY":
                source, target = shlex.split(rest)
                assert source == "."
                copy_context(context, root / target.lstrip("/"))
            elif name == "RUN":
                passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
                inside = root / _CERTIFICATES.relative_to("/")
                if inside.exists():
                    # This machine may trust an additional certificate, that of a proxy.
                    shutil.copy(_CERTIFICATES, inside)
                    passed |= {"PIP_CERT": str(_CERTIFICATES)}
                run_in(root, ["/bin/sh", "-c", rest], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"} | passed)


def copy_context(context: pathlib.Path, target: pathlib.Path) -> None:
    """Copies what .dockerignore lets through: it excludes everything, then names what is included."""
    names = [line[1:] for line in (context / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    target.mkdir(parents=True)
    for name in names:
        if (context / name).is_dir():
            shutil.copytree(context / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(context / name, target / name)


def run_in(root: pathlib.Path, words: list[str], environment: Mapping[str, str]) -> str:
    """Runs a command in a root and returns what it printed."""
    done = subprocess.run(
        [CHROOT, str(root), *words],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=STEP_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout
