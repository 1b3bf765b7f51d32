"""What the processes of both roles have in common in executor `program`."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from step3_jax.afd.payload import PayloadFormat
from step3_jax.afd.program.call import Numbers
from step3_jax.afd.program.exchange_hint import exchange_options
from step3_jax.afd.topology import UNION, AfdTopology
from step3_jax.beacon import Beacon
from step3_jax.engine.executor import ModelPart
from step3_jax.layout.payload import choose_payload
from step3_jax.model.step3 import Step3
from step3_jax.rank import TRACE_STEPS

P = ParamSpec("P")
R = TypeVar("R")

Specs = tuple[PartitionSpec, ...]
# Specs of arrays that are sharded over the devices, and of those that are replicated.
OWN, COPY = PartitionSpec(UNION), PartitionSpec()


class RoleProcess(ModelPart):
    """What both roles' processes have in common; `num_shards` are the attention devices of all processes.

    Attributes:
      topology: The devices of all processes.
      form: What crosses between the roles.
    """

    def __init__(self, model: Step3, topology: AfdTopology, payload: str) -> None:
        """As for `make_program_executor`."""
        topology.check(model.config)
        super().__init__(
            model.config,
            topology.union.local_devices,
            model.text.dtype,
            num_shards=topology.num_attention,
            num_image_shards=topology.tower.size("images"),
        )
        self._jit = functools.partial(jax.jit, compiler_options=exchange_options(self.devices[0].platform))
        self.topology = topology
        self.form = PayloadFormat.of(self.config.text, choose_payload(payload, self.dtype.name))
        self._own = NamedSharding(topology.union, OWN)
        self._copies = NamedSharding(topology.union, COPY)
        # Shows where a program hangs, at the price of a Python call per step.
        self._observe = Beacon.from_environment().step if os.environ.get(TRACE_STEPS) == "1" else None
        self._num_steps = 0

    @property
    def num_processes(self) -> int:
        """See `ModelPart.num_processes`."""
        return len({device.process_index for device in self.topology.devices})

    def _take(self, leaves: Sequence[Array]) -> list[Array]:
        """This process's shards of weights as arrays over all devices; the other shards are never materialised here."""
        return [
            self._spread([shard.data.astype(self.run_dtype(leaf.dtype)) for shard in leaf.addressable_shards])
            for leaf in leaves
        ]

    def _spread(self, parts: Sequence[Array]) -> Array:
        """One array over all devices, from arrays that are each on one device of this process."""
        shape = (self.topology.union.size * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._own, parts)

    def _call(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Makes a call and waits for it, so that the exchanges of two calls never mix."""
        num_traces, start = self.num_traces.total(), time.perf_counter()
        result = call(*args, **kwargs)
        if self.num_traces.total() != num_traces:
            self.compile_s += time.perf_counter() - start
        jax.block_until_ready(result)
        return result

    def _place(self, array: np.ndarray | np.generic) -> Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, self._copies, host.__getitem__)

    def _numbers(self, num_steps: int) -> Numbers:
        given = np.int32(num_steps), np.int32(self._num_steps)
        return Numbers(*(self._place(number) for number in given))

    def _on_union(self, run: Callable[P, R], in_specs: Specs, out_specs: Specs | PartitionSpec) -> Callable[P, R]:
        mesh = self.topology.union
        return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
