"""Names of dtypes on the command line: every command takes the long and the short ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_SAME = (
    {"bfloat16", "bf16"},
    {"float32", "fp32", "f32"},
    {"float16", "fp16", "f16"},
    {"fp8", "float8", "float8_e4m3fn"},
)


def dtype_name(choices: Sequence[str]) -> Callable[[str], str]:
    """A parser of an option's value, for argparse's `type`.

    Args:
      choices: The names that the command itself uses.

    Returns:
      A function that returns the one of `choices` that a name means, or the name unchanged, which argparse then refuses.
    """

    def dtype(text: str) -> str:
        name = text.lower()
        same = next((names for names in _SAME if name in names), {name})
        return next((choice for choice in choices if choice in same), text)

    return dtype
