//! Merging against the formulas, computed here densely and in f64: every method, LoRA and DoRA, mixed ranks and scales.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use graft_adapters::{AdapterSet, Fingerprint, Origin, Provenance, Route};
use graft_merge::{
    Error, MergeBase, MergeOptions, MergeReport, MergeSource, Method, Result, Setting, Size, merge,
};
use graft_ops::Array;
use graft_quant::{Checkpoint, read_safetensors};
use graft_testkit::{Family, Tiny, tiny_adapter, tiny_model};
use serde_json::json;
use tempfile::TempDir;

use crate::formulas::{distance, matrix, weight};
use crate::support::{adapter_dir, arrays, load, logits, names, read_json, tensors, unfused_logits, wave};

/// An adapter in its directory, with another scale than the testkit's.
fn adapter(base: &Path, tiny: &Tiny, dora: bool, (rank, seed): (usize, u64), scale: f64) -> TempDir {
    let dir = tiny_adapter(base, tiny, dora, rank, seed);
    let file = dir.path().join("adapter_config.json");
    let mut config = read_json(&file);
    config["lora_parameters"]["scale"] = scale.into();
    std::fs::write(file, config.to_string()).unwrap();
    dir
}

fn source(dir: &Path, weight: f64, density: f64) -> MergeSource {
    MergeSource {
        origin: Origin::of_adapter(dir, "one").unwrap(),
        set: AdapterSet::load(dir).unwrap(),
        weight: Setting::Number(weight),
        density: Setting::Number(density),
    }
}

fn options(method: &str, size: Size) -> MergeOptions {
    let method = Method::from_name(method).unwrap();
    MergeOptions { method, size, normalize: None, lambda: 1.0, t: None, seed: 5, force: false }
}

/// What a module's path and the single updates make of it.
type Formula<'a> = &'a dyn Fn(&str, &[Vec<f64>]) -> Vec<f64>;

struct Merged {
    dir: PathBuf,
    report: MergeReport,
    _parent: TempDir,
}

fn merged(sources: &[MergeSource], base: Option<&Path>, options: &MergeOptions) -> Result<Merged> {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("merged");
    let checkpoint = base.map(|base| Checkpoint::open(base).unwrap());
    let base = checkpoint.as_ref().map(|checkpoint| MergeBase {
        checkpoint,
        origin: Origin::of_model(checkpoint, "the base").unwrap(),
    });
    let result = merge(sources, base.as_ref(), options, &dir, &AtomicBool::new(false), &mut |_| {});
    let expected: &[&str] = if result.is_ok() { &["merged"] } else { &[] };
    assert_eq!(names(parent.path()), expected, "no half directory");
    Ok(Merged { dir, report: result?, _parent: parent })
}

/// The update of one module by the adapter in `dir`, dense in f64: c (W + s (A B)^T) - W.
fn update(w: &crate::formulas::Matrix, dir: &Path, path: &str) -> Vec<f64> {
    let all = read_safetensors(&dir.join("adapters.safetensors")).unwrap().0;
    let part = |name: &str| all.get(&format!("{path}.{name}")).map(matrix);
    let (Some(a), Some(b), m) = (part("lora_a"), part("lora_b"), part("m")) else {
        return vec![0.0; w.values.len()];
    };
    let scale = read_json(&dir.join("adapter_config.json"))["lora_parameters"]["scale"].as_f64().unwrap();
    let scale = f64::from(scale as f32);
    let mut values = Vec::new();
    for (o, row) in w.values.chunks_exact(w.columns).enumerate() {
        let sums = row.iter().enumerate().map(|(i, w)| {
            let product = |r: usize| a.values[i * a.columns + r] * b.values[r * b.columns + o];
            w + scale * (0..a.columns).map(product).sum::<f64>()
        });
        let sums: Vec<f64> = sums.collect();
        let norm = sums.iter().map(|v| v * v).sum::<f64>().sqrt();
        let c = m.as_ref().map_or(1.0, |m| m.values[o] / norm);
        values.extend(sums.iter().zip(row).map(|(v, w)| c * v - w));
    }
    values
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

const PATHS: [&str; 3] =
    ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"];

/// That the merged update of some modules is what `wanted` makes of the single ones, up to a share of its norm.
fn check(
    base: &Path,
    dirs: &[&Path],
    merged: &Path,
    limit: f64,
    wanted: impl Fn(&str, &[Vec<f64>]) -> Vec<f64>,
) {
    let stored = tensors(base);
    for path in PATHS {
        let w = weight(base, &stored, path);
        let single: Vec<Vec<f64>> = dirs.iter().map(|dir| update(&w, dir, path)).collect();
        let (expected, found) = (wanted(path, &single), update(&w, merged, path));
        let gap = distance(&expected, &found) / norm(&expected);
        assert!(gap < limit, "{path}: {gap}");
    }
}

fn weighted(single: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let one = |i: usize| single.iter().zip(weights).map(|(d, w)| w * d[i]).sum();
    (0..single[0].len()).map(one).collect()
}

/// The elements that are largest by absolute value; the others are zero.
fn largest(d: &[f64], density: f64) -> Vec<f64> {
    let mut sorted: Vec<f32> = d.iter().map(|x| x.abs() as f32).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // Between two elements, so that rounding does not decide; the tests' densities leave a gap.
    let last = (density * d.len() as f64) as usize;
    let limit = f64::from(sorted[last - 1] + sorted[last]) / 2.0;
    d.iter().map(|x| if x.abs() >= limit { *x } else { 0.0 }).collect()
}

fn scramble(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A random share of the elements over that share, drawn as docs/merging.md says.
fn drawn(d: &[f64], density: f64, path: &str, source: u64) -> Vec<f64> {
    let mut key = scramble(5 ^ scramble(source + 1));
    path.bytes().for_each(|byte| key = scramble(key ^ u64::from(byte)));
    let keep = |i: usize| (scramble(key.wrapping_add(i as u64)) as f64) < density * u64::MAX as f64;
    let kept: Vec<f64> = d.iter().enumerate().map(|(i, x)| if keep(i) { x / density } else { 0.0 }).collect();
    let share = kept.iter().filter(|x| **x != 0.0).count() as f64 / d.len() as f64;
    assert!((share - density).abs() < 0.05, "{share} of {density} were kept");
    kept
}

/// TIES: the sign of the weighted sum, and the weighted mean of those that have it.
fn elected(single: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let one = |i: usize| {
        let sum: f64 = single.iter().zip(weights).map(|(d, w)| w * d[i]).sum();
        let agree = || single.iter().zip(weights).filter(|(d, w)| **w * d[i] * sum > 0.0);
        let divisor: f64 = agree().map(|(_, w)| w).sum();
        if divisor == 0.0 { 0.0 } else { agree().map(|(d, w)| w * d[i]).sum::<f64>() / divisor }
    };
    (0..single[0].len()).map(one).collect()
}

#[test]
fn one_adapter_with_weight_one_is_itself() {
    arrays(|| {
        for packed in [None, Some((4, 32))] {
            let tiny = Tiny { packed, ..Tiny::new(Family::Llama) };
            let base = tiny_model(&tiny);
            for dora in [false, true] {
                let dir = adapter(base.path(), &tiny, dora, (4, 9), 0.7);
                let before = unfused_logits(base.path(), dir.path());
                for method in Method::NAMES {
                    for size in [Size::Full, Size::Rank(4), Size::Rank(64)] {
                        if (method == "cat" && size != Size::Full) || (method == "svd" && size == Size::Full)
                        {
                            continue;
                        }
                        let one = [source(dir.path(), 1.0, 1.0)];
                        let found = merged(&one, Some(base.path()), &options(method, size)).unwrap();
                        check(base.path(), &[dir.path()], &found.dir, 1e-5, |_, d| d[0].clone());
                        assert!(found.report.totals.error < 1e-5, "{:?}", found.report.totals);
                        let after = unfused_logits(base.path(), &found.dir);
                        assert!(crate::support::gap(&before, &after) < 2e-4, "{method}, dora {dora}");
                    }
                }
            }
        }
    });
}

#[test]
fn sums_equal_the_dense_sum() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) };
        let base = tiny_model(&tiny);
        let path = base.path();
        for dora in [[false, false], [true, true], [false, true]] {
            let dirs = [
                adapter(path, &tiny, dora[0], (4, 1), 0.7),
                adapter(path, &tiny, dora[1], (6, 2), 20.0 / 3.0),
            ];
            let dirs = [dirs[0].path(), dirs[1].path()];
            let weights = [0.8, -0.3];
            let sources = || [source(dirs[0], 0.8, 1.0), source(dirs[1], -0.3, 1.0)];
            for (method, size) in [
                ("linear", Size::Full),
                ("cat", Size::Full),
                ("svd", Size::Rank(10)),
                ("linear", Size::Energy(1.0)),
            ] {
                let found = merged(&sources(), Some(path), &options(method, size)).unwrap();
                check(path, &dirs, &found.dir, 1e-5, |_, d| weighted(d, &weights));
                assert!(found.report.layers.iter().all(|l| l.rank == 10 && l.error < 1e-5));
                let kind = if dora.contains(&true) { "dora" } else { "lora" };
                assert_eq!(found.report.fine_tune_type, kind);
            }
            // Over the sum of the weights, which is 0.5, and times lambda.
            let less = MergeOptions { normalize: Some(true), lambda: 0.7, ..options("linear", Size::Full) };
            let found = merged(&sources(), Some(path), &less).unwrap();
            check(path, &dirs, &found.dir, 1e-5, |_, d| weighted(d, &weights.map(|w| w / 0.5 * 0.7)));
            // Without magnitudes no base is needed.
            let alone = merged(&sources(), None, &options("linear", Size::Full));
            match dora.contains(&true) {
                true => assert!(matches!(alone, Err(Error::NeedsBase { .. }))),
                false => check(path, &dirs, &alone.unwrap().dir, 1e-5, |_, d| weighted(d, &weights)),
            }
        }
    });
}

#[test]
fn a_cut_says_what_it_lost() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let dirs = [
            adapter(base.path(), &tiny, false, (4, 1), 2.0),
            adapter(base.path(), &tiny, false, (4, 2), 1.0),
        ];
        let dirs = [dirs[0].path(), dirs[1].path()];
        let sources = || [source(dirs[0], 1.0, 1.0), source(dirs[1], 1.0, 1.0)];
        let found = merged(&sources(), None, &options("svd", Size::Rank(5))).unwrap();
        let stored = tensors(base.path());
        for layer in found.report.layers.iter().filter(|l| PATHS.contains(&l.path.as_str())) {
            let w = weight(base.path(), &stored, &layer.path);
            let single: Vec<Vec<f64>> = dirs.iter().map(|dir| update(&w, dir, &layer.path)).collect();
            let sum = weighted(&single, &[1.0, 1.0]);
            let error = distance(&sum, &update(&w, &found.dir, &layer.path)) / norm(&sum);
            assert!(layer.error > 0.05 && (layer.error - error).abs() < 1e-4, "{layer:?}: {error}");
            assert!((layer.norm / norm(&sum) - 1.0).abs() < 1e-4, "{layer:?}");
        }
        let energy = merged(&sources(), None, &options("linear", Size::Energy(0.9))).unwrap();
        assert!(
            energy.report.layers.iter().all(|l| l.error.powi(2) <= 0.1 && l.rank < 8),
            "{:?}",
            energy.report
        );
        // Ranks differ by module, and the directory is read all the same.
        unfused_logits(base.path(), &energy.dir);
    });
}

#[test]
fn dense_methods_equal_their_formulas() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let path = base.path();
        for dora in [[false, false], [true, false], [true, true]] {
            let dirs =
                [adapter(path, &tiny, dora[0], (4, 1), 0.7), adapter(path, &tiny, dora[1], (6, 2), 2.0)];
            let dirs = [dirs[0].path(), dirs[1].path()];
            let (weights, densities) = ([0.8, 0.5], [0.6, 0.3]);
            let run = |method: &str, normalize: Option<bool>, lambda: f64, wanted: Formula| {
                let sources = [source(dirs[0], 0.8, 0.6), source(dirs[1], 0.5, 0.3)];
                let options = MergeOptions { normalize, lambda, ..options(method, Size::Rank(128)) };
                let found = merged(&sources, Some(path), &options).unwrap();
                check(path, &dirs, &found.dir, 2e-5, wanted);
            };
            let trim = |d: &[Vec<f64>]| [0, 1].map(|i| largest(&d[i], densities[i]));
            let draw =
                |path: &str, d: &[Vec<f64>]| [0, 1].map(|i| drawn(&d[i], densities[i], path, i as u64));
            run("magnitude_prune", None, 1.0, &|_, d| weighted(&trim(d), &weights));
            run("ties", None, 1.0, &|_, d| elected(&trim(d), &weights));
            run("dare_linear", None, 1.0, &|p, d| weighted(&draw(p, d), &weights));
            run("dare_ties", None, 1.0, &|p, d| elected(&draw(p, d), &weights));
            run("dare_linear", Some(true), 1.0, &|p, d| weighted(&draw(p, d), &weights.map(|w| w / 1.3)));
            let scaled = |d: Vec<f64>| -> Vec<f64> { d.into_iter().map(|x| 0.7 * x).collect() };
            run("ties", None, 0.7, &|_, d| scaled(elected(&trim(d), &weights)));
            let mean = weights.map(|w| 0.7 * w / 1.3);
            run("magnitude_prune", Some(true), 0.7, &|_, d| weighted(&trim(d), &mean));
        }
    });
}

#[test]
fn slerp_walks_the_arc() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let path = base.path();
        for dora in [false, true] {
            let dirs = [adapter(path, &tiny, dora, (4, 1), 0.7), adapter(path, &tiny, dora, (6, 2), 2.0)];
            let dirs = [dirs[0].path(), dirs[1].path()];
            let arc = |d: &[Vec<f64>], t: f64| {
                let product: f64 = d[0].iter().zip(&d[1]).map(|(x, y)| x * y).sum();
                let angle = (product / norm(&d[0]) / norm(&d[1])).acos();
                weighted(d, &[((1.0 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()])
            };
            for (t, weights) in [(Some(0.0), [1.0, 1.0]), (Some(0.7), [1.0, 1.0]), (None, [1.0, 3.0])] {
                let sources = [source(dirs[0], weights[0], 1.0), source(dirs[1], weights[1], 1.0)];
                let options = MergeOptions { t: t.map(Setting::Number), ..options("slerp", Size::Full) };
                let found = merged(&sources, Some(path), &options).unwrap();
                check(path, &dirs, &found.dir, 1e-5, |_, d| arc(d, t.unwrap_or(0.75)));
            }
            let sources = [source(dirs[0], 1.0, 1.0), source(dirs[1], 1.0, 1.0)];
            let t = Some(Setting::Number(0.3));
            let less = MergeOptions { t, lambda: 0.7, ..options("slerp", Size::Full) };
            let found = merged(&sources, Some(path), &less).unwrap();
            check(path, &dirs, &found.dir, 1e-5, |_, d| arc(d, 0.3).iter().map(|x| 0.7 * x).collect());
            // Twice the same has no angle.
            let twice = [source(dirs[0], 1.0, 1.0), source(dirs[0], 1.0, 1.0)];
            let found = merged(&twice, Some(path), &options("slerp", Size::Full)).unwrap();
            check(path, &[dirs[0]], &found.dir, 1e-5, |_, d| d[0].clone());
        }
    });
}

#[test]
fn an_embedding_has_its_own_orientation() {
    arrays(|| {
        let path = "model.embed_tokens";
        let dirs = [0.1, 0.5].map(|seed| {
            let parts = [("lora_a", [288, 4]), ("lora_b", [4, 64])];
            let parts =
                parts.map(|(part, shape)| (format!("{path}.{part}"), wave(&shape, seed + shape[0] as f32)));
            adapter_dir("lora", &parts.into_iter().collect())
        });
        let base = tiny_model(&Tiny::new(Family::Llama));
        let product = |dir: &Path| {
            let all = read_safetensors(&dir.join("adapters.safetensors")).unwrap().0;
            let (a, b) = (matrix(&all[&format!("{path}.lora_a")]), matrix(&all[&format!("{path}.lora_b")]));
            let config = read_json(&dir.join("adapter_config.json"));
            let scale = config["lora_parameters"]["scale"].as_f64().unwrap();
            let one = |v: usize, e: usize| -> f64 {
                (0..a.columns).map(|r| a.values[v * a.columns + r] * b.values[r * b.columns + e]).sum()
            };
            (0..288 * 64).map(|i| scale * one(i / 64, i % 64)).collect::<Vec<f64>>()
        };
        let single: Vec<Vec<f64>> = dirs.iter().map(|dir| product(dir.path())).collect();
        let trimmed: Vec<Vec<f64>> = single.iter().map(|d| largest(d, 0.5)).collect();
        for (method, size, density, wanted) in [
            ("linear", Size::Full, 1.0, weighted(&single, &[0.8, 0.5])),
            ("svd", Size::Rank(8), 1.0, weighted(&single, &[0.8, 0.5])),
            ("ties", Size::Rank(64), 0.5, elected(&trimmed, &[0.8, 0.5])),
        ] {
            let sources = [source(dirs[0].path(), 0.8, density), source(dirs[1].path(), 0.5, density)];
            let found = merged(&sources, Some(base.path()), &options(method, size)).unwrap();
            let gap = distance(&wanted, &product(&found.dir)) / norm(&wanted);
            assert!(gap < 2e-5, "{method}: {gap}");
            unfused_logits(base.path(), &found.dir);
        }
    });
}

#[test]
fn weights_may_differ_by_depth_and_modules_may_be_missing() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let path = base.path();
        let (one, two) = (adapter(path, &tiny, false, (4, 1), 0.7), adapter(path, &tiny, false, (6, 2), 2.0));
        let mut sources = [source(one.path(), 1.0, 1.0), source(two.path(), 1.0, 1.0)];
        sources[0].weight = Setting::Gradient(vec![0.0, 0.6]);
        sources[1].set.adapters.remove(PATHS[1]);
        let found = merged(&sources, Some(path), &options("linear", Size::Full)).unwrap();
        check(path, &[one.path(), two.path()], &found.dir, 1e-5, |path, d| match path {
            "model.layers.0.self_attn.q_proj" => d[1].clone(),
            "model.layers.1.self_attn.k_proj" => weighted(d, &[0.6, 0.0]),
            _ => weighted(d, &[0.6, 1.0]),
        });
        // One rank for all, as mlx-lm has it.
        assert!(found.report.layers.iter().all(|l| l.rank == 10));
        assert_eq!(found.report.layers.iter().filter(|l| l.adapters == [0]).count(), 1);
    });
}

#[test]
fn the_result_says_what_it_was_made_of_and_is_the_same_again() {
    arrays(|| {
        let tiny = Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) };
        let base = tiny_model(&tiny);
        let path = base.path();
        let dirs = [adapter(path, &tiny, true, (4, 1), 0.7), adapter(path, &tiny, false, (6, 2), 2.0)];
        let run = || {
            let sources = [source(dirs[0].path(), 0.8, 0.5), source(dirs[1].path(), 0.5, 0.5)];
            merged(&sources, Some(path), &options("dare_ties", Size::Rank(8))).unwrap()
        };
        let (found, again) = (run(), run());
        for name in ["adapter_config.json", "adapters.safetensors", "merge_report.json"] {
            let [a, b] = [&found, &again].map(|m| std::fs::read(m.dir.join(name)).unwrap());
            assert!(a == b, "{name}");
        }
        assert_eq!(names(&found.dir), ["adapter_config.json", "adapters.safetensors", "merge_report.json"]);
        let set = AdapterSet::load(&found.dir).unwrap();
        let said = Provenance::read(&set).unwrap();
        let again: Provenance = serde_json::from_str(&set.metadata["graft_provenance"]).unwrap();
        assert_eq!(said, again);
        assert_eq!(said.inputs[1], Origin::of_adapter(dirs[1].path(), "one").unwrap());
        assert_eq!(said.inputs[1].sha256.len(), 2);
        assert_eq!(said.base.unwrap().sha256.len(), 2);
        assert_eq!(said.recipe["merge_method"], "dare_ties");
        assert_eq!(said.recipe["adapters"][0], json!({"weight": 0.8, "density": 0.5}));
        assert_eq!(said.summary["modules"], 14);
        let base = Fingerprint::of(&Checkpoint::open(path).unwrap(), "the base");
        assert_eq!(Fingerprint::read(&set.config), Some(base));
        let config = &set.config;
        assert_eq!((config.num_layers, config.parameters.as_ref().unwrap().rank), (-1, 8));
        let model = load(path);
        let table = set.table(&found.dir, |path| model.target(path)).unwrap();
        assert_eq!(logits(&model, &Route::Table(&table)).shape(), [24, 288]);
    });
}

#[test]
fn what_has_no_meaning_is_refused_by_name() {
    arrays(|| {
        let tiny = Tiny::new(Family::Llama);
        let base = tiny_model(&tiny);
        let dir = adapter(base.path(), &tiny, false, (4, 1), 0.7);
        let two = || vec![source(dir.path(), 1.0, 1.0), source(dir.path(), 1.0, 1.0)];
        let text = |sources: &[MergeSource], options: &MergeOptions| {
            merged(sources, Some(base.path()), options).map(|_| ()).unwrap_err().to_string()
        };
        let linear = || options("linear", Size::Full);
        let mut three = two();
        three.push(source(dir.path(), 1.0, 1.0));
        let with = |change: &dyn Fn(&mut MergeSource)| {
            let mut sources = two();
            change(&mut sources[1]);
            sources
        };
        for (sources, options, parts) in [
            (
                three,
                options("slerp", Size::Full),
                "slerp: expected two adapters, the ends of an arc, found 3",
            ),
            (vec![], linear(), "adapters: expected at least one, found none"),
            (two(), options("cat", Size::Rank(3)), "cat: expected no rank and no energy"),
            (two(), options("svd", Size::Full), "svd: expected a rank or an energy"),
            (two(), options("svd", Size::Rank(0)), "rank: expected at least 1, found 0"),
            (two(), options("svd", Size::Energy(1.5)), "energy: expected above 0 and at most 1, found 1.5"),
            (
                two(),
                MergeOptions { t: Some(Setting::Number(0.5)), ..linear() },
                "t: expected nothing, as it belongs to slerp",
            ),
            (
                two(),
                MergeOptions { t: Some(Setting::Number(1.5)), ..options("slerp", Size::Full) },
                "t: expected from 0 to 1, found 1.5",
            ),
            (
                two(),
                MergeOptions { lambda: f64::NAN, ..linear() },
                "lambda: expected a finite number, found NaN",
            ),
            (
                two(),
                MergeOptions { lambda: 1e39, ..linear() },
                "lambda: expected a finite number, found 1000",
            ),
            (
                with(&|s| s.weight = Setting::Number(1e300)),
                linear(),
                "weight of one: expected a finite number",
            ),
            (
                two(),
                MergeOptions { normalize: Some(true), ..options("slerp", Size::Full) },
                "normalize with slerp: expected nothing, as an arc has no sum of weights",
            ),
            (
                two(),
                MergeOptions {
                    t: serde_json::from_str(r#"[{"filter": "mlp", "value": 0.2}]"#).unwrap(),
                    ..options("slerp", Size::Full)
                },
                "t: expected a value for model.layers.0.self_attn.k_proj (a filter `*` is for the rest), found none",
            ),
            (
                // Each is finite, and their product is not.
                with(&|s| {
                    for adapter in s.set.adapters.values_mut() {
                        adapter.b = adapter.b.multiply(Array::from_f32(1e20)).unwrap();
                    }
                    s.weight = Setting::Number(1e30);
                }),
                linear(),
                "model.layers.0.mlp.down_proj: the new update holds values that are not finite; check the adapters",
            ),
            (
                with(&|s| s.weight = Setting::Number(f64::INFINITY)),
                linear(),
                "weight of one: expected a finite number, found inf",
            ),
            (
                with(&|s| s.density = Setting::Number(0.0)),
                options("ties", Size::Full),
                "density of one: expected above 0 and at most 1, found 0",
            ),
            (with(&|s| s.density = Setting::Number(0.5)), linear(), "density with linear: expected nothing"),
            (
                with(&|s| s.weight = Setting::Filters(vec![])),
                linear(),
                "weight of one: expected a value for model.layers.0.mlp.down_proj",
            ),
            (
                with(&|s| {
                    let other = s.set.adapters[PATHS[0]].clone();
                    s.set.adapters.insert("model.layers.7.mlp.up_proj".into(), other);
                }),
                linear(),
                "one: BASE: the adapter does not fit:\n  model.layers.7.mlp.up_proj: the base has no such linear",
            ),
        ] {
            let found = text(&sources, &options).replace(base.path().to_str().unwrap(), "BASE");
            assert!(found.contains(parts), "{parts:?} is not in {found}");
        }
        // Adapters of two bases, without one that could say so.
        let wide = Tiny { hidden: 128, ..tiny.clone() };
        let other = tiny_model(&wide);
        let foreign = adapter(other.path(), &wide, false, (4, 1), 0.7);
        let sources = [source(dir.path(), 1.0, 1.0), source(foreign.path(), 1.0, 1.0)];
        let found = merged(&sources, None, &linear()).map(|_| ()).unwrap_err().to_string();
        assert!(found.contains("q_proj: (64, 64) in one, (128, 64) in one"), "{found}");
        // Adapters that say so themselves.
        let says = |model: &str| {
            let mut one = source(dir.path(), 1.0, 1.0);
            let base = json!({"model_type": model, "shapes": "s", "precision": "", "lineage": format!("their/{model}")});
            one.set.config.set_extra("base", base);
            one
        };
        let found =
            merged(&[says("llama"), says("qwen2")], None, &linear()).map(|_| ()).unwrap_err().to_string();
        let parts =
            "an adapter of another base cannot be merged: it was trained on a qwen2 model, this is a llama";
        assert!(found.contains(parts) && found.contains("their/llama"), "{found}");
        // Of the same shapes, by their norms.
        let norms = |norms: &str| {
            let mut one = says("llama");
            let base = json!({"model_type": "llama", "shapes": "s", "precision": "", "lineage": "their/llama", "norms": norms});
            one.set.config.set_extra("base", base);
            one
        };
        let pair = [norms("a+b"), norms("c+d")];
        let found = merged(&pair, None, &linear()).map(|_| ()).unwrap_err().to_string();
        assert!(found.contains("another model of the same shapes") && found.contains("--force"), "{found}");
        merged(&pair, None, &MergeOptions { force: true, ..linear() }).unwrap();
        merged(&[norms("a+b"), norms("c+b")], None, &linear()).unwrap();
        // Whole weights.
        let sources = with(&|s| {
            let tensor = graft_quant::Tensor::from_array(&Array::from_slice(&[1.0f32], &[1])).unwrap();
            s.set.weights.insert("model.norm.weight".into(), tensor);
        });
        assert!(text(&sources, &linear()).contains("whole weights (model.norm.weight..) cannot be merged"));
        // A DoRA adapter that doubles each row, with weight -1: 1 - (2 - 1) is nothing.
        let dora = adapter(base.path(), &tiny, true, (4, 1), 0.7);
        let mut set = source(dora.path(), -1.0, 1.0);
        let model = load(base.path());
        for (path, adapter) in &mut set.set.adapters {
            adapter.b = adapter.b.multiply(Array::from_f32(0.0)).unwrap();
            let norms = model.target(path).unwrap().weight.row_norms_squared().unwrap().sqrt().unwrap();
            adapter.magnitude = Some(norms.multiply(Array::from_f32(2.0)).unwrap());
        }
        let found = text(&[set], &linear());
        assert!(found.contains("the factors of row") && found.contains("choose other weights"), "{found}");
        // Stopped.
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("merged");
        let stopped = merge(&two(), None, &linear(), &out, &AtomicBool::new(true), &mut |_| {});
        assert!(matches!(stopped, Err(Error::Stopped)));
        assert_eq!(names(parent.path()), Vec::<String>::new());
    });
}
