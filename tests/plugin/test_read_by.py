"""What one of two templates reads of a row, through Axolotl's own strategies."""

import copy

import pytest

from dskd_plugin.text.read_by import OneSided, Unread, hand_over

ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}[{{ message.role }}]"
    "{{ message.name }}{{ message.content }}{{ (message.tool_calls or []) | tojson }}{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role != 'system' %}[{{ message.role }}]{{ message.content }}{% endif %}"
    "{% endfor %}"
)
CONTENT = "{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}{% endfor %}"
NAMES = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
)
LAST = (
    "{% for message in messages %}[{{ message.role }}]{% if loop.last %}{{ message.content }}{% else %}"
    "{{ message.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "river", "description": "the lamp", "parameters": {"type": "object"}}}


def strategy(zoo, template, **options):
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy

    tokenizer = zoo("smollm2").tokenizer
    prompter = ChatTemplatePrompter(tokenizer, template, **options)
    return ChatTemplateStrategy(prompter, tokenizer, False, 512, roles_to_train=["assistant"], train_on_eos="turn")


def said(*texts, role="role", content="content"):
    roles = ("user", "assistant")
    return [{role: roles[k % 2], content: text} for k, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": " Be brief. "}
CASES = {
    "same": (CONTENT, CONTENT, {"messages": [SYSTEM, *said("red", "blue")]}, []),
    "trimmed": (ALL, CONTENT, {"messages": said(" red \n", "\n blue")}, []),
    "a tool's result of numbers": (
        CONTENT,
        CONTENT.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"),
        {"messages": [*said("red", "blue"), {"role": "tool", "content": '{"temperature": 22}'}, *said("red", "blue")]},
        [("student", "content of tool messages", "22")],
    ),
    "system": (
        CONTENT,
        NO_SYSTEM,
        {"messages": [SYSTEM, *said("red", "blue")]},
        [("student", "content of system messages", "Be brief.")],
    ),
    "system of the row": (
        NO_SYSTEM,
        CONTENT,
        {"messages": said("red", "blue"), "system": "Be brief."},
        [("teacher", "system", "Be brief.")],
    ),
    "parts of a content": (
        CONTENT,
        NO_SYSTEM,
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *said("red", "blue")]},
        [("student", "content of system messages", "Be brief.")],
    ),
    "name": (
        ALL,
        CONTENT,
        {"messages": [{"role": "user", "content": "red", "name": "Ann"}, *said("red", "blue")[1:]]},
        [("student", "name of user messages", "Ann")],
    ),
    "tools": (CONTENT, ALL, {"messages": said("red", "blue"), "tools": [TOOL]}, [("teacher", "tools", "river")]),
    "tools in a string": (
        CONTENT,
        ALL,
        {"messages": said("red", "blue"), "tools": '[{"type": "function", "function": {"name": "river"}}]'},
        [("teacher", "tools", "river")],
    ),
    "a part of the tools": (
        ALL,
        NAMES,
        {"messages": said("red", "blue"), "tools": [TOOL]},
        [("student", "tools.function.description", "the lamp")],
    ),
    "earlier reasoning": (
        ALL,
        LAST,
        {"messages": said("red", "<think>it is</think>blue", "lamp", "<think>it was</think>stone")},
        [("student", "text after <think> in content of assistant messages", "it is")],
    ),
    "a field that is null": (ALL, CONTENT, {"messages": [{**one, "name": None} for one in said("red", "blue")]}, []),
    "a template that refuses marks": (
        CONTENT,
        "{% for message in messages %}{% if message.content not in ('red', 'blue') %}{{ raise_exception('no') }}"
        "{% endif %}[{{ message.role }}]{{ message.content }}{% endfor %}",
        {"messages": said("red", "blue")},
        [],
    ),
}


OTHER_NAMES = {
    "attribute": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.notes }}{% endfor %}",
    "item": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ m['notes'] }}{% endfor %}",
    "get": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.get('notes', '') }}{% endfor %}",
    "copy": "{% for one in messages %}{% set m = one %}[{{ m.role }}]{{ m.content }}{{ m.notes }}{% endfor %}",
    "macro": (
        "{% macro show(m) %}[{{ m.role }}]{{ m.content }}{{ m.notes }}{% endmacro %}"
        "{% for one in messages %}{{ show(one) }}{% endfor %}"
    ),
    "whole": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "escaped": "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}{% endfor %}",
    "index": (
        "{% for k in range(messages | length) %}[{{ messages[k].role }}]{{ messages[k].content }}"
        "{{ messages[k].notes }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_fields_reach_a_template_whatever_it_calls_a_message(zoo, name):
    question, answer = said("red", "blue")
    row = {"messages": [{**question, "notes": "the lamp"}, answer]}
    found = OneSided.of(strategy(zoo, OTHER_NAMES[name]), strategy(zoo, CONTENT)).find(row)
    assert found == [Unread("student", "notes of user messages", "the lamp")]


def test_what_says_which_text_is_trained_on_reaches_no_template(zoo):
    """Axolotl would take it for the recipe's own choice, which is another field."""
    one = strategy(zoo, CONTENT)
    row = {"messages": [*said("red", "blue"), *[{**message, "training": False} for message in said("lamp", "stone")]]}
    before = one.tokenize_prompt(copy.deepcopy(row))
    hand_over(one, row)
    assert one.tokenize_prompt(copy.deepcopy(row)) == before and any(label != -100 for label in before["labels"][-8:])


def test_arguments_of_calls_that_no_template_shows_need_not_be_json(zoo):
    call = {"type": "function", "function": {"name": "river", "arguments": "{broken"}}
    row = {"messages": [said("red")[0], {"role": "assistant", "content": "blue", "tool_calls": [call]}]}
    silent, shows = strategy(zoo, CONTENT), strategy(zoo, OTHER_NAMES["whole"])
    for one in (silent, shows):
        hand_over(one, row)
    assert silent.tokenize_prompt(copy.deepcopy(row))["input_ids"]
    with pytest.raises(ValueError, match="Expecting property name"):
        shows.tokenize_prompt(copy.deepcopy(row))


CHANGED = ["| upper", "| lower", "| title", "[:5]", "[:20]", "[-4:]", "| trim | capitalize", "| truncate(12)"]


@pytest.mark.parametrize("change", CHANGED)
def test_a_text_that_a_template_cuts_or_capitalises_is_read(zoo, change):
    changes = "{% for m in messages %}[{{ m.role }}]{{ m.content" + change + " }}{% endfor %}"
    changes = changes.replace("m.content|", "m.content |")
    row = {"messages": [{"role": "system", "content": "Always answer with the word PLUM."}, *said("red", "blue")]}
    assert OneSided.of(strategy(zoo, CONTENT), strategy(zoo, changes)).find(row) == []
    dropped = changes.replace("in messages", "in messages if m.role != 'system'")
    (found,) = OneSided.of(strategy(zoo, CONTENT), strategy(zoo, dropped)).find(row)
    assert found == Unread("student", "content of system messages", row["messages"][0]["content"])


@pytest.mark.parametrize("name", CASES)
def test_text_that_one_side_alone_reads(zoo, name):
    student, teacher, row, expected = CASES[name]
    before = copy.deepcopy(row)
    found = OneSided.of(strategy(zoo, student), strategy(zoo, teacher)).find(row)
    assert found == [Unread(*one) for one in expected] and row == before


def test_messages_of_other_names(zoo):
    options = {
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"], "assistant": ["gpt"], "system": ["system"]},
    }
    row = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "red"}]}
    found = OneSided.of(strategy(zoo, CONTENT, **options), strategy(zoo, NO_SYSTEM, **options)).find(row)
    assert found == [Unread("student", "value of system messages", "Be brief.")]


def test_rows_of_one_shape_are_rendered_once(zoo, monkeypatch):
    one_sided = OneSided.of(strategy(zoo, CONTENT), strategy(zoo, NO_SYSTEM))
    rendered = []
    original = type(zoo("smollm2").tokenizer).apply_chat_template

    def counted(self, *args, **kwargs):
        rendered.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(zoo("smollm2").tokenizer), "apply_chat_template", counted)
    for text in ("red", "blue", "a longer text"):
        (found,) = one_sided.find({"messages": [{"role": "system", "content": text}, *said(text, text)]})
        assert found.text == text
    assert len(rendered) == 2


def test_no_other_kind_of_strategy_is_asked():
    class Plain:
        prompter = None

    assert OneSided.of(Plain(), Plain()) is None
