"""`step3 bench`: sizes, counts and the report; no test asserts a time."""

from __future__ import annotations

import json
import pathlib
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from step3_jax.bench import decode, loop, yardstick
from step3_jax.bench import peer as torch_peer
from step3_jax.bench.decode import measure_decode
from step3_jax.bench.model import bench_config, random_model
from step3_jax.bench.peer import TorchPeer
from step3_jax.bench.report import format_report
from step3_jax.bench.yardstick import prefill_products
from step3_jax.cli.arguments.bench import PRESETS
from step3_jax.cli.main import main
from step3_jax.layout.count import active_parameters, prefill_flops
from step3_jax.layout.deployment import parse_topology
from step3_jax.layout.parallel import Parallel
from step3_jax.model.step3 import Step3


def count(config):
    state = nnx.state(nnx.eval_shape(lambda: Step3(config, dtype="float32", rngs=nnx.Rngs(0))))
    return {"/".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}


def test_100m_has_about_100m_active_parameters_and_more_bytes_than_caches_hold():
    config = bench_config(*PRESETS["100m"])
    assert 95e6 < sum(active_parameters(config.text)) < 115e6
    total = sum(leaf.size for leaf in count(config).values())
    assert 2 * total >= 600e6


def test_active_parameters_are_the_matrices_a_token_meets():
    config = bench_config(128, 3)
    active = 0
    for name, leaf in count(config).items():
        if len(leaf.shape) == 3:
            active += leaf.size * config.text.moe_top_k // config.text.moe_num_experts
        elif len(leaf.shape) == 2 and "embed" not in name:
            active += leaf.size
    assert sum(active_parameters(config.text)) == active


def test_many_tokens_meet_every_expert_once():
    config = bench_config(128, 3)
    matrices = sum(leaf.size for name, leaf in count(config).items() if len(leaf.shape) > 1 and "embed" not in name)
    assert sum(active_parameters(config.text, 10_000)) == matrices


def test_prefill_counts_the_head_once_and_attention_by_the_square():
    text = bench_config(128, 2).text
    layers, head = active_parameters(text)
    attention = prefill_flops(text, 64) - 2 * (64 * layers + head)
    assert prefill_flops(text, 128) - 2 * (128 * layers + head) == 4 * attention > 0
    # The bare products are the rest: 64 tokens are spread evenly over the experts.
    products = prefill_products(text, 64)
    assert sum(count * rows * outputs * inputs for (rows, outputs, inputs), count in products.items()) == (
        64 * layers + head
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hidden", "100"], "multiple of 128"),
        (["--layers", "0"], "at least 1"),
        (["--steps", "0"], "--steps is 0"),
        (["--batch", "1,x"], "whole numbers"),
        (["--dtype", "int8"], "float32, bfloat16"),
        (["--quantization", "int3"], "none, stored, fp8, int8, int4"),
        (["--steps", "4000"], "tokens are needed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(options, said, capsys):
    assert main(["bench", "decode", *options]) == 2
    assert said in capsys.readouterr().err


def test_an_interpreter_that_cannot_start_is_named():
    with pytest.raises(ValueError, match="no-such-python"):
        TorchPeer("no-such-python", random_model(bench_config(128, 1)), ["float32"], 1)


@pytest.mark.skipif("torch" in sys.modules, reason="torch is here")
def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(torch_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"step3-jax\[bench\]"):
        TorchPeer(sys.executable, random_model(bench_config(128, 1)), ["float32"], 1)


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yardstick, "READ_BYTES", 2**20)
        return measure_decode(
            bench_config(128, 2),
            dtypes=["float32"],
            quantizations=["none", "int8"],
            batches=[1],
            steps=2,
            rounds=2,
            prompt_length=4,
            prefill_length=8,
        )


def test_every_figure_is_there_and_positive(found):
    assert [row["quantization"] for row in found["decode"]] == ["none", "int8"]
    for row in (*found["decode"], *found["prefill"]):
        assert all(value > 0 for name, value in row.items() if name not in ("dtype", "quantization"))
    decode = found["decode"][0]
    assert decode["gb_per_s"] == pytest.approx(decode["step_mb"] / decode["step_ms"])
    assert decode["share_of_read"] == pytest.approx(decode["gb_per_s"] / found["read_gb_per_s"])
    assert found["model"]["parameters"] == sum(leaf.size for leaf in count(bench_config(128, 2)).values())


def test_the_devices_are_on_record(found):
    assert found["conditions"]["devices"] == f"1 x {jax.devices()[0].device_kind}"
    parallel = decode._describe_devices(Parallel(tp=1), None)
    assert parallel == f"1 x {jax.devices()[0].device_kind} as {Parallel(tp=1)}"
    topology = SimpleNamespace(devices=jax.devices() * 2, instances=parse_topology("1a1f"))
    assert decode._describe_devices(None, SimpleNamespace(topology=topology)).endswith(" as 1a1f")
    assert decode._describe_devices(None, SimpleNamespace(topology=topology)).startswith("2 x ")


def test_an_interrupt_keeps_what_was_measured(tmp_path: pathlib.Path, monkeypatch, capsys):
    def decode(self: loop.Ours, steps: int) -> float:
        if self._batch_size == 2:
            raise KeyboardInterrupt
        return own(self, steps)

    own = loop.Ours.decode
    monkeypatch.setattr(loop.Ours, "decode", decode)
    monkeypatch.setattr(yardstick, "READ_BYTES", 2**20)
    file = tmp_path / "found.json"
    options = "--preset tiny --dtype float32 --batch 1,2 --steps 2 --rounds 2 --prompt 4 --prefill 8 --json"
    assert main(["bench", "decode", *options.split(), str(file)]) == 130
    printed = capsys.readouterr()
    assert printed.err.splitlines()[1:] == [
        "decode, batch 1: 2 rounds of 2 tokens in float32 stored ...",
        "decode, batch 2: 2 rounds of 2 tokens in float32 stored ...",
        "step3: interrupted; what had been measured until then is above",
    ]
    found = json.loads(file.read_text())
    assert found["is_partial"] is True
    assert [row["batch"] for row in found["decode"]] == [1]
    assert "| float32 | stored | 1 |" in printed.out


def test_report_is_a_table_of_every_column(found, tmp_path: pathlib.Path):
    text = format_report(json.loads(json.dumps(found)))
    for rows in (found["decode"], found["prefill"]):
        assert "| " + " | ".join(rows[0]) + " |" in text


def test_peer_reads_our_weights_and_gives_our_logits_and_tokens():
    pytest.importorskip("torch")
    model = random_model(bench_config(128, 2))
    ids = np.random.default_rng(0).integers(2, 2048, (2, 12))
    ours = loop.Ours(model)
    with TorchPeer(sys.executable, model, ["float32"], jax.local_device_count()) as peer:
        assert torch_peer.check_agreement(ours, peer, "float32", ids) < 1e-4
        ours.prefill(ids, 4)
        ours.decode(3)
        first = peer.ask("prefill", dtype="float32", ids=ids.tolist(), room=4)["tokens"]
        rest = peer.ask("decode", dtype="float32", steps=3)["tokens"]
    np.testing.assert_array_equal(ours.tokens(4), np.array([first, *rest]).T)
