"""Options of `step3 run-batch`."""

from __future__ import annotations

import argparse

from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.arguments.setting import add_setting
from step3_jax.cli.option import add_model
from step3_jax.engine.setting import settings_of
from step3_jax.server.config import ServerConfig

# The service's settings that make sense without a network.
SETTINGS = (
    "served_model_name",
    "max_n",
    "max_body_bytes",
    "allowed_media_domains",
    "reasoning_parser",
    "generation_config",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_model(parser)
    parser.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="requests, in OpenAI's batch format: JSON lines"
    )
    parser.add_argument(
        "-o",
        "--output-file",
        required=True,
        metavar="FILE",
        help="answers; requests that it already answers are skipped",
    )
    group = parser.add_argument_group("requests and answers")
    for name in SETTINGS:
        add_setting(group, *settings_of(ServerConfig)[name])
    add_engine(parser)
