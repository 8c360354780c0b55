//! Whole runs: the loss falls, a resumed run is the uninterrupted one, nothing that is not finite is written.

use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use graft_adapters::{AdapterSet, FineTuneType, LoraParameters};
use graft_model::{GenerateOptions, Model, Sampling};
use graft_testkit::{Family, Tiny};
use graft_train::{
    Data, Error, Evaluation, Event, Outcome, OwnedRoute, Split, Summary, TrainConfig, run, test,
};
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

fn evaluation(model: &Model, route: &OwnedRoute, split: &Split, batches: i64) -> Evaluation {
    test(model, &route.route(), split, 2, batches, 0, &AtomicBool::new(false)).unwrap().unwrap()
}

/// Every file below a directory, with its bytes.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for name in names(dir) {
        let path = dir.join(&name);
        if path.is_dir() {
            all.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            all.push((name, std::fs::read(&path).unwrap()));
        }
    }
    all
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
            // The rows that it is measured on are some of those it is trained on, which it says first.
            let told =
                matches!(&events[0], Event::Warning { text } if text.contains("in-two-splits: 3 of 3 rows"));
            assert!(told, "{:?}", events[0]);
            assert!(
                matches!(events[1], Event::Started { modules: 14, iters: 100, batches_per_pass: 2, .. }),
                "{:?}",
                events[1]
            );

            // What was written is an adapter that does what the trained one did.
            let set = AdapterSet::load(dir.path()).unwrap();
            assert_eq!(set.config.fine_tune_type, kind);
            let route = OwnedRoute::of(&set, dir.path(), &model).unwrap();
            let found = evaluation(&model, &route, &data.valid, 2);
            let all = evaluation(&model, &route, &data.valid, -1);
            assert!(all.loss < 0.5 * losses[0] && found.tokens <= all.tokens, "{all:?}");
            let base = evaluation(&model, &OwnedRoute::Base, &data.valid, -1);
            assert!(base.loss > 2.0 * all.loss);
        }
    });
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    arrays(|| {
        let plain = Tiny::new(Family::Llama);
        let packed = Tiny { packed: Some((4, 32)), ..plain.clone() };
        for (kind, stop_at, tiny) in [
            (FineTuneType::Lora, 6, packed.clone()),
            (FineTuneType::Dora, 5, packed),
            (FineTuneType::Dora, 5, plain.clone().in_mode("mxfp4")),
            (FineTuneType::Full, 7, plain),
        ] {
            let model = load(&tiny);
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
            let stop = AtomicBool::new(false);
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
        let other = LoraParameters { scale: 3.0, ..lora(4, 0.1) };
        let e = refused(TrainConfig { lora: other, ..resume.clone() }, &data1);
        assert!(e.contains("scale was 2.0, is 3.0") && e.contains("dropout was 0.0, is 0.1"), "{e}");

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
fn a_new_run_leaves_what_is_there_until_it_has_something_to_show() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let data = data(split(&[12, 14, 16, 18], 0, 1), split(&[12, 14, 16], 0, 2));
        let dir = tempfile::tempdir().unwrap();
        quietly(&TrainConfig { iters: 4, ..config(dir.path()) }, &model, &data).unwrap();
        let before = files(dir.path());
        let second = TrainConfig { seed: 8, lora: lora(2, 0.0), ..config(dir.path()) };
        // Stopped at once, and stopped after the first validation, whose line is not written either.
        for at_once in [true, false] {
            let stop = AtomicBool::new(at_once);
            let summary = run(&second, Rc::clone(&model), &data, &stop, &mut |event| {
                if matches!(event, Event::Valid { .. }) {
                    stop.store(true, Ordering::Relaxed);
                }
            })
            .unwrap();
            assert_eq!(summary.outcome, Outcome::Interrupted { step: 0 });
            assert!(files(dir.path()) == before);
        }
        let blown = TrainConfig { resume_adapter_file: Some("none".into()), ..second.clone() };
        quietly(&blown, &model, &data).unwrap_err();
        assert!(files(dir.path()) == before);

        // After a step metrics and state are the new run's; the adapter and its config stay one until the first save.
        let (mut seen, stop) = (None, AtomicBool::new(false));
        run(&second, Rc::clone(&model), &data, &stop, &mut |event| {
            if event == (Event::Step { iter: 1 }) {
                seen = Some((files(dir.path()), dir.path().join("state/latest").exists()));
            }
        })
        .unwrap();
        let (during, pointer) = seen.unwrap();
        let of = |files: &[(String, Vec<u8>)], name: &str| files.iter().find(|(n, _)| n == name).cloned();
        for name in ["adapters.safetensors", "adapter_config.json"] {
            assert!(of(&during, name) == of(&before, name), "{name}");
        }
        let lines = of(&during, "metrics.jsonl").map(|(_, bytes)| String::from_utf8(bytes).unwrap()).unwrap();
        assert!(lines.lines().count() == 1 && lines.contains("\"kind\":\"valid\",\"iter\":0"), "{lines}");
        assert!(!pointer);
        assert_eq!(AdapterSet::load(dir.path()).unwrap().config.parameters.unwrap().rank, 2);
    });
}

#[test]
fn no_iterations_save_the_adapter_as_it_starts() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let data = data(split(&[12, 14, 16, 18], 0, 1), split(&[12, 14], 0, 2));
        let dir = tempfile::tempdir().unwrap();
        let summary = quietly(&TrainConfig { iters: 0, ..config(dir.path()) }, &model, &data).unwrap();
        assert_eq!((summary.outcome, summary.iter), (Outcome::Finished, 0));
        assert!(dir.path().join("0000000_adapters.safetensors").exists());
        let set = AdapterSet::load(dir.path()).unwrap();
        let route = OwnedRoute::of(&set, dir.path(), &model).unwrap();
        let base = evaluation(&model, &OwnedRoute::Base, &data.valid, -1);
        assert_eq!(evaluation(&model, &route, &data.valid, -1), base);
        // The run goes on from there.
        let on = TrainConfig { resume: true, iters: 2, ..config(dir.path()) };
        assert_eq!(quietly(&on, &model, &data).unwrap().iter, 2);
    });
}

#[test]
fn tokens_that_the_model_does_not_know_are_named_before_the_first_step() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let vocab = model.config().vocab as u32;
        let mut bad = split(&[12, 14], 0, 1);
        bad.examples[1].tokens[3] = vocab;
        let good = split(&[12, 14], 0, 2);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapters");
        for data in [data(bad.clone(), good.clone()), data(good, bad.clone())] {
            let e = quietly(&config(&path), &model, &data).unwrap_err().to_string();
            assert!(e.starts_with("train.jsonl:2:") && e.contains(&format!("the token id {vocab} ")), "{e}");
        }
        let stop = AtomicBool::new(false);
        let tested = |split: &Split, batches: i64| {
            test(&model, &OwnedRoute::Base.route(), split, 2, batches, 0, &stop)
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(tested(&bad, -1).contains(&format!("vocab_size is {vocab}")));
        assert!(tested(&split(&[12], 0, 1), 0).contains("test_batches"));
        stop.store(true, Ordering::Relaxed);
        let found = test(&model, &OwnedRoute::Base.route(), &split(&[12], 0, 1), 2, -1, 0, &stop).unwrap();
        assert_eq!(found, None);
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
fn samples_are_answered_at_each_validation_and_change_nothing() {
    arrays(|| {
        let model = load(&Tiny::new(Family::Llama));
        let (train, none) = (split(&[12, 14, 16, 18], 0, 1), named(vec![], "valid.jsonl"));
        let options = GenerateOptions { max_tokens: 5, stop_ids: [].into(), sampling: Sampling::greedy() };
        let samples = vec![(vec![5, 6, 7], options.clone()), (vec![9], options)];
        for valid in [split(&[12], 0, 1), none] {
            let data = data(train.clone(), valid);
            let (with, without) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let dropout = TrainConfig { lora: lora(4, 0.1), ..config(with.path()) };
            let sampled = TrainConfig { samples: samples.clone(), ..dropout.clone() };
            let mut seen = Vec::new();
            run(&sampled, Rc::clone(&model), &data, &AtomicBool::new(false), &mut |event| {
                if let Event::Samples { iter, answers } = event {
                    seen.push((iter, answers));
                }
            })
            .unwrap();
            assert_eq!(seen.iter().map(|(iter, _)| *iter).collect::<Vec<_>>(), [0, 6, 12]);
            assert!(seen.iter().all(|(_, answers)| answers.iter().all(|a| a.len() == 5)));
            assert_ne!(seen[0].1, seen[2].1, "the adapter has learned something");
            let quiet = TrainConfig { adapter_path: without.path().into(), ..dropout };
            quietly(&quiet, &model, &data).unwrap();
            let adapter = |dir: &Path| std::fs::read(dir.join("adapters.safetensors")).unwrap();
            assert!(adapter(with.path()) == adapter(without.path()));
        }
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
        let found = evaluation(&model, &route, &data.valid, -1);
        let last = summary.valid.unwrap();
        assert!((found.loss - last.loss).abs() < 1e-6, "{found:?} {last:?}");
        let base = evaluation(&model, &OwnedRoute::Base, &data.valid, -1);
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
            warnings[0].contains("valid.jsonl: no-validation: no rows")
                && warnings[1].contains("learning_rate has no effect")
        );
    });
}
