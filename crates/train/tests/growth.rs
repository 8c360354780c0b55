//! 2000 steps take no more than 200: MLX's memory, threads (a stream on a CPU is one for ever) and the process stay as they are.
//! A program of its own, since threads of other tests would be counted as well.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::rc::Rc;

use graft_adapters::LoraParameters;
use graft_model::Model;
use graft_ops::ffi::memory;
use graft_ops::{Dtype, Form, form, set_form};
use graft_testkit::{Family, Tiny, mlx, tiny_model, wanted_form_is_mlx};
use graft_train::{
    Batch, Example, Optimizer, Params, Rng, Schedule, Split, Trainer, TrainerSettings, fixed_groups,
};

const STEPS: u64 = 2000;
/// By then every batch has been seen and everything that is made once has been made.
const SETTLED: u64 = 200;

/// What a step that leaves something behind adds to: at 1800 steps even 1 kB a step would be 1.8 MB.
#[derive(Debug)]
struct Held {
    active: usize,
    cached: usize,
    /// Threads and resident bytes, where the system tells them in a file.
    process: Option<(usize, usize)>,
}

impl Held {
    fn now() -> Held {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| -> Option<usize> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let process = field("Threads:").zip(field("VmRSS:").map(|kib| kib * 1024));
        Held { active: memory::active_memory().unwrap(), cached: memory::cache_memory().unwrap(), process }
    }
}

#[test]
fn steps_leave_nothing_behind() {
    mlx(|| {
        if wanted_form_is_mlx() {
            set_form(Form::Mlx);
        }
        let dir = tiny_model(&Tiny { packed: Some((4, 32)), layers: 1, ..Tiny::new(Family::Llama) });
        let model = Rc::new(Model::load(dir.path(), Dtype::Float32).unwrap());
        let mut rng = Rng::new(5);
        let examples = (6..22).enumerate().map(|(i, n)| {
            let tokens = (0..n).map(|_| rng.below(288) as u32).collect();
            Example::whole(i + 1, tokens, i % 3)
        });
        let split = Split {
            file: "train.jsonl".into(),
            examples: examples.collect(),
            skipped: vec![],
            warnings: vec![],
            found: true,
        };
        let lora = LoraParameters { rank: 4, scale: 2.0, dropout: 0.1, keys: None };
        let params = Params::low_rank(&model, &lora, -1, true, 1).unwrap();
        let settings = TrainerSettings {
            optimizer: Optimizer::from_config("adam", &serde_json::Map::new()).unwrap(),
            schedule: Schedule::constant(1e-4),
            max_grad_norm: Some(1.0),
            grad_checkpoint: true,
            dropout: 0.1,
            seed: 3,
        };
        let mut trainer = Trainer::new(model, params, settings).unwrap();
        let groups = fixed_groups(&split, 2, -1, 1);
        let mut settled = None;
        for iter in 1..=STEPS {
            let batch = Batch::new(&split, &groups[iter as usize % groups.len()], form());
            trainer.step(&batch, &split, iter, iter % 2 == 0).unwrap();
            if iter == SETTLED {
                settled = Some(Held::now());
            }
        }
        let (settled, end) = (settled.unwrap(), Held::now());
        // Both steps end with an update: the same arrays are alive, whatever was computed between.
        assert!(end.active <= settled.active + 16 * 1024, "{settled:?} {end:?}");
        // Buffers of other sizes may be kept for reuse, not many of them.
        assert!(end.cached <= settled.cached + 1024 * 1024, "{settled:?} {end:?}");
        if let Some(((threads, resident), (threads_then, resident_then))) = end.process.zip(settled.process) {
            assert_eq!(threads, threads_then, "a stream was made on the way");
            assert!(resident <= resident_then + 4 * 1024 * 1024, "{settled:?} {end:?}");
        }
    });
}
