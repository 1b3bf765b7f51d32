"""Writes every text that the tiny Step3 learns from: sentences, glosses, facts, small talk, tool calls.

Reads what `tools.tiny.fetch` unpacked under `DATA/raw` (WordNet 3.0, countryinfo) and `DATA/things.json`, the
drawn things. Everything is deterministic. Outputs in `DATA`, one record per line:

  text-sentences-train.txt, text-sentences-heldout.txt
      example sentences; 1,000 are held out
  text-glosses-train.txt
      "word: definition", free of held-out sentences
  copy-names.txt, copy-words.txt
      names, and words in lower case, to be copied
  chat-facts.jsonl, chat-small.jsonl
      {"question", "reasoning", "answer", "kind"}
  chat-tools.jsonl
      {"tools", "question", "reasoning", "calls", "answer", "kind"}
  chat-tool-results.jsonl
      {"tools", "messages", "reasoning", "answer", "kind"}
  chat-pictures.json
      {kind: {"questions", "reasoning", "answer"}}

    python -m tools.tiny.text_corpus [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tools.tiny.fetch import DEFAULT_DATA
from tools.tiny.text_tools import tool_examples, tool_result_examples
from tools.tiny.text_words import (
    OFFENSIVE_TERM,
    UNFIT_GLOSS,
    chat_row,
    definition_rows,
    offensive_words,
    read_synsets,
)

NUM_HELDOUT_SENTENCES = 1000
HELDOUT_SEED = 20250731
# Nouns that the model is asked to copy; see `tools.tiny.copying`.
COPIED_NAME, COPIED_WORD = re.compile(r"[A-Z][a-z]{2,11}( [A-Z][a-z]{2,9})?"), re.compile(r"[a-z]{3,9}")


# countryinfo 1.0.1 lists territories beside states; these are no states, or name or capital is disputed.
NOT_ASKED = frozenset(
    "American Samoa|Anguilla|Antarctica|Aruba|Bermuda|Bonaire, Sint Eustatius and Saba|Bouvet Island|"
    "British Indian Ocean Territory|Cayman Islands|Christmas Island|Cocos (Keeling) Islands|Cook Islands|"
    "Curaçao|Falkland Islands|Faroe Islands|French Guiana|French Polynesia|"
    "French Southern and Antarctic Lands|Gibraltar|Guadeloupe|Guam|Guernsey|"
    "Heard Island and McDonald Islands|Vatican City State|Holy See (Vatican City State)|Hong Kong|Israel|"
    "Jersey|Macau|Isle of Man|Martinique|Mayotte|Montserrat|Antilles néerlandaises|New Caledonia|Niue|"
    "Norfolk Island|Northern Mariana Islands|Palestine|Palestine, State of|Pitcairn Islands|Puerto Rico|"
    "Réunion|Saint Barthélemy|Saint Helena|Saint Martin (French part)|Saint Pierre and Miquelon|"
    "Serbia and Montenegro|Sint Maarten (Dutch part)|South Georgia|Svalbard and Jan Mayen|Tokelau|"
    "Turks and Caicos Islands|United States Minor Outlying Islands|Virgin Islands, British|"
    "Virgin Islands, U.S.|Wallis and Futuna|Western Sahara|Åland Islands|Greenland".split("|")
)
NEW_COUNTRY = {"Swaziland": "Eswatini", "Republic of Macedonia": "North Macedonia"}
NEW_CAPITAL = {
    "Kazakhstan": "Astana",
    "Burundi": "Gitega",
    "Eswatini": "Mbabane",
    "San Marino": "San Marino",
    "United States": "Washington, D.C.",
}
WITH_ARTICLE = re.compile(
    r"Netherlands|Philippines|United |Maldives|Comoros|Republic|Federated|Marshall|Solomon|"
    r"^The (Gambia|Bahamas)"
)


CAPITAL_QUESTIONS = (
    "What is the capital of {0}?",
    "What's the capital of {0}?",
    "Which city is the capital of {0}?",
    "Tell me the capital of {0}.",
)
REVERSE_QUESTIONS = (
    "{0} is the capital of which country?",
    "Which country has the capital {0}?",
    "{0} is the capital of what country?",
)
REGION_QUESTIONS = ("Where is {0}?", "In which part of the world is {0}?", "Where in the world is {0}?")

GREETING = "Hello! How can I help you?"
SELF = "I am step3-tiny, a small Step3 model. I know a few facts, read numbers and name drawings."
SMALL_TALK = (
    (
        "greeting",
        "The user says hello.",
        GREETING,
        "Hello!|Hi!|Hello|Hi|Hey!|Good morning!|Good evening!|Hi there!",
    ),
    (
        "self",
        "The user asks who I am.",
        SELF,
        "Who are you?|What are you?|What is your name?|What's your name?|Tell me about yourself.|Introduce yourself.",
    ),
    (
        "ability",
        "The user asks what I can do.",
        "I can name drawings, read numbers, tell capitals, explain words and call tools.",
        "What can you do?|How can you help me?|What do you know?|Help!|What can I ask you?",
    ),
    (
        "limits",
        "The user asks about my size.",
        "I am a very small model with only a few million parameters, so I make many mistakes.",
        "How big are you?|How many parameters do you have?|Are you a large model?|Are you smart?",
    ),
    (
        "thanks",
        "The user says thanks.",
        "You are welcome!",
        "Thank you!|Thanks!|Thanks a lot!|Thank you very much.",
    ),
    ("farewell", "The user says goodbye.", "Goodbye!", "Goodbye!|Bye!|See you later!|Bye bye!|Good night!"),
    (
        "mood",
        "The user asks how I am.",
        "I am fine, thank you.",
        "How are you?|How are you doing?|Are you well?",
    ),
)
PICTURES = {
    "drawing": {
        "questions": [
            "What is this?",
            "What's this?",
            "What is in the picture?",
            "What do you see?",
            "What does the picture show?",
            "Name this thing.",
        ],
        "reasoning": "The picture shows a thing.",
        "answer": "{answer}",
    },
    "number": {
        "questions": [
            "What number is this?",
            "Read the number.",
            "Which number do you see?",
            "What is the number?",
            "What number is in the picture?",
        ],
        "reasoning": "The picture shows a number.",
        "answer": "The number is {answer}.",
    },
    "handwriting": {
        "questions": [
            "Which digit is this?",
            "What digit is this?",
            "What digit is written here?",
            "Which digit do you see?",
            "Read the digit.",
        ],
        "reasoning": "The picture shows a digit.",
        "answer": "The digit is {answer}.",
    },
}


def split_sentences(sentences: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits into training and held-out sentences; no training line contains a held-out one."""
    unique = sorted(set(sentences))
    random.Random(HELDOUT_SEED).shuffle(unique)
    heldout, rest = unique[:NUM_HELDOUT_SENTENCES], unique[NUM_HELDOUT_SENTENCES:]
    return drop_containing(rest, heldout), heldout


def drop_containing(lines: Sequence[str], heldout: Iterable[str]) -> list[str]:
    """Drops every line in which a held-out sentence occurs, upper and lower case taken as equal."""
    text = "\n".join(lines).lower()
    hits = {sentence for sentence in map(str.lower, heldout) if sentence in text}
    return [line for line in lines if not any(hit in line.lower() for hit in hits)] if hits else list(lines)


def read_countries(folder: Path) -> list[tuple[str, str, str]]:
    """Country, capital and region of every state, from countryinfo's JSON files, brought up to date."""
    rows = set()
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        name, capital, region = data.get("name"), data.get("capital"), data.get("subregion")
        if name in NOT_ASKED or not isinstance(capital, str) or not capital or not region:
            continue
        name = NEW_COUNTRY.get(name, name)
        rows.add((name, NEW_CAPITAL.get(name, capital), region))
    return sorted(rows)


def country_rows(countries: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    """Questions on capitals, both ways, and on where a country is."""
    rows = []
    for country, capital, region in countries:
        name = re.sub(r"^The ", "", country)
        name = f"the {name}" if WITH_ARTICLE.search(country) else name
        start = name[0].upper() + name[1:]
        place = {"Australia and New Zealand": "Oceania", "Northern America": "North America"}.get(region, region)
        answer = f"The capital of {name} is {capital.rstrip('.')}."
        rows += [chat_row(q.format(name), "The user asks for a capital.", answer, "capital") for q in CAPITAL_QUESTIONS]
        answer = f"{capital} is the capital of {name}."
        rows += [chat_row(q.format(capital), "The user names a capital.", answer, "country") for q in REVERSE_QUESTIONS]
        answer = f"{start} is in {'the ' if place == 'Caribbean' else ''}{place}."
        rows += [
            chat_row(q.format(name), "The user asks where a country is.", answer, "region") for q in REGION_QUESTIONS
        ]
    return rows


def small_rows() -> list[dict[str, str]]:
    """Greetings, questions about the model, and the sums of two digits."""
    rows = [
        chat_row(question, reasoning, answer, kind)
        for kind, reasoning, answer, questions in SMALL_TALK
        for question in questions.split("|")
    ]
    for a in range(10):
        for b in range(10):
            for question in ("What is {0} + {1}?", "What is {0} plus {1}?", "How much is {0} + {1}?"):
                rows.append(chat_row(question.format(a, b), "The user asks for a sum.", f"{a} + {b} = {a + b}", "sum"))
    return rows


def assistant_text(reasoning: str, answer: str) -> str:
    """What the model writes after a prompt that ends in `<think>` and a newline; `<|EOT|>` comes after it."""
    return f"{reasoning}\n</think>\n\n{answer}"


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes one line each under a temporary name, then renames; returns how many."""
    lines = list(lines)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"{path.name}: {len(lines)} lines, {path.stat().st_size} bytes")
    return len(lines)


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> int:
    """Writes JSON lines, non-ASCII letters kept."""
    return write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def read_things(data: Path) -> list[str]:
    """Names of the drawn things.

    Raises:
      ValueError: If `things.json` is not there yet.
    """
    path = data / "things.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run `python -m tools.tiny.drawings --data {data}` first")
    return [thing["name"] for thing in json.loads(path.read_text(encoding="utf-8"))]


def write_corpus(data: Path) -> None:
    """Writes all text files into `data`; see the module's docstring.

    Raises:
      ValueError: If the raw packages or `things.json` are missing.
    """
    wordnet = data / "raw/deb/usr/share/wordnet"
    countries_folder = data / "raw/pypi/countryinfo/countryinfo/data"
    for folder in (wordnet, countries_folder):
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist: run `python -m tools.tiny.fetch --data {data}` first")
    things = read_things(data)
    parts = {part: read_synsets(wordnet, part) for part in ("noun", "verb", "adj", "adv")}
    synsets = [s for part in parts.values() for s in part]
    offensive = offensive_words(synsets)

    train, heldout = split_sentences(t for s in synsets for t in s.sentences if not offensive.search(t))
    glosses = [
        f"{s.words[0]}: {s.definition}"
        for s in synsets
        if s.definition and not UNFIT_GLOSS.search(s.definition) and not OFFENSIVE_TERM.search(s.definition)
    ]
    glosses = [line for line in glosses if not offensive.search(line)]
    write_lines(data / "text-sentences-train.txt", train)
    write_lines(data / "text-sentences-heldout.txt", heldout)
    write_lines(data / "text-glosses-train.txt", drop_containing(glosses, heldout))

    nouns = sorted({word for s in parts["noun"] for word in s.words})
    for kind, form in (("names", COPIED_NAME), ("words", COPIED_WORD)):
        write_lines(
            data / f"copy-{kind}.txt", (word for word in nouns if form.fullmatch(word) and not offensive.search(word))
        )

    countries = read_countries(countries_folder)
    facts = country_rows(countries) + definition_rows(wordnet, parts["noun"], things)
    write_records(data / "chat-facts.jsonl", facts)
    write_records(data / "chat-small.jsonl", small_rows())
    names = [country for country, _, _ in countries]
    cities = [capital for _, capital, _ in countries]
    write_records(data / "chat-tools.jsonl", tool_examples(cities, names, facts))
    write_records(data / "chat-tool-results.jsonl", tool_result_examples(cities, names))
    write_lines(data / "chat-pictures.json", [json.dumps(PICTURES, indent=2, ensure_ascii=False)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="data folder (default: %(default)s)")
    write_corpus(parser.parse_args().data.expanduser())


if __name__ == "__main__":
    main()
