//! What the default precision of answers costs: Kullback-Leibler divergence, agreement of the best token, and perplexity
//! against `--exact`, on a model directory and a text file.
//!
//! `cargo run -p graft-model --example fidelity -- MODEL_DIR TEXT_FILE [WINDOWS]`
#![allow(clippy::print_stdout, reason = "its output is the report")]

use std::error::Error;
use std::path::Path;

use graft_adapters::Route;
use graft_model::{Model, Run, Text, Tokenizer, compare};
use graft_ops::{Dtype, Precision, set_precision};

/// Tokens of a window, each of which but the first is predicted.
const WINDOW: usize = 256;

fn run(dir: &Path, texts: &[Text], precision: Precision) -> Result<Run, Box<dyn Error>> {
    set_precision(precision);
    let model = Model::load(dir, Dtype::Float32)?;
    Ok(Run::of(&model, &Route::Base, texts, &mut |_| true)?.ok_or("stopped")?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, text, rest @ ..] = &args[..] else {
        return Err("usage: fidelity MODEL_DIR TEXT_FILE [WINDOWS]".into());
    };
    let windows: usize = rest.first().map_or(Ok(8), |n| n.parse())?;
    let dir = Path::new(dir);
    let ids = Tokenizer::load(dir)?.encode(&std::fs::read_to_string(text)?, false)?;
    let windows = ids.chunks_exact(WINDOW).take(windows);
    let texts: Vec<Text> = windows.map(|ids| Text { tokens: ids.to_vec(), targets: 1..WINDOW }).collect();
    // The default comes last: a head that was laid out takes 16 bits where logits are made, the exact one's floats do not.
    let (exact, default) = (run(dir, &texts, Precision::F32)?, run(dir, &texts, Precision::Int16)?);
    let gaps = compare(&exact, &default, &texts, &mut || true)?.ok_or("stopped")?;
    let count = gaps.len() as f64;
    let mean = |of: fn(&graft_model::Gap) -> f64| gaps.iter().map(of).sum::<f64>() / count;
    let (exact, default) = (mean(|gap| gap.losses[0]).exp(), mean(|gap| gap.losses[1]).exp());
    println!(
        "{count} tokens: KL {:.2e} nats, best token agrees {:.2} %, perplexity {exact:.4} exact, {default:.4} default ({:+.4} %)",
        mean(|gap| gap.kl),
        100.0 * mean(|gap| f64::from(u8::from(gap.agree))),
        100.0 * (default / exact - 1.0)
    );
    Ok(())
}
