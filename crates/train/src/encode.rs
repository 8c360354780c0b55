//! The encoder that a model directory gives: its tokenizer and its chat template.

use graft_model::{ChatTemplate, Tokenizer};
use serde_json::{Map, Value};

use crate::data::{Encoder, Marks, RowResult};

/// The tokenizer and chat template of a model directory.
pub struct ModelEncoder<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template; without one only text rows can be encoded.
    pub template: Option<&'a ChatTemplate>,
    /// Further variables of the template (mlx-lm gives `enable_thinking`, true where the vocabulary has thinking tokens).
    pub extra: Map<String, Value>,
    /// The token that ends a text row.
    pub eos: Option<u32>,
}

impl Encoder for ModelEncoder<'_> {
    fn encode(&self, text: &str, special: bool) -> RowResult<Vec<u32>> {
        self.tokenizer.encode(text, special).map_err(|e| e.to_string())
    }

    fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> RowResult<String> {
        let template = self.template.ok_or(
            "the model has no chat template, which rows of messages or completions need: use {\"text\": ...} rows",
        )?;
        template.render(messages, tools, add_generation_prompt, &self.extra).map_err(|e| e.to_string())
    }

    fn eos(&self) -> Option<u32> {
        self.eos
    }

    fn marks(&self) -> Marks {
        Marks {
            bos: self.tokenizer.bos_id(),
            ends: self.tokenizer.eos_ids().clone(),
            special: self.tokenizer.special_tokens(),
        }
    }
}
