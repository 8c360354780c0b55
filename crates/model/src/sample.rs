//! Choosing the next token from its logits, on the host: a few passes over V numbers, next to nothing beside a forward.
//!
//! Semantics and order are mlx-lm's, so that the same settings mean the same distribution:
//! 1. `l[id] += bias` for every entry of `logit_bias`;
//! 2. repetition, for every distinct id of the last `repetition_context` tokens: `l = l < 0 ? l * p : l / p`;
//! 3. presence, for every distinct id of the last `presence_context` tokens: `l -= p`;
//! 4. frequency, for every id of the last `frequency_context` tokens: `l -= p * occurrences`;
//! 5. `logprob = l - logsumexp(l)`; this is what is reported. At temperature 0 the largest is the answer; else
//! 6. `top_p` keeps an id if the probability of all that are more probable is below `top_p` (ties stay together);
//! 7. `min_p` keeps an id if `p >= min_p * max(p)`, and the `min_tokens_to_keep` most probable anyway;
//! 8. XTC, with `xtc_probability`: of the ids whose probability is above `xtc_threshold`, only the least probable stays;
//! 9. `top_k` keeps the k most probable;
//! 10. one is drawn with probability proportional to `exp(logprob / temperature)`. So filters see the distribution before
//!     the temperature.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};

use graft_ops::exponentials;

use crate::{Error, Result};

/// How tokens are chosen. The formulas are in the source file's head; every field says which value turns it off.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most probable token.
    pub temperature: f32,
    /// Nucleus, in [0, 1]; 0 and 1 are off.
    pub top_p: f32,
    /// How many of the most probable tokens stay; 0 is off, and so is the vocabulary's size or more.
    pub top_k: usize,
    /// Least probability relative to the largest one, in [0, 1]; 0 is off.
    pub min_p: f32,
    /// Tokens that `min_p` may not remove, at least 1.
    pub min_tokens_to_keep: usize,
    /// Probability with which a token's choice leaves out the top choices, in [0, 1]; 0 is off.
    pub xtc_probability: f32,
    /// What counts as a top choice, a probability in [0, 0.5].
    pub xtc_threshold: f32,
    /// Ids that XTC never removes (mlx-lm: line breaks and the end of the answer).
    pub xtc_special_tokens: Vec<u32>,
    /// Factor above 0; 1 is off, and so is 0 as in mlx-lm.
    pub repetition_penalty: f32,
    /// How many of the last tokens the repetition penalty looks at; 0 is all.
    pub repetition_context: usize,
    /// Subtracted from the logit of a token that occurred; 0 is off.
    pub presence_penalty: f32,
    /// How many of the last tokens the presence penalty looks at; 0 is all.
    pub presence_context: usize,
    /// Subtracted from the logit of a token for each time it occurred; 0 is off.
    pub frequency_penalty: f32,
    /// How many of the last tokens the frequency penalty looks at; 0 is all.
    pub frequency_context: usize,
    /// Added to the logits of these ids. Minus infinity forbids an id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Log-probabilities are wanted, and this many alternatives with them.
    pub logprobs: Option<usize>,
    /// The same seed, logits and settings give the same tokens; none takes one from the system.
    pub seed: Option<u64>,
}

impl Sampling {
    /// The most probable token, nothing else asked for; a base to set single fields on.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 0.0,
            top_k: 0,
            min_p: 0.0,
            min_tokens_to_keep: 1,
            xtc_probability: 0.0,
            xtc_threshold: 0.0,
            xtc_special_tokens: Vec::new(),
            repetition_penalty: 0.0,
            repetition_context: 20,
            presence_penalty: 0.0,
            presence_context: 20,
            frequency_penalty: 0.0,
            frequency_context: 20,
            logit_bias: Vec::new(),
            logprobs: None,
            seed: None,
        }
    }

    /// Whether the largest logit is all that is asked for, so that the logits need not come to the host.
    pub fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0
            && !self.repeats()
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.logit_bias.is_empty()
            && self.logprobs.is_none()
    }

    /// Whether a choice from `vocab` tokens leaves some out.
    fn is_filtered(&self, vocab: usize) -> bool {
        (self.top_p > 0.0 && self.top_p < 1.0)
            || self.min_p > 0.0
            || self.xtc_probability > 0.0
            || (self.top_k > 0 && self.top_k < vocab)
    }

    fn repeats(&self) -> bool {
        self.repetition_penalty != 0.0 && self.repetition_penalty != 1.0
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is outside its range.
    pub fn check(&self) -> Result<()> {
        let within = |field: &'static str, value: f32, low: f32, high: f32, expected: &str| {
            if value >= low && value <= high { Ok(()) } else { Err(wrong(field, expected, &value)) }
        };
        within("temperature", self.temperature, 0.0, f32::MAX, "a number of at least 0")?;
        within("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1")?;
        within("xtc_probability", self.xtc_probability, 0.0, 1.0, "a number from 0 to 1")?;
        within("xtc_threshold", self.xtc_threshold, 0.0, 0.5, "a number from 0 to 0.5")?;
        within("repetition_penalty", self.repetition_penalty, 0.0, f32::MAX, "a number of at least 0")?;
        within("presence_penalty", self.presence_penalty, f32::MIN, f32::MAX, "a finite number")?;
        within("frequency_penalty", self.frequency_penalty, f32::MIN, f32::MAX, "a finite number")?;
        if self.min_tokens_to_keep == 0 {
            return Err(wrong("min_tokens_to_keep", "a whole number of at least 1", &0));
        }
        match self.logit_bias.iter().find(|(_, bias)| bias.is_nan() || *bias == f32::INFINITY) {
            Some((id, bias)) => {
                Err(wrong("logit_bias", "numbers below infinity", &format!("{bias} for id {id}")))
            }
            None => Ok(()),
        }
    }
}

fn wrong(field: &'static str, expected: &str, found: &dyn ToString) -> Error {
    Error::Sampling { field, expected: expected.to_owned(), found: found.to_string() }
}

/// Draws tokens one after another.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: Random,
    logits: Vec<f32>,
    /// Proportional to the probabilities: of all tokens by step 5, then of those that stay at the temperature.
    weights: Vec<f32>,
    alternatives: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// When a setting is outside its range.
    pub fn new(sampling: &Sampling) -> Result<Self> {
        sampling.check()?;
        // The standard library's hasher is keyed by the system: the only entropy that needs no dependency.
        let seed = sampling.seed.unwrap_or_else(|| RandomState::new().hash_one(0_u8));
        Ok(Self {
            sampling: sampling.clone(),
            random: Random(seed),
            logits: Vec::new(),
            weights: Vec::new(),
            alternatives: Vec::new(),
        })
    }

    /// Chooses from `logits` (V,) after `history` (prompt and answer): the id and its log-probability in nats, that of
    /// step 5.
    ///
    /// # Errors
    /// When a logit is not a number, no token is possible, or `logit_bias` names an id outside the vocabulary.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<(u32, f32)> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.penalise(history)?;
        let (best, largest) = largest(&self.logits)?;
        let sum = exponentials(&self.logits, largest, 1.0, &mut self.weights);
        let normaliser = f64::from(largest) + sum.ln();
        for l in &mut self.logits {
            *l = (f64::from(*l) - normaliser) as f32;
        }
        let id = if self.sampling.temperature == 0.0 { best } else { self.draw(best) };
        self.alternatives.clear();
        if let Some(n) = self.sampling.logprobs.filter(|n| *n > 0) {
            let ids = most_probable(&self.logits, (0..self.logits.len() as u32).collect(), n);
            self.alternatives.extend(ids.iter().map(|id| (*id, self.logits[*id as usize])));
        }
        Ok((id as u32, self.logits[id]))
    }

    /// The most probable id, all that [`Sampling::is_plain_greedy`] asks for: probabilities cost more than a small model's
    /// products.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn best(logits: &[f32]) -> Result<u32> {
        Ok(largest(logits)?.0 as u32)
    }

    /// As [`Sampler::best`], where the id of the largest logit has been found already.
    ///
    /// # Errors
    /// When that logit is no number to choose by.
    pub fn best_of(id: u32, logit: f32) -> Result<u32> {
        if logit.is_finite() { Ok(id) } else { Err(impossible(id as usize, logit)) }
    }

    /// The most probable tokens of the last choice with their log-probabilities, best first: as many as
    /// [`Sampling::logprobs`] asks for.
    pub fn alternatives(&self) -> &[(u32, f32)] {
        &self.alternatives
    }

    /// Steps 1 to 4.
    fn penalise(&mut self, history: &[u32]) -> Result<()> {
        let (s, logits) = (&self.sampling, &mut self.logits);
        for (id, bias) in &s.logit_bias {
            let vocab = logits.len();
            let logit = logits.get_mut(*id as usize);
            *logit.ok_or_else(|| wrong("logit_bias", &format!("ids below {vocab}"), &id))? += bias;
        }
        // Ids of the history were checked where they entered; one that is outside has no logit to change.
        if s.repeats() {
            let p = s.repetition_penalty;
            for id in last(history, s.repetition_context).iter().collect::<BTreeSet<_>>() {
                if let Some(l) = logits.get_mut(*id as usize) {
                    *l = if *l < 0.0 { *l * p } else { *l / p };
                }
            }
        }
        if s.presence_penalty != 0.0 {
            for id in last(history, s.presence_context).iter().collect::<BTreeSet<_>>() {
                if let Some(l) = logits.get_mut(*id as usize) {
                    *l -= s.presence_penalty;
                }
            }
        }
        if s.frequency_penalty != 0.0 {
            let mut counts = BTreeMap::new();
            for id in last(history, s.frequency_context) {
                *counts.entry(*id).or_insert(0_u32) += 1;
            }
            for (id, n) in counts {
                if let Some(l) = logits.get_mut(id as usize) {
                    *l -= s.frequency_penalty * n as f32;
                }
            }
        }
        Ok(())
    }

    /// Steps 6 to 10 on log-probabilities; `best` is the most probable id.
    fn draw(&mut self, best: usize) -> usize {
        let ids = self.sampling.is_filtered(self.logits.len()).then(|| self.candidates(best));
        let scale = self.sampling.temperature.recip().min(f32::MAX);
        let total = match &ids {
            None => exponentials(&self.logits, self.logits[best], scale, &mut self.weights),
            Some(ids) => {
                let staying: Vec<f32> = ids.iter().map(|id| self.logits[*id as usize]).collect();
                let top = staying.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                exponentials(&staying, top, scale, &mut self.weights)
            }
        };
        let id = |at: usize| ids.as_ref().map_or(at, |ids| ids[at] as usize);
        let mut left = self.random.uniform() * total;
        for (at, weight) in self.weights.iter().enumerate() {
            left -= f64::from(*weight);
            if left < 0.0 {
                return id(at);
            }
        }
        // Rounding can leave a crumb after the last one.
        self.weights.iter().rposition(|weight| *weight > 0.0).map_or(best, id)
    }

    /// Steps 6 to 9: the ids that stay, in ascending order, at least one.
    fn candidates(&mut self, best: usize) -> Vec<u32> {
        let s = &self.sampling;
        let lp = &self.logits;
        let at = |id: &u32| lp[*id as usize];
        let mut ids: Vec<u32> = (0..lp.len() as u32).filter(|id| at(id) > f32::NEG_INFINITY).collect();
        if s.top_p > 0.0 && s.top_p < 1.0 {
            let threshold = nucleus(lp, &self.weights, &ids, s.top_p).min(lp[best]);
            ids.retain(|id| at(id) >= threshold);
        }
        if s.min_p > 0.0 {
            let threshold = lp[best] + s.min_p.ln();
            let kept = if s.min_tokens_to_keep > 1 {
                most_probable(lp, ids.clone(), s.min_tokens_to_keep)
            } else {
                Vec::new()
            };
            ids.retain(|id| at(id) >= threshold || kept.contains(id));
        }
        if s.xtc_probability > 0.0 && self.random.uniform() <= f64::from(s.xtc_probability) {
            let weight = |id: &u32| f64::from(self.weights[*id as usize]);
            let total: f64 = ids.iter().map(weight).sum();
            let tops = ids.iter().filter(|id| weight(id) > f64::from(s.xtc_threshold) * total);
            if let Some(least) = tops.map(at).reduce(f32::min) {
                ids.retain(|id| at(id) <= least || s.xtc_special_tokens.contains(id));
            }
        }
        if s.top_k > 0 && s.top_k < ids.len() {
            ids = most_probable(lp, ids, s.top_k);
            ids.sort_unstable();
        }
        ids
    }
}

/// The largest logit, the first among equals, and its id.
fn largest(logits: &[f32]) -> Result<(usize, f32)> {
    // Sixteen side by side and no way out of the loop, so that the compiler takes them together.
    let (mut most, mut broken) = ([f32::NEG_INFINITY; 16], [false; 16]);
    for logits in logits.chunks(16) {
        for ((l, most), broken) in logits.iter().zip(&mut most).zip(&mut broken) {
            *most = if *l > *most { *l } else { *most };
            *broken |= l.is_nan() || *l == f32::INFINITY;
        }
    }
    let largest = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let wrong = |l: &f32| l.is_nan() || *l == f32::INFINITY;
    if broken.contains(&true)
        && let Some(id) = logits.iter().position(wrong)
    {
        return Err(impossible(id, logits[id]));
    }
    match logits.iter().position(|l| *l == largest) {
        Some(best) if largest > f32::NEG_INFINITY => Ok((best, largest)),
        _ => Err(impossible(0, f32::NEG_INFINITY)),
    }
}

/// Why nothing can be chosen where `logit` is the one to choose by.
fn impossible(id: usize, logit: f32) -> Error {
    Error::Request(if logit == f32::NEG_INFINITY {
        "no token is possible: every logit is minus infinity".into()
    } else {
        format!("the logit of token {id} is {logit}: the weights or the adapter are broken")
    })
}

/// The last `n` of `history`; all for 0.
fn last(history: &[u32], n: usize) -> &[u32] {
    let n = if n == 0 { history.len() } else { n.min(history.len()) };
    &history[history.len() - n..]
}

/// The `n` most probable of `ids`, best first, the lower id first among equals.
fn most_probable(lp: &[f32], mut ids: Vec<u32>, n: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| lp[*b as usize].total_cmp(&lp[*a as usize]).then(a.cmp(b));
    if n < ids.len() {
        ids.select_nth_unstable_by(n, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

/// The least log-probability that top_p keeps: that of the last id, by falling probability, before which less than
/// `top_p` of the total has been seen. `weights` are proportional to the probabilities.
fn nucleus(lp: &[f32], weights: &[f32], ids: &[u32], top_p: f32) -> f32 {
    let p = |id: &u32| f64::from(weights[*id as usize]);
    let total: f64 = ids.iter().map(p).sum();
    let wanted = f64::from(top_p) * total;
    // All that are as improbable as this together make no more than what is left out, so only others need sorting.
    let little = (total - wanted) / ids.len() as f64;
    let likely: Vec<u32> = ids.iter().copied().filter(|id| p(id) >= little).collect();
    // The nucleus is nearly always a small part of these too: sort only as much as it needs, eight times more at each try.
    let mut n = 64;
    loop {
        let (mut above, mut threshold) = (0.0, f32::INFINITY);
        for id in &most_probable(lp, likely.clone(), n) {
            if above >= wanted {
                return threshold;
            }
            above += p(id);
            threshold = lp[*id as usize];
        }
        if n >= likely.len() {
            return threshold;
        }
        n *= 8;
    }
}

/// A seeded stream of random numbers (splitmix64), the same on every machine.
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// Uniform in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
