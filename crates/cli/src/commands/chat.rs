//! `graft chat`: a conversation in the terminal.

use super::answer::{answer, params, sampling};
use super::load::Loaded;
use crate::args::ChatArgs;
use crate::ui;
use anyhow::Result;
use graft_serve::{Ask, Local};
use serde_json::{Value, json};
use std::io::{BufRead, IsTerminal};

const HELP: &str = "The commands: q quits, r forgets the conversation, h shows this.";

/// Reads a line, answers it, until `q` or the end of the input.
pub(crate) fn chat(args: &ChatArgs) -> Result<()> {
    let loaded = Loaded::open(&args.model)?;
    let route = loaded.route(args.adapter_path.as_deref())?;
    let params = params(&loaded, args.max_tokens, &[], sampling(&args.sampling, &loaded, Some(args.seed))?)?;
    // What was read of a conversation is not read again; one that was forgotten makes room for the next.
    let kept = 2 * usize::try_from(loaded.model.config().max_positions).unwrap_or(0);
    let mut engine = Local::new(&loaded.model, &loaded.tokenizer, route.route(), 1, kept);
    ui::note(&format!("Chatting with {}. {HELP}", args.model));
    let shown = std::io::stdin().is_terminal();
    let opening: Vec<Value> =
        args.system_prompt.iter().map(|system| json!({"role": "system", "content": system})).collect();
    let mut messages = opening.clone();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if shown {
            ui::print(">> ");
        }
        let Some(line) = lines.next().transpose()? else { return Ok(()) };
        match line.trim() {
            "" => {}
            "q" => return Ok(()),
            "h" => ui::note(HELP),
            "r" => {
                messages.clone_from(&opening);
                ui::note("The conversation is forgotten.");
            }
            query => {
                messages.push(json!({"role": "user", "content": query}));
                let prompt = match &loaded.template {
                    Some(template) => {
                        let text =
                            template.render(&messages, None, true, &loaded.tokenizer.template_variables())?;
                        loaded.tokenizer.encode(&text, false)?
                    }
                    None => loaded.tokenizer.encode(query, true)?,
                };
                let answer = answer(&mut engine, Ask { prompt, params: params.clone() }, "")?;
                ui::out("");
                if shown {
                    ui::note(&format!("{} tokens, {:.1} tokens-per-sec", answer.tokens, answer.speed()));
                }
                messages.push(json!({"role": "assistant", "content": answer.text}));
            }
        }
    }
}
