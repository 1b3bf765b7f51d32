"""`step3 inspect`: what a checkpoint holds, and whether it matches its config.json.

Exit code 0 if it matches, 1 if it does not, 2 if there is no checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from step3_jax import resources
from step3_jax.checkpoint.inspect import Inspection, collapse, inspect_checkpoint
from step3_jax.config import ModelConfig

MAX_LINES = 100


def run(arguments: argparse.Namespace) -> int:
    """Prints what was found."""
    found = inspect_checkpoint(resources.find_folder(arguments.path))
    if arguments.json:
        print(json.dumps(to_dict(found, tensors=arguments.tensors)))
    else:
        print("\n".join(to_lines(found, tensors=arguments.tensors)))
    return 1 if found.problems else 0


def to_dict(found: Inspection, *, tensors: bool = False) -> dict[str, object]:
    """The findings as a JSON object; `problems` is complete."""
    result: dict[str, object] = {
        "path": str(found.path),
        "form": found.form,
        "fits": not found.problems,
        "config": None if found.config is None else found.config.to_dict(),
        "num_tensors": len(found.tensors),
        "num_bytes": found.num_bytes,
        "parameters": found.parameters,
        "dtypes": {name: {"tensors": count, "bytes": size} for name, (count, size) in found.dtypes.items()},
        "fp8_tensors": found.num_fp8,
        "quantisable_tensors": found.num_quantisable,
        "files": {
            name: {"tensors": len(file.tensors), "bytes": file.num_bytes, "disk_bytes": file.disk_bytes}
            for name, file in found.files.items()
        },
        "problems": found.problems,
        "notes": found.notes,
    }
    if tensors:
        result["tensors"] = {
            tensor: {
                "dtype": found.tensors[tensor].dtype,
                "shape": list(found.tensors[tensor].shape),
                "bytes": found.tensors[tensor].num_bytes,
                "file": name,
            }
            for name, file in found.files.items()
            for tensor in file.tensors
        }
    return result


def to_lines(found: Inspection, *, tensors: bool = False) -> Iterator[str]:
    """The findings for a reader."""
    if tensors:
        yield from _list_tensors(found)
        yield ""
    yield f"{found.path}: {_describe_model(found.config)}; {found.form}"
    counts = found.parameters
    parts = [f"{part} {count:,}" for part, count in counts.items() if count and part != "total"]
    holder = _plural(len(found.files), "file" if found.form == "released layout" else "array")
    rows = {
        "tensors": f"{len(found.tensors):,} in {holder}, {_size(found.num_bytes)}",
        "files": _describe_files(found),
        "parameters": f"{counts['total']:,}" + (f": {' · '.join(parts)}" if parts else ""),
        "dtypes": " · ".join(
            f"{dtype}: {_plural(count, 'tensor')}, {_size(size)}" for dtype, (count, size) in found.dtypes.items()
        ),
        "quantised": _describe_quantisation(found),
    }
    for name, text in rows.items():
        yield f"  {name:<11} {text or '-'}"
    for note in found.notes:
        yield f"  note        {note}"
    if not found.problems:
        what = "nothing to compare with" if found.config is None else "all fits the configuration"
        yield f"  check       {what}"
        return
    yield "  check       does NOT fit:"
    for title, items in found.problems.items():
        yield f"    {title} ({len(items):,})"
        lines = collapse(items)
        yield from (f"      {line}" for line in lines[:MAX_LINES])
        if len(lines) > MAX_LINES:
            yield f"      ... and {len(lines) - MAX_LINES} more lines (--json has all)"


def _list_tensors(found: Inspection) -> Iterator[str]:
    width = max((len(name) for name in found.tensors), default=0)
    for name, file in found.files.items():
        yield f"{name}  {_size(file.num_bytes)}"
        for tensor in file.tensors:
            info = found.tensors[tensor]
            shape = " x ".join(str(length) for length in info.shape) or "scalar"
            yield f"  {tensor:<{width}}  {info.dtype:<8}  {shape:<22}  {info.num_bytes:>15,}"


def _describe_model(config: ModelConfig | None) -> str:
    if config is None:
        return "no configuration"
    text, vision = config.text, config.vision
    layers = _plural(text.num_hidden_layers, "layer")
    experts = f"{len(text.moe_layers)} of them with {text.moe_num_experts} experts"
    tower = "no vision tower" if vision is None else f"vision tower of {_plural(vision.num_hidden_layers, 'layer')}"
    return f"Step3, {layers}, {experts}, width {text.hidden_size}, {tower}, {config.dtype}"


def _describe_files(found: Inspection) -> str:
    sizes = [file.num_bytes for file in found.files.values()]
    if not sizes:
        return ""
    return _size(sizes[0]) if len(sizes) == 1 else f"from {_size(min(sizes))} to {_size(max(sizes))}"


def _describe_quantisation(found: Inspection) -> str:
    if not found.num_fp8:
        return "no"
    block = "?"
    if found.config is not None and found.config.quantization is not None:
        block = " x ".join(str(size) for size in found.config.quantization.weight_block_size)
    return f"FP8 in blocks of {block}: {found.num_fp8:,} of the {found.num_quantisable:,} tensors that the release quantises"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"
