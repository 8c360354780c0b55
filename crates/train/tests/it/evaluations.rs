//! A step and a token are one evaluation each: on a GPU every further one is a wait. (docs/proxies.md)

use graft_adapters::Route;
use graft_model::{GenerateOptions, Generator, Sampling};
use graft_ops::ffi::record;
use graft_ops::form;
use graft_testkit::{Family, Tiny};
use graft_train::{Batch, Params};

use crate::support::{arrays, load, lora, split, trainer};

#[test]
fn a_step_is_one_evaluation() {
    arrays(|| {
        let model = load(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
        let rows = split(&[9, 12], 2, 4);
        let params = Params::low_rank(&model, &lora(2, 0.0), -1, true, 1).unwrap();
        let mut trainer = trainer(&model, params, "adamw", 1e-3);
        let batch = Batch::new(&rows, &[0, 1], form());
        for (iter, update) in [(1, true), (2, false), (3, true)] {
            let (result, evaluations) = record(|| trainer.step(&batch, &rows, iter, update));
            assert!(result.unwrap().loss_sum > 0.0);
            let primitives: Vec<usize> = evaluations.iter().map(|e| e.primitives()).collect();
            assert!(matches!(primitives[..], [n] if n > 50), "step {iter}: {primitives:?}");
        }
    });
}

#[test]
fn a_token_is_one_evaluation() {
    arrays(|| {
        let model = load(&Tiny { packed: Some((4, 32)), ..Tiny::new(Family::Llama) });
        for sampling in
            [Sampling::greedy(), Sampling { temperature: 0.7, seed: Some(1), ..Sampling::greedy() }]
        {
            let options = GenerateOptions { max_tokens: 5, stop_ids: [].into(), sampling };
            let mut generator = Generator::new(&model, &[40, 41, 42], options, Route::Base).unwrap();
            let (tokens, evaluations) =
                record(|| std::iter::from_fn(|| generator.step().unwrap()).collect::<Vec<_>>());
            // The prompt's evaluation gives the first token.
            assert_eq!((tokens.len(), evaluations.len()), (5, 5));
        }
    });
}
