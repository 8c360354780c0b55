//! `graft adapter extract`: a LoRA adapter out of two models, by weight and by what it does to the answers.

use super::fuse_rows;
use super::fuse_verify::{distance, kept, over, perplexity};
use super::load::{self, Loaded};
use super::merge::{progress, say, size};
use crate::args::ExtractArgs;
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::{host, ui};
use anyhow::{Context, Result, anyhow, bail};
use graft_adapters::{Origin, Route};
use graft_merge::{ExtractOptions, MERGE_REPORT_FILE, Size};
use graft_model::{Sampler, Sampling, Text, compare};
use graft_ops::{Array, Dtype, Rows, ffi};
use graft_quant::Checkpoint;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens that a text of the fine-tuned model's own has, at most.
const DRAWN: usize = 32;

/// Extracts, and measures how far the base with the adapter is from the fine-tuned model.
pub(crate) fn extract(args: &ExtractArgs) -> Result<()> {
    if args.verify_rows == 0 {
        bail!(Usage("--verify-rows must be at least 1; --verify layers measures no rows".into()));
    }
    let measures = args.verify == "model";
    if measures {
        // What stands in the way is found out before the work.
        load::config(&args.model).context(WITHOUT)?;
        args.data.as_deref().map(fuse_rows::named).transpose()?;
    }
    let open = |name: &String| -> Result<(Checkpoint, Origin)> {
        let checkpoint = Checkpoint::open(&hub::resolve(name, What::Model)?)?;
        let origin = Origin::of_model(&checkpoint, name)?;
        Ok((checkpoint, origin))
    };
    let ((base, base_origin), (tuned, tuned_origin)) = (open(&args.model)?, open(&args.tuned)?);
    let options = ExtractOptions {
        size: size(args.size.rank, args.size.energy).unwrap_or(Size::Full),
        leave_out: args.leave_out,
        seed: args.seed,
        base: base_origin,
        tuned: tuned_origin,
    };
    let out = PathBuf::from(&args.save_path);
    let report = progress("matrices", |stop, on_event| {
        graft_merge::extract((&base, &tuned), &options, &out, stop, on_event)
    })
    .with_context(|| format!("cannot take an adapter out of {}", args.tuned))?;
    drop((base, tuned));
    if !args.json {
        say(&report, &format!("Extracted {} from {}", args.tuned, args.model), &out);
    }
    let mut value = serde_json::to_value(&report)?;
    if measures {
        let stop = host::stop_flag(|| ui::note("stopping; once more stops at once"));
        value["model"] = measure(args, &out, &stop).context(WITHOUT)?;
        let file = out.join(MERGE_REPORT_FILE);
        graft_quant::write_atomic(&file, format!("{value:#}").as_bytes())?;
        if !args.json {
            say_model(&value["model"]);
        }
    }
    if args.json {
        ui::out(&format!("{value:#}"));
    }
    Ok(())
}

const WITHOUT: &str = "the adapter's effect cannot be measured (--verify layers does without)";

/// KL(tuned || base with the adapter) beside KL(tuned || base), one model in memory at a time.
fn measure(args: &ExtractArgs, out: &Path, stop: &AtomicBool) -> Result<Value> {
    let stopped = || Interrupted("Interrupted before the adapter was measured; it is saved.".into());
    let run = |texts: &[Text], loaded: &Loaded, route: &Route, name: &str| {
        over(texts, loaded, route, name, stop)?.ok_or_else(|| anyhow!(stopped()))
    };
    let (data, texts, tuned) = {
        let loaded = Loaded::open(&args.tuned)?;
        let (data, texts) = match &args.data {
            Some(data) => {
                let (file, texts) = fuse_rows::of_data(data, args.verify_rows, &loaded.encoder())?;
                (file.display().to_string(), texts)
            }
            None => {
                let texts = drawn(&loaded, args.verify_rows, args.seed, stop)?;
                (format!("drawn from {}", args.tuned), texts.ok_or_else(stopped)?)
            }
        };
        let run = run(&texts, &loaded, &Route::Base, "fine-tuned model")?;
        (data, texts, run)
    };
    let loaded = Loaded::open(&args.model)?;
    let base = run(&texts, &loaded, &Route::Base, "base")?;
    let route = loaded.route(out.to_str())?;
    let adapter = run(&texts, &loaded, &route.route(), "base with the adapter")?;
    let gaps = |other| {
        compare(&tuned, other, &texts, &mut || !stop.load(Ordering::Relaxed))?
            .ok_or_else(|| anyhow!(stopped()))
    };
    let (to_base, to_adapter) = (gaps(&base)?, gaps(&adapter)?);
    Ok(json!({
        "data": data, "rows": texts.len(), "tokens": to_base.len(),
        "adapter": distance(&texts, &to_adapter), "base": distance(&texts, &to_base),
        "kept": kept(&texts, &to_adapter, &to_base),
        "perplexity": {
            "base": perplexity(&to_base, 1), "adapter": perplexity(&to_adapter, 1), "tuned": perplexity(&to_base, 0),
        },
    }))
}

/// Texts that the model writes when it is asked nothing, each from its own seed: where no rows are given, these are the ones
/// on which it should be met. None where `stop` was set.
fn drawn(loaded: &Loaded, count: usize, seed: u64, stop: &AtomicBool) -> Result<Option<Vec<Text>>> {
    let tokenizer = &loaded.tokenizer;
    let Some(first) = tokenizer.bos_id().or(tokenizer.eos_id()) else {
        bail!("the tokenizer has neither a token that begins nor one that ends a text: give --data");
    };
    let sampler = |text: usize| {
        Sampler::new(&Sampling {
            temperature: 1.0,
            seed: Some(seed.wrapping_add(text as u64)),
            ..Sampling::greedy()
        })
    };
    let mut samplers = (0..count).map(sampler).collect::<graft_model::Result<Vec<_>>>()?;
    let mut texts = vec![vec![first]; count];
    let ended =
        |text: &[u32]| text.len() > 1 && text.last().is_some_and(|id| tokenizer.eos_ids().contains(id));
    let progress = ui::Progress::new(DRAWN as u64, "drawing texts");
    for done in 0..DRAWN {
        progress.at(done as u64, String::new());
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let live: Vec<usize> = (0..count).filter(|text| !ended(&texts[*text])).collect();
        let lengths: Vec<i32> = live.iter().map(|text| texts[*text].len() as i32).collect();
        let ids = live.iter().flat_map(|text| texts[*text].iter().map(|id| *id as i32));
        let total: i32 = lengths.iter().sum();
        if total == 0 {
            break;
        }
        let mut end = 0;
        let ends = lengths.iter().map(|length| {
            end += length;
            end - 1
        });
        let ends = Array::from_iter(ends.collect::<Vec<_>>(), &[live.len() as i32]);
        let tokens = Array::from_iter(ids.collect::<Vec<_>>(), &[total]);
        let hidden = loaded.model.hidden(&tokens, &Rows::new(lengths), None, &Route::Base)?;
        let logits = loaded.model.logits(&hidden.take_axis(&ends, 0)?, &Route::Base)?;
        let logits = logits.as_dtype(Dtype::Float32)?;
        let rows = ffi::read::<f32>(&logits)?.chunks_exact(logits.dim(1) as usize);
        for (text, logits) in live.into_iter().zip(rows) {
            let (id, _) = samplers[text].sample(logits, &texts[text])?;
            texts[text].push(id);
        }
    }
    progress.done();
    Ok(Some(texts.into_iter().map(|tokens| Text { targets: 1..tokens.len(), tokens }).collect()))
}

fn say_model(model: &Value) {
    let number = |of: &Value| of.as_f64().unwrap_or(f64::NAN);
    let percent = |of: &Value| format!("{:.1} %", 100.0 * number(of));
    let (adapter, kept) = (&model["adapter"], &model["kept"]);
    ui::out(&format!(
        "Answers: {} [{}, {}] of the difference kept; KL(tuned || base with the adapter) {:.2e} (99 %: {:.2e}), \
         KL(tuned || base) {:.2e}; same best token {}",
        percent(&kept["value"]),
        percent(&kept["interval"][0]),
        percent(&kept["interval"][1]),
        number(&adapter["kl"]["value"]),
        number(&adapter["kl_p99"]),
        number(&model["base"]["kl"]["value"]),
        percent(&adapter["agreement"])
    ));
    let p = &model["perplexity"];
    ui::out(&format!(
        "Perplexity: base {:.3}, fine-tuned {:.3}, base with the adapter {:.3} ({} tokens of {} rows, {})",
        number(&p["base"]),
        number(&p["tuned"]),
        number(&p["adapter"]),
        model["tokens"],
        model["rows"],
        model["data"].as_str().unwrap_or_default()
    ));
}
