"""/v1/completions: prompts in every form, and what comes back of each."""

from __future__ import annotations

import pytest

from tests.server.client import Client, Reply
from tests.server.conftest import NAME


def complete(client: Client, prompt: object = "A SAY one two three four", **values: object) -> Reply:
    return client.call("/v1/completions", {"prompt": prompt, "temperature": 0} | values)


def texts(reply: Reply) -> list[str]:
    """Texts of the choices, of a stream put together."""
    if reply.headers["content-type"] == "application/json":
        return [choice["text"] for choice in reply.json()["choices"]]
    found: dict[int, str] = {}
    for event in reply.events:
        for choice in event["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_continued(client: Client, stream: bool) -> None:
    reply = complete(client, stream=stream)
    assert texts(reply) == ["one two three four"]
    first = reply.events[0] if stream else reply.json()
    assert (first["object"], first["model"]) == ("text_completion", NAME)
    last = reply.events[-1] if stream else reply.json()
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_all_forms_have_choices_in_their_order(client: Client, stream: bool) -> None:
    encode = client.service.llm.tokenizer.encode
    several = ["SAY one", "SAY two", "SAY three"]
    assert texts(complete(client, several, stream=stream)) == ["one", "two", "three"]
    assert texts(complete(client, [encode(text) for text in several], stream=stream)) == ["one", "two", "three"]
    assert texts(complete(client, encode("SAY ids"), stream=stream)) == ["ids"]
    assert texts(complete(client, several, n=2, stream=stream)) == ["one", "one", "two", "two", "three", "three"]


def test_a_text_has_no_bos_in_front_if_the_client_says_so(client: Client) -> None:
    tokenizer = client.service.llm.tokenizer
    text, bos = "SAY one", tokenizer.decode([tokenizer.bos_id])
    found = {
        (prompt, given): complete(client, prompt, return_token_ids=True, add_special_tokens=given).json()["choices"][0]
        for prompt in (text, bos + text)
        for given in (None, True, False)
    }
    without = tokenizer.encode(text)
    for (prompt, given), choice in found.items():
        expected = without if prompt == text and given is False else [tokenizer.bos_id, *without]
        assert choice["prompt_token_ids"] == expected, (prompt, given)


def test_usage_counts_all_prompts(client: Client) -> None:
    usages = [complete(client, prompt).json()["usage"] for prompt in ("SAY one", "SAY two")]
    both = complete(client, ["SAY one", "SAY two"]).json()["usage"]
    assert both["prompt_tokens"] == sum(usage["prompt_tokens"] for usage in usages)
    assert both["completion_tokens"] == sum(usage["completion_tokens"] for usage in usages)
    *_, last = complete(client, stream=True, stream_options={"include_usage": True}).events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == complete(client).json()["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gives_the_prompt_in_front(client: Client, stream: bool) -> None:
    assert texts(complete(client, ["a SAY b", "c SAY d"], echo=True, stream=stream)) == ["a SAY bb", "c SAY dd"]


def test_without_max_tokens_there_are_openais_sixteen(client: Client) -> None:
    usage = complete(client, "SAY " + "word " * 40).json()["usage"]
    assert usage["completion_tokens"] == 16
    assert complete(client, "SAY " + "word " * 40, max_tokens=30).json()["usage"]["completion_tokens"] == 30


def test_log_probabilities_count_the_characters_of_the_text(client: Client) -> None:
    text = "Grüße 你好!"
    choice = complete(client, f"SAY {text}", logprobs=2, max_tokens=50).json()["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == text
    assert found["token_logprobs"] == [-0.5] * len(found["tokens"])
    assert all(-0.5 in top.values() for top in found["top_logprobs"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)
    # Text that may be a stop string is held back.
    events = complete(client, f"SAY {text}", logprobs=2, max_tokens=50, stream=True, stop=["好?", "xyz"]).events
    pieces = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        assert [one for piece in pieces for one in piece[name]] == found[name]


def test_token_ids_come_back_if_they_are_wanted(client: Client) -> None:
    choice = complete(client, "SAY one", return_token_ids=True).json()["choices"][0]
    decode = client.service.llm.tokenizer.decode
    assert (decode(choice["token_ids"]), decode(choice["prompt_token_ids"][1:])) == ("one", "SAY one")
    for echo in (False, True):
        events = complete(client, ["SAY one", "SAY two"], return_token_ids=True, stream=True, echo=echo).events
        chunks = [event["choices"][0] for event in events if event["choices"][0]["index"] == 1]
        assert decode([token for chunk in chunks for token in chunk["token_ids"]]) == "two"
        assert decode(chunks[0]["prompt_token_ids"][1:]) == "SAY two"
        assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])


@pytest.mark.parametrize("echo", [False, True])
def test_tokens_can_be_named_by_their_ids(client: Client, echo: bool) -> None:
    options = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1, "echo": echo}
    choice = complete(client, "SAY Grüße 你好", **options).json()["choices"][0]
    ids = (choice["prompt_token_ids"] if echo else []) + choice["token_ids"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    tops = choice["logprobs"]["top_logprobs"][1:]
    assert [next(iter(top)) for top in tops] == choice["logprobs"]["tokens"][1:]


def test_no_log_probabilities_are_not_those_of_the_chosen_alone(client: Client) -> None:
    assert complete(client).json()["choices"][0]["logprobs"] is None
    found = complete(client, logprobs=0).json()["choices"][0]["logprobs"]
    assert [list(top) for top in found["top_logprobs"]] == [[token] for token in found["tokens"]]


@pytest.mark.parametrize(
    ("values", "param", "said"),
    [
        ({"suffix": "x"}, "suffix", "cannot fill in"),
        ({"best_of": 3}, "best_of", "only n, which is 1"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": ["a"] * 1000}, "prompt", "at most 256"),
        ({"prompt": [1, "a"]}, "prompt[1]", "'a'"),
        ({"prompt": [99999999]}, "prompt", "99999999"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": [[5], [-1]]}, "prompt", "-1"),
        ({"prompt": "see <im_patch>"}, "prompt", "image place"),
        ({"prompt": None}, "prompt", "None"),
        ({"logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(client: Client, values: dict[str, object], param: str, said: str) -> None:
    reply = complete(client, **values)
    assert reply.status == 400
    assert (reply.error["param"], said in reply.error["message"]) == (param, True), reply.error


def test_best_of_may_be_n(client: Client) -> None:
    assert len(texts(complete(client, n=2, best_of=2))) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_with_logprobs_scores_the_prompt(client: Client, stream: bool, max_tokens: int) -> None:
    prompt = "Grüße SAY one two three four"
    reply = complete(client, prompt, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream)
    ids = client.service.llm.tokenizer.encode(prompt, add_bos=True)
    if stream:
        pieces = [event["choices"][0]["logprobs"] for event in reply.events]
        found = {name: [one for piece in pieces if piece for one in piece[name]] for name in pieces[0]}
    else:
        found = reply.json()["choices"][0]["logprobs"]
        usage = reply.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), max_tokens)
    (text,) = texts(reply)
    assert text.startswith(prompt)
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert found["token_logprobs"][1:] == [-0.5] * (len(ids) - 1 + max_tokens)
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[1:]:
        assert "\ufffd" in token or text[offset:].startswith(token)


def test_scored_prompts_of_a_list_have_choices_each(client: Client) -> None:
    reply = complete(client, ["a SAY b", "c SAY d e f"], echo=True, logprobs=0, max_tokens=2, return_token_ids=True)
    first, second = reply.json()["choices"]
    assert (first["text"], second["text"]) == ("a SAY bb", "c SAY d e fd e")
    decode = client.service.llm.tokenizer.decode
    assert decode(second["prompt_token_ids"][1:]) == "c SAY d e f"
    assert decode(second["token_ids"]) == "d e"
    assert complete(client, ["a SAY b"], echo=True, logprobs=0, stop=["SAY"]).json()["choices"][0]["text"] == "a SAY bb"


def test_a_prompt_that_would_end_its_own_output_is_not_scored(client: Client) -> None:
    reply = complete(client, "a<|EOT|>b", echo=True, logprobs=0)
    assert (reply.status, reply.error["param"]) == (400, "prompt")


@pytest.mark.parametrize(
    ("param", "value"),
    [("structured_outputs", {"choice": ["yes", "no"]}), ("response_format", {"type": "json_object"})],
)
def test_a_form_is_not_dropped_where_the_prompt_is_scored(client: Client, param: str, value: object) -> None:
    reply = complete(client, echo=True, logprobs=1, **{param: value})
    assert (reply.status, reply.error["param"]) == (400, param)
    assert "cannot be combined with echo and logprobs" in reply.error["message"]
    reply = complete(client, "SAY no", echo=True, structured_outputs={"choice": ["yes", "no"]})
    assert texts(reply) == ["SAY nono"], "echo alone does not score"
