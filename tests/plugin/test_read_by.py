"""What one of two templates reads of a row, through Axolotl's own strategies."""

import copy

import pytest

from dskd_plugin.read_by import OneSided, Unread

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
