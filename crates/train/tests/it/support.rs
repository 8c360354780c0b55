//! Models, splits and settings that several tests share.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use graft_adapters::{FineTuneType, LoraParameters};
use graft_model::Model;
use graft_ops::{Array, Dtype};
use graft_testkit::{Tiny, mlx, tiny_model, wanted, wanted_form_is_mlx};
use graft_train::{
    Data, Example, Optimizer, Params, Rng, Schedule, Split, TrainConfig, Trainer, TrainerSettings,
};
use serde_json::Map;

/// Runs a body on the array thread, in the form that is asked for.
pub(crate) fn arrays<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    mlx(|| {
        if wanted_form_is_mlx() {
            graft_ops::set_form(graft_ops::Form::Mlx);
        }
        if let Some(level) = wanted("GRAFT_CPU") {
            graft_ops::set_cpu_level(level);
        }
        body()
    })
}

pub(crate) fn load(tiny: &Tiny) -> Rc<Model> {
    let dir = tiny_model(tiny);
    Rc::new(Model::load(dir.path(), Dtype::Float32).unwrap())
}

/// Rows of random tokens of the given lengths; `offset` masks each row's start.
pub(crate) fn split(lengths: &[usize], offset: usize, seed: u64) -> Split {
    let mut rng = Rng::new(seed);
    let examples = lengths.iter().enumerate().map(|(i, n)| {
        let tokens = (0..*n).map(|_| rng.below(288) as u32).collect();
        Example::whole(i + 1, tokens, offset)
    });
    named(examples.collect(), "train.jsonl")
}

pub(crate) fn named(examples: Vec<Example>, name: &str) -> Split {
    Split { file: name.into(), examples, skipped: vec![], warnings: vec![], found: true }
}

pub(crate) fn data(train: Split, valid: Split) -> Data {
    Data { train, valid, test: named(vec![], "test.jsonl") }
}

pub(crate) fn lora(rank: i32, dropout: f32) -> LoraParameters {
    LoraParameters { rank, scale: 2.0, dropout, keys: None }
}

/// Replaces every tensor of some parameters by its value plus small noise, so that no gradient is zero by symmetry.
pub(crate) fn shake(params: &mut Params, seed: u64) {
    for (i, value) in params.values.iter_mut().enumerate() {
        let key = mlx_rs::random::key(seed + i as u64).unwrap();
        let noise = mlx_rs::random::uniform::<_, f32>(-0.1f32, 0.1f32, value.shape(), &key).unwrap();
        *value = value.add(noise).unwrap();
        value.eval().unwrap();
    }
}

pub(crate) fn trainer(model: &Rc<Model>, params: Params, optimizer: &str, rate: f64) -> Trainer {
    let settings = TrainerSettings {
        optimizer: Optimizer::from_config(optimizer, &Map::new()).unwrap(),
        schedule: Schedule::constant(rate),
        max_grad_norm: None,
        grad_checkpoint: false,
        dropout: 0.0,
        seed: 3,
    };
    Trainer::new(Rc::clone(model), params, settings).unwrap()
}

pub(crate) fn config(dir: &Path) -> TrainConfig {
    TrainConfig {
        fine_tune_type: FineTuneType::Lora,
        num_layers: -1,
        lora: lora(4, 0.0),
        optimizer: "adam".into(),
        optimizer_config: Map::new(),
        learning_rate: 1e-2,
        lr_schedule: None,
        batch_size: 2,
        iters: 12,
        val_batches: 2,
        steps_per_report: 5,
        steps_per_eval: 6,
        save_every: 4,
        grad_accumulation_steps: 1,
        max_grad_norm: Some(1.0),
        grad_checkpoint: false,
        seed: 7,
        adapter_path: dir.to_path_buf(),
        resume: false,
        resume_adapter_file: None,
        clear_cache_threshold: 0,
        samples: vec![],
        adapter_config: Map::new(),
        metadata: BTreeMap::new(),
        peak_memory: || 123,
    }
}

pub(crate) fn values(a: &Array) -> Vec<f32> {
    a.reshape(&[-1]).unwrap().to_vec_cast::<f32>().unwrap()
}

pub(crate) fn number(a: &Array) -> f64 {
    f64::from(a.try_item_cast::<f32>().unwrap())
}
