//! Writes the graphs of every evaluation that decoding and training start in the GPU form, for comparison with mlx-lm's.
//!
//! usage: proxies OUT
//!
//! `OUT/<case>/model` is a model of [`BLOCKS`] narrow blocks, `OUT/<case>/{decode,lora,dora}-<number>.dot` the graph of an
//! evaluation as MLX exports it, `.txt` as MLX prints it: one greedy answer of [`DECODED`] tokens, and [`STEPS`] steps of Adam on
//! `OUT/rows.json`, all linears of the last [`LAYERS`] blocks. `OUT/<case>/building.json` has the microseconds that the host
//! took for each graph. How wide a model is makes no difference to its graph.
#![allow(clippy::expect_used, reason = "development only: a panic is the report")]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::rc::Rc;

use graft_adapters::{LoraParameters, Route};
use graft_model::{GenerateOptions, Generator, Model, Sampling};
use graft_ops::ffi::{Evaluation, record};
use graft_ops::{Form, set_form};
use graft_testkit::{Dtype, Family, Tiny, mlx, tiny_model};
use graft_train::{Batch, Example, Optimizer, Params, Schedule, Split, Trainer, TrainerSettings};

const BLOCKS: usize = 30;
const DECODED: usize = 6;
const STEPS: u64 = 3;
const LAYERS: i32 = 16;
const PROMPT: [u32; 5] = [40, 41, 42, 43, 44];

fn main() {
    let out = std::env::args().nth(1).expect("usage: proxies OUT");
    mlx(|| run(Path::new(&out)).expect("the graphs"));
}

fn run(out: &Path) -> Result<(), Box<dyn Error>> {
    set_form(Form::Mlx);
    let rows: Vec<Vec<u32>> = [30, 33].map(|n| (0..n).map(|i| i * 37 % 288).collect()).into();
    std::fs::create_dir_all(out)?;
    std::fs::write(out.join("rows.json"), serde_json::to_string(&rows)?)?;
    for (name, packed, dtype) in [
        ("packed-bf16", Some((4, 32)), Dtype::Bf16),
        ("packed-f16", Some((4, 32)), Dtype::F16),
        ("dense-bf16", None, Dtype::Bf16),
    ] {
        let tiny = Tiny { packed, dtype, layers: BLOCKS, ..Tiny::new(Family::Llama) };
        case(&out.join(name), &tiny, &rows)?;
    }
    Ok(())
}

fn case(out: &Path, tiny: &Tiny, rows: &[Vec<u32>]) -> Result<(), Box<dyn Error>> {
    let from = tiny_model(tiny);
    std::fs::create_dir_all(out.join("model"))?;
    for entry in std::fs::read_dir(from.path())? {
        let entry = entry?;
        std::fs::copy(entry.path(), out.join("model").join(entry.file_name()))?;
    }
    let dtype = match tiny.dtype {
        Dtype::F32 => graft_ops::Dtype::Float32,
        Dtype::F16 => graft_ops::Dtype::Float16,
        Dtype::Bf16 => graft_ops::Dtype::Bfloat16,
    };
    let model = Rc::new(Model::load(&out.join("model"), dtype)?);
    let mut building = BTreeMap::new();
    for (name, evaluations) in [
        ("decode", decode(&model)?),
        ("lora", train(&model, rows, false)?),
        ("dora", train(&model, rows, true)?),
    ] {
        for (number, evaluation) in evaluations.iter().enumerate() {
            std::fs::write(out.join(format!("{name}-{number}.dot")), &evaluation.dot)?;
            std::fs::write(out.join(format!("{name}-{number}.txt")), &evaluation.text)?;
        }
        building.insert(name, evaluations.iter().map(|e| e.building.as_micros()).collect::<Vec<_>>());
    }
    std::fs::write(out.join("building.json"), serde_json::to_string(&building)?)?;
    Ok(())
}

/// The evaluations of a greedy answer, the prompt's among them.
fn decode(model: &Model) -> Result<Vec<Evaluation>, Box<dyn Error>> {
    let options = GenerateOptions { max_tokens: DECODED, stop_ids: [].into(), sampling: Sampling::greedy() };
    let mut generator = Generator::new(model, &PROMPT, options, Route::Base)?;
    let (outcome, evaluations) = record(|| -> graft_model::Result<()> {
        while generator.step()?.is_some() {}
        Ok(())
    });
    outcome?;
    Ok(evaluations)
}

/// The evaluations of some steps.
fn train(model: &Rc<Model>, rows: &[Vec<u32>], dora: bool) -> Result<Vec<Evaluation>, Box<dyn Error>> {
    let example = |(i, tokens): (usize, &Vec<u32>)| Example::whole(i + 1, tokens.clone(), 0);
    let split = Split {
        file: "rows".into(),
        examples: rows.iter().enumerate().map(example).collect(),
        skipped: vec![],
        warnings: vec![],
        found: true,
    };
    let lora = LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys: None };
    let params = Params::low_rank(model, &lora, LAYERS, dora, 1)?;
    let settings = TrainerSettings {
        optimizer: Optimizer::from_config("adam", &serde_json::Map::new())?,
        schedule: Schedule::constant(1e-5),
        max_grad_norm: None,
        grad_checkpoint: false,
        dropout: 0.0,
        seed: 1,
    };
    let mut trainer = Trainer::new(Rc::clone(model), params, settings)?;
    let batch = Batch::new(&split, &(0..rows.len()).collect::<Vec<_>>(), graft_ops::form());
    let (outcome, evaluations) = record(|| -> graft_train::Result<()> {
        for iter in 1..=STEPS {
            trainer.step(&batch, &split, iter, true)?;
        }
        Ok(())
    });
    outcome?;
    Ok(evaluations)
}
