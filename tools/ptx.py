"""What the PTX of a Hopper kernel shows: what its product loop consists of, and two faults that no interpreter sees, since
both look right until a GPU runs them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

THREADS_PER_WARPGROUP = 128
# Bulk stores without a tensor map in one kernel, by how a case's name starts, and why they stay in bounds. A store with a
# tensor map is cut off at each bound of its array. Mosaic turns a contiguous, unswizzled copy into one without:
# it is cut off only at the end of the whole array, so whatever exceeds a row lands in the next one.
PLAIN_STORES: dict[str, tuple[int, str]] = {
    "norm_quantise/": (1, "a whole row of scales"),
    "swiglu_quantise/": (1, "64 scales, of a number of rows that is a multiple of 64"),
    "swiglu_quantise/77": (2, "64 scales, and in the last tile what its row has room for"),
    "permute_rows/": (1, "whole rows, in an array with room for all"),
    "moe_ffn/": (1, "as `permute_rows`"),
    "rope_cache_write/": (32, "rows of a page: 16 of keys and 16 of values"),
}


def register_fault(text: str, registers: int) -> str | None:
    """What is wrong with how a kernel's warpgroups trade registers; None if nothing is.

    `setmaxnreg.inc` waits until the block's pool has enough, and the pool is what the block was launched with: asking for
    more means waiting for ever. All warpgroups but one are assumed to ask for the most that any asks for.

    Args:
      text: PTX of one kernel.
      registers: Registers per thread at launch, as the assembler says.
    """
    increased, decreased = (
        [int(count) for count in re.findall(rf"setmaxnreg\.{kind}\.sync\.aligned\.u32\s+(\d+)", text)]
        for kind in ("inc", "dec")
    )
    if not increased:
        return None
    threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", text)
    if threads is None:
        return "warpgroups trade registers, and the PTX does not say how many threads there are"
    warpgroups = int(threads.group(1)) // THREADS_PER_WARPGROUP
    most, least = max(increased), max(decreased, default=registers)
    wanted, there = most * (warpgroups - 1) + least, registers * warpgroups
    if wanted <= there:
        return None
    return (
        f"{warpgroups} warpgroups start with {registers} registers a thread, {there} together, and ask for "
        f"{warpgroups - 1} x {most} + {least} = {wanted}: setmaxnreg would wait for ever"
    )


def count_plain_stores(text: str) -> int:
    """Bulk copies from shared to device memory without a tensor map."""
    return len(re.findall(r"cp\.async\.bulk\.global\.shared", text))


def store_fault(case: str, num_plain_stores: int) -> str | None:
    """What is wrong with the plain bulk stores of a kernel in `case`; None if nothing is."""
    known = [start for start in PLAIN_STORES if case.startswith(start)]
    expected = PLAIN_STORES[max(known, key=len)][0] if known else 0
    if num_plain_stores in (0, expected):
        return None
    return (
        f"{num_plain_stores} bulk stores of {case} have no tensor map, {expected} are known: nothing cuts them off at the "
        "end of a row. Show that they stay inside, then count them in PLAIN_STORES (tools/ptx.py)"
    )


class Loop(NamedTuple):
    """What one iteration of a kernel's longest product loop does per thread, including what only some iterations do.

    Attributes:
      instructions: PTX instructions; the assembler merges some and splits others.
      barriers: Barriers of a warpgroup or the block.
      shared_bytes: Bytes that loads and stores move between registers and shared memory.
    """

    instructions: int = 0
    barriers: int = 0
    shared_bytes: int = 0


def read_loop(text: str) -> Loop:
    """The longest of the innermost loops with every kind of tensor-core product in the kernel; zeros without products.

    A loop is what lies between a label and a branch back to it, as the compiler lays them out; a nested one is counted once.
    """
    lines = [line.strip() for line in text.splitlines()]
    kinds = {match.group() for line in lines if (match := re.search(r"wgmma\.mma_async\S*", line))}
    labels = {line[:-1]: index for index, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    loops = []
    for index, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)
        start = labels.get(branch.group(1), index) if branch else index
        code = "\n".join(lines[start:index])
        if kinds and start < index and all(kind in code for kind in kinds):
            loops.append((start, index))
    innermost = [
        (start, end)
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    return max((_count(lines[start : end + 1]) for start, end in innermost), default=Loop())


def _count(lines: list[str]) -> Loop:
    code = [line for line in lines if line.endswith(";") and not line.startswith((".", "//"))]
    barriers = sum(bool(re.search(r"\b(?:bar|barrier)\.", line)) for line in code)
    return Loop(len(code), barriers, sum(map(_shared_bytes, code)))


def _shared_bytes(line: str) -> int:
    """Bytes that a load or store moves per thread."""
    matrix = re.search(r"\b(?:ld|st)matrix\.\S*?\.x(\d)", line)
    if matrix:
        return 4 * int(matrix.group(1))
    plain = re.search(r"\b(?:ld|st)(?:\.\w+)*\.shared(?:::\w+)?(?:\.v(\d))?\.[a-z](\d+)", line)
    return int(plain.group(1) or 1) * int(plain.group(2)) // 8 if plain else 0
