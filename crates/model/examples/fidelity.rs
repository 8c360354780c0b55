//! What the default precision of answers costs: Kullback-Leibler divergence, agreement of the best token, and perplexity
//! against `--exact`, on a model directory and a text file.
//!
//! `cargo run -p graft-model --example fidelity -- MODEL_DIR TEXT_FILE [WINDOWS]`
#![allow(clippy::print_stdout, reason = "its output is the report")]

use std::error::Error;
use std::path::Path;

use graft_adapters::Route;
use graft_model::{Model, Tokenizer};
use graft_ops::{Array, Dtype, Precision, Rows, set_precision};

/// Tokens of a window, each of which but the first is predicted.
const WINDOW: usize = 256;

/// Log-probabilities (N, V) of each token's successor, by rows.
fn log_probabilities(
    model: &Model,
    ids: &[u32],
    precision: Precision,
) -> Result<Vec<Vec<f64>>, Box<dyn Error>> {
    set_precision(precision);
    let tokens = Array::from_iter(ids.iter().map(|id| *id as i32), &[ids.len() as i32]);
    let hidden = model.hidden(&tokens, &Rows::new(vec![ids.len() as i32]), None, &Route::Base)?;
    let logits = model.logits(&hidden, &Route::Base)?;
    logits.eval()?;
    let rows = logits.as_slice::<f32>().chunks_exact(logits.dim(1) as usize);
    Ok(rows
        .map(|row| {
            let most = row.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
            row.iter().map(|x| f64::from(x - most) - total.ln()).collect()
        })
        .collect())
}

fn best(row: &[f64]) -> Option<usize> {
    (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]))
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, text, rest @ ..] = &args[..] else {
        return Err("usage: fidelity MODEL_DIR TEXT_FILE [WINDOWS]".into());
    };
    let windows: usize = rest.first().map_or(Ok(8), |n| n.parse())?;
    let load = |precision| {
        set_precision(precision);
        Model::load(Path::new(dir), Dtype::Float32)
    };
    let (exact, default) = (load(Precision::F32)?, load(Precision::Int16)?);
    let ids = Tokenizer::load(Path::new(dir))?.encode(&std::fs::read_to_string(text)?, false)?;
    let (mut count, mut divergence, mut agreed, mut losses) = (0.0, 0.0, 0.0, [0.0; 2]);
    for window in ids.chunks_exact(WINDOW).take(windows) {
        let p = log_probabilities(&exact, window, Precision::F32)?;
        let q = log_probabilities(&default, window, Precision::Int16)?;
        for (i, (p, q)) in p.iter().zip(&q).enumerate().take(WINDOW - 1) {
            let target = window[i + 1] as usize;
            divergence += p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            agreed += f64::from(u8::from(best(p) == best(q)));
            losses[0] -= p[target];
            losses[1] -= q[target];
            count += 1.0;
        }
    }
    let [exact, default] = losses.map(|loss| (loss / count).exp());
    println!(
        "{count} tokens: KL {:.2e} nats, best token agrees {:.2} %, perplexity {exact:.4} exact, {default:.4} default ({:+.4} %)",
        divergence / count,
        100.0 * agreed / count,
        100.0 * (default / exact - 1.0)
    );
    Ok(())
}
