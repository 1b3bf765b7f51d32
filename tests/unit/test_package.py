"""What `import step3_jax` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib import resources

import pytest

import step3_jax


@pytest.mark.parametrize("name", step3_jax.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(step3_jax, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Llm"):
        _ = step3_jax.Llm


def test_importing_the_package_does_not_import_jax() -> None:
    code = "import sys, step3_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_packages_logger_says_nothing_unless_it_is_asked_to() -> None:
    code = "import step3_jax, logging; logging.getLogger('step3_jax.x').warning('heard')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    assert logging.getLogger("step3_jax").level == logging.NOTSET


def test_types_are_shipped() -> None:
    assert resources.files("step3_jax").joinpath("py.typed").is_file()
