//! The loop: validation, steps, reports, saves; and how a run starts, goes on and stops.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use graft_adapters::{ADAPTER_FILE, AdapterConfig, AdapterSet, FineTuneType};
use graft_model::{MAX_TOGETHER, Model, generate_all};
use graft_ops::ffi::memory;
use graft_quant::{read_safetensors, safetensors_bytes, write_atomic};

use crate::batch::{Batch, Walk, fixed_groups};
use crate::config::TrainConfig;
use crate::data::Data;
use crate::error::{io, setting};
use crate::event::{Event, TrainReport};
use crate::loss::{Evaluation, evaluate};
use crate::metrics::{Line, Metrics};
use crate::optim::Optimizer;
use crate::params::Params;
use crate::rng::mix;
use crate::schedule::Schedule;
use crate::state::{Progress, RunKey, States};
use crate::step::{Trainer, TrainerSettings};
use crate::{Error, Result};

/// Tags of independent random streams.
const TRAIN_ORDER: u64 = 0x0074_7261_696e;
const VALID_ORDER: u64 = 0x0076_616c_6964;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All iterations are done.
    Finished,
    /// It was asked to stop. After at least one iteration all is saved and can be resumed; before the first one of a new
    /// run nothing is written.
    Interrupted {
        /// Iterations done.
        step: u64,
    },
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Iterations done.
    pub iter: u64,
    /// Mean loss of the last report.
    pub train_loss: Option<f64>,
    /// The last validation.
    pub valid: Option<Evaluation>,
    /// Targets trained on.
    pub tokens: u64,
    /// The adapter's file.
    pub adapter_file: PathBuf,
}

/// Trains, and returns when all iterations are done or `stop` was set. `model` is given away or shared.
///
/// # Errors
/// When a setting, the data or a saved state does not fit, when loss or gradient are not finite, or when a file cannot
/// be written. What was saved before stays.
pub fn run(
    config: &TrainConfig,
    model: impl Into<Rc<Model>>,
    data: &Data,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event),
) -> Result<Summary> {
    let mut run = Run::start(config, model.into(), data, stop, on_event)?;
    run.train()
}

struct Run<'a> {
    config: &'a TrainConfig,
    data: &'a Data,
    stop: &'a AtomicBool,
    on_event: &'a mut dyn FnMut(Event),
    trainer: Trainer,
    walk: Walk,
    valid_groups: Vec<Vec<usize>>,
    states: States,
    metrics: Metrics,
    adapter_config: AdapterConfig,
    progress: Progress,
    train_loss: Option<f64>,
    valid: Option<Evaluation>,
    /// Iteration that is on the disk.
    saved: Option<u64>,
    /// The directory is this run's: what an earlier one left there is gone or about to be replaced.
    begun: bool,
    /// adapter_config.json is this run's.
    described: bool,
}

fn check(config: &TrainConfig) -> Result<()> {
    for (field, value) in [
        ("batch_size", config.batch_size as u64),
        ("steps_per_report", config.steps_per_report),
        ("steps_per_eval", config.steps_per_eval),
        ("save_every", config.save_every),
        ("grad_accumulation_steps", config.grad_accumulation_steps),
    ] {
        if value == 0 {
            return Err(setting(field, "a whole number above 0", value));
        }
    }
    if !config.learning_rate.is_finite() || config.learning_rate < 0.0 {
        return Err(setting("learning_rate", "a number of at least 0", config.learning_rate));
    }
    if let Some(norm) = config.max_grad_norm.filter(|n| !n.is_finite() || *n <= 0.0) {
        return Err(setting("max_grad_norm", "a number above 0", norm));
    }
    Ok(())
}

impl<'a> Run<'a> {
    fn start(
        config: &'a TrainConfig,
        model: Rc<Model>,
        data: &'a Data,
        stop: &'a AtomicBool,
        on_event: &'a mut dyn FnMut(Event),
    ) -> Result<Self> {
        check(config)?;
        let vocab = model.config().vocab as usize;
        data.train.check_vocabulary(vocab)?;
        data.valid.check_vocabulary(vocab)?;
        let optimizer = Optimizer::from_config(&config.optimizer, &config.optimizer_config)?;
        let schedule = match &config.lr_schedule {
            Some(value) => Schedule::from_value(value)?,
            None => Schedule::constant(config.learning_rate),
        };
        let mut walk = Walk::new(&data.train, config.batch_size, mix(&[config.seed, TRAIN_ORDER]))?;
        let valid_groups = fixed_groups(
            &data.valid,
            config.batch_size,
            config.val_batches,
            mix(&[config.seed, VALID_ORDER]),
        );
        for warning in data.warnings(config.batch_size, config.val_batches != 0) {
            on_event(Event::Warning { text: warning.text });
        }
        if optimizer.ignores_learning_rate() {
            let text = "adafactor sets its own step size, so learning_rate has no effect; set optimizer_config.adafactor.\
                        relative_step to false to use it";
            on_event(Event::Warning { text: text.into() });
        }
        let params = match config.fine_tune_type {
            FineTuneType::Full => Params::full(&model, config.num_layers)?,
            kind => {
                let dora = kind == FineTuneType::Dora;
                Params::low_rank(&model, &config.lora, config.num_layers, dora, config.seed)?
            }
        };
        let adapter_config = AdapterConfig {
            fine_tune_type: config.fine_tune_type,
            num_layers: config.num_layers,
            parameters: (config.fine_tune_type != FineTuneType::Full).then(|| config.lora.clone()),
            scales: Default::default(),
            raw: config.adapter_config.clone(),
        };
        let settings = TrainerSettings {
            optimizer,
            schedule,
            max_grad_norm: config.max_grad_norm,
            grad_checkpoint: config.grad_checkpoint,
            dropout: config.lora.dropout,
            seed: config.seed,
        };
        let total = total_parameters(&model);
        let mut trainer = Trainer::new(model, params, settings)?;

        let low_rank = config.fine_tune_type != FineTuneType::Full;
        let run = RunKey {
            fine_tune_type: config.fine_tune_type.name().to_owned(),
            optimizer: config.optimizer.clone(),
            batch_size: config.batch_size,
            grad_accumulation_steps: config.grad_accumulation_steps,
            seed: config.seed,
            training_data: data.train.digest(),
            scale: low_rank.then_some(config.lora.scale),
            dropout: low_rank.then_some(config.lora.dropout),
        };
        let mut states = States::new(&config.adapter_path);
        let found = if config.resume { states.latest()? } else { None };
        let resumed = found.is_some();
        let progress = match (found, &config.resume_adapter_file) {
            (Some(dir), _) => states.restore(&dir, &mut trainer, &run)?,
            (None, None) if config.resume => {
                let problem = "there is no saved state to resume: train without --resume, or give --resume-adapter-file";
                return Err(Error::State {
                    path: config.adapter_path.join("state"),
                    problem: problem.into(),
                });
            }
            (None, file) => {
                if let Some(file) = file {
                    trainer.params.assign(file, &read_safetensors(file)?.0)?;
                    trainer.refresh()?;
                }
                Progress { schema: 1, position: walk.position().clone(), run, ..Progress::default() }
            }
        };
        walk = walk.resume(progress.position.clone());
        let metrics = Metrics::new(&config.adapter_path, progress.metrics_bytes);
        let modules = match config.fine_tune_type {
            FineTuneType::Full => trainer.params.values.len(),
            _ => trainer.params.sites.len(),
        };
        on_event(Event::Started {
            trainable: trainer.params.count(),
            total,
            modules,
            iter: progress.iter,
            iters: config.iters,
            batches_per_pass: walk.batches(),
        });
        let saved = resumed.then_some(progress.iter);
        let mut this = Self {
            config,
            data,
            stop,
            on_event,
            trainer,
            walk,
            valid_groups,
            states,
            metrics,
            adapter_config,
            progress,
            train_loss: None,
            valid: None,
            saved,
            begun: false,
            described: false,
        };
        if resumed {
            this.begin()?;
        }
        Ok(this)
    }

    /// Makes the directory this run's. A new run waits with it until it has something to show, so that one that is stopped
    /// before leaves an earlier run's adapter, metrics and state whole.
    fn begin(&mut self) -> Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            let dir = &self.config.adapter_path;
            std::fs::create_dir_all(dir).map_err(io(dir))?;
            if self.saved.is_none() {
                self.states.forget()?;
            }
            self.metrics.begin()?;
        }
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn train(&mut self) -> Result<Summary> {
        // Before the first step, and after a resume where a validation was due but broken off.
        if self.config.iters > 0 && self.progress.iter.is_multiple_of(self.config.steps_per_eval) {
            self.validate()?;
        }
        while self.progress.iter < self.config.iters && !self.stopped() {
            self.step()?;
            let iter = self.progress.iter;
            let last = iter == self.config.iters;
            if last || iter.is_multiple_of(self.config.steps_per_report) {
                self.report()?;
            }
            if last || iter.is_multiple_of(self.config.steps_per_eval) {
                self.validate()?;
            }
            if last || iter.is_multiple_of(self.config.save_every) {
                self.save()?;
            }
        }
        let iter = self.progress.iter;
        // With no iterations to do, a run is done unless it was stopped before that.
        let finished = iter >= self.config.iters && (iter > 0 || !self.stopped());
        if self.saved != Some(iter) && (iter > 0 || finished) {
            self.save()?;
        }
        Ok(Summary {
            outcome: if finished { Outcome::Finished } else { Outcome::Interrupted { step: iter } },
            iter,
            train_loss: self.train_loss,
            valid: self.valid,
            tokens: self.progress.tokens,
            adapter_file: self.config.adapter_path.join(ADAPTER_FILE),
        })
    }

    fn step(&mut self) -> Result<()> {
        let began = Instant::now();
        let iter = self.progress.iter + 1;
        let batch = Batch::new(&self.data.train, self.walk.next_group(), graft_ops::form());
        // What is left over at the end is used too, not dropped.
        let update = iter.is_multiple_of(self.config.grad_accumulation_steps) || iter == self.config.iters;
        let result = self.trainer.step(&batch, &self.data.train, iter, update)?;
        self.begin()?;
        let p = &mut self.progress;
        p.iter = iter;
        p.updates = self.trainer.optimizer_state.step;
        p.tokens += result.tokens;
        p.grad_norm = result.grad_norm;
        p.learning_rate = result.learning_rate.unwrap_or(p.learning_rate);
        p.window.loss += result.loss_sum;
        p.window.tokens += result.tokens;
        p.window.steps += 1;
        if memory::cache_memory()? > self.config.clear_cache_threshold {
            memory::clear_cache()?;
        }
        p.window.seconds += began.elapsed().as_secs_f64();
        (self.on_event)(Event::Step { iter });
        Ok(())
    }

    fn report(&mut self) -> Result<()> {
        let p = &mut self.progress;
        let window = std::mem::take(&mut p.window);
        if window.steps == 0 || window.tokens == 0 {
            return Ok(());
        }
        let report = TrainReport {
            iter: p.iter,
            loss: window.loss / window.tokens as f64,
            learning_rate: p.learning_rate,
            grad_norm: p.grad_norm,
            tokens: p.tokens,
            tokens_per_second: window.tokens as f64 / window.seconds.max(1e-9),
            step_seconds: window.seconds / window.steps as f64,
            peak_memory_bytes: (self.config.peak_memory)(),
            mlx_peak_bytes: memory::peak_memory()? as u64,
        };
        self.train_loss = Some(report.loss);
        self.metrics.write(&Line::Train(&report))?;
        (self.on_event)(Event::Train(report));
        Ok(())
    }

    fn validate(&mut self) -> Result<()> {
        let iter = self.progress.iter;
        // What was done before a run was interrupted is not done again.
        if self.progress.last_valid == Some(iter) {
            return Ok(());
        }
        if !self.valid_groups.is_empty() {
            self.evaluate()?;
        }
        if !self.config.samples.is_empty() {
            self.sample()?;
        }
        Ok(())
    }

    /// Answers the sample prompts with the adapter as it is. Nothing here draws from the run's random numbers.
    fn sample(&mut self) -> Result<()> {
        let (stop, route) = (self.stop, self.trainer.route()?);
        let mut go_on = |_| !stop.load(Ordering::Relaxed);
        let (model, prompts) = (self.trainer.model(), &self.config.samples);
        if let Some(found) = generate_all(model, prompts, MAX_TOGETHER, &route.route(), &mut go_on)? {
            let answers = found.into_iter().map(|answer| answer.tokens).collect();
            (self.on_event)(Event::Samples { iter: self.progress.iter, answers });
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<()> {
        let iter = self.progress.iter;
        let began = Instant::now();
        let route = self.trainer.route()?;
        let of = self.valid_groups.len();
        let (stop, on_event) = (self.stop, &mut *self.on_event);
        let mut go_on = |done: usize| {
            on_event(Event::ValidProgress { done, of });
            !stop.load(Ordering::Relaxed)
        };
        let model = self.trainer.model();
        let found = evaluate(model, &route.route(), &self.data.valid, &self.valid_groups, &mut go_on)?;
        // A validation that was broken off says nothing and leaves no line.
        let Some(found) = found else { return Ok(()) };
        let seconds = began.elapsed().as_secs_f64();
        self.progress.last_valid = Some(iter);
        let Evaluation { loss, tokens, .. } = found;
        self.metrics.write(&Line::Valid { iter, loss, tokens, seconds })?;
        self.valid = Some(found);
        (self.on_event)(Event::Valid { iter, loss, tokens, seconds });
        Ok(())
    }

    fn set(&self, weights: std::collections::BTreeMap<String, graft_quant::Tensor>) -> AdapterSet {
        AdapterSet {
            adapters: Default::default(),
            weights,
            config: self.adapter_config.clone(),
            metadata: self.config.metadata.clone(),
        }
    }

    /// Writes the numbered checkpoint, the adapter and the state, the state last.
    fn save(&mut self) -> Result<()> {
        self.begin()?;
        let iter = self.progress.iter;
        let dir = &self.config.adapter_path;
        // Low-rank tensors are f32; whole weights have the model's dtype, as the base has.
        let dtype = match self.config.fine_tune_type {
            FineTuneType::Full => self.trainer.model().dtype(),
            _ => graft_ops::Dtype::Float32,
        };
        let set = self.set(self.trainer.params.tensors(dtype, iter)?);
        let file = dir.join(format!("{iter:07}_adapters.safetensors"));
        let bytes = safetensors_bytes(&set.weights, &set.metadata)?;
        write_atomic(&file, &bytes)?;
        if !self.described {
            set.save_config(dir)?;
            self.described = true;
        }
        write_atomic(&dir.join(ADAPTER_FILE), &bytes)?;
        self.progress.position = self.walk.position().clone();
        self.progress.accumulated_tokens = self.trainer.accumulated_tokens;
        self.progress.metrics_bytes = self.metrics.synced_length()?;
        self.states.save(&self.trainer, &self.progress, &self.adapter_config, &self.config.metadata)?;
        self.saved = Some(iter);
        (self.on_event)(Event::Saved { iter, file });
        Ok(())
    }
}

/// Numbers of the base: weights as if dense, biases and norms.
fn total_parameters(model: &Model) -> u64 {
    let weight = |w: &graft_quant::Weight| w.out_features() as u64 * w.in_features() as u64;
    let linears: u64 =
        model.linears().map(|l| weight(&l.weight) + l.bias.as_ref().map_or(0, |b| b.size() as u64)).sum();
    let norms: u64 = (0..model.config().layers as usize)
        .flat_map(|i| model.block_norms(i))
        .map(|n| n.weight.size() as u64)
        .sum();
    weight(&model.embedding().weight) + linears + norms + model.config().hidden as u64
}
