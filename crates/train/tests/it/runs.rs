//! Whole runs: the loss falls, a resumed run is the uninterrupted one, nothing that is not finite is written.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, FineTuneType};
use graft_model::Model;
use graft_testkit::{Family, Tiny};
use graft_train::{Data, Error, Event, Outcome, OwnedRoute, Summary, TrainConfig, run, test};
use serde_json::{Value, json};

use crate::support::{arrays, config, data, load, lora, named, split};

fn quietly(config: &TrainConfig, model: &Rc<Model>, data: &Data) -> Result<Summary, Error> {
    run(config, Rc::clone(model), data, &AtomicBool::new(false), &mut |_| {})
}

fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The lines without what a clock decides.
fn timeless(dir: &Path) -> Vec<Value> {
    let mut lines = metrics(dir);
    for line in &mut lines {
        for key in ["seconds", "step_seconds", "tokens_per_second", "mlx_peak_bytes"] {
            line.as_object_mut().unwrap().shift_remove(key);
        }
    }
    lines
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

#[test]
fn the_loss_falls_and_files_are_those_of_mlx_lm() {
    arrays(|| {
        let model = load(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
        let data = data(split(&[12, 14, 16, 18], 0, 1), split(&[12, 14, 16], 0, 1));
        for kind in [FineTuneType::Lora, FineTuneType::Dora] {
            let dir = tempfile::tempdir().unwrap();
            let config = TrainConfig {
                fine_tune_type: kind,
                lora: lora(8, 0.0),
                learning_rate: 3e-3,
                iters: 100,
                steps_per_report: 10,
                steps_per_eval: 40,
                save_every: 40,
                ..config(dir.path())
            };
            let mut events = Vec::new();
            let summary =
                run(&config, Rc::clone(&model), &data, &AtomicBool::new(false), &mut |e| events.push(e))
                    .unwrap();
            assert_eq!((summary.outcome, summary.iter), (Outcome::Finished, 100));
            let losses: Vec<f64> = metrics(dir.path())
                .iter()
                .filter(|l| l["kind"] == "train")
                .map(|l| l["loss"].as_f64().unwrap())
                .collect();
            assert_eq!(losses.len(), 10);
            assert!(losses[9] < 0.5 * losses[0], "{losses:?}");
            let valid: Vec<u64> = metrics(dir.path())
                .iter()
                .filter(|l| l["kind"] == "valid")
                .map(|l| l["iter"].as_u64().unwrap())
                .collect();
            assert_eq!(valid, [0, 40, 80, 100]);
            assert_eq!(metrics(dir.path())[1]["peak_memory_bytes"], 123);
            assert_eq!(summary.tokens, 50 * (12 + 14 + 16 + 18 - 4));
            assert_eq!(
                names(dir.path()),
                [
                    "0000040_adapters.safetensors",
                    "0000080_adapters.safetensors",
                    "0000100_adapters.safetensors",
                    "adapter_config.json",
                    "adapters.safetensors",
                    "metrics.jsonl",
                    "state"
                ]
            );
            assert_eq!(names(&dir.path().join("state")), ["0000080", "0000100", "latest"]);
            assert!(
                matches!(events[0], Event::Started { modules: 14, iters: 100, batches_per_pass: 2, .. }),
                "{:?}",
                events[0]
            );

            // What was written is an adapter that does what the trained one did.
            let set = AdapterSet::load(dir.path()).unwrap();
            assert_eq!(set.config.fine_tune_type, kind);
            let route = OwnedRoute::of(&set, dir.path(), &model).unwrap();
            let found = test(&model, &route.route(), &data.valid, 2, 2, 0).unwrap();
            let all = test(&model, &route.route(), &data.valid, 2, -1, 0).unwrap();
            assert!(all.loss < 0.5 * losses[0] && found.tokens <= all.tokens, "{all:?}");
            let base = test(&model, &OwnedRoute::Base.route(), &data.valid, 2, -1, 0).unwrap();
            assert!(base.loss > 2.0 * all.loss);
        }
    });
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    arrays(|| {
        for (kind, stop_at) in [
            (FineTuneType::Lora, 6),
            (FineTuneType::Dora, 5),
            (FineTuneType::Full, 7),
            (FineTuneType::Lora, 0),
        ] {
            let packed = (kind != FineTuneType::Full).then_some((4, 32));
            let model = load(&Tiny { packed, ..Tiny::new(Family::Llama) });
            let data = data(split(&[12, 14, 16, 18, 20, 7, 9], 0, 1), split(&[12, 14, 16], 0, 2));
            let settings = |dir: &Path| TrainConfig {
                fine_tune_type: kind,
                lora: lora(4, 0.1),
                // Updates fall on 4, 8 and 12: most stops are amid an accumulation, and amid a report.
                grad_accumulation_steps: 4,
                lr_schedule: Some(json!({"name": "cosine_decay", "arguments": [1e-3, 3], "warmup": 1})),
                ..config(dir)
            };
            let whole = tempfile::tempdir().unwrap();
            quietly(&settings(whole.path()), &model, &data).unwrap();

            let parts = tempfile::tempdir().unwrap();
            let stop = AtomicBool::new(stop_at == 0);
            let summary = run(&settings(parts.path()), Rc::clone(&model), &data, &stop, &mut |event| {
                if event == (Event::Step { iter: stop_at }) {
                    stop.store(true, Ordering::Relaxed);
                }
            })
            .unwrap();
            assert_eq!(summary.outcome, Outcome::Interrupted { step: stop_at });
            // A killed run leaves lines behind that its state does not know of.
            let file = parts.path().join("metrics.jsonl");
            let mut text = std::fs::read_to_string(&file).unwrap();
            text.push_str("{\"kind\": \"train\", \"iter\": 99}\n{\"kin");
            std::fs::write(&file, text).unwrap();

            let resumed =
                quietly(&TrainConfig { resume: true, ..settings(parts.path()) }, &model, &data).unwrap();
            assert_eq!((resumed.outcome, resumed.iter), (Outcome::Finished, 12));
            let read = |dir: &Path, name: &str| std::fs::read(dir.join(name)).unwrap();
            for name in [
                "adapters.safetensors",
                "state/0000012/optimizer.safetensors",
                "state/0000012/adapters.safetensors",
            ] {
                assert!(
                    read(whole.path(), name) == read(parts.path(), name),
                    "{}, stop at {stop_at}: {name}",
                    kind.name()
                );
            }
            assert_eq!(timeless(whole.path()), timeless(parts.path()), "{}, stop at {stop_at}", kind.name());

            // Nothing is left to do, and nothing is done.
            let again =
                quietly(&TrainConfig { resume: true, ..settings(parts.path()) }, &model, &data).unwrap();
            assert_eq!((again.outcome, again.iter), (Outcome::Finished, 12));
        }
    });
}

#[test]
fn a_run_goes_on_only_as_the_same_run() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let train = split(&[12, 14, 16, 18], 0, 1);
        let data1 = data(train.clone(), named(vec![], "valid.jsonl"));
        let dir = tempfile::tempdir().unwrap();
        let none = quietly(&TrainConfig { resume: true, ..config(dir.path()) }, &model, &data1).unwrap_err();
        assert!(none.to_string().contains("no saved state"), "{none}");
        quietly(&TrainConfig { iters: 4, ..config(dir.path()) }, &model, &data1).unwrap();

        let other = data(split(&[12, 14, 16, 18], 0, 9), named(vec![], "valid.jsonl"));
        let refused =
            |config: TrainConfig, data: &Data| quietly(&config, &model, data).unwrap_err().to_string();
        let resume = TrainConfig { resume: true, ..config(dir.path()) };
        assert!(refused(resume.clone(), &other).contains("training_data"));
        let e = refused(TrainConfig { batch_size: 1, seed: 8, ..resume.clone() }, &data1);
        assert!(e.contains("batch_size was 2, is 1") && e.contains("seed was 7, is 8"), "{e}");
        let e = refused(TrainConfig { lora: lora(8, 0.0), ..resume.clone() }, &data1);
        assert!(e.contains("expected shape"), "{e}");

        // Weights alone, into another directory: iterations start anew from those weights.
        let fresh = tempfile::tempdir().unwrap();
        let from = TrainConfig {
            resume: true,
            resume_adapter_file: Some(dir.path().join("adapters.safetensors")),
            learning_rate: 0.0,
            ..config(fresh.path())
        };
        assert_eq!(quietly(&from, &model, &data1).unwrap().iter, 12);
        let read = |dir: &Path| std::fs::read(dir.join("adapters.safetensors")).unwrap();
        assert!(read(dir.path()) == read(fresh.path()));

        // A damaged pointer is named.
        std::fs::write(dir.path().join("state/latest"), "../x\n").unwrap();
        assert!(refused(resume, &data1).contains("state/latest"));
    });
}

#[test]
fn what_is_not_finite_stops_the_run_and_is_not_saved() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let data = data(split(&[12, 14, 16, 18], 0, 1), named(vec![], "valid.jsonl"));
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            optimizer: "sgd".into(),
            learning_rate: 1e30,
            max_grad_norm: None,
            save_every: 1,
            ..config(dir.path())
        };
        let error = quietly(&config, &model, &data).unwrap_err();
        let Error::NonFinite { what, iter, rows } = &error else { panic!("{error}") };
        assert!(what == "loss" || what == "gradient", "{what}");
        assert!(*iter > 1 && rows.starts_with("train.jsonl lines "), "{error}");
        // Loading refuses values that are not finite, so this shows that there are none.
        AdapterSet::load(dir.path()).unwrap();
        AdapterSet::load(&dir.path().join("state").join(format!("{:07}", iter - 1))).unwrap();
        assert!(!dir.path().join(format!("{iter:07}_adapters.safetensors")).exists());
    });
}

#[test]
fn full_training_writes_whole_weights_of_the_last_blocks() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Qwen3));
        let data = data(split(&[12, 14, 16, 18], 0, 1), split(&[12], 0, 1));
        let dir = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            fine_tune_type: FineTuneType::Full,
            num_layers: 1,
            iters: 30,
            learning_rate: 1e-3,
            ..config(dir.path())
        };
        let summary = quietly(&config, &model, &data).unwrap();
        let set = AdapterSet::load(dir.path()).unwrap();
        assert_eq!(set.weights.len(), 7 + 4);
        assert!(set.weights.keys().all(|n| n.starts_with("model.layers.1.")));
        let route = OwnedRoute::of(&set, dir.path(), &model).unwrap();
        let found = test(&model, &route.route(), &data.valid, 2, -1, 0).unwrap();
        let last = summary.valid.unwrap();
        assert!((found.loss - last.loss).abs() < 1e-6, "{found:?} {last:?}");
        let base = test(&model, &OwnedRoute::Base.route(), &data.valid, 2, -1, 0).unwrap();
        assert!(found.loss < base.loss - 0.5);
    });
}

#[test]
fn settings_are_checked_before_anything_is_written() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let data = data(split(&[12, 14], 0, 1), named(vec![], "valid.jsonl"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapters");
        let base = config(&path);
        for (bad, field) in [
            (TrainConfig { iters: 0, ..base.clone() }, "iters"),
            (TrainConfig { save_every: 0, ..base.clone() }, "save_every"),
            (TrainConfig { learning_rate: f64::NAN, ..base.clone() }, "learning_rate"),
            (TrainConfig { max_grad_norm: Some(0.0), ..base.clone() }, "max_grad_norm"),
            (TrainConfig { batch_size: 3, ..base.clone() }, "batch_size"),
            (TrainConfig { num_layers: 9, ..base.clone() }, "num_layers"),
            (TrainConfig { lora: lora(0, 0.0), ..base.clone() }, "rank"),
            (TrainConfig { lora: lora(4, 1.0), ..base.clone() }, "dropout"),
            (TrainConfig { optimizer: "x".into(), ..base.clone() }, "optimizer"),
        ] {
            let e = quietly(&bad, &model, &data).unwrap_err().to_string();
            assert!(e.contains(field), "{field}: {e}");
        }
        assert!(!path.exists());
        let mut warnings = Vec::new();
        let adafactor = TrainConfig { optimizer: "adafactor".into(), iters: 1, ..base };
        run(&adafactor, model, &data, &AtomicBool::new(false), &mut |e| {
            if let Event::Warning { text } = e {
                warnings.push(text);
            }
        })
        .unwrap();
        assert!(
            warnings[0].contains("valid.jsonl: no rows")
                && warnings[1].contains("learning_rate has no effect")
        );
    });
}
