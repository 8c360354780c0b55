//! The ways in which the families write a conversation: their special tokens and the shape of their turns, in templates
//! of our own, on tiny models whose tokenizers know those tokens.

use serde_json::json;
use tempfile::TempDir;

use crate::files::write_json;
use crate::tiny::{Family, Tiny, tiny_model};
use crate::tokenizer::tokenizer_with;

/// How a family writes a conversation.
#[derive(Debug, Clone, Copy)]
pub struct ChatStyle {
    /// A name for messages.
    pub name: &'static str,
    /// The family of the model.
    pub family: Family,
    /// Special tokens.
    pub special: &'static [&'static str],
    /// Added tokens that are not special.
    pub plain: &'static [&'static str],
    /// `bos_token`.
    pub bos: Option<&'static str>,
    /// The tokenizer puts `bos` before a text.
    pub adds_bos: bool,
    /// `eos_token`, which ends an answer.
    pub eos: &'static str,
    /// The template knows tools and calls.
    pub tools: bool,
    /// The chat template.
    pub template: &'static str,
}

const CHATML: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// One of each kind that the families have.
pub const CHAT_STYLES: [ChatStyle; 5] = [
    ChatStyle {
        name: "llama 3",
        family: Family::Llama,
        special: &[
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        plain: &[],
        bos: Some("<|begin_of_text|>"),
        adds_bos: true,
        eos: "<|eot_id|>",
        tools: true,
        template: LLAMA3,
    },
    ChatStyle {
        name: "mistral",
        family: Family::Mistral,
        special: &[
            "<unk>",
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
        plain: &[],
        bos: Some("<s>"),
        adds_bos: true,
        eos: "</s>",
        tools: true,
        template: MISTRAL,
    },
    ChatStyle {
        name: "smollm2",
        family: Family::Llama,
        special: &CHATML,
        plain: &[],
        bos: Some("<|im_start|>"),
        adds_bos: false,
        eos: "<|im_end|>",
        tools: false,
        template: SMOLLM2,
    },
    ChatStyle {
        name: "qwen 2",
        family: Family::Qwen2,
        special: &CHATML,
        plain: &["<tool_call>", "</tool_call>"],
        bos: None,
        adds_bos: false,
        eos: "<|im_end|>",
        tools: true,
        template: QWEN2,
    },
    ChatStyle {
        name: "qwen 3",
        family: Family::Qwen3,
        special: &CHATML,
        plain: &["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
        bos: None,
        adds_bos: false,
        eos: "<|im_end|>",
        tools: true,
        template: QWEN3,
    },
];

impl ChatStyle {
    /// A tiny dense model of the family, of one layer, that writes conversations so.
    pub fn model(&self) -> TempDir {
        let mut tiny = Tiny { layers: 1, vocab: 320, ..Tiny::new(self.family) };
        let bos = self.bos.filter(|_| self.adds_bos);
        let tokenizer = tokenizer_with(self.special, self.plain, bos);
        let added = tokenizer["added_tokens"].as_array().expect("a list");
        let eos = added.iter().find(|token| token["content"] == self.eos).expect("the end token");
        tiny.extra.insert("eos_token_id".into(), eos["id"].clone());
        let dir = tiny_model(&tiny);
        let config = json!({"bos_token": self.bos, "eos_token": self.eos, "chat_template": self.template});
        for (name, value) in [
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", &config),
            ("generation_config.json", &json!({"eos_token_id": eos["id"]})),
        ] {
            write_json(&dir.path().join(name), value);
        }
        dir
    }
}

const LLAMA3: &str = r"{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|end_header_id|>\n\n' }}
    {%- if tools and loop.first %}{{- 'You can call: ' ~ (tools | tojson) ~ '\n\n' }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}
    {%- endfor %}
    {{- (m.content or '') | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const MISTRAL: &str = r"{{- bos_token }}
{%- set before = namespace(text='') %}
{%- for m in messages %}
    {%- if m.role == 'system' and loop.first %}
        {%- set before.text = m.content ~ '\n\n' %}
    {%- elif m.role == 'user' %}
        {%- if tools and before.text is not none %}{{- '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST] ' ~ (before.text or '') ~ m.content ~ '[/INST]' }}
        {%- set before.text = none %}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {{- '[TOOL_CALLS] ' }}
        {%- for call in m.tool_calls %}
            {{- [{'name': call.function.name, 'arguments': call.function.arguments}] | tojson }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' ~ m.content | trim ~ eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' ~ ({'content': m.content} | tojson) ~ '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('a message from ' ~ m.role ~ ' has no place here') }}
    {%- endif %}
{%- endfor %}";

const SMOLLM2: &str = r"
{%- for m in messages %}
    {%- if loop.first and m.role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}";

const QWEN2: &str = r"
{%- set own = messages[0].role == 'system' %}
{{- '<|im_start|>system\n' ~ (messages[0].content if own else 'You help.') }}
{%- if tools %}{{- '\n<tools>\n' }}{% for tool in tools %}{{- tool | tojson ~ '\n' }}{% endfor %}{{- '</tools>' }}{% endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- elif not (own and loop.first) %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\n' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) ~ '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}";

const QWEN3: &str = r"
{%- set own = messages[0].role == 'system' %}
{%- if own or tools %}
    {{- '<|im_start|>system\n' ~ (messages[0].content if own else '') }}
    {%- if tools %}{{- '\n<tools>\n' }}{% for tool in tools %}{{- tool | tojson ~ '\n' }}{% endfor %}{{- '</tools>' }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set asked = namespace(at=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set parts = (m.content or '').split('</think>') %}
        {%- set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > asked.at and (loop.last or thought) %}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- parts[-1].lstrip('\n') }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\n' ~ ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) ~ '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (own and loop.first) %}
        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}";
