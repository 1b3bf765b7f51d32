"""Compiles programs for H100 GPUs on a machine that has none: shapes in, PTX, registers and memory out.

Needs the packages of the `aot` extra (the CUDA plugin of jax, without the CUDA libraries) and `ptxas`.
python -m tools.gpu_check --compile-only compiles every kernel; tools/record_kernels.py records what that gives.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from step3_jax.gpu import COMPILER_OPTIONS
from tools import ptx

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 12 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
"""

NO_LOOP = ptx.Loop()


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What the assembler says of one kernel.

    Attributes:
      name: Entry point.
      registers: Per thread.
      spill_bytes: Bytes per thread spilled to local memory.
      wgmma: Kinds of tensor-core instruction, such as "m64n128k32.f32.e4m3.e4m3".
      num_wgmma, num_mma_sync, num_tma: Instructions for warpgroup products, older products, and bulk copies.
      num_plain_stores: Bulk stores without a tensor map, see `ptx.store_fault`.
      smem_bytes: Shared memory of a block, without its barriers.
      loop: The product loop, see `ptx.Loop`.
    """

    name: str
    registers: int
    spill_bytes: int
    wgmma: tuple[str, ...]
    num_wgmma: int
    num_mma_sync: int
    num_tma: int
    num_plain_stores: int = 0
    smem_bytes: int = 0
    loop: ptx.Loop = NO_LOOP


def missing() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    # The parent first: looking inside a package that does not exist is an error.
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return "the CUDA plugin of jax is not installed: pip install 'step3-jax[aot]'"
    if shutil.which("ptxas") is None:
        return "ptxas is not on PATH: it comes with the CUDA toolkit"
    return None


def h100_mesh(shape: Sequence[int] = (1,), names: Sequence[str] = ("x",)) -> Mesh:
    """A mesh of H100s that exist only as a description, in one node."""
    if not jax.config.jax_platforms:
        # Only the plugin's compiler is needed; it would otherwise look for a GPU and for CUDA's libraries.
        jax.config.update("jax_platforms", "cpu")
    count = int(np.prod(shape))
    topology = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=H100)
    return Mesh(np.array(topology.devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def compile_for(
    mesh: Mesh,
    function: Callable[..., object],
    *args: object,
    donate: Sequence[int] = (),
    compiler_options: Mapping[str, str] = COMPILER_OPTIONS,
) -> jax.stages.Compiled:
    """Compiles `function` for the devices of `mesh`; `args` are pytrees of arrays or of `jax.ShapeDtypeStruct`.

    An argument without a sharding is replicated; those numbered in `donate` are donated. The options default to those of
    every program for GPUs.
    """

    def place(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*jax.tree.map(place, args))
        return lowered.compile(compiler_options=dict(compiler_options))


@contextlib.contextmanager
def dumped_kernels() -> Iterator[pathlib.Path]:
    """Within it, the PTX of everything that is compiled is written to the folder it yields, which is removed at the end.

    The Mosaic compiler reads these variables when it first compiles, so use this once in a process.
    """
    folder = pathlib.Path(tempfile.mkdtemp(prefix="step3-ptx-"))
    names = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTX": "1"}
    old = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield folder
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def compile_and_read(
    mesh: Mesh, function: Callable[..., object], *args: object, donate: Sequence[int] = ()
) -> tuple[jax.stages.Compiled, list[KernelReport]]:
    """`compile_for`, and the Mosaic kernels that this process had not compiled before."""
    folder = _process_folder()
    try:
        return compile_for(mesh, function, *args, donate=donate), read_kernels(folder)
    finally:
        # The log of the compiler's passes is tens of megabytes per kernel.
        for path in folder.iterdir():
            path.unlink()


def read_kernels(folder: pathlib.Path) -> list[KernelReport]:
    """Assembles each PTX file in `folder` for sm_90a and reads what the assembler says about it.

    Raises:
      RuntimeError: If a kernel's warpgroups ask for more registers than there are: it would hang.
    """
    reports = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        entry = re.search(r"\.entry (\w+)", text)
        resources = path.with_suffix(".resources.txt")
        smem = re.search(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else None
        said = _assemble(path)
        name = entry.group(1).removesuffix("_mosaic_gpu_kernel") if entry else path.stem
        registers = max(map(int, re.findall(r"Used (\d+) registers", said)), default=0)
        fault = ptx.register_fault(text, registers)
        if fault is not None:
            raise RuntimeError(f"{name}: {fault}")
        reports.append(
            KernelReport(
                name=name,
                registers=registers,
                spill_bytes=max(map(int, re.findall(r"(\d+) bytes spill stores", said)), default=0),
                wgmma=tuple(sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", text)))),
                num_wgmma=text.count("wgmma.mma_async"),
                num_mma_sync=text.count("mma.sync"),
                num_tma=text.count("cp.async.bulk.tensor"),
                num_plain_stores=ptx.count_plain_stores(text),
                smem_bytes=int(smem.group(1)) if smem else 0,
                loop=ptx.read_loop(text),
            )
        )
    return reports


@functools.cache
def _process_folder() -> pathlib.Path:
    """The folder of `dumped_kernels` for the rest of this process."""
    context = dumped_kernels()
    folder = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return folder


def _assemble(path: pathlib.Path) -> str:
    """What ptxas says about a PTX file; from XLA's own run of it if that was recorded."""
    written = path.with_suffix(".ptxas")
    if written.exists():
        return written.read_text()
    command = ["ptxas", "-arch=sm_90a", "-v", str(path), "-o", str(path.with_suffix(".cubin"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
