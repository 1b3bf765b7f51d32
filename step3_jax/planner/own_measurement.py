"""Users' own measurements: results of `tools/gpu_check`, and of `step3 bench decode`."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping

from step3_jax.layout.hardware import Hardware, list_hardware, load_hardware

# Version of results.json, as `tools/gpu_check/report.py` writes it; a test keeps the two in step.
GPU_CHECK_SCHEMA = 2
# Parts of a hardware's name that are not in the driver's name.
_FORM_FACTOR = re.compile(r"sxm|\d+gb")
_DECODE_CASE = re.compile(r"mfa_decode/(\w+)/(\d+)x(\d+)")
_MOE_CASE = re.compile(r"moe_ffn/fp8/(\d+)x\d+of\d+/uniform")


@dataclasses.dataclass(frozen=True)
class OwnMeasurement:
    """Shares of a device's data sheet that a user's own run reached.

    Attributes:
      hardware: The device.
      source: The file and the cases, for people.
      is_whole_engine: Whether whole decode steps were measured; else only kernels.
      attention: Share of attention by KV dtype; for whole steps one for all.
      ffn: Share of the feed-forward layers; None if no case was timed.
      figures: What was measured, for people.
    """

    hardware: Hardware
    source: str
    is_whole_engine: bool
    attention: Mapping[str, float]
    ffn: float | None
    figures: tuple[str, ...]


def read_measurement(path: str, hardware_name: str | None = None, *, context_tokens: int) -> OwnMeasurement:
    """Reads a file of measurements.

    Args:
      path: `results.json` of `python -m tools.gpu_check`, or the file of `step3 bench decode --json`.
      hardware_name: The measured hardware, in the form of `load_hardware`; None to find it by the name in the file.
      context_tokens: The timed attention with the nearest context is used.

    Raises:
      ValueError: If it is neither file, has another version, or has no usable time.
    """
    file = pathlib.Path(path).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--measured {path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--measured {path} is not a JSON file: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--measured {path} holds {type(found).__name__}; a JSON object is needed")
    if "schema" in found or "ceilings" in found:
        return _read_gpu_check(path, found, hardware_name, context_tokens)
    if isinstance(found.get("decode"), list):
        return _read_bench(path, found, hardware_name)
    raise ValueError(
        f"--measured {path} is neither results.json of python -m tools.gpu_check nor the file of step3 bench decode "
        "--json FILE: run one of the two"
    )


def _read_gpu_check(
    path: str, found: Mapping[str, object], hardware_name: str | None, context_tokens: int
) -> OwnMeasurement:
    if found.get("schema") != GPU_CHECK_SCHEMA:
        raise ValueError(
            f"--measured {path} has schema {found.get('schema')!r}, and {GPU_CHECK_SCHEMA} is needed: run python -m "
            "tools.gpu_check of this version again"
        )
    conditions = _mapping(found.get("conditions"))
    if conditions.get("mode") != "gpu":
        raise ValueError(
            f"--measured {path} is of mode {conditions.get('mode')!r}: only times of mode gpu say something about a GPU"
        )
    hardware = _find_hardware(path, str(conditions.get("gpu", "")), hardware_name)
    results = _mapping(found.get("results"))
    attention: dict[str, tuple[float, float]] = {}
    ffn: tuple[int, float] | None = None
    figures = []
    for name, result in results.items():
        decode, moe = _DECODE_CASE.fullmatch(str(name)), _MOE_CASE.fullmatch(str(name))
        share = _share(_mapping(result), hardware, is_fp8=moe is not None)
        if share is None or (decode is None and moe is None):
            continue
        figures.append(f"{name}: {share:.0%} of the data sheet")
        if decode is not None:
            # Large batches, then the nearest context.
            distance = abs(math.log(int(decode[3]) / context_tokens)) + (0 if int(decode[2]) >= 64 else 100)
            if decode[1] not in attention or distance < attention[decode[1]][0]:
                attention[decode[1]] = (distance, share)
        if moe is not None and (ffn is None or int(moe[1]) > ffn[0]):
            ffn = (int(moe[1]), share)
    if not figures:
        raise ValueError(
            f"--measured {path} has no time of mfa_decode or moe_ffn: run python -m tools.gpu_check on a GPU"
        )
    return OwnMeasurement(
        hardware,
        f"{path}, kernels of this project on {conditions.get('gpu')}",
        is_whole_engine=False,
        attention={dtype: share for dtype, (_, share) in attention.items()},
        ffn=None if ffn is None else ffn[1],
        figures=tuple(figures),
    )


def _read_bench(path: str, found: Mapping[str, object], hardware_name: str | None) -> OwnMeasurement:
    device = str(_mapping(found.get("conditions")).get("device", ""))
    hardware = _find_hardware(path, device, hardware_name)
    rows = [_mapping(row) for row in found["decode"]] if isinstance(found["decode"], list) else []
    rates = [float(rate) for row in rows if isinstance(rate := row.get("gb_per_s"), int | float) and rate > 0]
    if not rates:
        raise ValueError(f"--measured {path} has no decode step that was measured: run step3 bench decode --json again")
    share = min(max(rates) / (hardware.bandwidth_tb_s * 1e3), 1.0)
    return OwnMeasurement(
        hardware,
        f"{path}, whole decode steps of this project on {device or 'a device without a name'}",
        is_whole_engine=True,
        attention=dict.fromkeys(("fp8", "bfloat16", "int4"), share),
        ffn=share,
        figures=(f"decode read weights at up to {max(rates):.1f} GB/s, {share:.1%} of the bandwidth",),
    )


def _find_hardware(path: str, device: str, hardware_name: str | None) -> Hardware:
    """The table's hardware for a device, checked against the user's choice."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    if hardware_name is not None:
        hardware = load_hardware(hardware_name)
        if hardware.name in list_hardware() and "nvidia" in words and not _words(hardware.name) <= words:
            raise ValueError(f"--measured {hardware_name}={path}: the file is for {device}, which is other hardware")
        return hardware
    matching = [name for name in list_hardware() if _words(name) <= words]
    if not matching:
        raise ValueError(
            f"--measured {path}: it is for {device or 'a device without a name'}, which no file of configs/hardware "
            f"names; give --measured NAME={path}"
        )
    return load_hardware(max(matching, key=len))


def _words(name: str) -> set[str]:
    return {word for word in name.split("-") if not _FORM_FACTOR.fullmatch(word)}


def _share(result: Mapping[str, object], hardware: Hardware, *, is_fp8: bool) -> float | None:
    """Share of the data sheet's bandwidth or peak, whichever is nearer; None if nothing was timed."""
    gb_per_s, tflops = result.get("gb_per_s"), result.get("tflops")
    if not isinstance(gb_per_s, int | float) or not isinstance(tflops, int | float) or result.get("status") != "PASS":
        return None
    peak = hardware.fp8_tflops if is_fp8 and hardware.fp8_tflops is not None else hardware.bf16_tflops
    return min(max(gb_per_s / (hardware.bandwidth_tb_s * 1e3), tflops / peak), 1.0)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
