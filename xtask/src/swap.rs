//! `cargo xtask swap-proof`: an adapter is trained, published and swapped again and again while clients stream answers, and
//! every answer is shown to come from the version that it names, from its first token to its last.
//!
//! The proof is the version (`adapter_generation`, a hash of the weights) in each event: a text that differs from what that
//! version says alone, in a server of its own, is an answer of wrong weights or of a stale prefix.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::children::Temporary;
use crate::http;
use crate::live::{Live, base, numbers, train};
use crate::pipeline::words;

/// Versions that take turns.
const VERSIONS: usize = 3;
/// Clients at a time.
const CLIENTS: usize = 8;
/// Tokens of an answer.
const TOKENS: usize = 24;
/// What is asked. The first ones begin alike, so that they share a prefix.
const QUESTIONS: [&str; 4] = [
    "turn on the lights in the kitchen and tell me what you did",
    "turn on the lights in the kitchen and close the blinds",
    "write a sentence about rain",
    "name three colours",
];
/// What the process may have grown by that is nothing of ours: the allocators' own.
const SLACK: u64 = 96 << 20;

/// An answer as a client saw it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Answer {
    generation: String,
    question: usize,
    text: String,
}

pub(crate) fn task(args: &[String]) -> Result<()> {
    let ([swaps, streams], given) = numbers(args, [("--swaps", 50), ("--streams", 200)])?;
    let (graft, base) = base(given.as_deref())?;
    let temporary = Temporary::new()?;
    let dirs: Vec<_> = (0..VERSIONS).map(|n| temporary.0.join(format!("v{n}"))).collect();
    train(&graft, &base, &dirs[0], 0, false)?;
    let live = Live::start(&graft, &base, temporary.0.join("root"))?;
    live.publish(&dirs[0], "live")?;
    let mut known = vec![live.load("live", "live", None)?];
    ask(&live.server.address, "live", 0)?;
    let before = (live.settle()?, live.server.process.memory());

    let (stop, count, answers) = (AtomicBool::new(false), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let began = Instant::now();
    let swapped = std::thread::scope(|scope| -> Result<usize> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (live, stop, count, answers) = (&live, &stop, &count, &answers);
                scope.spawn(move || -> Result<()> {
                    for n in client.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let answer = ask(&live.server.address, "live", n % QUESTIONS.len())?;
                        answers.lock().map_err(|_| anyhow::anyhow!("a client panicked"))?.push(answer);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let mut swap = || -> Result<usize> {
            // The other versions are trained while the first one answers.
            for (dir, seed) in dirs.iter().zip(0..).skip(1) {
                train(&graft, &base, dir, seed, seed == 1)?;
                live.publish(dir, "live")?;
                known.push(live.load("live", "live", known.last().map(String::as_str))?);
            }
            let mut done = VERSIONS - 1;
            while done < swaps as usize || count.load(Ordering::Relaxed) < streams as usize {
                let [from, to] = [done, done + 1].map(|n| n % VERSIONS);
                live.publish(&dirs[to], "live")?;
                let now = live.load("live", "live", Some(&known[from]))?;
                ensure!(now == known[to], "the same files are another version: {now}, {}", known[to]);
                done += 1;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(done)
        };
        let swapped = swap();
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        swapped
    })?;
    let seconds = began.elapsed().as_secs_f64();

    let after = live.settle()?;
    ensure!(after["adapters"]["generations"] == 1, "versions that nobody holds are kept: {after}");
    let sizes = [&before.0, &after].map(|stats| stats["adapters"]["bytes"].as_u64().unwrap_or_default());
    let allowed = before.1 + after["kv_bytes"]["cached"].as_u64().unwrap_or_default() + 2 * sizes[1] + SLACK;
    let memory = live.server.process.memory();
    ensure!(memory <= allowed, "the process has grown from {} to {memory} bytes", before.1);
    drop(live);

    let mut flags = words(&["server", "--model", &base, "--model-id", "base"]);
    for (n, dir) in dirs.iter().enumerate() {
        flags.extend(words(&["--adapter", &format!("v{n}={}", dir.display())]));
    }
    let alone = graft.serve(&flags)?;
    let mut expected = BTreeMap::new();
    for (n, generation) in known.iter().enumerate() {
        for question in 0..QUESTIONS.len() {
            let answer = ask(&alone.address, &format!("v{n}"), question)?;
            ensure!(&answer.generation == generation, "v{n} is {}, not {generation}", answer.generation);
            expected.insert((answer.generation, question), answer.text);
        }
    }
    let differ = (0..QUESTIONS.len()).any(|question| {
        let texts = known.iter().map(|generation| &expected[&(generation.clone(), question)]);
        texts.collect::<BTreeSet<_>>().len() == VERSIONS
    });
    ensure!(differ, "the versions cannot be told apart by what they say; nothing would be proved");
    let answers = answers.into_inner().unwrap_or_default();
    let mut by_version: BTreeMap<&str, usize> = BTreeMap::new();
    for answer in &answers {
        match expected.get(&(answer.generation.clone(), answer.question)) {
            Some(text) if *text == answer.text => *by_version.entry(&answer.generation).or_default() += 1,
            Some(text) => {
                bail!("{} says {text:?} alone, but {:?} was answered", answer.generation, answer.text)
            }
            None => bail!("nobody knows the version {}", answer.generation),
        }
    }
    println!(
        "{} streams while an adapter was swapped {swapped} times in {seconds:.0} s: each one is what its version says alone",
        answers.len()
    );
    for (n, generation) in known.iter().enumerate() {
        println!(
            "  v{n} {}: {} streams",
            &generation[..12],
            by_version.get(generation.as_str()).unwrap_or(&0)
        );
    }
    let mib = |bytes: u64| bytes >> 20;
    println!("  memory {} MiB before, {} MiB after", mib(before.1), mib(memory));
    Ok(())
}

/// Streams one answer, whose events must all name one version.
fn ask(address: &str, model: &str, question: usize) -> Result<Answer> {
    let messages = json!([{"role": "user", "content": QUESTIONS[question]}]);
    let body = json!({"model": model, "messages": messages, "max_tokens": TOKENS, "stream": true});
    let (mut text, mut versions) = (String::new(), BTreeSet::new());
    http::events(address, "/v1/chat/completions", &body, |event| {
        text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        versions.insert(event["adapter_generation"].as_str().unwrap_or("none").to_owned());
        true
    })?;
    match versions.into_iter().collect::<Vec<_>>().as_slice() {
        [generation] => Ok(Answer { generation: generation.clone(), question, text }),
        several => bail!("one answer names the versions {several:?}"),
    }
}
