"""Mapped weights in a control group that holds half of them: it answers, from the disk, with experts read ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from step3_jax.config import ModelConfig, QuantConfig
from step3_jax.cpu_kernels.loader import Unavailable, find_kernels
from tests.process import environment
from tools.make_checkpoint import make_checkpoint

PROGRAM = pathlib.Path(__file__).parent / "larger_than_memory.py"
GROUPS = pathlib.Path("/sys/fs/cgroup")


@contextlib.contextmanager
def control_group(limit_bytes: int) -> Iterator[pathlib.Path]:
    """A control group with a memory limit, of either version; skips the test where none can be made."""
    lines = pathlib.Path("/proc/self/cgroup").read_text().splitlines()
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    if "memory" in paths:
        parent, name = GROUPS / "memory" / paths["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, name = GROUPS / paths.get("", "/").lstrip("/"), "memory.max"
    folder = parent / f"step3-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {parent}: {error.strerror}")
    try:
        try:
            (folder / name).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"{folder / name} cannot be set: {error.strerror}")
        yield folder
    finally:
        folder.rmdir()


def answer(*arguments: object) -> dict[str, object]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # Two gigabytes are written, and read again and again.
@pytest.mark.skipif(isinstance(find_kernels(), Unavailable), reason="there are no CPU kernels here")
def test_a_model_of_twice_the_memory_answers_from_the_disk(tmp_path: pathlib.Path) -> None:
    config = ModelConfig.preset("step3-tiny")
    text = dataclasses.replace(
        config.text, hidden_size=1024, intermediate_size=2048, num_hidden_layers=5, moe_layers=(1, 2, 3, 4),
        moe_num_experts=64, moe_top_k=3, moe_intermediate_size=2560, share_expert_dim=1024, share_q_dim=512,
        num_attention_heads=8, head_dim=128, vocab_size=4096,
    )  # fmt: skip
    config = dataclasses.replace(config, text=text, vision=None, dtype="bfloat16", quantization=QuantConfig())
    size = make_checkpoint(tmp_path / "model", config)
    whole = answer(tmp_path / "model")
    # Pages that are cached already are counted where they were read first.
    for path in (tmp_path / "model").glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(size // 2) as group:
        half = answer(tmp_path / "model", group)
    print(json.dumps({"bytes": size, "whole": whole, "half": half}, indent=2))
    assert half["tokens"] == whole["tokens"]
    assert whole["hit_rate"] == 1
    assert 0 < half["hit_rate"] < 1
    assert half["read_mb_a_token"] > 0
