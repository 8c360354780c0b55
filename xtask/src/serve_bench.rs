//! `cargo xtask serve-bench`: what serving costs beside the model. Eight answers at a time of one adapter against eight of
//! eight different ones; and of the server's time, what is not spent in passes through the model.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::children::Temporary;
use crate::http;
use crate::live::{Live, base, numbers, train};

/// Answers at a time, and adapters.
const TOGETHER: usize = 8;
/// Tokens of an answer.
const TOKENS: usize = 128;

pub(crate) fn task(args: &[String]) -> Result<()> {
    let ([rounds], given) = numbers(args, [("--rounds", 5)])?;
    let (graft, base) = base(given.as_deref())?;
    let temporary = Temporary::new()?;
    let dirs: Vec<PathBuf> = (0..TOGETHER).map(|n| temporary.0.join(format!("v{n}"))).collect();
    for (dir, seed) in dirs.iter().zip(0..) {
        train(&graft, &base, dir, seed, false)?;
    }
    let live = Live::start(&graft, &base, temporary.0.join("root"))?;
    let names: Vec<String> = (0..TOGETHER).map(|n| format!("a{n}")).collect();
    for (dir, name) in dirs.iter().zip(&names) {
        live.publish(dir, name)?;
        live.load(name, name, None)?;
    }
    let same = vec!["a0".to_owned(); TOGETHER];
    let plain = vec!["base".to_owned(); TOGETHER];
    let all = [("base", &plain), ("one adapter", &same), ("eight adapters", &names)];
    let mut speeds = vec![Vec::new(); all.len()];
    let (mut seconds, mut threads) = (live.stats()?["seconds"].clone(), live.server.process.cpu_seconds());
    for round in 0..=rounds {
        for ((_, models), speeds) in all.iter().zip(&mut speeds) {
            let speed = speed(&live, models)?;
            // The first round warms up.
            if round > 0 {
                speeds.push(speed);
            }
        }
        if round == 0 {
            seconds = live.stats()?["seconds"].clone();
            threads = live.server.process.cpu_seconds();
        }
    }
    let [plain, one, eight] = [0, 1, 2].map(|at| {
        let mut speeds = speeds[at].clone();
        speeds.sort_by(f64::total_cmp);
        speeds[speeds.len() / 2]
    });
    for ((name, _), speed) in all.iter().zip([plain, one, eight]) {
        println!("{TOGETHER} at a time, {name:<14} {speed:>7.1} tokens/s");
    }
    let cost = one / eight - 1.0;
    println!("eight different adapters cost {:.1} % against one", 100.0 * cost);
    let now = live.stats()?["seconds"].clone();
    let spent = |field: &str| number(&now[field]) - number(&seconds[field]);
    let outside = 1.0 - spent("in_passes") / spent("busy");
    println!("scheduling, sampling and text: {:.2} % of the engine's time", 100.0 * outside);
    let (mut all_cpu, mut http_cpu) = (0.0, 0.0);
    for (name, now) in live.server.process.cpu_seconds() {
        let used = now - threads.get(&name).copied().unwrap_or_default();
        all_cpu += used;
        if name.starts_with("tokio") {
            http_cpu += used;
        }
    }
    if all_cpu > 0.0 {
        println!("HTTP: {:.2} % of the processor time", 100.0 * http_cpu / all_cpu);
        ensure!(http_cpu / all_cpu + outside < 0.03, "HTTP and scheduling cost 3 % or more of a step");
    }
    ensure!(cost <= 0.15, "eight adapters cost more than 15 %");
    Ok(())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

/// Tokens a second of answers asked for at once.
fn speed(live: &Live, models: &[String]) -> Result<f64> {
    let began = Instant::now();
    let tokens = std::thread::scope(|scope| -> Result<u64> {
        let asked = models.iter().zip(0_u64..).map(|(model, n)| scope.spawn(move || answer(live, model, n)));
        let asked: Vec<_> = asked.collect();
        let mut sum = 0;
        for thread in asked {
            sum += thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(sum)
    })?;
    Ok(tokens as f64 / began.elapsed().as_secs_f64())
}

/// Streams an answer; its tokens.
fn answer(live: &Live, model: &str, n: u64) -> Result<u64> {
    let body = json!({
        "model": model, "prompt": format!("{n} things to know about rain:"), "max_tokens": TOKENS, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut tokens = 0;
    http::events(&live.server.address, "/v1/completions", &body, |event| {
        tokens = event["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
        true
    })?;
    if tokens == 0 { bail!("{model} answers nothing") } else { Ok(tokens) }
}
