"""The settings: checked by name and value, read from a file, printed, and shown in the docs."""

from __future__ import annotations

import pathlib

import pytest

from step3_jax.engine.config import (
    GROUPS,
    EngineConfig,
    format_config,
    read_config_file,
    settings,
)
from step3_jax.engine.setting import format_table, kind_of


def test_vllms_names_are_there_with_a_meaning_each() -> None:
    names = set(settings())
    assert names >= {
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "enable_prefix_caching",
        "tensor_parallel_size",
        "data_parallel_size",
        "seed",
        "dtype",
    }
    for field, setting in settings().values():
        assert setting.help
        assert setting.group in GROUPS
        assert field.default is not None or setting.auto
        assert kind_of(field) in (bool, int, float, str, dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; a whole number of at least 1 is needed$"),
        ({"max_num_seqs": True}, "max_num_seqs is True; a whole number"),
        ({"max_num_seqs": 2.0}, "max_num_seqs is 2.0; a whole number"),
        ({"max_model_len": "4k"}, "max_model_len is '4k'; a whole number of at least 1 is needed, or None"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization is 1.5; a number from 0.01 to 1.0 is needed"),
        ({"max_call_ms": float("nan")}, "max_call_ms is nan"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype is 'fp4'; allowed: auto, float32, bfloat16, fp8, int4"),
        ({"speculative_config": "ngram"}, "speculative_config is 'ngram'; names with values are needed, or None"),
        ({"speculative_config": {"method": "eagle"}}, "speculative_config has method 'eagle'; allowed: ngram"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1; True or False is needed"),
        ({"enable_prefix_cache": True}, "no setting 'enable_prefix_cache'; did you mean enable_prefix_caching"),
        ({"tensor_parallel": 2}, "no setting 'tensor_parallel'; did you mean tensor_parallel_size"),
        ({"zzz": 2}, "no setting 'zzz'; there are dtype, quantization, load_format"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.of(values)


def test_a_printed_configuration_is_read_as_the_same(tmp_path: pathlib.Path) -> None:
    config = EngineConfig(
        max_num_seqs=3,
        kv_cache_dtype="int4",
        seed=None,
        enable_prefix_caching=False,
        speculative_config={"method": "ngram", "num_speculative_tokens": 4},
    )
    file = tmp_path / "engine.yaml"
    file.write_text(format_config(config, {"afd": "1a1f"}), encoding="utf-8")
    fields, deployment = read_config_file(file)
    assert EngineConfig.of(fields) == config
    assert deployment == {"afd": "1a1f"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-num-seq: 3", "engine.yaml: there is no setting 'max_num_seq'; did you mean max_num_seqs"),
        ("max_num_seqs: many", "engine.yaml: max_num_seqs is 'many'"),
        ("- 3", "engine.yaml holds list; a mapping of settings is needed"),
        ("a: [", "engine.yaml is not valid YAML"),
        ("deployment: 3", "engine.yaml: deployment is 3; it must be a mapping or the name of a deployment file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: pathlib.Path, text: str, message: str) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_config_file(file)


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"none.yaml cannot be read: No such file"):
        read_config_file(tmp_path / "none.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("# nothing\n", encoding="utf-8")
    assert read_config_file(file) == ({}, None)


def test_the_docs_show_the_settings_as_they_are() -> None:
    page = pathlib.Path(__file__).resolve().parents[3] / "docs" / "configuration.md"
    assert format_table(EngineConfig) in page.read_text(encoding="utf-8"), "run: python -m step3_jax.engine.config"
