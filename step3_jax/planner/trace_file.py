"""Past requests as a workload: a file of prompt and output lengths, and the contexts that follow from them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# Prompt and output together are cached; the released model has this many positions.
MAX_TOKENS = 65_536
_LENGTHS = ("prompt_tokens", "output_tokens")
_ARRIVAL = "arrival_s"
_FORM = '{"prompt_tokens": N, "output_tokens": N}'


@dataclasses.dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
      prompt_tokens: At least 1.
      output_tokens: At least 1.
      arrival_s: Seconds from the start of the trace; None if the file has no times.
    """

    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None


def read_trace(path: str | pathlib.Path, *, max_tokens: int | None = MAX_TOKENS) -> list[TraceRequest]:
    """Reads a trace: a JSON object on each line, such as {"prompt_tokens": 120, "output_tokens": 40, "arrival_s": 1.5}.

    Other keys and empty lines are ignored. `arrival_s` may be omitted, in all lines or in none; the requests are
    returned in the order of their arrival.

    Args:
      path: The file.
      max_tokens: Most tokens of a prompt, and of prompt and output together; None for no limit.

    Raises:
      ValueError: If the file cannot be read, has no requests, or has a line that is malformed, cut off, or
        longer than the model's context; the message names the line.
    """
    file = pathlib.Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {number}: not UTF-8 text; a trace has a JSON object on each line") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            found.append(parse_request(_load(line, where, is_last=number == len(lines)), where, max_tokens=max_tokens))
    if not found:
        raise ValueError(f"{file} has no requests; a line for each is needed, such as {_FORM}")
    with_time = [one.arrival_s for one in found if one.arrival_s is not None]
    if with_time and len(with_time) != len(found):
        raise ValueError(
            f"{file}: {len(with_time)} of {len(found)} requests have {_ARRIVAL}; give it in all or in none"
        )
    return sorted(found, key=lambda one: one.arrival_s or 0.0)


def parse_request(entry: object, where: str, *, max_tokens: int | None = MAX_TOKENS) -> TraceRequest:
    """A request from a JSON object.

    Args:
      entry: The content of a line.
      where: File and line, at the start of messages.
      max_tokens: As for `read_trace`.

    Raises:
      ValueError: For a malformed object, lengths below 1, or a request that is too long.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {json.dumps(entry)[:80]} is not an object such as {_FORM}")
    lengths = []
    for key in _LENGTHS:
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {key} is {json.dumps(value)}; a whole number of at least 1 is needed")
        lengths.append(value)
    prompt, output = lengths
    if max_tokens is not None and prompt > max_tokens:
        raise ValueError(f"{where}: a prompt of {prompt:,} tokens; at most {max_tokens:,} are allowed")
    if max_tokens is not None and prompt + output > max_tokens:
        raise ValueError(
            f"{where}: {prompt:,} tokens of prompt and {output:,} of output are {prompt + output:,} together; at most "
            f"{max_tokens:,} are allowed"
        )
    arrival = entry.get(_ARRIVAL)
    if arrival is None:
        return TraceRequest(prompt, output)
    if not isinstance(arrival, int | float) or isinstance(arrival, bool) or not 0 <= arrival < math.inf:
        raise ValueError(f"{where}: {_ARRIVAL} is {json.dumps(arrival)}; seconds of at least 0 are needed")
    return TraceRequest(prompt, output, float(arrival))


def count_contexts(requests: Sequence[TraceRequest]) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """The contexts at which the tokens of a trace are decoded.

    A request with a prompt of p tokens decodes its i-th token, counted from 0, with p + i tokens in the cache. A request is
    in the batch as long as it decodes, so this is also how long the sequences of the batch are at a random moment.

    Args:
      requests: At least one request.

    Returns:
      Contexts in ascending order, and how many tokens are decoded at each.
    """
    longest = max(one.prompt_tokens + one.output_tokens for one in requests)
    # +1 where a request starts to decode, -1 where it ends: their running sum counts the requests at each context.
    change = np.zeros(longest + 1, np.int64)
    np.add.at(change, [one.prompt_tokens for one in requests], 1)
    np.add.at(change, [one.prompt_tokens + one.output_tokens for one in requests], -1)
    counts = np.cumsum(change)
    contexts = np.flatnonzero(counts)
    return contexts, counts[contexts]


def _load(line: str, where: str, *, is_last: bool) -> object:
    try:
        return json.loads(line)
    except ValueError:
        pass
    # A complete file ends with a line feed, so its last line here is empty.
    if is_last and line.lstrip().startswith("{") and not line.rstrip().endswith("}"):
        raise ValueError(f"{where}: {line[:80]!r} is cut off: the file is not complete")
    raise ValueError(f"{where}: {line[:80]!r} is not JSON; an object such as {_FORM} is needed")
