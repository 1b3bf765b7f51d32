"""Links of pages that leave docs/, and the pages that they lead to."""

from __future__ import annotations

import pathlib

import pytest

from tools.site.repository import find_linked, move_links, write_page


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    for name, text in {
        "docs/a.md": "See [b](b.md), [notes](../notes/one.md#part) and [files](../configs).",
        "docs/b.md": "```\n[not a link](../nowhere.md)\n```\n`[nor this](../nowhere.md)`",
        "notes/one.md": "# One\n## Part\nBack to [a](../docs/a.md), on to [two](two.txt).",
        "notes/two.txt": "two",
        "configs/x.yaml": "key: value",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "notes" / "photo.png").write_bytes(b"\x89PNG\xff")
    return tmp_path


def pages(root: pathlib.Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (root / "docs").glob("*.md")}


def test_what_is_linked_from_outside_becomes_pages_and_what_these_link_to(root: pathlib.Path) -> None:
    assert find_linked(root, pages(root)) == ["configs", "configs/x.yaml", "notes/one.md", "notes/two.txt"]


@pytest.mark.parametrize(
    ("uri", "text", "moved"),
    [
        ("a.md", "[x](b.md)", "[x](b.md)"),
        ("a.md", "[x](../notes/one.md#part)", "[x](repository/notes/one.md#part)"),
        ("a.md", "[x](../configs)", "[x](repository/configs.md)"),
        ("a.md", "[x](../notes/photo.png)", "[x](repository/notes/photo.png)"),
        ("repository/notes/one.md", "[x](two.txt)", "[x](two.txt.md)"),
        ("repository/notes/one.md", "[x](../docs/a.md#y)", "[x](../../a.md#y)"),
        ("a.md", "[x](https://example.org/y.md) [z](#here)", "[x](https://example.org/y.md) [z](#here)"),
        ("b.md", "`[x](../notes/one.md)`", "`[x](../notes/one.md)`"),
    ],
)
def test_links_lead_to_the_same_place_on_the_site(uri: str, text: str, moved: str, root: pathlib.Path) -> None:
    assert move_links(root, uri, text) == (moved, [])


def test_links_that_lead_nowhere_are_told(root: pathlib.Path) -> None:
    assert move_links(root, "a.md", "[x](../gone.md) [y](../../out.md)")[1] == ["../gone.md", "../../out.md"]


def test_a_folder_is_a_page_of_links_and_a_file_one_with_its_text(root: pathlib.Path) -> None:
    assert "[x.yaml](configs/x.yaml)" in write_page(root, "configs")
    assert "```yaml\nkey: value\n```" in write_page(root, "configs/x.yaml")
