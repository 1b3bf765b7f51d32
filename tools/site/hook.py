"""MkDocs calls these functions while it builds the site (`hooks` in mkdocs.yml).

Reference pages are generated from the code. Files outside docs/ that pages link to become pages too, so that links which
work in a checkout also work on the site.
"""

from __future__ import annotations

import logging
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.site.api_page import API, KERNELS, write_api
from tools.site.command_page import write_commands
from tools.site.metric_page import write_metrics
from tools.site.repository import find_linked, is_page, move_links, uri_of, write_page

ROOT = pathlib.Path(__file__).resolve().parents[2]
GENERATED = "reference/"
# A build with warnings fails.
_LOG = logging.getLogger("mkdocs.hooks.site")
# Python-Markdown treats a list that follows a line of text without a blank line as part of the text.
_SWALLOWED_LIST = re.compile(r"<p>[^<]*(?:<(?!/?p>)[^<]*)*?\n[-*] ")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the files of the repository that pages link to."""
    for name, text in {
        "command.md": write_commands(),
        "api.md": write_api(API),
        "kernels.md": write_api(KERNELS),
        "metrics.md": write_metrics(),
    }.items():
        files.append(File.generated(config, GENERATED + name, content=text))
    texts = {page.src_uri: page.content_string for page in files.documentation_pages()}
    for path in find_linked(ROOT, texts):
        uri = uri_of(ROOT, path)
        if is_page(ROOT / path):
            files.append(File.generated(config, uri, content=write_page(ROOT, path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave docs/ into links to the pages that `on_files` made."""
    if page.file.src_uri.startswith(GENERATED):
        return markdown
    text, missing = move_links(ROOT, page.file.src_uri, markdown)
    for target in missing:
        _LOG.warning("%s links to %s, which does not exist", page.file.src_uri, target)
    return text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Finds lists that were treated as text."""
    if _SWALLOWED_LIST.search(html):
        _LOG.warning("%s has a list without a blank line before it", page.file.src_uri)
    return html
