//! Losses of Adam's first steps on tiny models as mlx-lm 0.32.2 computes them; `cargo xtask golden` writes the file.

use graft_ops::{Array, form};
use graft_quant::read_safetensors;
use graft_testkit::tolerance::F32_DEEP;
use graft_testkit::{Family, Tiny, assert_close, tiny_adapter, tiny_model};
use graft_train::{Batch, Example, Params};
use serde_json::Value;

use crate::support::{arrays, lora, named, trainer};

#[test]
fn losses_are_mlx_lms() {
    let golden: Value = serde_json::from_str(include_str!("../golden/losses.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 38, "{} cases", cases.len());
    arrays(|| {
        for case in cases {
            let family = Family::ALL.into_iter().find(|f| f.name() == case["family"]).unwrap();
            let bits = case["bits"].as_i64().unwrap() as i32;
            let packed = (bits > 0).then_some((bits, 32));
            let tiny = Tiny { packed, tied: case["tied"].as_bool().unwrap(), ..Tiny::new(family) };
            let mode = ["mxfp4", "nvfp4", "mxfp8"].into_iter().find(|mode| case["mode"] == **mode);
            let tiny = mode.map_or(tiny.clone(), |mode| tiny.in_mode(mode));
            let (dir, dora) = (tiny_model(&tiny), case["adapter"] == "dora");
            let model =
                std::rc::Rc::new(graft_model::Model::load(dir.path(), graft_ops::Dtype::Float32).unwrap());

            let mut params = Params::low_rank(&model, &lora(4, 0.0), -1, dora, 1).unwrap();
            let start = tiny_adapter(dir.path(), &tiny, dora, 4, 9);
            let file = start.path().join("adapters.safetensors");
            params.assign(&file, &read_safetensors(&file).unwrap().0).unwrap();

            let rows: Vec<Vec<u32>> = serde_json::from_value(case["rows"].clone()).unwrap();
            let count = rows.len();
            let examples = rows.into_iter().enumerate().map(|(i, tokens)| Example::whole(i + 1, tokens, 0));
            let split = named(examples.collect(), "train.jsonl");
            let batch = Batch::new(&split, &Vec::from_iter(0..count), form());
            let mut trainer = trainer(&model, params, "adam", case["learning_rate"].as_f64().unwrap());

            let expected: Vec<f32> = serde_json::from_value(case["losses"].clone()).unwrap();
            let step = |i: usize| trainer.step(&batch, &split, i as u64 + 1, true).unwrap();
            let mean = |loss: graft_train::StepResult| (loss.loss_sum / loss.tokens as f64) as f32;
            let found: Vec<f32> = (0..expected.len()).map(step).map(mean).collect();
            let shape = [expected.len() as i32];
            assert_close(&Array::from_slice(&found, &shape), &Array::from_slice(&expected, &shape), F32_DEEP);
        }
    });
}
