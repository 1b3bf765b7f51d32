"""Options of commands that talk to a service."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

KEY_VARIABLE = "STEP3_API_KEY"


class _NameService(argparse.Action):
    """Stores the address, and the module that does the work instead of the command's own."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.remote_module = self.const


def add_service(parser: argparse.ArgumentParser, *, module: str) -> None:
    """Adds --url and its related options.

    Args:
      parser: Gets the options.
      module: A module of `step3_jax.cli` that does the work if there is an address.
    """
    group = parser.add_argument_group("a service instead of a local model")
    group.add_argument(
        "--url",
        action=_NameService,
        const=module,
        metavar="URL",
        help="address of an OpenAI-compatible service, http://host:port",
    )
    add_key(group)
    add_served_model(group)


def add_served_model(parser: argparse._ActionsContainer) -> None:
    """Adds --served-model."""
    parser.add_argument("--served-model", metavar="NAME", help="name of a model of the service (default: its first)")


def add_key(parser: argparse._ActionsContainer) -> None:
    """Adds --api-key."""
    parser.add_argument("--api-key", metavar="KEY", help=f"of the service (default: ${KEY_VARIABLE})")


def read_key(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key from the command line, or else from the environment. A key meant for another service is never sent."""
    return arguments.api_key or environment.get(KEY_VARIABLE) or None
