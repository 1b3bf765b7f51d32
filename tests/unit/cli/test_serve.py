"""`step3 serve`: its options, and what is reported before anything is loaded."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest

from step3_jax.cli import main
from step3_jax.cli.serve import read_server_config
from step3_jax.engine.setting import format_table, settings_of
from step3_jax.server.config import GROUPS, ServerConfig

ROOT = pathlib.Path(__file__).resolve().parents[3]


def read(*words: str) -> ServerConfig:
    return read_server_config(main.build_parser("serve").parse_args(["serve", *words]))


def test_every_setting_is_an_option() -> None:
    assert read() == ServerConfig()
    config = read(
        *("--port", "9000", "--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y", "--no-ui"),
        *("--allowed-origins", "https://a.example", "--shutdown-timeout", "5", "--reasoning-parser", "none"),
        *("--metrics-prefix", "vllm", "--max-num-queued-reqs", "7", "--max-num-seqs", "3"),
    )
    assert (config.port, config.api_key, config.served_model_name, config.ui) == (9000, ("a", "b"), ("x", "y"), False)
    assert (config.shutdown_timeout, config.reasoning_parser, config.metrics_prefix) == (5.0, "none", "vllm")


def test_help_has_every_option_under_a_heading_that_says_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "--help"]) == 0
    first, *sections = re.split(r"^(?=\S.*:$)", capsys.readouterr().out, flags=re.MULTILINE)
    assert first.startswith("usage:")
    options = {part.partition(":")[0]: re.findall(r"^  .*?(--[\w-]+)", part, re.MULTILINE) for part in sections}
    assert options.pop("positional arguments") == []
    # What every command has.
    assert set(options.pop("options")) == {"--help", "--debug", "--log-level"}
    assert len(options) >= 9
    assert max(map(len, options.values())) <= 11


def test_a_key_may_be_in_the_environment_where_no_other_user_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP3_API_KEY", "secret")
    assert read().api_key == ("secret",)
    assert read("--api-key", "other").api_key == ("other",)
    monkeypatch.setenv("STEP3_API_KEY", "")
    assert read().api_key == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "port is 70000; a whole number from 0 to 65535"),
        (["--ssl-keyfile", "key.pem"], "give both or neither"),
        (["--max-n", "0"], "max_n is 0; a whole number of at least 1"),
        (["--api-key", ""], "api_key is ('',)"),
        (["--reasoning-parser", "deepseek"], "'step3', 'none'"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid"),
        (["no-such-folder"], "no-such-folder"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_a_missing_library_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main.main(["serve"]) == 2
    assert "pip install 'step3-jax[server]'" in capsys.readouterr().err


def test_each_setting_has_a_meaning_and_a_group() -> None:
    for name, (_, setting) in settings_of(ServerConfig).items():
        assert setting.help, name
        assert setting.group in GROUPS, name


def test_the_docs_have_the_table() -> None:
    page = ROOT / "docs" / "serving.md"
    assert format_table(ServerConfig) in page.read_text(encoding="utf-8"), "run: python -m step3_jax.server.config"


def test_the_page_is_there_on_loopback_addresses() -> None:
    hosts = {
        "127.0.0.1": True,
        "::1": True,
        "localhost": True,
        "0.0.0.0": False,
        "10.0.0.1": False,
        "example.com": False,
    }
    assert {host: ServerConfig(host=host).has_page for host in hosts} == hosts


@pytest.mark.parametrize("value", [None, "key", 5, ("",), [5]])
def test_texts_are_a_tuple(value: object) -> None:
    with pytest.raises(ValueError, match=r"api_key is .*; a tuple of texts"):
        ServerConfig.of({"api_key": value})


def test_a_file_has_a_section_for_the_service_and_options_go_before_it(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max_num_seqs: 8\nserver:\n  port: 9000\n  served-model-name: [a, b]\n  max-n: 3\n")
    config = read("--config", str(file), "--max-n", "5")
    assert (config.port, config.served_model_name, config.max_n) == (9000, ("a", "b"), 5)
    assert main.main(["serve", "--config", str(file), "--api-key", "secret", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "secret" not in printed
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert read("--config", str(again)) == read("--config", str(file))


@pytest.mark.parametrize(
    ("section", "said"),
    [("  prot: 1", "did you mean port?"), ("  port: x", "port is 'x'"), (" 5", "a mapping of the service's settings")],
)
def test_a_mistake_in_the_section_is_told_with_its_file(
    tmp_path: pathlib.Path, section: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"server:\n{section}\n")
    assert main.main(["serve", "--config", str(file)]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "serve.yaml" in printed
