"""Compiles every kernel at the real model's shapes for an H100, without one, and records what the assembler reports.

    python -m tools.record_kernels --out benchmarks/kernels-compiled

Needs Python 3.12 and the extra `aot`. The tests of `make kernels` check these figures against their limits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import NamedTuple

import jax

from pallas_kernels.compat import IS_0_11
from tools import gpu_compile, launch_count, ptx
from tools.gpu_check import cases as case_list
from tools.gpu_check.case import Case

# What a kernel's tensor-core products must be.
E4M3, F16, BF16 = "f32.e4m3.e4m3", "f32.f16.f16", "f32.bf16.bf16"
# Every kernel in every form that it has with the default block sizes at the model's sizes, and its products.
CASES: dict[str, str | tuple[str, ...] | None] = {
    "mfa_decode/bfloat16/64x8192": BF16,
    "mfa_decode/fp8/64x8192": (E4M3, F16),
    "mfa_decode/fp8/1x32768": (E4M3, F16),
    "mfa_decode/fp8/edges-4x16": (E4M3, F16),
    "mfa_decode/int4/64x8192": (E4M3, BF16),
    "mfa_decode_quantised/fp8/128x4096/float16/planned": (E4M3, F16),
    # A token and four guesses: more rows than one tile has.
    "mfa_decode_quantised/fp8/64x8192-5x64/float16/planned": (E4M3, F16),
    "fp8_matmul/1x7168x16384": E4M3,
    "fp8_matmul/64x7168x16384": E4M3,
    "fp8_matmul/64x2048x7168": E4M3,
    "fp8_matmul/128x18432x7168": E4M3,
    "fp8_matmul/4096x7168x16384": E4M3,
    "moe_ffn/fp8/256x6of48/uniform": E4M3,
    "moe_ffn/fp8/1024x6of48/uniform": E4M3,
    "moe_ffn/fp8/2731x48of48/uniform": E4M3,
    "moe_ffn/bfloat16/256x6of48/uniform": BF16,
    "mfa_prefill/bfloat16/8k": BF16,
    "mfa_prefill/fp8/8k": F16,
    "dense_attention/vision/4x2708": BF16,
    "norm_quantise/64x7168": None,
    "norm_quantise/4096x7168": None,
    "norm_quantise/128x2048/joined": None,
    "swiglu_quantise/64x5120": None,
    "swiglu_quantise/77x5120": None,
    "swiglu_quantise/4096x5120": None,
    "swiglu_quantise/128x5120/joined": None,
    "permute_rows/128x7168": None,
    "rope_cache_write/bfloat16/128": None,
    "rope_cache_write/fp8/128": None,
    "rope_cache_write/fp8/128/joined": None,
}
# Cases that may spill registers, by the start of their names: bytes of stores a thread, and why. All others may not.
ALLOWED_SPILLS = {
    "mfa_decode": (
        # JAX 0.10 orders the instructions differently.
        194 if IS_0_11 else 208,
        "sums of 64 x 256, scores and weights are live at once; mostly in the merge of two warpgroups",
    ),
    "mfa_prefill/fp8/": (28 if IS_0_11 else 56, "the warpgroup that converts 8-bit rows to float16 has few registers"),
    "moe_ffn/fp8/": (44, "gate + up at tiles of 128 rows: two sums and a product are 192 registers; once a work item"),
}


class IterationCount(NamedTuple):
    """A count of one iteration of `mfa_decode`'s loop, as compiled now.

    Attributes:
      case: Of `CASES`.
      count: Of `ptx.Loop`.
    """

    case: str
    count: str


# How changes of the kernels affected their counts; iterations as in the table, by the same tool. Clocks of shared memory
# are counted at 128 bytes each, as in the kernels' docstrings.
FP8, INT4 = "mfa_decode/fp8/64x8192", "mfa_decode/int4/64x8192"
CHANGES: tuple[tuple[str, str, str, str, str | IterationCount], ...] = (
    (
        "`mfa_decode` fp8, 64 x 8192",
        "keys multiplied as stored",
        "instructions an iteration",
        "1,341",
        IterationCount(FP8, "instructions"),
    ),
    ("", "", "bytes that a thread moves an iteration", "896", IterationCount(FP8, "shared_bytes")),
    ("", "", "clocks of shared memory a block", "1,796", "1,412"),
    ("", "", "launches, with the conversion of the queries", "3", "2"),
    ("", "no automatic barriers", "barriers an iteration", "10", IterationCount(FP8, "barriers")),
    (
        "`mfa_decode` int4, 64 x 8192",
        "keys in e4m3",
        "instructions an iteration, counting the inner loop three times",
        "1,476",
        "1,725",
    ),
    ("", "", "of them shifts of 16 bits, which become several", "192", "0"),
    ("", "", "bytes that a thread moves an iteration", "672", "664"),
    ("", "", "clocks of shared memory a block", "1,552", "1,424"),
    ("", "no automatic barriers", "barriers an iteration", "18", IterationCount(INT4, "barriers")),
    ("`fp8_matmul` 64 x 2048 x 7168", "K shared in a cluster", "launches", "2", "1"),
    ("", "", "megabytes of partial sums in memory, written and read", "8.4", "0"),
    ("`fp8_matmul` 64 x 7168 x 16384", "K shared in a cluster", "launches", "2", "1"),
    ("", "", "megabytes of partial sums in memory, written and read", "14.7", "0"),
    ("`moe_ffn` fp8, 171 rows an expert", "empty halves of tiles left out", "rows multiplied", "256", "192"),
    ("`mfa_prefill` fp8", "no automatic barriers", "barriers in the kernel", "43", "8"),
    ("`fp8_matmul`, `moe_ffn` fp8", "a weight's scale read ahead", "turns between its load and its use", "0", "1"),
    (
        "`mfa_prefill` bfloat16",
        "weights summed up after the barriers",
        "numbers that a thread adds up in a turn before the other warpgroup may multiply",
        "32",
        "0",
    ),
)
REORDERED = (
    "The last two rows change when something is done, not how much is done, so the counts of a turn do not show them. Their "
    "effect has to be measured on a GPU, and was not."
)


def main() -> None:
    """Writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(prog="python -m tools.record_kernels", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/kernels-compiled"))
    parser.add_argument("--only", default="", help="names that start so")
    args = parser.parse_args()
    if gpu_compile.missing():
        parser.error(str(gpu_compile.missing()))
    mesh = gpu_compile.h100_mesh()
    known = {case.name: case for case in case_list.all_cases("compile", is_quick=False)}
    rows = []
    for name in CASES:
        if name.startswith(args.only):
            for report in compile_case(mesh, known[name]):
                rows.append({"case": name, **dataclasses.asdict(report)})
                print(rows[-1], flush=True)
    write(args.out.with_suffix(".json"), json.dumps({"jax": jax.__version__, "kernels": rows}, indent=1) + "\n")
    write(args.out.with_suffix(".md"), table(rows) if args.only else table(rows) + launch_count.section())


def compile_case(mesh: jax.sharding.Mesh, case: Case) -> list[gpu_compile.KernelReport]:
    """The Mosaic kernels of one case."""
    shapes = jax.eval_shape(lambda: case.make(0))
    return gpu_compile.compile_and_read(mesh, lambda *inputs: case.run(*inputs, implementation="mosaic"), *shapes)[1]


def allowed_spill_bytes(name: str) -> int:
    """Bytes that the kernels of a case may spill."""
    return max((limit for start, (limit, _) in ALLOWED_SPILLS.items() if name.startswith(start)), default=0)


def table(rows: list[dict[str, object]]) -> str:
    """The figures as a page."""
    lines = [
        "# The kernels as compiled for an H100",
        "",
        f"sm_90a, jax {jax.__version__}, without a GPU: `python -m tools.record_kernels` writes this page and the",
        "JSON file of the same name; `make kernels` compiles the same and checks it. Registers are those of a thread when",
        "a kernel starts; warpgroups then trade them (`setmaxnreg`). Shared memory is that of a block, of at most 227 KB.",
        "Code that two cases have in common is listed once. An iteration is one of the product loop: PTX instructions,",
        "barriers, and bytes that a thread moves to and from shared memory; code that only some iterations run is counted",
        "too. Nothing here was run: no time is given because none was measured.",
        "",
        "| case | kernel | registers | spilled bytes | shared memory, KB | wgmma | bulk copies | an iteration |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kinds = ", ".join(str(kind) for kind in row["wgmma"]) or "-"  # type: ignore[attr-defined]
        lines.append(
            f"| {row['case']} | {row['name']} | {row['registers']} | {row['spill_bytes']} | "
            f"{int(str(row['smem_bytes'])) / 1024:.0f} | {kinds} ({row['num_wgmma']}) | {row['num_tma']} | "
            f"{', '.join(map(str, ptx.Loop(*row['loop']))) if row['num_wgmma'] else '-'} |"  # type: ignore[misc]
        )
    lines += ["", "Allowed to spill, in bytes a thread:", ""]
    lines += [f"- `{start}`: {limit}; {why}." for start, (limit, why) in ALLOWED_SPILLS.items()]
    lines += ["", "Counts before and after changes:", "", "| kernel | change | count | before | after |"]
    lines += ["| --- | --- | --- | --- | --- |", *(_describe(change, rows) for change in CHANGES), "", REORDERED]
    return "\n".join(lines) + "\n"


def _describe(change: tuple[str, str, str, str, str | IterationCount], rows: list[dict[str, object]]) -> str:
    *cells, after = change
    if isinstance(after, IterationCount):
        loops = [ptx.Loop(*row["loop"]) for row in rows if (row["case"], row["name"]) == (after.case, "mfa_decode")]  # type: ignore[misc]
        after = f"{getattr(loops[0], after.count):,}" if loops else "-"
    return f"| {' | '.join([*cells, after])} |"


def write(path: pathlib.Path, text: str) -> None:
    """Writes under a temporary name first."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    main()
