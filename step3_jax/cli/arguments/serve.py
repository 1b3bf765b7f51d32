"""Options of `step3 serve`: one for each field of `ServerConfig`, and the engine's."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.arguments.setting import add_setting
from step3_jax.cli.option import add_model
from step3_jax.engine.setting import settings_of
from step3_jax.server.config import GROUPS, ServerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    titles = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for field, setting in settings_of(ServerConfig).values():
        add_setting(titles[setting.group], field, setting)
    add_engine(parser)
