//! `graft perplexity`: how well a model, with or without an adapter, predicts local text.

use super::load::Loaded;
use crate::args::{DEFAULT_DATA, PerplexityArgs};
use crate::errors::Usage;
use crate::hub::{self, What};
use crate::{host, ui};
use anyhow::{Result, bail};
use graft_ops::{Array, Rows};
use graft_train::{DataConfig, Rng, Row, Split, read_rows};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Rows that are tokenized at a time, so that a large file is read only as far as it is needed.
const ROWS: usize = 256;

/// Packs shuffled rows into windows of fixed length and reports `exp` of the mean loss with its standard error.
pub(crate) fn perplexity(args: &PerplexityArgs) -> Result<()> {
    if args.sequence_length < 2 || args.batch_size == 0 {
        bail!(Usage("--sequence-length must be at least 2 and --batch-size at least 1".into()));
    }
    let file = data_file(&args.data_path)?;
    let rows = read_rows(&file)?;
    let loaded = Loaded::open(&args.model)?;
    let route = loaded.route(args.adapter_path.as_deref())?;
    let windows = windows(args, &loaded, &file, &rows)?;
    if windows.is_empty() {
        bail!(
            "{}: its {} rows are shorter than one window of {} tokens; give more text or a smaller --sequence-length",
            file.display(),
            rows.len(),
            args.sequence_length
        );
    }
    let start = Instant::now();
    let progress = ui::Progress::new(windows.len() as u64, "windows");
    let mut losses: Vec<f32> = Vec::new();
    for (i, batch) in windows.chunks(args.batch_size).enumerate() {
        losses.extend(batch_losses(&loaded, &route.route(), batch)?);
        progress.at(((i + 1) * args.batch_size).min(windows.len()) as u64, String::new());
    }
    progress.done();
    let seconds = start.elapsed().as_secs_f64();
    let count = losses.len() as f64;
    let mean = losses.iter().map(|l| f64::from(*l)).sum::<f64>() / count;
    let variance =
        losses.iter().map(|l| (f64::from(*l) - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    let perplexity = mean.exp();
    let error = perplexity * (variance / count).sqrt();
    let peak = host::peak_memory();
    if args.json {
        let report = json!({
            "schema": 1, "model": args.model, "adapter": args.adapter_path, "data": file.display().to_string(),
            "perplexity": perplexity, "standard_error": error, "loss": mean, "tokens": losses.len(),
            "windows": windows.len(), "seconds": seconds, "peak_memory_bytes": peak,
        });
        ui::out(&serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    ui::out(&format!("Model: {}", args.model));
    if let Some(adapter) = &args.adapter_path {
        ui::out(&format!("Adapter: {adapter}"));
    }
    ui::out(&format!("Perplexity: {perplexity:.3} ± {error:.3}"));
    ui::out(&format!("Evaluation time: {seconds:.2} seconds"));
    ui::out(&format!("Peak memory: {:.2} GB", peak as f64 / 1e9));
    ui::out(&format!("Tokens per second: {:.0}", count / seconds.max(1e-9)));
    ui::out(&format!(
        "Total samples: {}, total tokens: {}",
        windows.len(),
        windows.len() * args.sequence_length
    ));
    Ok(())
}

/// The file itself, or the first of test, valid and train in a directory.
fn data_file(argument: &str) -> Result<PathBuf> {
    let path = Path::new(argument);
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    if argument == DEFAULT_DATA && !path.exists() {
        bail!(Usage(format!(
            "--data-path is required: mlx_lm's default {DEFAULT_DATA} is kept as parquet, which graft does not read; give \
             FILE.jsonl or a directory with test.jsonl, valid.jsonl or train.jsonl"
        )));
    }
    let dir = hub::resolve(argument, What::Data)?;
    let names = ["test.jsonl", "valid.jsonl", "train.jsonl"];
    match names.iter().map(|n| dir.join(n)).find(|f| f.exists()) {
        Some(file) => Ok(file),
        None => bail!("{} holds none of {}", dir.display(), names.join(", ")),
    }
}

/// Whole windows of the rows' tokens, in an order that the seed decides.
fn windows(args: &PerplexityArgs, loaded: &Loaded, file: &Path, rows: &[Row]) -> Result<Vec<Vec<u32>>> {
    let config = DataConfig::new(false, usize::MAX);
    let wanted = usize::try_from(args.num_samples).ok().filter(|n| *n > 0);
    let order = Rng::new(args.seed).permutation(rows.len());
    let mut tokens = Vec::new();
    for chunk in order.chunks(ROWS) {
        let chunk: Vec<Row> = chunk.iter().filter_map(|i| rows.get(*i)).cloned().collect();
        let split = Split::from_rows(file, &chunk, &loaded.encoder(), &config)?;
        split.check_vocabulary(loaded.model.config().vocab as usize)?;
        tokens.extend(split.examples.into_iter().flat_map(|e| e.tokens));
        if wanted.is_some_and(|n| tokens.len() >= n * args.sequence_length) {
            break;
        }
    }
    let windows = tokens.chunks_exact(args.sequence_length).map(<[u32]>::to_vec);
    Ok(windows.take(wanted.unwrap_or(usize::MAX)).collect())
}

/// Losses of all tokens but each window's first.
fn batch_losses(loaded: &Loaded, route: &graft_adapters::Route, batch: &[Vec<u32>]) -> Result<Vec<f32>> {
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for window in batch {
        inputs.extend(window[..window.len() - 1].iter().map(|t| *t as i32));
        targets.extend(window[1..].iter().map(|t| *t as i32));
    }
    let array = |ids: &[i32]| Array::from_slice(ids, &[ids.len() as i32]);
    let rows =
        Rows { lengths: batch.iter().map(|w| w.len() as i32 - 1).collect(), starts: vec![0; batch.len()] };
    let hidden = loaded.model.hidden(&array(&inputs), &rows, None, route)?;
    let losses = loaded.model.losses(&hidden, &array(&targets), route)?;
    Ok(graft_ops::ffi::read::<f32>(&losses)?.to_vec())
}
