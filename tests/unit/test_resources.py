"""Finding the files that ship with the package."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax import resources


def test_a_checkout_has_the_shipped_files_beside_the_package() -> None:
    root = pathlib.Path(__file__).resolve().parents[2]
    assert resources.find("configs/models/step3.json") == root / "configs/models/step3.json"
    assert (resources.find("models/step3-tiny") / "tokenizer.json").is_file()


def test_an_installed_package_prefers_its_own_copy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "step3_jax"
    for place in (package / "_shipped", package.parent):
        (place / "configs").mkdir(parents=True)
        (place / "configs" / "some.json").write_text("{}")
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert resources.find("configs/some.json") == package / "_shipped" / "configs" / "some.json"


@pytest.mark.parametrize("name", ["models/no-such-model", "../pyproject.toml", "/etc/hostname"])
def test_a_name_that_is_not_shipped_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        resources.find(name)
