"""Text that asks for copying, new each time: repeated tokens, quoted values, words given back, tool calls.

The small recorded sets of `tools.tiny.text_corpus` can be learnt by heart; this text cannot, so that the model has to
learn to look for a value in its prompt and to write it down.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.tiny.text_tools import (
    FUNCTIONS,
    REASONING,
    ToolCall,
    ask,
    ask_twice,
    draw_arguments,
    draw_result,
    format_tool_calls,
    function_schema,
    result_messages,
)

Record = dict[str, Any]

REPEAT_LENGTHS, MAX_REPEATED, MAX_REPEATS = (3, 24), 72, 4
# Of the tokens of a random sequence; all ids between the first and the last control tokens.
FIRST_TEXT_ID, LAST_TEXT_ID = 3, 4080
MAX_QUOTED = 5
SYLLABLES = (
    "b br c ch d dr f g gr h j k kl l m n p pr r s sh st t th tr v w y z".split(),
    "a e i o u ai ea ou".split(),
)
ENDINGS = ("", "", "", "n", "r", "s", "l", "m", "k", "t")
RECALL_REASONING = "The user asks for something said before."
RECALLS = (
    ("Say {name}.", "{name}"),
    ("Say {word}.", "{word}"),
    ("Repeat after me: {word} {other} {name}", "{word} {other} {name}"),
    ("Write the number {number}.", "{number}"),
    ("My name is {name}. What is my name?", "Your name is {name}."),
    ("I live in {name}. Where do I live?", "You live in {name}."),
    ("The code of {name} is {number}. What is the code of {name}?", "The code of {name} is {number}."),
    (
        "The code of {name} is {number}. The code of {rival} is {second}. What is the code of {name}?",
        "The code of {name} is {number}.",
    ),
    (
        "The code of {rival} is {second}. The code of {name} is {number}. What is the code of {name}?",
        "The code of {name} is {number}.",
    ),
    ("{name} has a {word}. {rival} has a {other}. What does {name} have?", "{name} has a {word}."),
    ("{rival} has a {other}. {name} has a {word}. What does {name} have?", "{name} has a {word}."),
    ("{rival} has a {other}. {name} has a {word}. Who has a {word}?", "{name} has a {word}."),
)
# What follows the question in a group of tool dialogues, by sequences drawn.
GROUP_SHARES = {"call": 0.74, "two-calls": 0.08, "no-call": 0.06, "result": 0.12}
MAX_IN_GROUP = 9


def read_places(data: Path) -> tuple[list[str], list[str]]:
    """Cities and countries of the recorded tool calls, sorted."""
    rows = [json.loads(line) for line in (data / "chat-tools.jsonl").read_text(encoding="utf-8").splitlines()]
    arguments = [call["arguments"] for row in rows for call in row["calls"]]
    cities, countries = (sorted({each[key] for each in arguments if key in each}) for key in ("city", "country"))
    return cities, countries


class Values:
    """Draws words, names and numbers; most are too many to be learnt by heart.

    Args:
      cities, countries: Of the recorded tool calls.
      names, words: Names, and words in lower case.
      rng: Source of randomness.
    """

    def __init__(
        self,
        cities: Sequence[str],
        countries: Sequence[str],
        names: Sequence[str],
        words: Sequence[str],
        rng: random.Random,
    ) -> None:
        self.cities, self.countries, self.names, self.words = cities, countries, names, words
        self._rng = rng

    @classmethod
    def load(cls, data: Path, rng: random.Random) -> Values:
        """Takes places from the recorded tool calls, names and words from what `tools.tiny.text_corpus` wrote."""
        names, words = (
            (data / f"copy-{kind}.txt").read_text(encoding="utf-8").splitlines() for kind in ("names", "words")
        )
        cities, countries = read_places(data)
        return cls(cities, countries, names, words, rng)

    def word(self) -> str:
        """A lower-case word."""
        return self._rng.choice(self.words)

    def name(self) -> str:
        """A name of WordNet's, or one of random syllables."""
        return self._rng.choice(self.names) if self._rng.random() < 0.5 else self._invent()

    def number(self) -> str:
        """One to six digits."""
        return str(self._rng.randrange(10 ** self._rng.randint(1, 6)))

    def place(self, places: Sequence[str]) -> str:
        """Mostly one of `places`, else a name."""
        return self._rng.choice(places) if self._rng.random() < 0.65 else self.name()

    def _invent(self) -> str:
        onsets, vowels = SYLLABLES
        rng = self._rng
        syllables = [rng.choice(onsets) + rng.choice(vowels) + rng.choice(ENDINGS) for _ in range(rng.randint(1, 3))]
        return "".join(syllables).capitalize()


def repeated_tokens(rng: random.Random) -> tuple[list[int], list[float]]:
    """Random token ids, two to four times over; what counts are the repeats but for their first token."""
    length = rng.randint(*REPEAT_LENGTHS)
    times = rng.randint(2, max(2, min(MAX_REPEATS, MAX_REPEATED // length)))
    once = [rng.randint(FIRST_TEXT_ID, LAST_TEXT_ID) for _ in range(length)]
    return once * times, [0.0] * length + ([0.0] + [1.0] * (length - 1)) * (times - 1)


def quoted_values(values: Values, rng: random.Random) -> list[str]:
    """Values in a line, then each of them in quotes: pieces of text, every second one a copy.

    A word after a blank and a word after a quote are other tokens, as they are in a question and in a tool call.
    """
    count = rng.randint(2, MAX_QUOTED)
    drawn = [rng.choice((values.name, values.name, values.number, values.word))() for _ in range(count)]
    if rng.random() < 0.5:
        return _copies(f"{', '.join(drawn)}.\n", ["", *["\n"] * (count - 1)], drawn)
    keys = rng.sample(values.words, count)
    head = ", ".join(f"{key} is {value}" for key, value in zip(keys, drawn, strict=True)) + ".\n"
    order = rng.sample(range(count), count)
    fronts = [("" if place == 0 else "\n") + keys[index] + "=" for place, index in enumerate(order)]
    return _copies(head, fronts, [drawn[index] for index in order])


def _copies(head: str, fronts: Sequence[str], copies: Sequence[str]) -> list[str]:
    """Pieces in turn: plain text up to a quote, a copy with the quote after it."""
    pieces = []
    for place, (front, copy) in enumerate(zip(fronts, copies, strict=True)):
        pieces += [(head if place == 0 else "") + front + '"', copy + '"']
    return [*pieces, "\n"]


def recall_record(values: Values, rng: random.Random) -> Record:
    """A question that is answered by a word, a name or a number in it."""
    question, answer = rng.choice(RECALLS)
    drawn = {"name": values.name(), "word": values.word(), "number": values.number()}
    drawn |= {
        "rival": draw_other(values.name, drawn["name"]),
        "other": draw_other(values.word, drawn["word"]),
        "second": draw_other(values.number, drawn["number"]),
    }
    record = {"question": question.format(**drawn), "reasoning": RECALL_REASONING, "answer": answer.format(**drawn)}
    return {**record, "kind": "recall"}


def draw_other(draw: Callable[[], str], first: str) -> str:
    """A value that is not `first`."""
    while (value := draw()) == first:
        pass
    return value


class Calls:
    """Draws groups of tool dialogues with the same functions on offer."""

    def __init__(
        self, values: Values, facts: Sequence[Mapping[str, str]], held_out: frozenset[str], rng: random.Random
    ):
        """Takes facts to answer without a call, and the calls, as the model writes them, that it may not draw."""
        self._values, self._facts, self._held_out, self._rng = values, facts, held_out, rng

    def group(self) -> list[Record]:
        """Dialogues, as the records of `chat-tools.jsonl` and `chat-tool-results.jsonl`."""
        names = self._rng.sample(list(FUNCTIONS), self._rng.randint(1, 3))
        tools = [function_schema(name) for name in names]
        kinds = self._rng.choices(list(GROUP_SHARES), list(GROUP_SHARES.values()), k=MAX_IN_GROUP)
        return [{"tools": tools, **self._dialogue(self._rng.choice(names), kind)} for kind in kinds]

    def _dialogue(self, name: str, kind: str) -> Record:
        rng = self._rng
        if kind == "no-call":
            fact = rng.choice(self._facts)
            return {key: fact[key] for key in ("question", "reasoning", "answer")}
        call = self._call(name)
        arguments = call["arguments"]
        if kind == "result" and name != "translate":
            result, answer = draw_result(name, arguments, rng)
            messages = result_messages(call, ask(name, arguments, rng), result)
            return {"messages": messages, "reasoning": "The tool has answered.", "answer": answer}
        calls, question = [call], ask(name, arguments, rng)
        if kind == "two-calls" and "city" in arguments:
            calls.append(self._call(name))
            question = ask_twice(calls)
        return {"question": question, "reasoning": REASONING[name], "calls": calls, "answer": ""}

    def _call(self, name: str) -> ToolCall:
        """A call with values of any kind that is none of the held-out ones."""
        rng, values = self._rng, self._values
        while True:
            places = [values.place(values.cities)], [values.place(values.countries)]
            arguments = draw_arguments(name, *places, rng)
            if name == "translate" and rng.random() < 0.6:
                arguments["word"] = values.word()
            elif name == "switch_light" and rng.random() < 0.3:
                arguments["room"] = values.word()
            elif name == "set_timer" and rng.random() < 0.3:
                arguments["minutes"] = rng.randint(2, 999)
            elif name in ("add", "multiply") and rng.random() < 0.2:
                arguments |= {"a": rng.randrange(10**5), "b": rng.randrange(10**5)}
            call: ToolCall = {"name": name, "arguments": arguments}
            if format_tool_calls([call]) not in self._held_out:
                return call
