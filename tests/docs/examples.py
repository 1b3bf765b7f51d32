"""The fenced examples of the documentation, and a program that runs all of a kind in one process.

    python tests/docs/examples.py KIND

An HTML comment directly above a block marks it: `<!-- not run: why -->`, or `<!-- slow: why -->` if it takes longer than a
few seconds.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import re
import shlex
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = (
    "README.md",
    "models/step3-tiny/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
LANGUAGES = ("python", "sh")
_BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_MARK = re.compile(r"(?P<how>not run|slow): \S.*")


@dataclasses.dataclass(frozen=True)
class Example:
    """One fenced block.

    Attributes:
      file: Its file, from the root.
      line: Number of its first line, from 1.
      language: "python" or "sh".
      text: Its content.
      mark: The comment above it; None without one.
    """

    file: str
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def kind(self) -> str:
        """ "fast", "slow" or "not run"."""
        match = None if self.mark is None else _MARK.fullmatch(self.mark)
        return "fast" if match is None else match["how"]

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell block, without comments; a backslash at the end continues a line."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def read_examples(file: str) -> list[Example]:
    """All blocks of a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return [
        Example(file, text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"], match["mark"])
        for match in _BLOCK.finditer(text)
    ]


def run_example(example: Example) -> None:
    """Runs a block in this process; `step3` is called instead of started.

    Raises:
      RuntimeError: If a command fails.
    """
    if example.language == "python":
        source = "\n" * (example.line - 1) + example.text
        exec(compile(source, example.file, "exec"), {"__name__": "__main__"})
        return
    from step3_jax.cli.main import main

    for program, *words in example.commands:
        if program != "step3":
            raise RuntimeError(f"{example}: {program} cannot be run: mark the block as not run")
        sys.stdin = io.StringIO()
        begin = time.monotonic()
        code = main(words)
        print(f"-- {time.monotonic() - begin:.1f} s: step3 {shlex.join(words)}", file=sys.stderr)
        if code != 0:
            raise RuntimeError(f"{example}: step3 {shlex.join(words)} has exit code {code}")


if __name__ == "__main__":
    for one in (example for file in FILES for example in read_examples(file)):
        if one.kind == sys.argv[1] and one.language in LANGUAGES:
            run_example(one)
