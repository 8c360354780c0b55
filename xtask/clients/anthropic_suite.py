"""The anthropic package for Python against `graft server`; the servers are those of openai_suite.py."""

import anthropic
from suite import WEATHER, check, follows, raises, run

USER = [{"role": "user", "content": "What is the weather?"}]
TOOLS = [{"name": "weather", "description": "Tells it.", "input_schema": WEATHER}]
FIELDS = dict(model="default_model", max_tokens=20, messages=USER)


def client(address, key="none"):
    return anthropic.Anthropic(base_url=f"http://{address}", api_key=key, max_retries=0, timeout=60)


@check
def a_message_and_its_stream_say_the_same(o):
    c = client(o.plain)
    whole = c.messages.create(**FIELDS, system="Be brief.")
    assert whole.type == "message" and whole.role == "assistant" and whole.content[0].type == "text"
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole._request_id
    with c.messages.stream(**FIELDS, system="Be brief.") as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    types = [event.type for event in c.messages.create(**FIELDS, stream=True)]
    assert types[0] == "message_start" and types[-1] == "message_stop"


@check
def tokens_are_counted(o):
    c = client(o.plain)
    whole = c.messages.create(**FIELDS)
    assert c.messages.count_tokens(model="default_model", messages=USER).input_tokens == whole.usage.input_tokens


@check
def a_stop_sequence_is_named(o):
    c = client(o.plain)
    text = c.messages.create(**FIELDS).content[0].text
    cut = c.messages.create(**FIELDS, stop_sequences=[text[3:6]])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == text[3:6]


@check
def a_tool_is_used(o):
    c = client(o.tools)
    fields = dict(
        model="default_model", max_tokens=300, messages=USER, tools=TOOLS, thinking={"type": "disabled"},
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    whole = c.messages.create(**fields)
    block = whole.content[-1]
    assert whole.stop_reason == "tool_use" and block.type == "tool_use" and block.name == "weather", whole
    follows(block.input)
    with c.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    assert final.content[-1].input == block.input
    history = USER + [
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "sun"}]},
    ]
    answer = c.messages.create(model="default_model", max_tokens=5, messages=history, tools=TOOLS)
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")


@check
def errors_have_their_classes(o):
    c = client(o.plain)
    ask = lambda **more: lambda: c.messages.create(**{**FIELDS, **more})
    raises(anthropic.NotFoundError, 404, ask(model="nobody"))
    image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/"}}
    for fields in (
        dict(extra_body={"temperature": -1}),
        dict(max_tokens=0),
        dict(messages=[]),
        dict(messages=[{"role": "user", "content": [image]}]),
        dict(messages=USER + [{"role": "assistant", "content": "So"}]),
        dict(tools=TOOLS),
    ):
        for stream in (False, True):
            error = raises(anthropic.BadRequestError, 400, ask(stream=stream, **fields))
            assert error.body["error"]["type"] == "invalid_request_error" and error.body["request_id"], error.body
    error = raises(anthropic.AuthenticationError, 401, lambda: client(o.locked, "no").messages.create(**FIELDS))
    assert error.body["error"]["type"] == "authentication_error"
    assert client(o.locked, "secret").messages.create(**FIELDS).content


run("anthropic (Python)", "tools", "plain", "locked")
