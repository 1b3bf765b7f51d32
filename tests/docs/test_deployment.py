"""The deployment guide's memory figures are what `step3 plan memory` prints, and its commands fit their deployments."""

from __future__ import annotations

import re
import shlex

import pytest

from step3_jax.cli.main import build_parser, main
from step3_jax.launch.place import read_need
from tests.docs.examples import ROOT, read_examples

PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| .+? \| ([\d.]+) million \| `step3 (plan memory .+?)` \|$", PAGE, re.MULTILINE)


def test_the_table_has_the_published_deployments() -> None:
    assert len(ROWS) == 4


@pytest.mark.parametrize(("weights", "tokens", "command"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_memory_is_what_the_plan_prints(
    weights: str, tokens: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    fits = re.search(r"KV tokens that fit: ([\d,]+)", printed)
    assert fits is not None
    assert f"{int(fits[1].replace(',', '')) / 1e6:.1f}" == tokens
    sizes = re.search(r"^weights \(arithmetic\) +(.*)$", printed, re.MULTILINE)
    assert sizes is not None
    said = re.findall(r"\d+\.\d", weights)
    assert said in ([], [f"{float(size):.1f}" for size in sizes[1].split()])


def test_each_command_starts_as_many_processes_as_it_has_hosts_times_eight() -> None:
    examples = [one for one in read_examples("docs/deployment.md") if one.language == "sh"]
    launched = [words for one in examples for words in one.commands if words[:3] == ["step3", "launch", "--hosts"]]
    assert len(launched) == 3
    for words in launched:
        arguments = build_parser("launch").parse_args(words[1:])
        need = read_need(arguments.words)
        assert need is not None
        assert need.processes() == 8 * len(arguments.hosts.split(","))
