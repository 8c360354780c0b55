"""Writes the golden files of tests/text.rs: chat.json with transformers, sample.json with mlx-lm.

Usage: python text.py (in an environment with transformers and mlx-lm). The templates are ours; they use the constructs
of the templates of well known families.
"""

import json
import math
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message is taken out of the list. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("No first user message to put the tools into") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call at once") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""

THINK = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Lines that blocks stand on, control of space, loops that end early, scopes, printing of every kind of value.
MIXED = """Start
{% for m in messages %}
    {% if m.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if m.role == 'stop' %}{% break %}{% endif %}
  {{ m.role.upper() }}:  {{ m.content }}
    {%+ if true %}kept{% endif +%}
  {% generation %}
    said {{ m.content }}
  {% endgeneration %}
  {%- generation -%}  tight  {%- endgeneration -%}
{% endfor %}
{% set ns = namespace(n=0) %}
{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}
{{ ns.n }} {{ none }} {{ true }} {{ missing }} {{ [1, 'a', none, 2.5] }} {{ {'k': 'v'} }} {{ 1.0 }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ 7 / 2 }}
{{ values | tojson }}
{{ values | tojson(indent=2) }}
{{ values | tojson(sort_keys=true, separators=(',', ':')) }}
{{ values | tojson(ensure_ascii=true) }}
{{ 'a,b,c'.split(',') | join('-') }} {{ 'x' ~ 1 ~ true }} {{ '  pad '.strip() }}{{ "title case".title() }} {{ 'abc'[::-1] }} {{ 'aXbX'.replace('X', '.') }}
{{ messages | map(attribute='role') | list }} {{ messages | rejectattr('role', 'equalto', 'skip') | list | length }}
{%- for key, value in values | items %} {{ key }}={{ value }}{% if not loop.last %};{% endif %}{% endfor %}
{% for key, value in values.items() | list %}{{ loop.index }}/{{ loop.length }} {% endfor %}
{% macro show(x, y='d') %}<{{ x }}|{{ y }}>{% endmacro %}{{ show(1) }}{{ show('a', y=2) }}
{{ values.get('absent', 'fallback') }} {{ values.text is string }} {{ values.list is iterable }} {{ values.map is mapping }} {{ 3 is odd }} {{ values.get('absent') is none }}
{{ "%s and %d" | format("one", 2) }} {{ 'ab' if false else 'cd' }} {{ 'inline' if false }}|{{ (1, 2) | length }} {{ [3, 1, 2] | sort | first }} {{ values.list | last }}
{{ values | dictsort }} {{ 'a' in 'abc' }} {{ 'k' in {'k': 1} }} {{ messages[0]['content'][:3] }} {{ messages[-1].content | length }} {{ not tools }}
{{ '\\n'.join(['x', 'y']) }} {{ 'end' | default('no') }} {{ missing | default('yes') }} {{ 'é & <b>' }} {{ "it's" }} {{ ["it's", 'q"'] }}
{# a comment #}
Done
"""

# Every way in which a value becomes text, for values that Python prints in its own way.
PRINTED = """{% for x in values %}{{ x }} {{ [x] }} {{ x | string }} {{ [x, x] | join(', ') }}
{% endfor %}
{{ {'k': (1,), 2: (1, 2)} }} {{ () }} {{ 1e300 * 1e300 }} {{ [-1e300 * 1e300] }} {{ values[:2] + [1e16, 1e15] }}
{{ values | join }} {{ 1e-5 }} {{ 1e16 | string | length }} {{ [missing] }}
"""

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather <now> & here: \"so\"",
     "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Stadt, z. B. Köln"},
                    "days": {"type": "integer", "default": 3}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "time", "description": "Time", "parameters": {"type": "object", "properties": {}}}},
]
USER = {"role": "user", "content": "  How is the weather in Köln? 'quoted' <b>  "}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "x": [1.5, None, True]}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "{\"degrees\": 21}"}
ANSWER = {"role": "assistant", "content": "21 degrees."}
PRINTABLE = [0.1, 1e16, 123456789.125, 1e-4, 1e-5, -1e-300, 0.0, 7, True, None, [], {"a": [1e22]}, "it's", "\"", "it's \"", "\\ \0 \x1b \x7f \x85",
             "\u0301 \u00a0 \u00ad \u200d \u2029 \u3000 \ufeff \ue000 \u0378", "👩\u200d👧 \U000e0001 \U0001f600 ünï 你 กำ"]
VALUES = {"text": "ü\n\"<&>'\u007f\u2028", "list": [1, 2.0, 1e20, 1e-7, -0.0, 123456789012345680.0, 0.1], "map": {"b": None, "a": [True, {}, []]}, "empty": {}}

CASES = [
    ("chatml", CHATML, [USER], None, True, {}),
    ("chatml system", CHATML, [SYSTEM, USER, ANSWER], None, False, {}),
    ("headers", HEADERS, [SYSTEM, USER], None, True, {"date_string": "1 Jan 2025"}),
    ("headers tools", HEADERS, [SYSTEM, USER, CALL, RESULT, ANSWER], TOOLS, True, {"date_string": "1 Jan 2025"}),
    ("headers tools in system", HEADERS, [USER, CALL, {**RESULT, "content": {"degrees": 21.5}}], TOOLS, True,
     {"date_string": "1 Jan 2025", "tools_in_user_message": False}),
    ("headers no user", HEADERS, [SYSTEM], TOOLS, True, {"date_string": "1 Jan 2025"}),
    ("inst", INST, [SYSTEM, USER, ANSWER, USER], None, True, {}),
    ("inst tools", INST, [USER, CALL, RESULT, ANSWER, USER], TOOLS, True, {}),
    ("inst result object", INST, [USER, CALL, {**RESULT, "content": {"content": 21}}], TOOLS, True, {}),
    ("inst wrong order", INST, [USER, USER], None, True, {}),
    ("think", THINK, [SYSTEM, USER], None, True, {}),
    ("think off", THINK, [USER], None, True, {"enable_thinking": False}),
    ("think on", THINK, [USER], None, True, {"enable_thinking": True}),
    ("think tools", THINK, [SYSTEM, USER, CALL, RESULT, RESULT, ANSWER], TOOLS, True, {}),
    ("think history", THINK, [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER,
                              {"role": "assistant", "content": "<think>\nwell\n</think>\n\nNo."}], None, False, {}),
    ("think field", THINK, [USER, {"role": "assistant", "content": "No.", "reasoning": "because"}], None, False, {}),
    ("think arguments as text", THINK, [USER, {"role": "assistant", "content": "I call", "tool_calls": [
        {"function": {"name": "time", "arguments": "{}"}}, {"name": "time", "arguments": {}}]}], TOOLS, False, {}),
    ("mixed", MIXED, [USER, {"role": "skip", "content": "no"}, ANSWER, {"role": "stop", "content": "never"}], None, False, {"values": VALUES}),
    ("printed", PRINTED, [USER], None, False, {"values": PRINTABLE}),
]

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chat():
    from transformers.utils.chat_template_utils import render_jinja_template

    out = []
    for name, template, messages, tools, generation, extra in CASES:
        try:
            rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template,
                                                add_generation_prompt=generation, **{**TOKENS, **extra})
            expected, error = rendered[0], None
        except Exception as e:
            expected, error = None, str(e)
        out.append({"name": name, "template": name.split()[0], "messages": messages, "tools": tools,
                    "add_generation_prompt": generation, "extra": extra, "expected": expected, "error": error})
    templates = {name.split()[0]: template for name, template, *_ in CASES}
    text = json.dumps({"tokens": TOKENS, "templates": templates, "cases": out}, ensure_ascii=False, indent=1)
    (HERE / "chat.json").write_text(text + "\n")


def sample():
    import mlx.core as mx
    from mlx_lm import sample_utils as s

    rng = np.random.default_rng(7)
    filters = [{}, {"top_p": 0.5}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_p": 0.6, "min_tokens_to_keep": 4}, {"top_k": 5}, {"top_k": 1},
               {"xtc_probability": 1.0, "xtc_threshold": 0.05}, {"xtc_probability": 1.0, "xtc_threshold": 0.02, "xtc_special_tokens": [3, 5]},
               {"top_p": 0.8, "min_p": 0.05, "top_k": 4, "xtc_probability": 1.0, "xtc_threshold": 0.2}]
    penalties = [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7, "repetition_context_size": 3}, {"presence_penalty": 0.5},
                 {"frequency_penalty": 0.25, "frequency_context_size": 6}, {"logit_bias": {2: 3.0, 9: -100.0}},
                 {"logit_bias": {1: 1.5}, "repetition_penalty": 1.1, "presence_penalty": -0.2, "frequency_penalty": 0.3}]
    cases = []
    for i in range(14):
        penalty, filt = penalties[i % len(penalties)], filters[i % len(filters)]
        logits = (rng.normal(size=24) * 2).astype(np.float32)
        history = rng.integers(0, 24, size=12).tolist()
        x = mx.array(logits)[None]
        for p in s.make_logits_processors(**penalty):
            x = p(mx.array(history), x)
        lp = x - mx.logsumexp(x, axis=-1, keepdims=True)
        y = lp
        if 0 < filt.get("top_p", 0) < 1:
            y = s.apply_top_p(y, filt["top_p"])
        if filt.get("min_p", 0):
            y = s.apply_min_p(y, filt["min_p"], filt.get("min_tokens_to_keep", 1))
        if filt.get("xtc_probability", 0):
            y = s.apply_xtc(y, 1.0, filt["xtc_threshold"], filt.get("xtc_special_tokens", []))
        if filt.get("top_k", 0):
            y = s.apply_top_k(y, filt["top_k"])
        kept = [j for j, v in enumerate(np.array(y)[0]) if v > -math.inf]
        cases.append({"penalties": {k: (list(v.items()) if k == "logit_bias" else v) for k, v in penalty.items()}, "filters": filt,
                      "logits": [float(v) for v in logits], "history": history,
                      "logprobs": [float(v) for v in np.array(lp)[0]], "kept": kept})
    (HERE / "sample.json").write_text(json.dumps(cases) + "\n")


chat()
sample()
