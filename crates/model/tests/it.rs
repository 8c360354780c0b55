//! Equivalences of the decoder: cached = uncached, a batch = its rows alone, packed = dequantized, and mlx-lm's values.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::Path;

use graft_adapters::{Adapter, AdapterSet, Route, RouteRows};
use graft_model::{
    Completion, GenerateOptions, Generator, KvCache, Model, PREFILL_STEP, Sampling, generate_all, reusable,
    shareable,
};
use graft_ops::{Array, Dtype, Form, Precision, Rows, ffi, with_precision};
use graft_testkit::tolerance::{BF16_DEEP, F32_DEEP};
use graft_testkit::{
    Family, Tiny, assert_close, mlx, tiny_adapter, tiny_dense_of, tiny_model, wanted, wanted_form_is_mlx,
};

/// Runs on the array thread, in the form that the environment asks for.
fn arrays(test: impl FnOnce() + Send) {
    mlx(|| {
        if wanted_form_is_mlx() {
            graft_ops::set_form(Form::Mlx);
        }
        if let Some(level) = wanted("GRAFT_CPU") {
            graft_ops::set_cpu_level(level);
        }
        test();
    });
}

fn load(dir: &Path) -> Model {
    Model::load(dir, Dtype::Float32).unwrap()
}

fn ids(n: usize, seed: u32) -> Vec<i32> {
    (0..n as u32).map(|i| ((i * 37 + seed * 101 + i * i * 7) % 250) as i32).collect()
}

fn tokens(ids: &[i32]) -> Array {
    Array::from_slice(ids, &[ids.len() as i32])
}

fn logits(model: &Model, ids: &[i32], route: &Route) -> Array {
    let h = model.hidden(&tokens(ids), &Rows::new(vec![ids.len() as i32]), None, route).unwrap();
    model.logits(&h, route).unwrap()
}

/// The modes of floats.
const FLOATS: [&str; 3] = ["mxfp4", "nvfp4", "mxfp8"];

fn every_model() -> impl Iterator<Item = Tiny> {
    let affine = Family::ALL.into_iter().flat_map(|family| {
        [(None, true), (None, false), (Some((4, 32)), true), (Some((3, 64)), false)]
            .map(|(packed, tied)| Tiny { packed, tied, ..Tiny::new(family) })
    });
    affine.chain(FLOATS.map(|mode| Tiny { tied: mode != "nvfp4", ..Tiny::new(Family::Llama) }.in_mode(mode)))
}

#[test]
fn a_packed_model_equals_its_dequantized_one() {
    arrays(|| {
        let affine =
            [2, 3, 4, 5, 6, 8].map(|bits| Tiny { packed: Some((bits, 32)), ..Tiny::new(Family::Llama) });
        let floats = FLOATS.map(|mode| Tiny::new(Family::Llama).in_mode(mode));
        for (tiny, seed) in affine.into_iter().chain(floats).zip(2..) {
            let packed = tiny_model(&tiny);
            let dense = tiny_dense_of(packed.path());
            let text = ids(19, seed);
            let (a, b) = (load(packed.path()), load(dense.path()));
            assert_close(&logits(&a, &text, &Route::Base), &logits(&b, &text, &Route::Base), F32_DEEP);
        }
    });
}

#[test]
fn cached_equals_uncached_whatever_the_steps() {
    arrays(|| {
        for tiny in every_model() {
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let text = ids(40, 3);
            let whole = logits(&model, &text, &Route::Base);
            for steps in [vec![40], vec![17, 1, 1, 21], vec![1; 40]] {
                let mut cache = KvCache::new(&model);
                let (mut parts, mut at) = (Vec::new(), 0);
                for n in steps {
                    let rows = Rows { lengths: vec![n as i32], starts: vec![at as i32] };
                    let h = model
                        .hidden(&tokens(&text[at..at + n]), &rows, Some(&mut [&mut cache]), &Route::Base)
                        .unwrap();
                    parts.push(model.logits(&h, &Route::Base).unwrap());
                    at += n;
                }
                assert_close(&mlx_rs::ops::concatenate(&parts, 0).unwrap(), &whole, F32_DEEP);
            }
        }
    });
}

#[test]
fn a_batch_of_rows_equals_each_row_alone() {
    arrays(|| {
        for tiny in every_model() {
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let texts = [ids(9, 1), ids(1, 2), ids(33, 3), ids(9, 4)];
            let rows = Rows::new(texts.iter().map(|t| t.len() as i32).collect());
            let h = model.hidden(&tokens(&texts.concat()), &rows, None, &Route::Base).unwrap();
            let together = model.logits(&h, &Route::Base).unwrap();
            let alone: Vec<Array> = texts.iter().map(|t| logits(&model, t, &Route::Base)).collect();
            assert_close(&together, &mlx_rs::ops::concatenate(&alone, 0).unwrap(), F32_DEEP);
        }
    });
}

#[test]
fn sequences_decoded_together_equal_each_alone() {
    arrays(|| {
        let dir = tiny_model(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Qwen3) });
        let model = load(dir.path());
        let prompts = [ids(5, 1), ids(70, 2), ids(31, 3)];
        let mut caches: Vec<KvCache> = prompts.iter().map(|_| KvCache::new(&model)).collect();
        for (prompt, cache) in prompts.iter().zip(&mut caches) {
            let rows = Rows::new(vec![prompt.len() as i32]);
            model.hidden(&tokens(prompt), &rows, Some(&mut [cache]), &Route::Base).unwrap();
        }
        let next = [7, 8, 9];
        let rows = Rows { lengths: vec![1; 3], starts: prompts.iter().map(|p| p.len() as i32).collect() };
        let mut borrowed: Vec<&mut KvCache> = caches.iter_mut().collect();
        let h = model.hidden(&tokens(&next), &rows, Some(&mut borrowed), &Route::Base).unwrap();
        let together = model.logits(&h, &Route::Base).unwrap();
        for (i, prompt) in prompts.iter().enumerate() {
            let text = [prompt.as_slice(), &next[i..=i]].concat();
            let alone = logits(&model, &text, &Route::Base);
            let last = alone.split_at_indices(&[text.len() as i32 - 1], 0).unwrap();
            let row = together.split_at_indices(&[i as i32, i as i32 + 1], 0).unwrap();
            assert_close(&row[1], &last[1], F32_DEEP);
        }
    });
}

/// Reads what of `text` is not in the cache, up to each border of a chunk; the bits of the last logits.
fn read_on(model: &Model, cache: &mut KvCache, text: &[i32]) -> Vec<u32> {
    loop {
        let start = cache.len() as usize;
        let end = ((start / PREFILL_STEP + 1) * PREFILL_STEP).min(text.len());
        let rows = Rows { lengths: vec![(end - start) as i32], starts: vec![start as i32] };
        let h = model.hidden(&tokens(&text[start..end]), &rows, Some(&mut [cache]), &Route::Base).unwrap();
        ffi::eval(cache.arrays()).unwrap();
        if end == text.len() {
            let last = h.split_at_indices(&[h.dim(0) - 1], 0).unwrap().swap_remove(1);
            let logits = model.logits(&last, &Route::Base).unwrap().contiguous().unwrap();
            return ffi::read::<f32>(&logits).unwrap().iter().map(|x| x.to_bits()).collect();
        }
    }
}

#[test]
fn a_prefix_that_is_taken_over_gives_the_same_bits() {
    arrays(|| {
        let mut taken = 0;
        for (tiny, precision) in
            every_model().flat_map(|t| [(t.clone(), Precision::F32), (t, Precision::Int16)])
        {
            let dir = tiny_model(&tiny);
            with_precision(precision, || {
                let model = load(dir.path());
                for (donor, common, total) in [
                    (130, 130, 200),
                    (130, 129, 140),
                    (300, 300, 301),
                    (300, 200, 230),
                    (540, 540, 560),
                    (700, 650, 690),
                    (700, 700, 700),
                    (1100, 1090, 1300),
                ] {
                    let text = ids(donor, 1);
                    let own = [&text[..common], &ids(total - common, 2)].concat();
                    let mut from = KvCache::new(&model);
                    read_on(&model, &mut from, &text);
                    let kept = reusable(common.min(shareable(donor, donor)), total);
                    assert!(kept < total && kept <= common, "{kept} of {total}");
                    taken += kept;
                    let mut forked = from.fork(kept as i32);
                    let mut cold = KvCache::new(&model);
                    let (a, b) = (read_on(&model, &mut forked, &own), read_on(&model, &mut cold, &own));
                    assert_eq!(a, b, "{kept} of {total} after {donor}, {precision:?}, {tiny:?}");
                    let longer = [&own[..], &[7]].concat();
                    let next = |cache| read_on(&model, cache, &longer);
                    assert_eq!(next(&mut forked), next(&mut cold), "a token after it");
                    // Who gave it goes on as before.
                    let longer = [&text[..], &[9]].concat();
                    let mut alone = KvCache::new(&model);
                    read_on(&model, &mut alone, &text);
                    assert_eq!(read_on(&model, &mut from, &longer), read_on(&model, &mut alone, &longer));
                }
            });
        }
        assert!(taken > 0);
    });
}

#[test]
fn generation_equals_the_argmax_of_whole_passes() {
    arrays(|| {
        let dir = tiny_model(&Tiny { packed: Some((4, 32)), tied: false, ..Tiny::new(Family::Llama) });
        let model = load(dir.path());
        let mut text: Vec<u32> = ids(600, 5).iter().map(|&i| i as u32).collect();
        let options = GenerateOptions { max_tokens: 12, stop_ids: [].into(), sampling: Sampling::greedy() };
        let mut generator = Generator::new(&model, &text, options, Route::Base).unwrap();
        let mut made = Vec::new();
        while let Some(token) = generator.step().unwrap() {
            made.push(token.id);
        }
        assert_eq!(made.len(), 12);
        for id in made {
            let all: Vec<i32> = text.iter().map(|&i| i as i32).collect();
            let row = logits(&model, &all, &Route::Base);
            let best = mlx_rs::ops::indexing::argmax_axis(&row, -1, false).unwrap();
            best.eval().unwrap();
            assert_eq!(*best.as_slice::<u32>().last().unwrap(), id);
            text.push(id);
        }
    });
}

#[test]
fn neither_company_nor_order_changes_an_answer() {
    arrays(|| {
        for packed in [Some((4, 32)), None] {
            let tiny = Tiny { packed, ..Tiny::new(Family::Qwen3) };
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let files = tiny_adapter(dir.path(), &tiny, true, 4, 9);
            let set = AdapterSet::load(files.path()).unwrap();
            let table = set.table(files.path(), |path| model.target(path)).unwrap();
            let route = Route::Table(&table);
            let prompts: Vec<(Vec<u32>, GenerateOptions)> = (0..40)
                .map(|i| {
                    let sampling = match i % 2 {
                        0 => Sampling::greedy(),
                        _ => Sampling { temperature: 1.0, seed: Some(u64::from(i)), ..Sampling::greedy() },
                    };
                    let options = GenerateOptions {
                        max_tokens: (i % 7) as usize * 3,
                        stop_ids: (0..60).collect(),
                        sampling,
                    };
                    (ids(1 + (i * 13 % 45) as usize, i).iter().map(|&i| i as u32).collect(), options)
                })
                .collect();
            let alone: Vec<Completion> = prompts
                .iter()
                .map(|(prompt, options)| {
                    let mut generator = Generator::new(&model, prompt, options.clone(), route).unwrap();
                    let (mut tokens, mut stopped) = (Vec::new(), false);
                    while let Some(token) = generator.step().unwrap() {
                        stopped = token.stop;
                        tokens.extend((!token.stop).then_some(token.id));
                    }
                    Completion { tokens, stopped }
                })
                .collect();
            assert!(alone.iter().any(|a| a.stopped) && alone.iter().any(|a| a.tokens.len() == 18));
            let answers = |prompts: &[_], together| {
                generate_all(&model, prompts, together, &route, &mut |_| true).unwrap().unwrap()
            };
            // MLX has another kernel for a single row, so in its form sums may differ in their last bits.
            let sizes: &[usize] = if wanted_form_is_mlx() { &[7] } else { &[1, 7, 32] };
            for together in sizes {
                let found = answers(&prompts, *together);
                assert_eq!(found.len(), alone.len());
                assert!(wanted_form_is_mlx() || found == alone, "{packed:?}, {together} together");
            }
            if !wanted_form_is_mlx() {
                let reversed: Vec<_> = prompts.iter().rev().cloned().collect();
                let mut found = answers(&reversed, 5);
                found.reverse();
                assert!(found == alone, "{packed:?}, in reverse");
            }
            let stopped = generate_all(&model, &prompts, 4, &route, &mut |done| done < 3).unwrap();
            assert_eq!(stopped, None);
            // With one token for each, the second question whether to go on comes while the prompts are read.
            let options = GenerateOptions { max_tokens: 1, ..prompts[0].1.clone() };
            let short = [(vec![1, 2], options.clone()), (vec![3], options)];
            let mut asked = 0;
            let mut once = |_| {
                asked += 1;
                asked < 2
            };
            assert_eq!(generate_all(&model, &short, 2, &route, &mut once).unwrap(), None);
        }
    });
}

#[test]
fn rows_of_several_adapters_in_one_pass_equal_each_alone() {
    arrays(|| {
        for (tiny, precision) in
            every_model().flat_map(|tiny| [Precision::F32, Precision::Int16].map(|p| (tiny.clone(), p)))
        {
            let dir = tiny_model(&tiny);
            let model = with_precision(precision, || load(dir.path()));
            let embed = model.embedding().path.clone();
            let tables = [(false, 4), (true, 6), (true, 3)].map(|(dora, rank)| {
                let files = tiny_adapter(dir.path(), &tiny, dora, rank, rank as u64);
                let mut set = AdapterSet::load(files.path()).unwrap();
                if rank == 4 {
                    let (vocab, hidden) = model.target(&embed).unwrap().shape();
                    let random =
                        |shape: &[i32]| mlx_rs::random::normal::<f32>(shape, None, 0.05, None).unwrap();
                    let (a, b) = (random(&[vocab, 4]), random(&[4, hidden]));
                    set.adapters.insert(embed.clone(), Adapter { a, b, scale: 1.0, magnitude: None });
                }
                set.table(files.path(), |path| model.target(path)).unwrap()
            });
            let texts = [ids(5, 1), ids(1, 2), ids(9, 3), ids(2, 4)];
            let own = [Some(&tables[0]), None, Some(&tables[1]), Some(&tables[2])];
            let groups: Vec<RouteRows> = texts
                .iter()
                .zip(own)
                .map(|(text, table)| RouteRows { rows: text.len() as i32, table })
                .collect();
            let (rows, route) = (Rows::new(groups.iter().map(|g| g.rows).collect()), Route::Mixed(&groups));
            let together = with_precision(precision, || {
                let h = model.hidden(&tokens(&texts.concat()), &rows, None, &route).unwrap();
                model.logits(&h, &route).unwrap()
            });
            let mut from = 0;
            for (text, table) in texts.iter().zip(own) {
                let route = table.map_or(Route::Base, Route::Table);
                let alone = with_precision(precision, || logits(&model, text, &route));
                let to = from + text.len() as i32;
                assert_close(&together.split_at_indices(&[from, to], 0).unwrap()[1], &alone, F32_DEEP);
                from = to;
            }
        }
    });
}

#[test]
fn an_adapter_with_b_zero_is_the_base_and_dora_too() {
    arrays(|| {
        for tiny in every_model() {
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let text = ids(12, 8);
            let base = logits(&model, &text, &Route::Base);
            for dora in [false, true] {
                let files = tiny_adapter(dir.path(), &tiny, dora, 4, 9);
                let mut set = AdapterSet::load(files.path()).unwrap();
                let table = set.table(files.path(), |path| model.target(path)).unwrap();
                let changed = logits(&model, &text, &Route::Table(&table));
                assert!(graft_testkit::close(&changed, &base, F32_DEEP).is_err(), "the adapter does nothing");
                for (path, adapter) in &mut set.adapters {
                    adapter.b = adapter.b.multiply(Array::from_f32(0.0)).unwrap();
                    if dora {
                        let n0 = model.target(path).unwrap().weight.row_norms_squared().unwrap();
                        adapter.magnitude = Some(n0.sqrt().unwrap());
                    }
                }
                let table = set.table(files.path(), |path| model.target(path)).unwrap();
                assert_close(&logits(&model, &text, &Route::Table(&table)), &base, F32_DEEP);
            }
        }
    });
}

#[test]
fn losses_are_those_of_the_logits() {
    arrays(|| {
        for tiny in every_model() {
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let (text, targets) = (ids(21, 1), tokens(&ids(21, 2)));
            let h = model.hidden(&tokens(&text), &Rows::new(vec![21]), None, &Route::Base).unwrap();
            let losses = model.losses(&h, &targets, &Route::Base).unwrap();
            let logits = model.logits(&h, &Route::Base).unwrap();
            let chosen = logits.take_along_axis(targets.expand_dims(1).unwrap(), 1).unwrap();
            let sum = logits.logsumexp_axis(1, false).unwrap();
            assert_close(&losses, &sum.subtract(chosen.squeeze_axes(&[1]).unwrap()).unwrap(), F32_DEEP);
        }
    });
}

#[test]
fn the_forms_agree_and_every_block_keeps_its_type() {
    mlx(|| {
        for tiny in every_model() {
            let dir = tiny_model(&tiny);
            let text = ids(24, 4);
            let own = {
                graft_ops::set_form(Form::Cpu);
                let h = logits(&load(dir.path()), &text, &Route::Base);
                h.eval().unwrap();
                h
            };
            graft_ops::set_form(Form::Mlx);
            let plain = logits(&load(dir.path()), &text, &Route::Base);
            assert_close(&own, &plain, F32_DEEP);
            for dtype in [Dtype::Bfloat16, Dtype::Float16] {
                let model = Model::load(dir.path(), dtype).unwrap();
                for dora in [false, true] {
                    let files = tiny_adapter(dir.path(), &tiny, dora, 4, 9);
                    let set = AdapterSet::load(files.path()).unwrap();
                    let table = set.table(files.path(), |path| model.target(path)).unwrap();
                    let route = Route::Table(&table);
                    let rows = Rows::new(vec![24]);
                    let mut h = model.embed(&tokens(&text), &route).unwrap();
                    for index in 0..tiny.layers {
                        h = model.block(index, &h, &rows, &route).unwrap();
                        assert_eq!(h.dtype(), dtype, "{} block {index}", tiny.family.name());
                    }
                    assert_eq!(model.final_norm(&h, &route).unwrap().dtype(), dtype);
                }
                assert_close(
                    &logits(&model, &text, &Route::Base).as_dtype(Dtype::Float32).unwrap(),
                    &plain,
                    BF16_DEEP,
                );
            }
            graft_ops::set_form(Form::Cpu);
        }
    });
}

#[test]
fn a_checkpoint_that_differs_from_its_config_is_refused_whole() {
    let dir = tiny_model(&Tiny::new(Family::Llama));
    let file = dir.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config["num_hidden_layers"] = 3.into();
    config["intermediate_size"] = 64.into();
    std::fs::write(&file, config.to_string()).unwrap();
    mlx(|| {
        let message = Model::load(dir.path(), Dtype::Float32).unwrap_err().to_string();
        for part in [
            "model.layers.2.mlp.up_proj.weight: missing",
            "model.layers.0.mlp.up_proj.weight: expected shape",
        ] {
            assert!(message.contains(part), "{message}");
        }
    });
}

#[test]
fn blocks_with_a_window_are_refused_by_name() {
    let dir = tiny_model(&Tiny::new(Family::Llama));
    let file = dir.path().join("config.json");
    let map = std::fs::read(&file).unwrap();
    let config = |change: &[(&str, serde_json::Value)]| {
        let mut map: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&map).unwrap();
        map.extend(change.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        graft_model::config_from_map(&file, &map).map(|_| ()).map_err(|e| e.to_string())
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    config(&[("layer_types", [full, full][..].into()), ("sliding_window", 4096.into())]).unwrap();
    let error = config(&[("layer_types", [full, sliding][..].into())]).unwrap_err();
    assert!(error.contains("layer_types") && error.contains(sliding), "{error}");
    let window = [("use_sliding_window", true.into()), ("sliding_window", 64.into())];
    assert!(config(&window).unwrap_err().contains("use_sliding_window"));
    // A window from a block on that the model does not have is none.
    config(&[&window[..], &[("max_window_layers", 2.into())]].concat()).unwrap();
}

/// Logits of tiny models as mlx-lm 0.32.2 computes them; `cargo xtask golden` writes the file.
#[test]
fn logits_are_mlx_lms() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/logits.json")).unwrap();
    arrays(|| {
        for case in golden["cases"].as_array().unwrap() {
            let family = Family::ALL.into_iter().find(|f| f.name() == case["family"]).unwrap();
            let bits = case["bits"].as_i64().unwrap() as i32;
            let packed = (bits > 0).then_some((bits, 32));
            let tiny = Tiny { packed, tied: case["tied"].as_bool().unwrap(), ..Tiny::new(family) };
            let mode = FLOATS.into_iter().find(|mode| case["mode"] == **mode);
            let tiny = mode.map_or(tiny.clone(), |mode| tiny.in_mode(mode));
            let dir = tiny_model(&tiny);
            let model = load(dir.path());
            let text: Vec<i32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let expected: Vec<f32> = serde_json::from_value(case["last"].clone()).unwrap();
            let route_files;
            let table;
            let route = match case["adapter"].as_str().unwrap() {
                "none" => Route::Base,
                kind => {
                    route_files = tiny_adapter(dir.path(), &tiny, kind == "dora", 4, 9);
                    let set = AdapterSet::load(route_files.path()).unwrap();
                    table = set.table(route_files.path(), |path| model.target(path)).unwrap();
                    Route::Table(&table)
                }
            };
            let all = logits(&model, &text, &route);
            let last = all.split_at_indices(&[text.len() as i32 - 1], 0).unwrap().pop().unwrap();
            let last = last.split_at_indices(&[expected.len() as i32], 1).unwrap().swap_remove(0);
            let expected = Array::from_slice(&expected, &[1, expected.len() as i32]);
            assert_close(&last, &expected, F32_DEEP);
        }
    });
}
