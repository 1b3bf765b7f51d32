"""The generated pages cover everything they are about."""

from __future__ import annotations

import importlib
import re

import pytest

from step3_jax.cli.main import COMMANDS
from tools.site.api_page import API, KERNELS, ApiPage
from tools.site.command_page import write_commands


def test_every_command_has_a_heading_and_every_option_a_row() -> None:
    page = write_commands()
    assert re.findall(r"^## step3 ([\w-]+)$", page, re.MULTILINE) == list(COMMANDS)
    assert "\n### step3 plan search\n" in page
    assert "| `--max-num-seqs N` | most sequences that run at a time" in page
    assert "%(default)s" not in page


def test_the_metrics_page_has_what_the_dashboard_asks_for() -> None:
    pytest.importorskip("prometheus_client", reason="the service is not installed")
    from tools.site.metric_page import write_metrics

    page = write_metrics()
    names = re.findall(r"^\| `(step3:\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert ("step3:num_requests_running", "gauge") in names
    assert ("step3:generation_tokens_total", "counter") in names
    assert ("step3:time_to_first_token_seconds", "histogram") in names


@pytest.mark.parametrize("page", [API, KERNELS], ids=lambda page: page.title)
def test_everything_on_a_page_of_the_api_exists(page: ApiPage) -> None:
    for name in (name for section in page.sections for name in section.names):
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, attribute) or importlib.import_module(name)
