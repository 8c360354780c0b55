//! The legs of a comparison: what each is, the bases they stand on, and a process of its own for each run.

use super::convert::packing;
use super::plot::Metrics;
use super::{data, load};
use crate::args::{CompareArgs, NOT_COMPARED};
use crate::errors::{Interrupted, Usage};
use crate::hub::{self, What};
use crate::settings::{Defaults, Settings, file_of, merge};
use crate::ui;
use anyhow::{Context, Result, bail};
use graft_quant::convert::{ConvertOptions, Packing, convert};
use graft_quant::{Checkpoint, Mode};
use graft_train::Walk;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, UNIX_EPOCH};

/// Iterations of a run where none are given, as in the lesson's exercise.
const ITERS: i64 = 50;

/// How often a leg's process is looked at.
const POLL: Duration = Duration::from_millis(100);

/// A process that ends with this value, however that ends. A run saves nothing that is half done, so it may end at any
/// time.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A run whose loss stopped being a number.
#[derive(Debug)]
pub(super) struct Blown(String);

impl std::fmt::Display for Blown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Blown {}

/// What a leg stands on.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Base {
    Dense,
    Packed,
    /// The model of its settings.
    Own,
}

/// One of the trainings that are compared.
pub(super) struct Leg {
    pub(super) name: String,
    pub(super) base: Base,
    /// What it has instead of the common settings.
    pub(super) own: Map<String, Value>,
    /// The leg it is compared with, which comes before it.
    pub(super) against: Option<usize>,
    /// The rate that `--find-lr` found.
    pub(super) rate: Option<f64>,
}

impl Leg {
    /// LoRA or DoRA.
    pub(super) fn kind(&self, settings: &Settings) -> String {
        settings.text("fine_tune_type").unwrap_or_default().to_owned()
    }
}

/// The legs that the flags ask for.
pub(super) fn legs(args: &CompareArgs) -> Result<Vec<Leg>> {
    let mut names = args.legs.clone();
    if names.is_empty() && args.leg.is_empty() {
        names = ["lora", "qlora", "qdora"].map(str::to_owned).to_vec();
    }
    let mut legs: Vec<Leg> = Vec::new();
    for name in names {
        let base = if name.starts_with('q') { Base::Packed } else { Base::Dense };
        let own = Map::from_iter([("fine_tune_type".to_owned(), name.trim_start_matches('q').into())]);
        // One refinement at a time: the packed base, then the magnitude.
        let before = match name.as_str() {
            "qdora" => "qlora",
            _ => "lora",
        };
        let against = legs.iter().position(|leg| leg.name == before).or((!legs.is_empty()).then_some(0));
        legs.push(Leg { name, base, own, against, rate: None });
    }
    for file in &args.leg {
        let stem = Path::new(file).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        let own = file_of(Some(file))?;
        let against = (!legs.is_empty()).then_some(0);
        legs.push(Leg { name: stem.to_owned(), base: Base::Own, own, against, rate: None });
    }
    if let Some((_, leg)) =
        legs.iter().enumerate().find(|(i, leg)| legs[..*i].iter().any(|l| l.name == leg.name))
    {
        bail!(Usage(format!("two legs are called {}: give each another name", leg.name)));
    }
    if legs.iter().any(|leg| ["", "bases"].contains(&leg.name.as_str())) {
        bail!(Usage("--leg: a leg's file needs a name of its own, not `bases`".into()));
    }
    Ok(legs)
}

/// A base and where it comes from.
pub(super) struct Made {
    pub(super) path: String,
    pub(super) from: String,
}

/// What all runs of a comparison share.
pub(super) struct Bench<'a> {
    pub(super) out: PathBuf,
    pub(super) common: Map<String, Value>,
    /// `--threads` and `--exact`, for each process.
    pub(super) globals: Vec<String>,
    pub(super) stop: &'a AtomicBool,
    pub(super) dense: Option<Made>,
    pub(super) packed: Option<Made>,
    /// Warnings that were said, which each leg would repeat.
    said: RefCell<BTreeSet<String>>,
}

/// What one run came to.
pub(super) struct Run {
    pub(super) seed: i64,
    pub(super) dir: PathBuf,
    pub(super) metrics: Metrics,
    pub(super) adapter_bytes: u64,
    /// The data and where in it the run ended; equal for runs that saw the same batches in the same order.
    pub(super) batches: Value,
}

/// The common settings: the file of `-c` under the flags.
pub(super) fn common(args: &CompareArgs, legs: &[Leg]) -> Result<Map<String, Value>> {
    let mut all = file_of(args.run.config.as_deref())?;
    lay(&mut all, args.run.as_file());
    for (key, why) in NOT_COMPARED {
        if all.contains_key(key) || legs.iter().any(|leg| leg.own.contains_key(key)) {
            bail!(Usage(format!("--{}: {why}; leave it out", key.replace('_', "-"))));
        }
    }
    if legs.iter().any(|leg| leg.own.contains_key("seed")) {
        bail!(Usage(
            "seed: all legs have the same, so that they see the same batches; give --seed, not a leg's"
                .into()
        ));
    }
    if all.contains_key("fine_tune_type") && legs.iter().any(|leg| leg.base != Base::Own) {
        bail!(Usage("--fine-tune-type: --legs decides that; leave it out".into()));
    }
    for key in ["model", "data"] {
        let everywhere = legs.iter().all(|leg| leg.own.contains_key(key));
        let described = key == "data" && all.contains_key("hf_dataset");
        if !(all.contains_key(key) || everywhere || described) {
            bail!(Usage(format!("--{key} is required")));
        }
    }
    let iters = all.entry("iters").or_insert(ITERS.into()).as_i64().unwrap_or(ITERS);
    all.entry("steps_per_eval").or_insert((iters / 5).max(1).into());
    all.entry("save_every").or_insert(iters.max(1).into());
    all.insert("steps_per_report".into(), 1.into());
    Ok(all)
}

/// Lays settings over others, as a settings file and flags lie over defaults.
fn lay(under: &mut Map<String, Value>, over: Map<String, Value>) {
    if over.contains_key("lr_schedule") {
        under.remove("lr_schedule");
    }
    let lora = over.get("lora_parameters");
    if lora.is_some_and(|lora| lora.get("alpha").is_some() && lora.get("scale").is_none())
        && let Some(Value::Object(lora)) = under.get_mut("lora_parameters")
    {
        lora.remove("scale");
    }
    merge(under, over);
}

/// Whether a directory holds no more than what a comparison leaves that did not come to a result: bases, and legs'
/// settings and logs. The next one goes on with it.
pub(super) fn is_unfinished(out: &Path) -> Result<bool> {
    let entries = |dir: &Path| -> Result<Vec<PathBuf>> {
        let all = std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        Ok(all.collect::<std::io::Result<Vec<_>>>()?.iter().map(std::fs::DirEntry::path).collect())
    };
    if !out.is_dir() {
        return Ok(false);
    }
    let spare = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        (name.starts_with("seed-") || name.starts_with("lr-"))
            && (name.ends_with(".yaml") || name.ends_with(".log"))
    };
    for dir in entries(out)? {
        if !dir.is_dir() || (!dir.ends_with("bases") && !entries(&dir)?.iter().all(spare)) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl<'a> Bench<'a> {
    /// Without bases yet.
    pub(super) fn new(
        out: &Path,
        common: Map<String, Value>,
        globals: Vec<String>,
        stop: &'a AtomicBool,
    ) -> Self {
        let said = RefCell::default();
        Self { out: out.to_path_buf(), common, globals, stop, dense: None, packed: None, said }
    }
}

impl Bench<'_> {
    /// The seed of each leg's first run.
    pub(super) fn first_seed(&self) -> i64 {
        self.common.get("seed").and_then(Value::as_i64).unwrap_or_default()
    }

    /// The seeds of a leg's runs.
    pub(super) fn seeds(&self, count: u32) -> Vec<i64> {
        (self.first_seed()..).take(count as usize).collect()
    }

    /// Whether a line of a run is a warning that was not said yet.
    pub(super) fn is_new_warning(&self, line: &str) -> bool {
        line.starts_with("warning: ") && self.said.borrow_mut().insert(line.to_owned())
    }

    /// Reads the legs' rows as their runs will and says what is wrong with them; a base of its own makes no difference,
    /// since it has the tokenizer of the model that it is made of.
    pub(super) fn check_rows(&self, legs: &[Leg], seed: i64) -> Result<()> {
        let shared = legs.iter().find(|leg| leg.base != Base::Own);
        for leg in legs.iter().filter(|leg| leg.base == Base::Own).chain(shared) {
            let settings = self.settings(leg, seed)?;
            let model = settings.text("model").unwrap_or_default();
            let (tokenizer, template) = load::text(&hub::resolve(model, What::Model)?)?;
            let data = data::load(&settings, &load::encoder(&tokenizer, template.as_ref()))?;
            let vocab = load::config(model)?.vocab as usize;
            data.train.check_vocabulary(vocab)?;
            data.valid.check_vocabulary(vocab)?;
            let batch_size = usize::try_from(settings.int("batch_size")).unwrap_or_default();
            Walk::new(&data.train, batch_size, 0)?;
            for warning in data.warnings(batch_size, settings.int("val_batches") != 0) {
                let line = format!("warning: {}", warning.text);
                if self.is_new_warning(&line) {
                    ui::note(&line);
                }
            }
        }
        Ok(())
    }

    /// Finds or makes the bases that the legs need.
    pub(super) fn make_bases(&mut self, args: &CompareArgs, legs: &[Leg]) -> Result<()> {
        let needs = |base| legs.iter().any(|leg| leg.base == base);
        let flags = args.q_bits.is_some() || args.q_group_size.is_some() || args.quant_predicate.is_some();
        if flags && !needs(Base::Packed) {
            bail!(Usage(
                "--q-bits, --q-group-size and --quant-predicate are for the base of qlora and qdora, and no such leg is \
                 compared: leave them out"
                    .into()
            ));
        }
        let Some(model) = self.common.get("model").and_then(Value::as_str).map(str::to_owned) else {
            return Ok(());
        };
        if !needs(Base::Dense) && !needs(Base::Packed) {
            return Ok(());
        }
        let dir = hub::resolve(&model, What::Model)?;
        let packed = Checkpoint::open(&dir)?.names().any(|name| name.ends_with(".scales"));
        if packed && flags {
            bail!(Usage(format!(
                "--q-bits, --q-group-size and --quant-predicate pack a dense model, and {model} is packed already: \
                 leave them out, or compare what `graft convert --dequantize` makes of it"
            )));
        }
        let packing = packing(Mode::Affine, args.q_bits, args.q_group_size, args.quant_predicate.as_deref())?;
        let given = || Some(Made { path: model.clone(), from: "as given".into() });
        if packed {
            self.packed = given();
            if needs(Base::Dense) {
                self.dense = Some(self.convert(&dir, "dense", None, format!("{model}, dequantized"))?);
            }
        } else {
            self.dense = given();
            if needs(Base::Packed) {
                let grid = packing.grid;
                let recipe = packing.recipe.map(|r| format!(", {}", r.name())).unwrap_or_default();
                let from =
                    format!("{model}, quantized: {} bits, groups of {}{recipe}", grid.bits, grid.group_size);
                self.packed = Some(self.convert(&dir, "packed", Some(packing), from)?);
            }
        }
        Ok(())
    }

    fn convert(&self, source: &Path, name: &str, pack: Option<Packing>, from: String) -> Result<Made> {
        let target = self.out.join("bases").join(name);
        // What it was made of, written when it was whole.
        let note = target.with_extension("from");
        let changed = |file: &Path| file.metadata().ok()?.modified().ok()?.duration_since(UNIX_EPOCH).ok();
        let times: Vec<_> = Checkpoint::open(source)?.files().map(changed).collect();
        let made_of = format!("{from}\n{}\n{times:?}\n", source.canonicalize()?.display());
        if target.is_dir() && std::fs::read_to_string(&note).is_ok_and(|text| text == made_of) {
            ui::note(&format!("The {name} base is there from an earlier try: {from}"));
            return Ok(Made { path: target.display().to_string(), from });
        }
        let _older = std::fs::remove_dir_all(&target);
        ui::note(&format!("Making the {name} base: {from}"));
        std::fs::create_dir_all(self.out.join("bases"))
            .with_context(|| format!("cannot make the directory {}", self.out.display()))?;
        let options = ConvertOptions { dequantize: pack.is_none(), pack, dtype: None };
        match convert(source, &target, &options, self.stop, &mut |_| {}) {
            Ok(_) => {
                std::fs::write(&note, made_of).with_context(|| format!("cannot write {}", note.display()))?;
                Ok(Made { path: target.display().to_string(), from })
            }
            Err(error) => {
                // What was made for it goes again, if it is empty.
                let _in_use = std::fs::remove_dir(self.out.join("bases"));
                let _in_use = std::fs::remove_dir(&self.out);
                match error {
                    graft_quant::Error::Stopped => bail!(self.interrupted()),
                    error => Err(error.into()),
                }
            }
        }
    }

    fn base(&self, leg: &Leg) -> Option<&Made> {
        match leg.base {
            Base::Dense => self.dense.as_ref(),
            Base::Packed => self.packed.as_ref(),
            Base::Own => None,
        }
    }

    /// The settings file of a leg's run, without the recipe's defaults under it.
    fn file(&self, leg: &Leg, seed: i64, rate: Option<f64>, adapter: &Path) -> Map<String, Value> {
        let mut all = self.common.clone();
        lay(&mut all, leg.own.clone());
        if let Some(base) = self.base(leg) {
            all.insert("model".into(), base.path.clone().into());
        }
        if let Some(rate) = rate {
            all.insert("learning_rate".into(), rate.into());
        }
        all.insert("seed".into(), seed.into());
        all.insert("adapter_path".into(), adapter.display().to_string().into());
        all
    }

    /// A leg's settings, complete and checked.
    pub(super) fn settings(&self, leg: &Leg, seed: i64) -> Result<Settings> {
        let file = self.file(leg, seed, leg.rate, Path::new("adapter"));
        Settings::of_file(&format!("leg {}", leg.name), file, Defaults::Recipe)
    }

    /// Trains a leg. `place` is where, below the leg's directory.
    pub(super) fn train(&self, leg: &Leg, seed: i64, rate: Option<f64>, place: &str) -> Result<Run> {
        let folder = self.out.join(&leg.name);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let (dir, file) = (folder.join(place), folder.join(format!("{place}.yaml")));
        // JSON is YAML.
        let settings = Value::from(self.file(leg, seed, rate, &dir));
        std::fs::write(&file, format!("{settings:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
        let iters = settings["iters"].as_u64().unwrap_or_default();
        let progress = ui::Progress::new(iters, &format!("{} {place}", leg.name));
        let mut steps = 0;
        let words = ["train", "-c", &file.display().to_string()].map(str::to_owned);
        let done = self.child(&words, &folder.join(format!("{place}.log")), &mut |line| {
            if self.is_new_warning(line) {
                progress.line(line);
            }
            if line.starts_with("Iter ") && line.contains(": Train loss ") {
                steps += 1;
                progress.at(steps, String::new());
            }
        });
        progress.done();
        done.with_context(|| format!("leg {}, {place}", leg.name))?;
        let bytes = |path: PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
        let read = |path: PathBuf| -> Result<String> {
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let latest = read(dir.join("state/latest"))?;
        let state: Value =
            serde_json::from_str(&read(dir.join("state").join(latest.trim()).join("state.json"))?)?;
        Ok(Run {
            seed,
            metrics: Metrics::read(&dir)?,
            adapter_bytes: bytes(dir.join(graft_adapters::ADAPTER_FILE)),
            batches: json!([state["position"], state["run"]["training_data"], state["run"]["batch_size"]]),
            dir,
        })
    }

    /// Runs graft in a process of its own; what it says goes to a log.
    pub(super) fn child(&self, words: &[String], log: &Path, on_line: &mut dyn FnMut(&str)) -> Result<()> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut log_file =
            std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(program);
        command
            .args(&self.globals)
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = Process(command.spawn().context("cannot start a process for the leg")?);
        let (said, lines) = mpsc::channel();
        if let Some(pipe) = child.0.stderr.take() {
            std::thread::spawn(move || {
                BufReader::new(pipe).lines().try_for_each(|line| said.send(line).map_err(drop))
            });
        }
        let mut error = None;
        let status = loop {
            // A leg may say nothing for minutes, and is to end soon all the same.
            if self.stop.load(Ordering::Relaxed) {
                bail!(self.interrupted());
            }
            match lines.recv_timeout(POLL) {
                Ok(line) => {
                    let line = line.context("cannot read what the leg says")?;
                    writeln!(log_file, "{line}")
                        .with_context(|| format!("cannot write {}", log.display()))?;
                    error = line.strip_prefix("error: ").map(str::to_owned).or(error);
                    on_line(&line);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {}
            }
            match child.0.try_wait().context("cannot wait for the leg's process")? {
                Some(status) => break status,
                None => std::thread::sleep(POLL),
            }
        };
        if status.code() == Some(130) {
            bail!(self.interrupted());
        }
        if !status.success() {
            let why = error.unwrap_or_else(|| format!("it ended with {status}"));
            let blown = why.contains(graft_train::NOT_FINITE);
            let why = format!("{why} (its log is {})", log.display());
            if blown {
                bail!(Blown(why));
            }
            bail!(why);
        }
        Ok(())
    }

    fn interrupted(&self) -> Interrupted {
        Interrupted(match self.out.exists() {
            true => format!("Interrupted; what is done so far is in {}.", self.out.display()),
            false => "Interrupted; nothing was written.".into(),
        })
    }
}
