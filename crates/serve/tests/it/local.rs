//! The engine without a server says what the model says alone, whatever it answers beside.

use graft_adapters::{AdapterSet, Route};
use graft_model::{Model, Sampling, Tokenizer};
use graft_ops::Dtype;
use graft_serve::{Answered, Ask, Error, Event, Finish, Local, Params};
use graft_testkit::mlx;

use crate::server::{direct, fixture};

fn ask(prompt: &[u32], max_tokens: usize, sampling: Sampling) -> Ask {
    let params = Params { max_tokens, sampling, stop: Vec::new(), stop_ids: [].into() };
    Ask { prompt: prompt.to_vec(), params }
}

/// Runs `body` on the array thread with the fixture's model and one of its adapters.
fn with<T: Send>(adapter: Option<&str>, body: impl FnOnce(&Model, &Tokenizer, Route) -> T + Send) -> T {
    let own = fixture();
    mlx(move || {
        let model = Model::load(own.model.path(), Dtype::Float32).unwrap();
        let tokenizer = Tokenizer::load(own.model.path()).unwrap();
        let dir = adapter.map(|name| match name {
            "lora" => own.lora.path(),
            "dora" => own.dora.path(),
            _ => own.broken.path(),
        });
        let table =
            dir.map(|dir| AdapterSet::load(dir).unwrap().table(dir, |path| model.target(path)).unwrap());
        body(&model, &tokenizer, table.as_ref().map_or(Route::Base, Route::Table))
    })
}

fn answers(engine: &mut Local, asks: &[Ask]) -> Vec<(String, Vec<u32>)> {
    let found = engine.answer(asks, &mut |_, _| {}, &mut |_| true).unwrap().unwrap();
    found.into_iter().map(|answered: Answered| (answered.text, answered.tokens)).collect()
}

#[test]
fn answers_are_the_models_own_whatever_their_order_and_company() {
    let words = ["a", "hello the user", "x y z", "the", "hello hello"];
    let prompts: Vec<String> = (0..14).map(|i| words[i % 5].repeat(1 + 60 * (i / 5))).collect();
    for (name, dir) in [
        (None, None),
        (Some("lora"), Some(fixture().lora.path())),
        (Some("dora"), Some(fixture().dora.path())),
    ] {
        for temperature in [0.0, 0.9] {
            let sampling =
                |i: usize| Sampling { temperature, seed: Some(i as u64), top_p: 0.95, ..Sampling::greedy() };
            let alone: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(i, prompt)| {
                    let (tokens, text) = direct(dir, prompt, true, sampling(i), 3 + i % 7);
                    (text, tokens)
                })
                .collect();
            with(name, |model, tokenizer, route| {
                let ids = |prompt: &String| tokenizer.encode(prompt, true).unwrap();
                let asks: Vec<Ask> =
                    prompts.iter().enumerate().map(|(i, p)| ask(&ids(p), 3 + i % 7, sampling(i))).collect();
                for (together, kept) in [(1, 0), (3, 4000), (32, 0), (32, 500)] {
                    let mut engine = Local::new(model, tokenizer, route, together, kept);
                    assert_eq!(answers(&mut engine, &asks), alone, "{name:?} {together}");
                    let mut turned: Vec<_> =
                        answers(&mut engine, &asks.iter().rev().cloned().collect::<Vec<_>>());
                    turned.reverse();
                    assert_eq!(turned, alone, "{name:?} {together}, the other way round");
                    assert!(kept > 0 || engine.stats().prefix_hits == 0);
                }
            });
        }
    }
}

#[test]
fn a_conversation_is_read_once() {
    with(None, |model, tokenizer, route| {
        let mut engine = Local::new(model, tokenizer, route, 1, 10_000);
        let mut history: Vec<u32> = (0..1200).map(|i| 5 + i % 200).collect();
        for turn in 0..3 {
            let asks = [ask(&history, 20, Sampling::greedy())];
            let before = engine.stats();
            let found = answers(&mut engine, &asks);
            let fresh = answers(&mut Local::new(model, tokenizer, route, 1, 0), &asks);
            assert_eq!(found, fresh, "turn {turn}");
            let read = engine.stats().prompt_tokens - before.prompt_tokens;
            // At most what is new, the last answer, and what was not whole.
            assert!(turn == 0 || read < 512, "turn {turn} read {read} of {}", history.len());
            history.extend(&found[0].1);
            history.extend((0..50).map(|i| 100 + i));
        }
    });
}

#[test]
fn what_happens_is_told_and_a_run_can_be_stopped() {
    with(None, |model, tokenizer, route| {
        let mut engine = Local::new(model, tokenizer, route, 2, 0);
        let asks: Vec<Ask> = (0..6).map(|i| ask(&[5 + i, 6], 10, Sampling::greedy())).collect();
        let none = engine.answer(&asks, &mut |_, _| {}, &mut |done| done < 3).unwrap();
        assert!(none.is_none());
        // What ran then is gone, and the next call has all places.
        let mut texts = vec![String::new(); 6];
        let mut accepted = 0;
        let mut said = |index: usize, event: &Event| match event {
            Event::Accepted => accepted += 1,
            Event::Piece { text, .. } => texts[index] += text,
            Event::Done { .. } | Event::Failed(_) => {}
        };
        let found = engine.answer(&asks, &mut said, &mut |_| true).unwrap().unwrap();
        let all: Vec<_> = found.iter().map(|found| found.text.clone()).collect();
        assert_eq!((accepted, &texts), (6, &all));
        assert!(found.iter().all(|found| found.first <= found.total && !found.tokens.is_empty()));
        // The first token that comes, given as one that ends the answer, is the whole answer.
        let mut ends = asks[0].clone();
        ends.params.stop_ids = [found[0].tokens[0]].into();
        let nothing = &engine.answer(&[ends], &mut |_, _| {}, &mut |_| true).unwrap().unwrap()[0];
        assert_eq!((nothing.text.as_str(), nothing.tokens.len(), nothing.finish), ("", 1, Finish::Stop));
        let none = engine.answer(&[ask(&[5], 0, Sampling::greedy())], &mut |_, _| {}, &mut |_| true);
        assert!(none.unwrap().unwrap()[0].tokens.is_empty());
    });
}

#[test]
fn what_cannot_be_answered_is_an_error() {
    with(Some("broken"), |model, tokenizer, route| {
        let mut engine = Local::new(model, tokenizer, route, 2, 0);
        let hot = Sampling { temperature: -1.0, ..Sampling::greedy() };
        for (ask, part) in [
            (ask(&[], 5, Sampling::greedy()), "the prompt has no tokens"),
            (ask(&[5, 999_999], 5, Sampling::greedy()), "token id 999999 is outside the vocabulary"),
            (ask(&[5], 5, hot), "temperature"),
        ] {
            let error = engine.answer(&[ask], &mut |_, _| {}, &mut |_| true).unwrap_err();
            assert!(matches!(error, Error::Model(_)) && error.to_string().contains(part), "{error}");
        }
        let error = engine.answer(&[ask(&[5, 6], 5, Sampling::greedy())], &mut |_, _| {}, &mut |_| true);
        assert!(matches!(error, Err(Error::Answer(_))), "{error:?}");
    });
}
