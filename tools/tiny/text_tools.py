"""Tool-call examples for the tiny Step3: eight functions, questions that need them, answers from results."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

NUM_CALLS = 1700
NUM_PLAIN_ANSWERS = 300
NUM_RESULTS = 600
SEED = 7

Arguments = dict[str, str | int | bool]


class ToolCall(TypedDict):
    """One call, as `chat-tools.jsonl` holds it."""

    name: str
    arguments: Mapping[str, object]


FUNCTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Current weather in a city.", {"city": "string"}),
    "get_time": ("Local time in a city.", {"city": "string"}),
    "get_population": ("Number of people in a country.", {"country": "string"}),
    "add": ("Adds two numbers.", {"a": "integer", "b": "integer"}),
    "multiply": ("Multiplies two numbers.", {"a": "integer", "b": "integer"}),
    "set_timer": ("Starts a timer.", {"minutes": "integer"}),
    "translate": ("Translates a word.", {"word": "string", "language": "string"}),
    "switch_light": ("Switches the light of a room.", {"room": "string", "on": "boolean"}),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "get_weather": (
        "What is the weather in {city}?",
        "How is the weather in {city}?",
        "Is it raining in {city}?",
    ),
    "get_time": (
        "What time is it in {city}?",
        "Tell me the time in {city}.",
        "What is the local time in {city}?",
    ),
    "get_population": ("How many people live in {country}?", "What is the population of {country}?"),
    "add": ("What is {a} + {b}?", "Add {a} and {b}.", "What is {a} plus {b}?"),
    "multiply": ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} * {b}?"),
    "set_timer": (
        "Set a timer for {minutes} minutes.",
        "Start a timer of {minutes} minutes.",
        "Timer, {minutes} minutes!",
    ),
    "translate": (
        "Translate {word} into {language}.",
        "What is {word} in {language}?",
        "How do you say {word} in {language}?",
    ),
    "switch_light": ("Turn {state} the light in the {room}.", "Switch the light in the {room} {state}."),
}
REASONING = {
    "get_weather": "I need the weather tool.",
    "get_time": "I need the time tool.",
    "get_population": "I need the population tool.",
    "add": "I need the add tool.",
    "multiply": "I need the multiply tool.",
    "set_timer": "I need the timer tool.",
    "translate": "I need the translate tool.",
    "switch_light": "I need the light tool.",
}
# Cities that are no capital, so that a name is copied from the question and not from the facts.
MORE_CITIES = (
    "New York|Chicago|Boston|Seattle|Los Angeles|San Francisco|Toronto|Montreal|Vancouver|Sydney|"
    "Melbourne|Barcelona|Munich|Hamburg|Milan|Naples|Lyon|Marseille|Manchester|Liverpool|Glasgow|Zurich|"
    "Geneva|Shanghai|Shenzhen|Osaka|Kyoto|Mumbai|Kolkata|Karachi|Istanbul|Dubai|Lagos|Casablanca|"
    "Cape Town|Rio de Janeiro|Guayaquil|Porto|Venice|Florence"
).split("|")
WORDS = "dog|cat|house|water|bread|tree|sun|moon|book|friend|hand|milk|river|street|school|apple|horse|bird"
LANGUAGES = "French|German|Spanish|Italian|Chinese|Japanese|Russian|Arabic|Dutch|Polish"
ROOMS = "kitchen|bedroom|bathroom|living room|office|garage|hall|garden"
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy")


def function_schema(name: str) -> dict[str, object]:
    """The function's description in the form that chat clients send in `tools`."""
    description, parameters = FUNCTIONS[name]
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def format_tool_calls(calls: Iterable[ToolCall]) -> str:
    """The text by which the released model calls tools.

    Args:
      calls: Each with `name` and `arguments`, a mapping: strings are written as they are, others as JSON.
    """
    text = "<｜tool_calls_begin｜>\n"
    for call in calls:
        text += f'<｜tool_call_begin｜>\nfunction<｜tool_sep｜><steptml:invoke name="{call["name"]}">'
        for key, value in call["arguments"].items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += f'<steptml:parameter name="{key}">{shown}</steptml:parameter>'
        text += "</steptml:invoke><｜tool_call_end｜>\n"
    return text + "<｜tool_calls_end｜>"


def draw_arguments(name: str, cities: Sequence[str], countries: Sequence[str], rng: random.Random) -> Arguments:
    """Values for one call of the function `name`."""
    if name in ("get_weather", "get_time"):
        return {"city": rng.choice(cities)}
    if name == "get_population":
        return {"country": rng.choice(countries)}
    if name in ("add", "multiply"):
        size = 10 ** rng.randint(1, 3)
        return {"a": rng.randrange(2, size), "b": rng.randrange(2, size)}
    if name == "set_timer":
        return {"minutes": rng.randint(2, 90)}
    if name == "translate":
        return {"word": rng.choice(WORDS.split("|")), "language": rng.choice(LANGUAGES.split("|"))}
    return {"room": rng.choice(ROOMS.split("|")), "on": rng.random() < 0.5}


def ask(name: str, arguments: Arguments, rng: random.Random) -> str:
    """One of the questions that `name` called with `arguments` answers."""
    state = "on" if arguments.get("on") else "off"
    return rng.choice(QUESTIONS[name]).format(**arguments, state=state)


def ask_twice(calls: Sequence[ToolCall]) -> str:
    """A question that two calls for the weather or the time answer."""
    first, second = (call["arguments"]["city"] for call in calls)
    what = "weather" if calls[0]["name"] == "get_weather" else "time"
    return f"What is the {what} in {first} and in {second}?"


def offer(names: Sequence[str], rng: random.Random) -> list[dict[str, object]]:
    """The functions `names` and up to two others, in any order."""
    others = [name for name in FUNCTIONS if name not in names]
    offered = [*names, *rng.sample(others, rng.randint(0, 2))]
    rng.shuffle(offered)
    return [function_schema(name) for name in offered]


def tool_examples(
    cities: Sequence[str], countries: Sequence[str], facts: Sequence[Mapping[str, str]]
) -> list[dict[str, object]]:
    """Questions with tools on offer: most need a call, some two, some none (`calls` empty, an `answer`)."""
    rng = random.Random(SEED)
    cities = [*cities, *MORE_CITIES, *MORE_CITIES]
    names = list(FUNCTIONS)
    rows: list[dict[str, object]] = []
    for index in range(NUM_CALLS):
        name = names[index % len(names)]
        arguments = draw_arguments(name, cities, countries, rng)
        calls: list[ToolCall] = [{"name": name, "arguments": arguments}]
        question, kind = ask(name, arguments, rng), "call"
        if name in ("get_weather", "get_time") and rng.random() < 0.25:
            second = {"city": rng.choice([city for city in cities if city != arguments["city"]])}
            calls.append({"name": name, "arguments": second})
            question, kind = ask_twice(calls), "two-calls"
        row = {
            "tools": offer([name], rng),
            "question": question,
            "reasoning": REASONING[name],
            "calls": calls,
        }
        rows.append({**row, "answer": "", "kind": kind})
    for fact in rng.sample(list(facts), min(NUM_PLAIN_ANSWERS, len(facts))):
        row = {
            "tools": offer([rng.choice(names)], rng),
            "question": fact["question"],
            "reasoning": fact["reasoning"],
        }
        rows.append({**row, "calls": [], "answer": fact["answer"], "kind": "no-call"})
    rng.shuffle(rows)
    return rows


def draw_result(name: str, arguments: Arguments, rng: random.Random) -> tuple[str, str]:
    """What the tool replies (JSON) and what the model then says."""
    if name == "get_weather":
        degrees, sky = rng.randint(-9, 39), rng.choice(SKIES)
        return json.dumps(
            {"degrees": degrees, "sky": sky}
        ), f"It is {degrees} degrees and {sky} in {arguments['city']}."
    if name == "get_time":
        clock = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        return json.dumps({"time": clock}), f"It is {clock} in {arguments['city']}."
    if name == "get_population":
        millions = rng.randint(1, 400)
        return json.dumps({"millions": millions}), f"About {millions} million people live in {arguments['country']}."
    if name in ("add", "multiply"):
        a, b = int(arguments["a"]), int(arguments["b"])
        result = a + b if name == "add" else a * b
        return json.dumps({"result": result}), f"The result is {result}."
    if name == "set_timer":
        return json.dumps({"ok": True}), f"The timer is set for {arguments['minutes']} minutes."
    state = "on" if arguments.get("on") else "off"
    return json.dumps({"ok": True}), f"The light in the {arguments.get('room')} is {state}."


def result_messages(call: ToolCall, question: str, result: str) -> list[dict[str, object]]:
    """A conversation up to the tool's reply."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_0", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_0", "content": result},
    ]


def tool_result_examples(cities: Sequence[str], countries: Sequence[str]) -> list[dict[str, object]]:
    """Conversations that end in a tool's reply, with the answer that the model gives from it."""
    rng = random.Random(SEED + 1)
    cities = [*cities, *MORE_CITIES]
    names = [name for name in FUNCTIONS if name != "translate"]  # a translation cannot be made up
    rows: list[dict[str, object]] = []
    for index in range(NUM_RESULTS):
        name = names[index % len(names)]
        arguments = draw_arguments(name, cities, countries, rng)
        result, answer = draw_result(name, arguments, rng)
        messages = result_messages({"name": name, "arguments": arguments}, ask(name, arguments, rng), result)
        row = {"tools": offer([name], rng), "messages": messages, "reasoning": "The tool has answered."}
        rows.append({**row, "answer": answer, "kind": "result"})
    return rows
