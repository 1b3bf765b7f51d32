"""`--log-level`, `STEP3_LOG_LEVEL` and `--debug`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import pytest

from step3_jax.cli import env, main
from step3_jax.cli.log import read_level, start_log


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Restores the package's logger."""
    logger = logging.getLogger("step3_jax")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
    logging.Logger.manager._clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "variable", "level"),
    [
        ({}, None, None),
        ({}, "", None),
        ({}, "Info", "info"),
        ({"log_level": "error"}, "info", "error"),
        ({"log_level": "error", "debug": True}, "info", "debug"),
    ],
)
def test_an_option_goes_before_the_variable(
    options: dict[str, object], variable: str | None, level: str | None
) -> None:
    environment = {} if variable is None else {"STEP3_LOG_LEVEL": variable}
    assert read_level(argparse.Namespace(**options), environment) == level


def test_a_wrong_variable_is_named_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="STEP3_LOG_LEVEL is 'loud'; allowed: debug, info, warning, error"):
        read_level(argparse.Namespace(), {"STEP3_LOG_LEVEL": "loud"})


@pytest.mark.parametrize(("level", "shown"), [(None, "WE"), ("info", "IWE"), ("error", "E")])
def test_the_log_is_shown_from_its_level_on(level: str | None, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    start_log(level)
    for name in ("info", "warning", "error"):
        getattr(logging.getLogger("step3_jax.somewhere"), name)("%s of a part", name)
    lines = capsys.readouterr().err.splitlines()
    assert "".join(line[0] for line in lines) == shown
    assert lines[-1] == "ERROR step3_jax.somewhere: error of a part"


@pytest.mark.parametrize("argv", [["--log-level", "info", "env"], ["env", "--log-level=info"]])
def test_a_command_takes_the_level_before_and_after_its_name(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(_: argparse.Namespace) -> int:
        logging.getLogger("step3_jax.somewhere").info("here")
        return 0

    monkeypatch.setattr(env, "run", log)
    assert main._run_guarded(argv, has_log=True) == 0
    assert capsys.readouterr().err == "INFO step3_jax.somewhere: here\n"
