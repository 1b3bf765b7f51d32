"""Trains the tiny Step3's tokenizer and writes the tokenizer and constants files of the shipped model.

Byte-level BPE of 4,096 entries, digits one by one, with Step3's control tokens under their released names:
three at the start, as in the release, the others at the end of the vocabulary. Writes tokenizer.json,
tokenizer_config.json, generation_config.json and preprocessor_config.json next to the model's chat template.

    python -m tools.tiny.tokenizer [--data DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.tiny.fetch import DEFAULT_DATA
from tools.tiny.text_corpus import assistant_text
from tools.tiny.text_tools import FUNCTIONS, format_tool_calls, function_schema

DEFAULT_OUT = Path("models/step3-tiny")
VOCAB_SIZE = 4096

BOS, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
EOT = "<|EOT|>"
# The last tokens of the vocabulary, and whether `skip_special_tokens` hides them: the reasoning and tool-call
# parsers work on text, so their markers have to stay in it.
LAST_TOKENS = {
    "<|BOT|>": True,
    EOT: True,
    "<think>": False,
    "</think>": False,
    "<im_start>": True,
    "<im_patch>": True,
    "<im_end>": True,
    "<patch_start>": True,
    "<patch_end>": True,
    "<patch_newline>": True,
    "<｜tool_calls_begin｜>": False,
    "<｜tool_calls_end｜>": False,
    "<｜tool_call_begin｜>": False,
    "<｜tool_call_end｜>": False,
    "<｜tool_sep｜>": False,
}

PREPROCESSOR_CONFIG = {
    "image_processor_type": "Step3VisionProcessor",
    "image_size": 64,
    "patch_size": 48,
    "max_side": 96,
    "small_ratio": 1.5,
    "wide_ratio": 4.0,
    "round_up": 0.2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_token_len": 16,
    "patch_token_len": 9,
}


def read_texts(data: Path, prompt: str) -> Iterator[str]:
    """Every training text; held-out sentences are not read.

    Args:
      data: Data folder.
      prompt: A rendered prompt that offers every tool.

    Raises:
      ValueError: If the corpus has not been written.
    """
    names = ("chat-facts", "chat-small", "chat-tools", "chat-tool-results")
    plain = [data / "text-sentences-train.txt", data / "text-glosses-train.txt"]
    chats = [data / f"{name}.jsonl" for name in names]
    for path in [*plain, *chats, data / "chat-pictures.json"]:
        if not path.exists():
            raise ValueError(f"{path} does not exist: run `python -m tools.tiny.text_corpus --data {data}` first")
    for path in plain:
        # Example sentences count twice: free completion is measured on them.
        yield from path.read_text(encoding="utf-8").splitlines() * (2 if path is plain[0] else 1)
    for path in chats:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for tool in record.get("tools", []):
                yield json.dumps(tool, ensure_ascii=False)
            for message in record.get("messages", []):
                yield message["content"]
            answer = format_tool_calls(record["calls"]) if record.get("calls") else record["answer"]
            yield record.get("question", "")
            yield without_marks(assistant_text(record["reasoning"], answer))
    for kind in json.loads((data / "chat-pictures.json").read_text(encoding="utf-8")).values():
        yield from [*kind["questions"], kind["reasoning"], kind["answer"]] * 50
    # The words of the "# Tools" part occur in every prompt with tools, so they are worth entries of their own.
    yield from [without_marks(prompt)] * 50


def render_tool_prompt(template: Path) -> str:
    """The prompt of a greeting with every tool on offer.

    Raises:
      ValueError: If the chat template is not there.
    """
    if not template.exists():
        raise ValueError(f"{template} does not exist: give the chat template with --template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = plain_json
    messages = [{"role": "user", "content": "Hello!"}]
    tools = [function_schema(name) for name in FUNCTIONS]
    compiled = environment.from_string(template.read_text(encoding="utf-8"))
    return compiled.render(messages=messages, tools=tools, add_generation_prompt=True)


def plain_json(value: object) -> str:
    """JSON with non-ASCII letters kept, as prompts contain it."""
    return json.dumps(value, ensure_ascii=False)


def without_marks(text: str) -> str:
    """The text with control tokens blanked, so that no merge is spent on their letters."""
    for token in LAST_TOKENS:
        text = text.replace(token, " ")
    return text


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Trains on `texts`; ids 0, 1, 2 and the last 15 are control tokens, all 256 bytes are entries.

    Raises:
      ValueError: If the texts are too few for a full vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    first = [AddedToken(token, special=True, normalized=False) for token in (BOS, END, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(LAST_TOKENS),
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for token, is_special in LAST_TOKENS.items():  # one call each: ids follow the order of the table
        added = AddedToken(token, special=is_special, normalized=False)
        if is_special:
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"the texts give {size} entries instead of {VOCAB_SIZE}: train on the whole corpus")
    return tokenizer


def check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Encodes and decodes `texts`.

    Raises:
      ValueError: If one of them comes back changed.
    """
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(f"the tokenizer does not give {text!r} back")


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json; `add_bos_token` is for plain completions, the chat template writes its own."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    """generation_config.json: only ids; sampling defaults are the server's."""
    return {
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOT),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name, then renames."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_model_files(tokenizer: Tokenizer, out: Path) -> None:
    """Writes the tokenizer and the three JSON files next to it."""
    files: dict[str, Mapping[str, object]] = {
        "tokenizer_config.json": tokenizer_config(),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="model folder (default: %(default)s)")
    parser.add_argument("--template", type=Path, default=DEFAULT_OUT / "chat_template.jinja", help="%(default)s")
    options = parser.parse_args()
    data = options.data.expanduser()
    tokenizer = train_tokenizer(read_texts(data, render_tool_prompt(options.template)))
    heldout = (data / "text-sentences-heldout.txt").read_text(encoding="utf-8")
    odd = [
        "  two  blanks\n\n\ttab\r\n",
        "0123456789 -1.5e10",
        "步步高 é ß 😀 \x00\x7f",
        f"<think>\nx\n</think>\n\ny{EOT}",
    ]
    check_round_trip(tokenizer, [heldout, *heldout.splitlines(), *odd])
    write_model_files(tokenizer, options.out)
    num_tokens = len(tokenizer.encode(heldout, add_special_tokens=False).ids)
    print(f"{VOCAB_SIZE} entries; held-out sentences: {len(heldout) / num_tokens:.3f} characters per token")


if __name__ == "__main__":
    main()
