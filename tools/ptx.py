"""Two faults of a Hopper kernel that its PTX shows and that no interpreter can: both look right until a GPU runs them."""

from __future__ import annotations

import re

THREADS_PER_WARPGROUP = 128
# Bulk stores without a tensor map in one kernel, by how a case's name begins, and why they stay inside. A store with a
# tensor map is cut off at each bound of its array. Mosaic makes one without of a copy that is contiguous and not swizzled:
# it is cut off at the end of the whole array alone, so that what is too much for a row lands in the next one.
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

    `setmaxnreg.inc` waits until the block's pool has enough, and the pool is what the block was launched with: to ask for
    more is to wait for ever. All warpgroups but one are taken to ask for the most that any asks for.

    Args:
      text: PTX of one kernel.
      registers: Of a thread at the launch, as the assembler says.
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
