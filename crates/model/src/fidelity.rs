//! How far two runs are from each other, token by token: divergence, agreement of the best token, losses.
//!
//! Two models need not be in memory together: a run keeps the hidden states of the tokens it was asked for, E floats each, and
//! the head that makes logits of them. Logits, V floats a token, exist for a few tokens at a time.

use std::collections::HashMap;
use std::ops::Range;

use graft_adapters::{Embedding, Linear, Route, Table};
use graft_ops::ffi::{eval, read};
use graft_ops::{Array, Dtype, Rows};

use crate::{Error, Model, Result};

/// Tokens of a forward pass, at most, unless one text has more.
const BATCH: usize = 2048;
/// Tokens whose logits are held at a time.
const CHUNK: usize = 64;

/// A text, and which of its tokens are predicted: `tokens[s]` for `s` in `targets`, from those before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Places in `tokens`, from 1 on.
    pub targets: Range<usize>,
}

/// What a model makes of some texts: the hidden states (M, E) before its head, of all their targets.
#[derive(Debug)]
pub struct Run {
    hidden: Vec<Array>,
    head: Head,
}

/// A model's output head by itself, with what a route changes of it.
#[derive(Debug)]
struct Head {
    linear: Option<Linear>,
    embedding: Option<Embedding>,
    table: Option<Table>,
    tensors: HashMap<String, Array>,
}

impl Head {
    fn of(model: &Model, route: &Route) -> Head {
        let (linear, embedding) = match &model.head {
            Some(head) => (Some(head.clone()), None),
            None => (None, Some(model.embed.clone())),
        };
        let path = linear.as_ref().map(|l| &l.path).or(embedding.as_ref().map(|e| &e.path));
        let path = path.cloned().unwrap_or_default();
        let site = route.site(&path).map(|site| (path.clone(), site.clone()));
        let tensor = |part: &str| Some((format!("{path}.{part}"), route.tensor(&path, part)?.clone()));
        let table = site.map(|site| Table { sites: HashMap::from([site]) });
        Head {
            linear,
            embedding,
            table,
            tensors: ["weight", "bias"].into_iter().filter_map(tensor).collect(),
        }
    }

    fn logits(&self, hidden: &Array) -> Result<Array> {
        let route = match &self.table {
            Some(table) => Route::Table(table),
            None if self.tensors.is_empty() => Route::Base,
            None => Route::Weights(&self.tensors),
        };
        let logits = match (&self.linear, &self.embedding) {
            (Some(head), _) => head.forward(hidden, &route)?,
            (None, Some(embedding)) => embedding.as_linear(hidden, &route)?,
            (None, None) => return Err(Error::Request("a model without a head has no logits".into())),
        };
        Ok(logits.as_dtype(Dtype::Float32)?)
    }
}

impl Run {
    /// Runs a model over texts. `go_on` is told how many are done; none if it says no.
    ///
    /// # Errors
    /// When a text has targets that it does not hold, or an array operation fails.
    pub fn of(
        model: &Model,
        route: &Route,
        texts: &[Text],
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Run>> {
        let mut hidden = Vec::new();
        let mut done = 0;
        while done < texts.len() {
            if !go_on(done) {
                return Ok(None);
            }
            let (mut ids, mut lengths, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
            for text in &texts[done..] {
                let Range { start, end } = text.targets;
                if start == 0 || end > text.tokens.len() || start >= end {
                    return Err(Error::Request(format!(
                        "expected targets after the first of {} tokens, found {start}..{end}",
                        text.tokens.len()
                    )));
                }
                if !lengths.is_empty() && ids.len() + end > BATCH {
                    break;
                }
                wanted.extend((start..end).map(|s| (ids.len() + s - 1) as i32));
                ids.extend(text.tokens[..end - 1].iter().map(|t| *t as i32));
                lengths.push(end as i32 - 1);
            }
            done += lengths.len();
            let tokens = Array::from_slice(&ids, &[ids.len() as i32]);
            let states = model.hidden(&tokens, &Rows::new(lengths), None, route)?;
            let wanted = Array::from_slice(&wanted, &[wanted.len() as i32]);
            let states = states.take_axis(wanted, 0)?;
            eval([&states])?;
            hidden.push(states);
        }
        Ok(Some(Run { hidden, head: Head::of(model, route) }))
    }
}

/// What two runs say of one target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// KL(first || second) of their distributions, in nats.
    pub kl: f64,
    /// Whether both hold the same token for the most likely.
    pub agree: bool,
    /// The loss of the target with the first and with the second, in nats.
    pub losses: [f64; 2],
}

/// Compares two runs over the same texts, target by target in their order. None if `go_on` says no.
///
/// # Errors
/// When the runs are of other texts or vocabularies, when logits are not finite, or an array operation fails.
pub fn compare(
    first: &Run,
    second: &Run,
    texts: &[Text],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<Vec<Gap>>> {
    let targets: Vec<u32> = texts.iter().flat_map(|t| t.tokens[t.targets.clone()].iter().copied()).collect();
    let mut gaps = Vec::with_capacity(targets.len());
    if first.hidden.len() != second.hidden.len() {
        return Err(Error::Request("the two runs are not of the same texts".into()));
    }
    for (p, q) in first.hidden.iter().zip(&second.hidden) {
        for start in (0..p.dim(0)).step_by(CHUNK) {
            if !go_on() {
                return Ok(None);
            }
            let end = (start + CHUNK as i32).min(p.dim(0));
            let ids = Array::from_iter(start..end, &[end - start]);
            let p = first.head.logits(&p.take_axis(&ids, 0)?)?;
            let q = second.head.logits(&q.take_axis(&ids, 0)?)?;
            eval([&p, &q])?;
            let own = targets.get(gaps.len()..gaps.len() + (end - start) as usize);
            let vocabulary = p.dim(1) as usize;
            let Some(own) = own.filter(|own| {
                p.shape() == q.shape() && own.iter().all(|target| (*target as usize) < vocabulary)
            }) else {
                return Err(Error::Request(format!(
                    "two runs that cannot be compared: logits of shapes {:?} and {:?}",
                    p.shape(),
                    q.shape()
                )));
            };
            let (p, q) = (read::<f32>(&p)?, read::<f32>(&q)?);
            for (run, logits) in [("first", p), ("second", q)] {
                if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NotFinite { run, target: gaps.len() + at / vocabulary });
                }
            }
            gaps.extend(rows(p, q, own, vocabulary));
        }
    }
    if gaps.len() == targets.len() {
        Ok(Some(gaps))
    } else {
        Err(Error::Request(format!("the runs hold {} targets, the texts {}", gaps.len(), targets.len())))
    }
}

/// The gaps of some rows of logits, on all threads.
fn rows(p: &[f32], q: &[f32], targets: &[u32], vocabulary: usize) -> Vec<Gap> {
    let share = targets.len().div_ceil(graft_ops::threads()).max(1);
    let all = p.chunks(share * vocabulary).zip(q.chunks(share * vocabulary)).zip(targets.chunks(share));
    let work = |((p, q), targets): ((&[f32], &[f32]), &[u32])| {
        let rows = p.chunks_exact(vocabulary).zip(q.chunks_exact(vocabulary)).zip(targets);
        rows.map(|((p, q), target)| gap(p, q, *target as usize)).collect::<Vec<_>>()
    };
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = all.map(|part| scope.spawn(move || work(part))).collect();
        // A thread that panicked leaves its rows out, which the caller's count finds.
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    })
}

/// Of two rows of logits. Sums in f64: where the two are near each other the divergence is a difference of large numbers.
fn gap(p: &[f32], q: &[f32], target: usize) -> Gap {
    let best = |x: &[f32]| (0..x.len()).max_by(|a, b| x[*a].total_cmp(&x[*b]).then(b.cmp(a)));
    let total = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + x.iter().map(|x| f64::from(x - most).exp()).sum::<f64>().ln()
    };
    let (all_p, all_q) = (total(p), total(q));
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p) - all_p, f64::from(*q) - all_q);
        p.exp() * (p - q)
    };
    // Never below zero but for rounding; `max` would make 0 of what is no number.
    let kl = p.iter().zip(q).map(term).sum::<f64>();
    let kl = if kl < 0.0 { 0.0 } else { kl };
    Gap {
        kl,
        agree: best(p) == best(q),
        losses: [all_p - f64::from(p[target]), all_q - f64::from(q[target])],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_formula() {
        let logits = |p: [f32; 3]| p.map(|p| p.ln() + 5.0);
        let (p, q) = (logits([0.7, 0.2, 0.1]), logits([0.5, 0.1, 0.4]));
        let found = gap(&p, &q, 2);
        let wanted = 0.7 * (0.7f64 / 0.5).ln() + 0.2 * 2f64.ln() + 0.1 * 0.25f64.ln();
        assert!((found.kl - wanted).abs() < 1e-6, "{found:?}, {wanted}");
        assert!(found.agree && (found.losses[0] + 0.1f64.ln()).abs() < 1e-6);
        assert!((found.losses[1] + 0.4f64.ln()).abs() < 1e-6);
        assert_eq!(gap(&p, &p, 0).kl, 0.0);
        assert!(!gap(&p, &logits([0.1, 0.8, 0.1]), 0).agree);
        assert!(gap(&[f32::NAN, 0.0, 0.0], &q, 2).kl.is_nan() && gap(&p, &[f32::NAN; 3], 2).kl.is_nan());
        assert_eq!(rows(&[p, q, p].concat(), &[q, q, q].concat(), &[0, 1, 2], 3)[1].kl, 0.0);
    }
}
