//! What must not be held at once is not, by MLX's own peak: logits of all targets, activations of all blocks, a dense product
//! for DoRA's norm. In both forms of the operations.

use std::rc::Rc;

use graft_model::Model;
use graft_ops::ffi::{Mode, eval, memory, quantize, value_and_grad};
use graft_ops::row_norms;
use graft_ops::{Array, WeightRef, cross_entropy, form, linear_cross_entropy, matmul};
use graft_quant::{Packed, Weight};
use graft_testkit::{Family, Tiny};
use graft_train::{Batch, Graph, Optimizer, Params, Schedule, Trainer, TrainerSettings};
use mlx_rs::random;
use serde_json::Map;

use crate::support::{arrays, load, lora, split};

/// What `f` needs at most at one time, beyond what is alive before: the least of some runs, since on a CPU MLX allocates for
/// operations before those in front of them have run, and how far ahead it gets is left to chance.
fn needs(mut f: impl FnMut()) -> usize {
    let mut run = || {
        memory::clear_cache().unwrap();
        let before = memory::active_memory().unwrap();
        memory::reset_peak_memory().unwrap();
        f();
        memory::peak_memory().unwrap() - before
    };
    (0..3).map(|_| run()).min().unwrap_or(0)
}

fn normal(seed: u64, shape: &[i32]) -> Array {
    let array = random::normal::<f32>(shape, None, None, &random::key(seed).unwrap()).unwrap();
    eval([&array]).unwrap();
    array
}

#[test]
fn logits_exist_for_a_chunk_of_targets_at_a_time() {
    arrays(|| {
        let (vocabulary, width, chunk) = (32_768, 64, 8);
        let w = normal(2, &[vocabulary, width]);
        let part = (chunk * vocabulary * 4) as usize;
        // What the whole logits need, the loss in chunks with its gradient, and without.
        let [few, many] = [256, 1024].map(|targets| {
            let h = normal(1, &[targets, width]);
            let wanted = Array::from_iter((0..targets).map(|i| i * 31), &[targets]);
            let step = |loss: &dyn Fn(&Array) -> graft_ops::Result<Array>| {
                let f = |x: &[Array]| Ok(vec![loss(&x[0])?.sum(false)?]);
                let (values, gradients) = value_and_grad(f, std::slice::from_ref(&h), &[0]).unwrap();
                eval(values.iter().chain(&gradients)).unwrap();
            };
            let folded = |h: &Array| linear_cross_entropy(h, WeightRef::Dense(&w), &wanted, chunk);
            let whole = needs(|| step(&|h| cross_entropy(&matmul(h, WeightRef::Dense(&w))?, &wanted)));
            // The logits and their gradient.
            assert!(whole >= 2 * (targets * vocabulary * 4) as usize, "{whole} of {targets} targets");
            [needs(|| step(&folded)), needs(|| eval([&folded(&h).unwrap()]).unwrap())]
        });
        for (few, many) in few.into_iter().zip(many) {
            // Logits, probabilities, hits as bool and as f32, their difference: five of a chunk at most. On a CPU MLX
            // allocates for operations before those in front of them have run, here for up to two chunks more.
            assert!(few <= 15 * part, "{few}, a chunk is {part}");
            // Four times the targets: h, its gradient by chunk, joined and scaled, and how far MLX happened to be ahead.
            assert!(many <= few + 4 * part, "{few}, then {many}, a chunk is {part}");
        }
    });
}

#[test]
fn a_head_that_is_trained_keeps_no_logits() {
    arrays(|| {
        let vocab = 4096;
        let tiny = Tiny { tied: false, vocab, layers: 1, ..Tiny::new(Family::Llama) };
        let model: Rc<Model> = load(&tiny);
        let mut settings = lora(1, 0.0);
        settings.keys = Some(vec!["lm_head".into()]);
        let params = Params::low_rank(&model, &settings, -1, false, 1).unwrap();
        let graph = Graph::new(Rc::clone(&model), &params, false, 0.0, 1);
        let [few, many] = [1, 16].map(|rows| {
            let batch = Batch::new(&split(&vec![257; rows], 0, 4), &(0..rows).collect::<Vec<_>>(), form());
            needs(|| {
                let (loss, gradients) = graph.loss_and_gradients(&params, &[None], &batch, 1).unwrap();
                eval([&loss].into_iter().chain(&gradients)).unwrap();
            })
        });
        // Kept logits would be 15 chunks more, and their gradient as many. On a CPU MLX allocates for operations before those in
        // front of them have run, so for some chunks.
        let chunk = 256 * vocab * 4;
        assert!(few >= chunk, "{few}: not even the logits of a chunk, {chunk}");
        assert!(many <= few + 8 * chunk, "{few}, then {many}, a chunk is {chunk}");
    });
}

/// What a step needs with that many blocks.
fn of_blocks(layers: usize, grad_checkpoint: bool) -> usize {
    let model: Rc<Model> = load(&Tiny { layers, ..Tiny::new(Family::Llama) });
    let rows = split(&[129, 129], 0, 4);
    let params = Params::low_rank(&model, &lora(1, 0.0), -1, false, 1).unwrap();
    let settings = TrainerSettings {
        optimizer: Optimizer::from_config("sgd", &Map::new()).unwrap(),
        schedule: Schedule::constant(1e-3),
        max_grad_norm: None,
        grad_checkpoint,
        dropout: 0.0,
        seed: 3,
    };
    let mut trainer = Trainer::new(model, params, settings).unwrap();
    let batch = Batch::new(&rows, &[0, 1], form());
    needs(|| {
        trainer.step(&batch, &rows, 1, true).unwrap();
    })
}

#[test]
fn with_checkpointing_a_block_keeps_its_input_only() {
    arrays(|| {
        let more = |checkpoint: bool| of_blocks(12, checkpoint).saturating_sub(of_blocks(4, checkpoint)) / 8;
        let (with, without) = (more(true), more(false));
        // N tokens of E floats, and of the 7 linears' A and B at rank 1 the gradient, the mean and the new value: 1248 inputs
        // and outputs in all.
        let (input, trained) = (256 * 64 * 4, 3 * 1248 * 4);
        assert!(with <= 2 * input + trained, "{with}, the input is {input}");
        // Its two norms, q, the attention's output, gate and up at the least: 64 (2 + 1 + 1) + 2 * 128 floats a token.
        assert!(without >= 8 * input, "{without}, the input is {input}");
    });
}

#[test]
fn a_norm_makes_no_dense_product() {
    arrays(|| {
        let (out, inputs, rank) = (4096, 1024, 8);
        let dense = normal(1, &[out, inputs]);
        let (a, b) = (normal(2, &[inputs, rank]), normal(3, &[rank, out]));
        let parts = quantize(&dense, 32, 4, Mode::Affine).unwrap();
        eval(&parts).unwrap();
        let n0 = dense.square().unwrap().sum_axis(1, false).unwrap();
        eval([&n0]).unwrap();
        let whole = needs(|| {
            let sum = dense.add(a.matmul(&b).unwrap().transpose().unwrap()).unwrap();
            eval([&sum.square().unwrap().sum_axis(1, false).unwrap().sqrt().unwrap()]).unwrap();
        });
        let weight = (out * inputs * 4) as usize;
        assert!(whole >= weight, "{whole} of {weight}");
        let [codes, scales, biases] = parts.try_into().unwrap();
        let packed = Packed { codes, scales, biases: Some(biases), grid: graft_quant::Grid::affine(4, 32) };
        for weight in [Weight::Packed(packed), Weight::Dense(dense.clone())] {
            let held = needs(|| eval([&row_norms(&a, &b, 2.0, weight.as_ref(), &n0).unwrap()]).unwrap());
            // P, G B, their sum, its product with B, each (R, out), and one being made; A^T; some (out,).
            let allowed = 5 * (rank * out * 4) + 2 * inputs * rank * 4 + 8 * out * 4;
            assert!(held <= allowed as usize, "{held}, allowed {allowed}");
        }
    });
}
