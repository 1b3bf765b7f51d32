"""Messages that tables of symptoms quote are those of the sources: readers search a page for what was printed.

A quotation is compared word by word with the strings of the sources, in which a placeholder stands for some words or none;
"..." and "N" do in a quotation.
"""

from __future__ import annotations

import ast
import errno
import functools
import os
import re
from collections.abc import Iterator

import pytest

from tests.docs.examples import ROOT

# How many words a placeholder in the source, or "..." in a quotation, may stand for.
MOST_WORDS = 8
WILD = "\0"
HEAD = re.compile(r"\| (symptom|message) \|")
# Words that come from placeholders: with a number, a name or a path, and these.
VARIABLE = re.compile(r"[\d'/(]|\.\.\.|^(N|serve|fastapi|dp|tp|Image|--max-new-tokens|--max-tokens)\W?$")
# The shell's own; what the system says of an error.
FOREIGN = {"step3: command not found"}
SYSTEM = re.compile("|".join(os.strerror(code) for code in (errno.EADDRINUSE, errno.ECONNREFUSED)))
# Put together from several strings.
COMPOSED = {
    "widened, without CPU kernels (...)": ("widened, ...", "without CPU kernels (...)"),
    "is a Git LFS pointer, not the file itself": ("Git LFS pointer, not the file itself",),
    "has no option --max-new-tokens, did you mean --max-tokens?": (
        "has no option --max-new-tokens",
        ", did you mean --max-tokens?",
    ),
}


def _read_quotes() -> Iterator[tuple[str, str]]:
    """File and words of every quotation in the first column of a table of symptoms."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        is_inside = False
        for line in page.read_text(encoding="utf-8").splitlines():
            is_inside = line.startswith("|") and (is_inside or HEAD.match(line) is not None)
            if not is_inside:
                continue
            symptom = line.split(" | ")[0].removeprefix("|").strip()
            # A command may follow what it prints.
            quotes = re.findall(r'"([^"]+)"', symptom) or re.findall("`([^`]+)`", symptom)[:1]
            yield from ((page.name, quote) for quote in quotes if quote not in FOREIGN)


QUOTES = list(_read_quotes())


def _text(node: ast.expr) -> str | None:
    """A string with its placeholders; None for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or WILD for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = _text(node.left), _text(node.right)
        return None if sides == (None, None) else "".join(WILD if side is None else side for side in sides)
    return None


@functools.cache
def _templates() -> list[list[str]]:
    """The words of every string in the sources."""
    texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    # A shell's message: quoted parts on lines that are continued, with variables.
    texts = re.findall(r'echo ((?:"[^\n]*?"[ \\\n]*)+)', texts[0])
    texts = [re.sub(r"\$\$(\([^)]*\)|\{[^}]*\}|\w+)", WILD, re.sub(r'"[ \\\n]*"?', " ", text)) for text in texts]
    for path in sorted((ROOT / "step3_jax").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts += [text for node in ast.walk(tree) if isinstance(node, ast.expr) and (text := _text(node))]
    return [text.split() for text in dict.fromkeys(texts)]


def _count_fixed(quote: list[str], template: list[str]) -> int:
    """How many words of a quotation are literally those of a part of a template; -1 if it does not fit."""

    @functools.cache
    def fit(i: int, j: int) -> int:
        """The same for the quotation from word i on, at word j of the template."""
        if i == len(quote):
            return 0
        if j == len(template):
            return -1
        if "..." in quote[i] or quote[i] in ("N", "N,"):
            return max(fit(i + 1, min(j + words, len(template))) for words in range(1, MOST_WORDS + 1))
        if WILD in template[j]:
            pattern = "[^\n]*?".join(map(re.escape, template[j].split(WILD)))
            ends = range(i, min(i + MOST_WORDS, len(quote)) + 1)
            return max((fit(end, j + 1) for end in ends if re.fullmatch(pattern, " ".join(quote[i:end]))), default=-1)
        # A quotation may end before the message does.
        is_same = quote[i] == (template[j].rstrip(".,;:") if i == len(quote) - 1 else template[j])
        rest = fit(i + 1, j + 1) if is_same else -1
        return -1 if rest < 0 else rest + (not VARIABLE.search(quote[i]))

    return max((fit(0, start) for start in range(len(template))), default=-1)


def _is_said(quote: str) -> bool:
    words = SYSTEM.sub("...", quote).split()
    least = max(1, sum(not VARIABLE.search(word) for word in words))
    return any(_count_fixed(words, template) >= least for template in _templates())


def test_there_are_quotations() -> None:
    assert len(QUOTES) > 30


@pytest.mark.parametrize(("page", "quote"), QUOTES)
def test_a_quoted_message_is_one_of_the_sources(page: str, quote: str) -> None:
    for part in COMPOSED.get(quote, (quote,)):
        assert _is_said(part), f"docs/{page} quotes a message that nothing prints: {quote}"


@pytest.mark.parametrize(
    "quote",
    [
        "there is no directory /nope",
        "queue_is_full",
        "has positions for no more than 2,048 tokens",
        "needs 4 GPUs, but there are 2",
    ],
)
def test_a_message_that_was_reworded_is_noticed(quote: str) -> None:
    assert not _is_said(quote)
