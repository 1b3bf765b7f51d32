"""The form in which weights are held on a device: from what was asked for and what the device's kernels multiply."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from step3_jax.layout.weight_form import CPU_FORMS, QUANTIZATIONS


class Place(NamedTuple):
    """The devices that hold a parameter.

    Attributes:
      platform: As `Device.platform` names it.
      num_devices: Devices of the mesh; 1 without one.
    """

    platform: str
    num_devices: int

    @property
    def is_host(self) -> bool:
        """Whether it is this machine's memory, unsharded."""
        return self == ("cpu", 1)


@dataclasses.dataclass(frozen=True)
class FormChoice:
    """How weights are held in one place.

    Attributes:
      quantization: One of `QUANTIZATIONS` but "auto".
      keeps_bfloat16: Whether bfloat16 weights of linear layers stay bfloat16 with float32 activations.
      reason: Why, for the message of loading.
    """

    quantization: str
    keeps_bfloat16: bool
    reason: str


def choose_form(
    asked: str, place: Place, *, cpu_obstacle: str | None, has_fp8: bool, products: str = "float32"
) -> FormChoice:
    """How weights are held.

    Args:
      asked: One of `QUANTIZATIONS`.
      place: The devices that hold them.
      cpu_obstacle: Why the CPU kernels cannot run here; None if they can.
      has_fp8: Whether the checkpoint's linear weights are FP8.
      products: The dtype that the CPU kernels multiply in, for the message.

    Raises:
      ValueError: For an unknown form, or one that cannot be multiplied or made there.
    """
    if asked not in QUANTIZATIONS:
        raise ValueError(f"quantization is {asked!r}; allowed: {', '.join(QUANTIZATIONS)}")
    if place.platform != "cpu":
        return _choose_accelerator(asked, place.platform, has_fp8)
    if place.num_devices > 1:
        return _choose_shards(asked, has_fp8)
    has_kernels = cpu_obstacle is None
    kernels = f"CPU kernels multiply them in {products}" if has_kernels else f"without CPU kernels ({cpu_obstacle})"
    if asked == "auto":
        if not has_kernels:
            return FormChoice("none", False, f"widened, {kernels}")
        return FormChoice("stored", True, f"as stored, {kernels}")
    if asked == "none":
        return FormChoice("none", False, "widened, as asked for")
    how = "as stored" if asked == "stored" else f"in {asked}"
    suffix = "" if has_kernels else ", so each product widens its matrix first"
    return FormChoice(asked, has_kernels, f"{how}, {kernels}{suffix}")


def _choose_accelerator(asked: str, platform: str, has_fp8: bool) -> FormChoice:
    if asked in CPU_FORMS:
        raise ValueError(
            f"quantization {asked} is for CPUs: the GPU kernels multiply only FP8 and bfloat16 weights; on "
            f"{platform} use auto, stored or none"
        )
    if asked == "fp8" and not has_fp8:
        raise ValueError(
            "quantization fp8 quantises at load only on CPUs: for GPUs, step3 convert SRC DST --to hf --dtype fp8 does it "
            "once, and DST loads unchanged"
        )
    return FormChoice("none" if asked == "none" else "stored", False, "widened" if asked == "none" else "as stored")


def _choose_shards(asked: str, has_fp8: bool) -> FormChoice:
    """On several emulated devices of one CPU, which are for trying things out."""
    if asked in CPU_FORMS or (asked == "fp8" and not has_fp8):
        raise ValueError(
            f"quantization {asked} is for one CPU device: weights that are sharded over emulated devices are read part by "
            "part; use none or auto"
        )
    if asked in ("stored", "fp8"):
        return FormChoice("stored", False, "as stored, in shards; each product widens its matrix first")
    return FormChoice("none", False, "widened, as they are sharded over emulated devices of one CPU")
