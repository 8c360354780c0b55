"""The openai package for Python against `graft server`: what it parses, accumulates and raises.

--tools is a server on a model whose template knows tools, --plain one on the demo's base, --locked one that asks for the
key `secret`. Each is an address with the port.
"""

import json
import math
from typing import Literal

import openai
from pydantic import BaseModel, Field
from suite import WEATHER, check, follows, raises, run

USER = [{"role": "user", "content": "What is the weather?"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": WEATHER}}


def client(address, key="none", **options):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key=key, max_retries=0, timeout=60, **options)


@check
def models_are_listed_and_found(o):
    for address in (o.tools, o.plain):
        c = client(address)
        models = c.models.list().data
        assert len(models) >= 1 and models[0].object == "model"
        for model in models:
            assert c.models.retrieve(model.id).id == model.id
    parents = [model.model_dump().get("parent") for model in client(o.tools).models.list().data]
    assert parents[0] is None and parents[1] is not None, parents
    raises(openai.NotFoundError, 404, lambda: client(o.tools).models.retrieve("nobody"))


@check
def a_chat_and_its_stream_say_the_same(o):
    for address in (o.tools, o.plain):
        c = client(address)
        whole = c.chat.completions.create(model="default_model", messages=USER, max_tokens=20)
        chunks = list(
            c.chat.completions.create(
                model="default_model", messages=USER, max_tokens=20, stream=True, stream_options={"include_usage": True}
            )
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:] if chunk.choices)
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@check
def the_stream_helper_accumulates(o):
    # The helper raises where an answer is cut, so it gets one that ends by itself.
    fields = dict(model="default_model", messages=USER, max_tokens=300, stop=[".", ","])
    with client(o.plain).chat.completions.stream(**fields) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


@check
def completions_take_text_and_ids_and_stream(o):
    c = client(o.plain)
    whole = c.completions.create(model="default_model", prompt=["Once upon", "The sea"], max_tokens=8, logprobs=3)
    assert [choice.index for choice in whole.choices] == [0, 1]
    first = whole.choices[0]
    assert "".join(first.logprobs.tokens) == first.text and len(first.logprobs.top_logprobs[0]) == 3
    assert first.logprobs.text_offset[0] == 0
    again = c.completions.create(model="default_model", prompt="Once upon", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in again) == first.text
    assert c.completions.create(model="default_model", prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3


@check
def logprobs_have_their_tokens(o):
    whole = client(o.plain).chat.completions.create(
        model="default_model", messages=USER, max_tokens=10, logprobs=True, top_logprobs=5, temperature=1, seed=3
    )
    content = whole.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in content).decode()
    assert text.startswith(whole.choices[0].message.content)
    for token in content:
        assert len(token.top_logprobs) == 5 and token.logprob <= 0
        best = [other.logprob for other in token.top_logprobs]
        assert best == sorted(best, reverse=True) and sum(map(math.exp, best)) <= 1.0001
    chunks = client(o.plain).chat.completions.create(
        model="default_model", messages=USER, max_tokens=10, logprobs=True, top_logprobs=5, temperature=1, seed=3, stream=True
    )
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == content


@check
def seeds_n_and_stop(o):
    c = client(o.plain)
    ask = lambda **more: c.chat.completions.create(model="default_model", messages=USER, max_tokens=12, temperature=1, **more)
    one, two = ask(seed=5), ask(seed=5)
    assert one.choices == two.choices
    three = ask(seed=5, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.choices[0].message == one.choices[0].message
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    text = one.choices[0].message.content
    stop = text[4:7]
    cut = ask(seed=5, stop=["never there", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert ask(seed=5, logit_bias={"5": -100}).choices


@check
def a_json_schema_is_followed(o):
    format = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    for address in (o.tools, o.plain):
        for seed in range(3):
            whole = client(address).chat.completions.create(
                model="default_model", messages=USER, max_tokens=200, temperature=1, seed=seed, response_format=format,
                extra_body={"chat_template_kwargs": {"enable_thinking": False}},
            )
            assert whole.choices[0].finish_reason == "stop", whole
            follows(json.loads(whole.choices[0].message.content))


@check
def a_pydantic_model_is_parsed(o):
    class Place(BaseModel):
        kind: Literal["sea", "hill"]
        height: int = Field(ge=0, le=99)

    class Trip(BaseModel):
        name: Literal["a", "b"]
        places: list[Place] = Field(min_length=1, max_length=2)

    parsed = client(o.plain).chat.completions.parse(
        model="default_model", messages=USER, max_tokens=300, temperature=1, seed=1, response_format=Trip
    )
    trip = parsed.choices[0].message.parsed
    assert isinstance(trip, Trip) and 1 <= len(trip.places) <= 2


@check
def json_objects(o):
    whole = client(o.plain).chat.completions.create(
        model="default_model", messages=[{"role": "user", "content": "Give me a JSON object with your name."}], max_tokens=200,
        response_format={"type": "json_object"},
    )
    text = whole.choices[0].message.content
    assert text.lstrip().startswith("{")
    if whole.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@check
def a_forced_call_comes_whole_and_streamed(o):
    c = client(o.tools)
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        fields = dict(
            model="default_model", messages=USER, tools=[TOOL, OTHER], tool_choice=choice, max_tokens=300, temperature=1,
            seed=1, parallel_tool_calls=False, extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        whole = c.chat.completions.create(**fields)
        message = whole.choices[0].message
        assert whole.choices[0].finish_reason == "tool_calls" and len(message.tool_calls) == 1, whole
        call = message.tool_calls[0]
        assert call.type == "function" and call.id and call.function.name in ("weather", "other")
        follows(json.loads(call.function.arguments))
        with c.chat.completions.stream(**fields) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        streamed = final.choices[0].message.tool_calls[0]
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        history = USER + [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
        answer = c.chat.completions.create(model="default_model", messages=history, tools=[TOOL, OTHER], max_tokens=5)
        assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    none = c.chat.completions.create(model="default_model", messages=USER, tools=[TOOL], tool_choice="none", max_tokens=5)
    assert none.choices[0].message.tool_calls is None


@check
def errors_have_their_classes(o):
    c = client(o.plain)
    ask = lambda **more: lambda: c.chat.completions.create(**{"model": "default_model", "messages": USER, "max_tokens": 2, **more})
    raises(openai.NotFoundError, 404, ask(model="nobody"))
    for fields, param in [
        (dict(temperature=-1), "temperature"),
        (dict(messages=[]), "messages"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
        (dict(logit_bias={"99999999": 1}), "logit_bias"),
        (dict(n=1000), "n"),
        (dict(top_logprobs=50, logprobs=True), "top_logprobs"),
        (dict(store=True), "store"),
        (dict(tools=[{"type": "web_search"}]), "tools[0].type"),
        (dict(tool_choice="required"), "tool_choice"),
        (dict(response_format={"type": "xml"}), "response_format.type"),
        (dict(extra_body={"guided_regex": "a"}), "guided_regex"),
    ]:
        for stream in (False, True):
            error = raises(openai.BadRequestError, 400, ask(stream=stream, **fields))
            assert error.param == param and error.type == "invalid_request_error" and error.code, (fields, error.body)
    error = raises(openai.BadRequestError, 400, ask(messages=[{"role": "user", "content": "word " * 100000}]))
    assert error.code == "context_length_exceeded"


@check
def keys_are_asked_for(o):
    for key in ("wrong", "secre", "secret2"):
        error = raises(openai.AuthenticationError, 401, lambda: client(o.locked, key).models.list())
        assert error.code == "invalid_api_key" and error.response.headers["www-authenticate"] == "Bearer"
    assert client(o.locked, "secret").models.list().data


@check
def a_client_that_leaves_makes_room(o):
    c = client(o.plain)
    for _ in range(3):
        stream = c.chat.completions.create(model="default_model", messages=USER, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert c.chat.completions.create(model="default_model", messages=USER, max_tokens=2).choices


run("openai (Python)", "tools", "plain", "locked")
