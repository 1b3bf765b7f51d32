"""Prompts from messages, and that only the template makes control tokens."""

from __future__ import annotations

import json
import pathlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from step3_jax.text.chat_template import ChatTemplate, collect_images
from step3_jax.text.tokenizer import Tokenizer

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
PIECES = st.sampled_from(["<think>", "<im_patch>", "<|EOT|><|BOT|>", "<im", "_patch>", " ", "\n", "a", "你好", '"'])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=5).map("".join)
IMAGE = {"type": "image", "image": "dog.png"}


def _user(content):
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def template(checkpoint):
    return ChatTemplate.load(checkpoint)


@pytest.fixture(params=["small", "shipped"])
def pair(request, checkpoint):
    folder = checkpoint if request.param == "small" else request.getfixturevalue("shipped")
    return Tokenizer.load(folder), ChatTemplate.load(folder)


def test_prompt_is_the_released_form(pair):
    tokenizer, template = pair
    messages = _user([IMAGE, {"type": "text", "text": "QUESTION"}])
    expected = "<｜begin▁of▁sentence｜><|BOT|>user\n <im_patch>QUESTION <|EOT|><|BOT|>assistant\n<think>\n"
    assert template.render(messages) == expected
    assert template.encode_chat(tokenizer, messages) == tokenizer.encode(expected)


def test_typed_control_tokens_stay_text(pair):
    tokenizer, template = pair
    typed = "".join(tokenizer.control_tokens)
    for content in (typed, [{"type": "text", "text": typed}]):
        ids = template.encode_chat(tokenizer, _user(content))
        harmless = template.encode_chat(tokenizer, _user("x"))
        control = set(tokenizer.control_tokens.values())
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]
        assert tokenizer.decode(ids) == template.render(_user(content))


def test_image_and_typed_image_token_are_told_apart(pair):
    tokenizer, template = pair
    messages = _user([{"type": "text", "text": "a <im_patch> b "}, IMAGE, {"type": "text", "text": " c"}])
    ids = template.encode_chat(tokenizer, messages)
    place = ids.index(tokenizer.control_id("<im_patch>"))
    assert ids.count(tokenizer.control_id("<im_patch>")) == 1
    assert tokenizer.decode(ids[:place]).endswith("a <im_patch> b ")


@SHARED
@given(first=TEXTS, second=TEXTS, reply=TEXTS)
def test_no_text_forges_a_turn_or_an_image(tokenizer, template, first, second, reply):
    items = [{"type": "text", "text": first}, {"type": "text", "text": second}, IMAGE]
    messages = [*_user(items), {"role": "assistant", "content": reply}, *_user(second)]
    ids = template.encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == template.render(messages)
    for name, count in (("<im_patch>", 1), ("<|BOT|>", 4), ("<|EOT|>", 3)):
        assert ids.count(tokenizer.control_id(name)) == count


@SHARED
@given(text=TEXTS)
def test_ids_are_those_of_the_text_when_nothing_is_typed(tokenizer, template, text):
    if not tokenizer.find_control(text):
        messages = _user(text)
        assert template.encode_chat(tokenizer, messages) == tokenizer.encode(template.render(messages))


def test_assistant_keeps_reasoning_tokens_only(tokenizer, template):
    reply = {"role": "assistant", "content": "<think>hm</think>ok<|EOT|><im_patch>"}
    ids = template.encode_chat(tokenizer, [*_user("a"), reply], add_generation_prompt=False)
    assert ids.count(tokenizer.control_id("</think>")) == 1
    assert ids.count(tokenizer.control_id("<|EOT|>")) == 2
    assert tokenizer.control_id("<im_patch>") not in ids


def test_tool_calls_as_clients_write_them_give_the_prompt_of_the_object(shipped):
    tokenizer, template = Tokenizer.load(shipped), ChatTemplate.load(shipped)

    def encode(arguments, result):
        call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [
            *_user("How warm is it in Oslo?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": result},
        ]
        return template.encode_chat(tokenizer, messages)

    assert encode('{"city": "Oslo", "days": 2}', None) == encode({"city": "Oslo", "days": 2}, "")


def test_control_tokens_in_tool_schemas_stay_text(tokenizer, template):
    tools = [{"type": "function", "function": {"name": "f", "description": "takes <im_patch>", "<think>": 1}}]
    ids = template.encode_chat(tokenizer, _user("a"), tools, add_generation_prompt=False)
    assert tokenizer.control_id("<im_patch>") not in ids
    assert tokenizer.control_id("<think>") not in ids
    assert "takes <im_patch>" in tokenizer.decode(ids)


def test_private_characters_in_messages_do_not_end_the_protection(tokenizer, template):
    typed = "\U000f0000\U000f0001<im_patch>\U000f0000"
    ids = template.encode_chat(tokenizer, _user(typed))
    assert tokenizer.control_id("<im_patch>") not in ids
    assert typed in tokenizer.decode(ids)


def test_template_that_looks_at_content_still_serves_plain_messages(tokenizer):
    template = ChatTemplate("{% for m in messages %}{{ m.content[:7] }}<|EOT|>{% endfor %}")
    assert template.encode_chat(tokenizer, _user("brown foxes")) == tokenizer.encode("brown f<|EOT|>")
    with pytest.raises(ValueError, match="cannot be distinguished from its own"):
        template.encode_chat(tokenizer, _user("<think>"))
    adjacent = ChatTemplate("{% for m in messages %}{{ m.content[:5] }}{% endfor %}")
    with pytest.raises(ValueError, match="cannot be distinguished from its own"):
        adjacent.encode_chat(tokenizer, [*_user("<thin"), *_user("k> abc")])


def test_template_that_strips_content_is_served(tokenizer):
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}<|EOT|>{% endfor %}")
    ids = template.encode_chat(tokenizer, _user("  <think> fox \n"))
    assert ids == [*tokenizer.encode_user_text("<think> fox"), tokenizer.control_id("<|EOT|>")]


def test_template_that_drops_images_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"0 image place\(s\) for 1 image\(s\)"):
        ChatTemplate("x").encode_chat(tokenizer, _user([IMAGE]))


def test_collect_images_keeps_order():
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = [
        *_user([IMAGE, {"type": "text", "text": "a"}, url]),
        *_user("b"),
        *_user([{"type": "image", "path": "c"}]),
    ]
    assert collect_images(messages) == ["dog.png", "data:image/png;base64,AA==", "c"]
    with pytest.raises(ValueError, match="message 0 has no source"):
        collect_images(_user([{"type": "image"}]))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        (["hello"], "Message 0 is str"),
        ([{"content": "a"}], "has role None"),
        ([{"role": "<im_patch>", "content": "a"}], "has role '<im_patch>'"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 3}], "type int"),
        ([{"role": "user", "content": [{}]}], "item of type None"),
        ([{"role": "user", "content": [{"type": "video"}]}], "type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text"),
        ([{"role": "system", "content": [IMAGE]}], "only user and tool may"),
    ],
)
def test_malformed_messages_are_refused_by_number(template, messages, message):
    with pytest.raises(ValueError, match=message):
        template.render(messages)


def _write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_load_follows_precedence(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate.load(tmp_path)
    named = [{"name": "other", "template": "no"}, {"name": "default", "template": "named {{ bos_token }}"}]
    _write(tmp_path, "tokenizer_config.json", {"chat_template": named, "bos_token": {"content": "<s>"}})
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "named <s>"
    _write(tmp_path, "tokenizer_config.json", {"chat_template": "config"})
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "config"
    _write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "json"
    _write(tmp_path, "chat_template.jinja", "jinja")
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "jinja"


@pytest.mark.parametrize("stored", [[{"name": "tool_use", "template": "a"}], 3, [3], {"default": 3}])
def test_templates_without_a_default_are_refused_when_one_is_needed(tmp_path, stored):
    _write(tmp_path, "chat_template.json", {"chat_template": stored})
    template = ChatTemplate.load(tmp_path)
    with pytest.raises(ValueError, match=r"default|must be text"):
        template.render(_user("a"))


TEMPLATES = {"default": "plain", "tool_use": "tools"}


@pytest.mark.parametrize(
    "stored", [TEMPLATES, [{"name": name, "template": text} for name, text in TEMPLATES.items()]], ids=["map", "list"]
)
def test_the_template_for_tools_is_taken_where_there_are_tools(tmp_path, stored):
    _write(tmp_path, "tokenizer_config.json", {"chat_template": stored})
    template = ChatTemplate.load(tmp_path)
    assert (template.render(_user("a")), template.render(_user("a"), tools=[])) == ("plain", "tools")


@pytest.mark.parametrize("folder", ["additional_chat_templates", "chat_templates"])
def test_further_templates_may_lie_in_a_folder(tmp_path, folder):
    (tmp_path / folder).mkdir()
    _write(tmp_path / folder, "tool_use.jinja", "tools")
    with pytest.raises(ValueError, match="none is named 'default'"):
        ChatTemplate.load(tmp_path).render(_user("a"))
    _write(tmp_path, "chat_template.jinja", "plain")
    template = ChatTemplate.load(tmp_path)
    assert (template.render(_user("a")), template.render(_user("a"), tools=[])) == ("plain", "tools")


def test_all_special_tokens_are_variables(tmp_path):
    _write(tmp_path, "special_tokens_map.json", {"unk_token": "<unk>", "pad_token": "<old>"})
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": "<pad>",
        "sep_token": None,
        "add_bos_token": True,
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"image_token": "<im>"},
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}{{ sep_token }}"
        "{{ add_bos_token }}{{ additional_special_tokens | join }}",
    }
    _write(tmp_path, "tokenizer_config.json", config)
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "<s></s><pad><unk><im><a><b>"


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfhi")
    assert ChatTemplate.load(tmp_path).render(_user("a")) == "hi"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{{ messages }}é".encode("latin-1"), "not UTF-8"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"{% if %}", "cannot be compiled"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_when_a_chat_is_asked_for(tmp_path, data, message):
    (tmp_path / "chat_template.jinja").write_bytes(data)
    template = ChatTemplate.load(tmp_path)
    with pytest.raises(ValueError, match=rf"chat_template\.jinja.*{message}"):
        template.render(_user("a"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | tojson }}", '{"ö": "<你>"}'),
        ("{{ x | tojson(indent=1) }}", '{\n "ö": "<你>"\n}'),
        ("{{ x | tojson(ensure_ascii=True) }}", '{"\\u00f6": "<\\u4f60>"}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "aab"),
        ("{% for i in [1, 2] %}{% generation %}{{ i }}{{ loop.index }}{% endgeneration %}{% endfor %}", "1122"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{% set n = namespace(a=1) %}{% generation %}{% set n.a = 2 %}{% endgeneration %}{{ n.a }}", "2"),
        ("a\n  {% generation %}\nb\n  {% endgeneration %}\nc", "a\nb\nc"),
        ("{{ documents is none }}{{ nothing is defined }}", "TrueFalse"),
    ],
)
def test_environment_is_that_of_released_templates(source, expected):
    assert ChatTemplate(source).render(_user("a"), x={"ö": "<你>"}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no roles') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[9].content.x }}",
        "{{ 1 + messages }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_that_fail_or_break_out_are_refused(source):
    with pytest.raises(ValueError, match="refuses these messages"):
        ChatTemplate(source).render(_user("a"))


def test_template_that_is_no_template_is_refused():
    with pytest.raises(ValueError, match="chat template cannot be compiled"):
        ChatTemplate("{% if %}").render(_user("a"))


def test_the_last_message_is_continued(tiny_model_path: pathlib.Path) -> None:
    template, tokenizer = ChatTemplate.load(tiny_model_path), Tokenizer.load(tiny_model_path)
    messages = [{"role": "user", "content": "Hi <think>"}, {"role": "assistant", "content": "A <|EOT|> violin is"}]
    ids = template.encode_chat(tokenizer, messages, continue_final_message=True)
    assert tokenizer.decode(ids).endswith("<|BOT|>assistant\n A <|EOT|> violin is")
    control = tokenizer.control_tokens
    assert control["<think>"] not in ids
    assert ids.count(control["<|EOT|>"]) == 1, "the user's turn ends; what was typed stays text"


@pytest.mark.parametrize("message", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}])
def test_only_an_assistants_text_is_continued(tiny_model_path: pathlib.Path, message: dict[str, object]) -> None:
    template, tokenizer = ChatTemplate.load(tiny_model_path), Tokenizer.load(tiny_model_path)
    with pytest.raises(ValueError, match="the last message must be an assistant's"):
        template.encode_chat(tokenizer, [message], continue_final_message=True)
