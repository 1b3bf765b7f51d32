"""Small tokenizers made in the test, one for each kind of vocabulary that matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from step3_jax.text.tokenizer import Tokenizer

BOS, BOT, EOT = "<｜begin▁of▁sentence｜>", "<|BOT|>", "<|EOT|>"
SPECIAL = (BOS, EOT)
CONTROL = (
    *SPECIAL,
    BOT,
    "<think>",
    "</think>",
    "<im_start>",
    "<im_patch>",
    "<im_end>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
    "<｜tool_calls_begin｜>",
    "<｜tool_sep｜>",
)
CORPUS = [
    "The quick brown fox thinks of im_patch and patch_start. " * 3,
    "你好，世界 what is 1 + 2?",
    "<think>",
] * 3

TEMPLATE = """\
{%- macro body(content) -%}
{%- if content is string %} {{ content }} {% else %} {% for item in content -%}
{{ item.text if item.type == 'text' else '<im_patch>' }}
{%- endfor %} {% endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{% endif -%}
{%- for message in messages -%}
<|BOT|>{{ message.role }}{{ '\\n' }}
{%- if message.content is not none %}{{ body(message.content) }}{% endif %}<|EOT|>
{%- endfor -%}
{%- if add_generation_prompt %}<|BOT|>assistant{{ '\\n<think>\\n' }}{% endif -%}
"""


def byte_level_description() -> str:
    """A `tokenizer.json` as Step3's: byte-level BPE, control tokens added, few of them special."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in CONTROL if name not in SPECIAL])
    return tokenizer.to_str()


def byte_fallback_description() -> str:
    """Another kind: letters in the vocabulary, and one token for each byte of those that are not."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {letter: 257 + index for index, letter in enumerate("▁abcdefghij好")}
    tokenizer = LibraryTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.to_str()


def write_checkpoint(folder: Path, description: str) -> Path:
    """The text files of a checkpoint."""
    folder.joinpath("tokenizer.json").write_text(description, encoding="utf-8")
    config = {"bos_token": BOS, "eos_token": {"content": EOT}, "chat_template": TEMPLATE}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level_description())


@pytest.fixture(scope="session")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Tokenizer:
    return Tokenizer(byte_fallback_description())


@pytest.fixture(scope="session")
def shipped() -> Path:
    folder = Path(__file__).parents[3] / "models" / "step3-tiny"
    if not (folder / "tokenizer.json").exists() or not (folder / "chat_template.jinja").exists():
        pytest.skip("the shipped tiny model is not in this checkout")
    return folder
