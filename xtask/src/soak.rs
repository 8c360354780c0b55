//! `cargo xtask soak`: a server under clients of all kinds (patient, leaving, slow, sending garbage, swapping adapters) for
//! some minutes, and what it then still holds: memory, threads, files, places, leases.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::children::Temporary;
use crate::http;
use crate::live::{Live, base, numbers, train};

/// Clients at a time, besides the one that swaps and the one that asks for /health.
const CLIENTS: u64 = 12;
/// Resident bytes by which the process may differ from what it had when all kinds of requests had been seen.
const SLACK: u64 = 64 << 20;
/// How long /health may take for 99 of 100.
const HEALTH: Duration = Duration::from_millis(50);

/// What was done.
#[derive(Default)]
struct Counts {
    whole: AtomicU64,
    left: AtomicU64,
    slow: AtomicU64,
    garbage: AtomicU64,
    swaps: AtomicU64,
    bad_loads: AtomicU64,
}

/// Numbers that look random and are the same each time (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

pub(crate) fn task(args: &[String]) -> Result<()> {
    let ([minutes, seconds], given) = numbers(args, [("--minutes", 15), ("--seconds", 0)])?;
    let length = Duration::from_secs(if seconds > 0 { seconds } else { 60 * minutes });
    let (graft, base) = base(given.as_deref())?;
    let temporary = Temporary::new()?;
    let dirs: Vec<PathBuf> = (0..3).map(|n| temporary.0.join(format!("v{n}"))).collect();
    for (dir, seed) in dirs.iter().zip(0..) {
        train(&graft, &base, dir, seed, seed == 1)?;
    }
    let live = Live::start(&graft, &base, temporary.0.join("root"))?;
    for (dir, name) in dirs.iter().zip(["a", "b", "c"]) {
        live.publish(dir, name)?;
    }
    let (counts, stop) = (Counts::default(), AtomicBool::new(false));
    let running = || !stop.load(Ordering::Relaxed);
    let process = &live.server.process;
    let began = Instant::now();
    let (mut early, mut times) = (None, Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let (live, counts, dirs, running) = (&live, &counts, &dirs, &running);
        let clients = (0..CLIENTS).map(|n| scope.spawn(move || client(live, counts, Random(n), running)));
        let clients: Vec<_> = clients.collect();
        let swapper = scope.spawn(move || swap(live, counts, dirs, running));
        let mut watch = || -> Result<()> {
            while began.elapsed() < length {
                let asked = Instant::now();
                let (status, reply) = http::request(&live.server.address, "GET /health", &[], None)?;
                times.push(asked.elapsed());
                ensure!(status == 200, "/health: {status} {reply}");
                // By a third of the time every kind of request has been seen many times.
                if early.is_none() && began.elapsed() > length / 3 {
                    early = Some((process.memory(), process.threads(), process.files()));
                }
                let dead = clients.iter().any(|client| client.is_finished()) || swapper.is_finished();
                if dead {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(())
        };
        let watched = watch();
        stop.store(true, Ordering::Relaxed);
        for client in clients.into_iter().chain([swapper]) {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        watched
    })?;
    let Some((memory, threads, files)) = early else { bail!("a client ended early") };
    let stats = live.settle()?;
    let now = (process.memory(), process.threads(), process.files());
    for name in ["a", "b", "c", "d"] {
        // Those that are not there now say so.
        live.change("unload", &json!({"lora_name": name}))?;
    }
    let empty = live.settle()?;
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    println!(
        "{} s: {} answers, {} clients that left, {} slow ones, {} that sent garbage, {} swaps, {} loads of nothing",
        length.as_secs(),
        count(&counts.whole),
        count(&counts.left),
        count(&counts.slow),
        count(&counts.garbage),
        count(&counts.swaps),
        count(&counts.bad_loads),
    );
    println!("  /health {:?} at the median, {:?} for 99 of 100, {:?} at most", at(0.5), at(0.99), at(1.0));
    println!(
        "  memory {} MiB after a third, {} MiB at the end; threads {threads}, {}; files {files}, {}",
        memory >> 20,
        now.0 >> 20,
        now.1,
        now.2
    );
    println!("  {stats}");
    ensure!(empty["adapters"]["bytes"] == 0, "adapters without a name are kept: {empty}");
    ensure!(now.0 <= memory + SLACK, "memory grows");
    ensure!(now.1 <= threads + 4, "threads grow");
    ensure!(now.2 <= files + 16, "files grow");
    ensure!(at(0.99) < HEALTH, "/health is slow");
    Ok(())
}

/// One client after another, of all kinds.
fn client(live: &Live, counts: &Counts, mut random: Random, running: &dyn Fn() -> bool) -> Result<()> {
    let address = live.server.address.as_str();
    while running() {
        let model = ["base", "a", "b", "c", "d"][random.below(5) as usize];
        let prompt = "tell me about the weather, ".repeat(1 + random.below(60) as usize);
        let body = json!({
            "model": model, "prompt": prompt, "max_tokens": 1 + random.below(40), "stream": true,
            "temperature": random.below(2), "seed": random.below(9),
        });
        match random.below(6) {
            0 | 1 => {
                let ended = http::events(address, "/v1/completions", &body, |_| true);
                expected(ended)?;
                counts.whole.fetch_add(1, Ordering::Relaxed);
            }
            2 => {
                let mut left = random.below(4);
                let ended = http::events(address, "/v1/completions", &body, |_| {
                    left = left.saturating_sub(1);
                    left > 0
                });
                expected(ended)?;
                counts.left.fetch_add(1, Ordering::Relaxed);
            }
            3 => {
                // One that has left before its answer begins, in the queue or while its prompt is read.
                let _gone = send(address, &request(&body.to_string()), Duration::ZERO);
                counts.left.fetch_add(1, Ordering::Relaxed);
            }
            4 => {
                let ended = http::events(address, "/v1/completions", &body, |_| {
                    std::thread::sleep(Duration::from_millis(60));
                    running()
                });
                expected(ended)?;
                counts.slow.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                garbage(address, &mut random);
                counts.garbage.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// An adapter may be away for a moment, and the queue may be full; nothing else may happen.
fn expected(ended: Result<()>) -> Result<()> {
    match ended {
        Err(error) => {
            let text = format!("{error:#}");
            // The last two: it was being published while somebody asked for it.
            let harmless =
                ["model_not_found", "queue_full", "adapter_file_changed", "adapter_path_not_found"];
            if harmless.iter().any(|code| text.contains(code)) { Ok(()) } else { Err(error) }
        }
        Ok(()) => Ok(()),
    }
}

fn request(body: &str) -> String {
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Sends bytes, stays for a while, and goes; what comes back, up to some bytes, is thrown away.
fn send(address: &str, text: &str, stay: Duration) -> Result<()> {
    let mut socket = TcpStream::connect(address)?;
    socket.write_all(text.as_bytes())?;
    if !stay.is_zero() {
        socket.set_read_timeout(Some(stay))?;
        let _nothing = socket.read(&mut [0; 512]);
    }
    Ok(())
}

/// What no client should send. How it is answered is the tests' business; here it must only do no harm.
fn garbage(address: &str, random: &mut Random) {
    let noise: String = (0..random.below(400)).map(|_| char::from(random.below(256) as u8)).collect();
    let text = match random.below(6) {
        0 => noise,
        1 => request(&noise),
        2 => "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{\"prompt\"".into(),
        3 => request("{\"prompt\": 7, \"max_tokens\": -1}"),
        4 => request(&"[".repeat(2000)),
        _ => format!("GET /{noise} HTTP/1.1\r\nX: {}\r\n", "y".repeat(random.below(2000) as usize)),
    };
    // It may be cut off while it writes.
    let _cut = send(address, &text, Duration::from_millis(random.below(50)));
}

/// Loads, replaces and unloads, and tries to load what is no adapter.
fn swap(live: &Live, counts: &Counts, dirs: &[PathBuf], running: &dyn Fn() -> bool) -> Result<()> {
    let mut random = Random(99);
    let change = |what: &str, body: Value, allowed: &[u16]| -> Result<()> {
        let (status, reply) = live.change(what, &body)?;
        ensure!(allowed.contains(&status), "{what} {body}: {status} {reply}");
        Ok(())
    };
    while running() {
        let name = ["a", "b", "c"][random.below(3) as usize];
        match random.below(4) {
            0 => {
                live.publish(&dirs[random.below(3) as usize], name)?;
                // Another one may be on its way because somebody asked for it.
                let body = json!({"lora_name": name, "lora_path": name, "load_inplace": true});
                change("load", body, &[200, 429])?;
                counts.swaps.fetch_add(1, Ordering::Relaxed);
            }
            1 => change("unload", json!({"lora_name": name}), &[200, 404])?,
            2 => change("load", json!({"lora_name": "d", "lora_path": name}), &[200, 400, 429])?,
            _ => {
                change("load", json!({"lora_name": "e", "lora_path": "nothing"}), &[404, 429])?;
                counts.bad_loads.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(Duration::from_millis(20 + random.below(200)));
    }
    Ok(())
}
