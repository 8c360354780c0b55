//! `graft generate`: one prompt, one answer.

use super::answer::{answer, params, sampling};
use super::load::Loaded;
use crate::args::GenerateArgs;
use crate::errors::Usage;
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_model::Sampling;
use graft_serve::{Ask, Local};
use serde_json::{Map, Value, json};
use std::io::Read;

/// Where the beginning of an answer ends; transformers' continue_final_message uses the same.
const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG";

/// Prints the answer and, unless `--verbose false`, mlx-lm's lines about it.
pub(crate) fn generate(args: &GenerateArgs) -> Result<()> {
    let verbose = !["false", "f"].contains(&args.verbose.to_lowercase().as_str());
    let extra = match &args.chat_template_config {
        Some(text) => json_object("--chat-template-config", text)?,
        None => Map::new(),
    };
    let prompt = match args.prompt.as_str() {
        "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
            text
        }
        // A shell passes `\n` as two characters; mlx-lm reads them as one.
        text => text.replace("\\n", "\n").replace("\\t", "\t"),
    };
    let loaded = Loaded::open(&args.model)?;
    let route = loaded.route(args.adapter_path.as_deref())?;
    let templated = loaded.template.is_some() && !args.ignore_chat_template;
    let text = if templated { render(args, &loaded, &prompt, extra)? } else { prompt };
    let ids = loaded.tokenizer.encode(&text, !templated)?;
    let sampling = Sampling {
        min_p: args.min_p,
        top_k: args.top_k,
        min_tokens_to_keep: args.min_tokens_to_keep,
        ..sampling(&args.sampling, &loaded, args.seed)?
    };
    let ask = Ask { prompt: ids, params: params(&loaded, args.max_tokens, &args.extra_eos_token, sampling)? };
    let opening = if verbose { "==========\n" } else { "" };
    // Nobody comes after it, so nothing of the prompt is kept.
    let mut engine = Local::new(&loaded.model, &loaded.tokenizer, route.route(), 1, 0);
    let answer = answer(&mut engine, ask, opening)?;
    ui::out("");
    if !verbose {
        return Ok(());
    }
    ui::out("==========");
    if answer.text.is_empty() {
        ui::out("No text generated for this prompt");
        return Ok(());
    }
    ui::out(&format!("Prompt: {} tokens, {:.3} tokens-per-sec", answer.prompt_tokens, answer.prompt_speed()));
    ui::out(&format!("Generation: {} tokens, {:.3} tokens-per-sec", answer.tokens, answer.speed()));
    ui::out(&format!("Peak memory: {:.3} GB", host::peak_memory() as f64 / 1e9));
    Ok(())
}

/// The prompt as the template puts it; with `--prefill-response` it ends inside the answer.
fn render(args: &GenerateArgs, loaded: &Loaded, prompt: &str, extra: Map<String, Value>) -> Result<String> {
    let Some(template) = &loaded.template else { return Ok(prompt.to_string()) };
    let mut messages = Vec::new();
    if let Some(system) = &args.system_prompt {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": prompt}));
    let mut variables = loaded.tokenizer.template_variables();
    variables.extend(extra);
    let Some(prefill) = &args.prefill_response else {
        return Ok(template.render(&messages, None, true, &variables)?);
    };
    messages.push(json!({"role": "assistant", "content": format!("{prefill}{TAG} ")}));
    let text = template.render(&messages, None, false, &variables)?;
    let Some((before, after)) = text.rsplit_once(TAG).filter(|(before, _)| before.contains(prefill.trim()))
    else {
        bail!("the chat template does not print --prefill-response, so the answer cannot begin with it");
    };
    // A template that trims what it prints takes the tag's own space away, and would take the answer's too.
    Ok(if after.starts_with(' ') { before } else { before.trim_end() }.to_string())
}

/// The JSON object that a flag holds.
pub(crate) fn json_object(flag: &str, text: &str) -> Result<Map<String, Value>> {
    let wrong = |why: String| {
        Usage(format!("{flag} must be a JSON object such as {{\"enable_thinking\": false}}{why}"))
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => bail!(wrong(String::new())),
        Err(error) => bail!(wrong(format!(": {error}"))),
    }
}
