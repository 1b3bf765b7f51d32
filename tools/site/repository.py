"""Files of the repository as pages of the site: those that a page links to, and those that they link to in turn.

A page in docs/ has the same relative links on the site and in a checkout. Other files are under `repository/`, where a
Markdown file becomes a page, any other text a page that shows it, and a folder a page with links.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from collections.abc import Callable, Mapping

PREFIX = "repository/"
_DOCS = "docs/"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "sh"}
# Longer ones are not shown but copied.
_MAX_BYTES = 200_000


def find_linked(root: pathlib.Path, texts: Mapping[str, str]) -> list[str]:
    """Files and folders outside docs/ that pages link to, and those that they link to in turn.

    Args:
      root: The repository's root.
      texts: Markdown of the pages, by their path on the site.

    Returns:
      Paths from the root, sorted.
    """
    found: set[str] = set()
    waiting = [target for uri, text in texts.items() for target in _targets(_source_of(uri), text)]
    while waiting:
        path = waiting.pop()
        if path in found or path.startswith(_DOCS) or not _is_inside(root, path):
            continue
        found.add(path)
        if is_page(root / path):
            waiting += _targets(_source_of(uri_of(root, path)), write_page(root, path))
    return sorted(found)


def move_links(root: pathlib.Path, uri: str, text: str) -> tuple[str, list[str]]:
    """A page's text with its links rewritten for the site, and the links that lead nowhere.

    Args:
      root: The repository's root.
      uri: The page's path on the site.
      text: Its Markdown.
    """
    source = _source_of(uri)
    missing: list[str] = []

    def move(match: re.Match[str]) -> str:
        path = _resolve(source, match["target"])
        if not path.startswith(_DOCS) and not _is_inside(root, path):
            missing.append(match["target"])
            return match.group()
        target = path.removeprefix(_DOCS) if path.startswith(_DOCS) else uri_of(root, path)
        return posixpath.relpath(target, posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return _outside_code(text, lambda part: _LINK.sub(move, part)), missing


def is_page(file: pathlib.Path) -> bool:
    """Whether a file or folder is shown as a page; others are copied."""
    if file.is_dir():
        return True
    try:
        return len(file.read_text(encoding="utf-8")) <= _MAX_BYTES and file.suffix != ".svg"
    except UnicodeDecodeError:
        return False


def write_page(root: pathlib.Path, path: str) -> str:
    """Markdown of the page of a file or a folder; `path` is from the root."""
    file = root / path
    if file.is_dir():
        names = sorted(one.name for one in file.iterdir() if not one.name.startswith((".", "__")))
        return f"# {path}\n\n" + "".join(f"- [{name}]({file.name}/{name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    fence = "~~~" if "```" in text else "```"
    return f"# {file.name}\n\n`{path}`\n\n{fence}{_LANGUAGES.get(file.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def uri_of(root: pathlib.Path, path: str) -> str:
    """Where the site has a file or folder of the repository; `path` is from the root."""
    is_itself = path.endswith(".md") or not is_page(root / path)
    return PREFIX + (path if is_itself else f"{path}.md")


def _source_of(uri: str) -> str:
    """Where in the repository a page of the site comes from, for its relative links."""
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else _DOCS + uri


def _targets(source: str, text: str) -> list[str]:
    return [_resolve(source, match["target"]) for match in _LINK.finditer(_CODE.sub("``", text))]


def _resolve(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _is_inside(root: pathlib.Path, path: str) -> bool:
    return not path.startswith("..") and (root / path).exists()


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    end = 0
    for match in _CODE.finditer(text):
        parts += [change(text[end : match.start()]), match.group()]
        end = match.end()
    return "".join([*parts, change(text[end:])])
