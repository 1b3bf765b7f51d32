"""The options that are made from the engine's settings, and the file behind them."""

from __future__ import annotations

import argparse
import json
import pathlib

import pytest

from step3_jax.cli.arguments.engine import add_engine
from step3_jax.cli.engine import EngineChoice, print_config, read_engine
from step3_jax.engine.config import EngineConfig, read_config_file, settings
from step3_jax.layout.parallel import Parallel
from step3_jax.rank import CPU_DEVICES


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves this process with its one device."""
    monkeypatch.setenv(CPU_DEVICES, "1")


def parse(*words: str, **values: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_engine(parser, **values)
    return parser.parse_args(words)


def choose(*words: str) -> EngineChoice:
    return read_engine(parse(*words))


def test_every_setting_has_an_option_of_its_name() -> None:
    assert set(vars(parse())) >= set(settings())
    config = choose(
        "--max-num-seqs", "5", "--no-enable-prefix-caching", "--kv-cache-dtype", "fp8", "--seed", "7"
    ).config
    assert config == EngineConfig(max_num_seqs=5, enable_prefix_caching=False, kv_cache_dtype="fp8", seed=7)
    assert not hasattr(parse(without=["seed"]), "seed")


def test_the_command_line_stands_over_the_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max-num-seqs: 4\nseed: 3\n", encoding="utf-8")
    assert choose("--config", str(file), "--max-num-seqs", "8").config == EngineConfig(max_num_seqs=8, seed=3)


def test_what_is_printed_is_read_as_the_same(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("stream_interval: 2\ndeployment:\n  afd: 1a1f\n", encoding="utf-8")
    assert print_config(parse("--config", str(file), "--max-model-len", "99", "--print-config"))
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    fields, deployment = read_config_file(file)
    assert EngineConfig.of(fields) == EngineConfig(stream_interval=2, max_model_len=99)
    assert deployment == {"afd": "1a1f"}
    assert not print_config(parse())


def test_several_devices_have_the_names_that_vllm_users_know() -> None:
    assert choose().parallel is None
    long = choose("--data-parallel-size", "2", "--tensor-parallel-size", "4", "--expert-parallel-size", "8").parallel
    assert long == choose("--dp", "2", "--tp", "4", "--ep", "8").parallel == Parallel(2, 4, 8)
    assert choose("--ep", "4").parallel == Parallel(dp=4, ep=4)
    tensor = choose("--tp", "2", "--attention-parallelism", "tensor").parallel
    assert tensor == Parallel(tp=2, attention="tensor")
    assert choose("--tp", "2", "--expert-exchange", "all_to_all").parallel == Parallel(tp=2, exchange="all_to_all")
    assert choose("--tp", "2", "--mm-encoder-tp-mode", "data").parallel == Parallel(tp=2, vision="data")
    with pytest.raises(ValueError, match="is for several devices: add --tensor-parallel-size"):
        choose("--attention-parallelism", "tensor")
    with pytest.raises(ValueError, match="tensor_parallel_size is 0"):
        choose("--tp", "0")


def test_a_files_deployment_says_where_it_runs(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("deployment:\n  afd: off\n  devices: 4\n  parallel: {dp: 2, tp: 2, ep: 4}\n", encoding="utf-8")
    assert choose("--config", str(file)).parallel == Parallel(2, 2, 4)
    with file.open("a", encoding="utf-8") as more:
        more.write("  mm_encoder_tp_mode: data\n")
    assert choose("--config", str(file)).parallel == Parallel(2, 2, 4, vision="data")
    assert choose("--config", str(file), "--mm-encoder-tp-mode", "weights").parallel == Parallel(2, 2, 4)
    file.write_text("deployment:\n  afd: 1a1f\n  microbatches: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1a1f"):
        # There is one device.
        choose("--config", str(file))
    file.write_text("deployment:\n  afdd: 1a1f\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"engine.yaml: deployment: unknown key afdd; did you mean afd"):
        choose("--config", str(file))


def test_speculation_is_given_as_json() -> None:
    values = {"method": "ngram", "num_speculative_tokens": 4}
    assert choose("--speculative-config", json.dumps(values)).config.speculative_config == values
    for text, message in (("ngram", "'ngram' is not JSON"), ("[4]", "is not a JSON object")):
        with pytest.raises(argparse.ArgumentError, match=message):
            parse("--speculative-config", text)
    with pytest.raises(ValueError, match="num_speculative_tokens is 0; a whole number from 1 to 16"):
        choose("--speculative-config", json.dumps(values | {"num_speculative_tokens": 0}))
