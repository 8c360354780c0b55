//! The passes of a turn: which sequences share one, what it gives each of them, and what becomes of those whose pass failed.

use std::time::Instant;

use super::Scheduler;
use crate::ApiError;
use crate::log::LogEvent;
use crate::pass::{Ahead, Rows, begin, caught, chunk};
use crate::sequence::Sequence;

impl Scheduler<'_> {
    /// Which sequences take a token together: all but those that a failure has set apart, those of one adapter with one scale
    /// side by side.
    fn groups(&self) -> Vec<Vec<u64>> {
        let decodes = self.active.iter().filter(|sequence| sequence.decodes());
        let (alone, mut shared): (Vec<&Sequence>, Vec<&Sequence>) = decodes.partition(|s| s.alone);
        shared.sort_by_key(|sequence| (sequence.key(), sequence.id));
        let mut groups: Vec<Vec<u64>> = alone.iter().map(|sequence| vec![sequence.id]).collect();
        if !shared.is_empty() {
            groups.push(shared.iter().map(|sequence| sequence.id).collect());
        }
        groups
    }

    /// One token for each sequence that can take one.
    pub(super) fn decode(&mut self) -> bool {
        // While a prompt is read each step is awaited, or its tokens would wait for the chunk as well.
        let onward = !self.active.iter().any(Sequence::reads);
        let mut groups = self.groups();
        let known = |ahead: &Ahead| onward && groups.contains(&ahead.members);
        let (mut going, ended): (Vec<Ahead>, Vec<Ahead>) = self.ahead.drain(..).partition(known);
        let any = !groups.is_empty() || !ended.is_empty();
        // Where somebody came or left, what is being computed is taken as it is, and a new pass begins.
        for last in &ended {
            let rows = self.timed(|_| last.read());
            self.settle(&last.members, &rows);
        }
        if !ended.is_empty() {
            groups = self.groups();
        }
        for members in &groups {
            let at = going.iter().position(|ahead| ahead.members == *members);
            let last = at.map(|at| going.swap_remove(at));
            if let Some(rows) = self.timed(|own| own.step(members, last, onward)) {
                self.settle(members, &rows);
            }
        }
        any
    }

    /// Counts the time of a part of a turn as spent in a pass.
    fn timed<T>(&mut self, part: impl FnOnce(&mut Self) -> T) -> T {
        let began = Instant::now();
        let made = part(self);
        self.stats.pass_seconds += began.elapsed().as_secs_f64();
        made
    }

    /// Begins the next pass of a group, where it has one, and gives the logits of the last one; none yet if it has just
    /// begun and need not be awaited.
    fn step(&mut self, members: &[u64], last: Option<Ahead>, onward: bool) -> Option<Result<Rows, String>> {
        let mut group: Vec<&mut Sequence> =
            self.active.iter_mut().filter(|sequence| members.contains(&sequence.id)).collect();
        group.sort_by_key(|sequence| members.iter().position(|id| *id == sequence.id));
        let plain = onward && group.iter().all(|sequence| sequence.plain());
        let begins = last.is_none() || group.iter().all(|sequence| sequence.goes_on());
        let next = begins.then(|| begin(self.model, self.base, &mut group, last.as_ref(), plain)).transpose();
        self.stats.steps += u64::from(begins);
        match (last, next) {
            (_, Err(message)) => Some(Err(message)),
            (Some(last), Ok(next)) => {
                self.ahead.extend(next);
                Some(last.read())
            }
            (None, Ok(Some(next))) if !plain => Some(next.read()),
            (None, Ok(next)) => {
                self.ahead.extend(next);
                None
            }
        }
    }

    /// One chunk of the prompt whose turn it is.
    pub(super) fn read(&mut self) -> bool {
        let room = self.room(self.reserved());
        let Some(sequence) = self.active.iter_mut().filter(|s| s.reads()).min_by_key(|s| s.turn) else {
            return false;
        };
        self.turn += 1;
        sequence.turn = self.turn;
        let (id, key) = (sequence.id, sequence.key());
        let known = usize::try_from(sequence.cache.len()).unwrap_or(0);
        // One that a failure has set apart takes nothing from others and gives them nothing.
        if !sequence.alone
            && let Some(cache) = self.prefixes.find(key, sequence.prompt(), known)
        {
            self.stats.prefix_hits += u64::from(!sequence.has_skipped());
            self.stats.prefix_tokens += sequence.skip(cache) as u64;
        }
        let (start, began) = (sequence.cache.len(), Instant::now());
        let result = chunk(self.model, self.base, sequence);
        self.stats.pass_seconds += began.elapsed().as_secs_f64();
        self.stats.chunks += 1;
        self.stats.prompt_tokens += u64::try_from(sequence.cache.len() - start).unwrap_or(0);
        sequence.has_read();
        if result.is_ok() && !sequence.alone {
            let Sequence { history, prompt, cache, .. } = sequence;
            self.prefixes.keep(key, &history[..*prompt], cache, room);
        }
        if let Some(rows) = result.transpose() {
            self.settle(&[id], &rows.map(Rows::Logits));
        }
        true
    }

    /// Hands each sequence of a pass its row. If the pass failed, those that shared it go on alone, since one of them
    /// may be the cause; one that was alone ends.
    pub(super) fn settle(&mut self, members: &[u64], rows: &Result<Rows, String>) {
        let (model, words) = (self.model, &self.words);
        let shared = members.len() > 1;
        if rows.is_err() {
            self.stats.failures += 1;
            self.ahead.retain(|ahead| !ahead.members.iter().any(|id| members.contains(id)));
        }
        for (place, id) in members.iter().enumerate() {
            // One that has ended, or whose client has left, needs no more.
            let Some(sequence) = self.active.iter_mut().find(|s| s.id == *id && !s.is_over()) else {
                continue;
            };
            if rows.is_ok() && sequence.repeats() {
                continue;
            }
            let failed = match rows {
                Ok(rows) => {
                    let chosen = caught(|| match rows {
                        Rows::Logits(all) => match all.chunks_exact(words.size).nth(place) {
                            Some(logits) => sequence.choose(logits, words),
                            None => Err("a pass has too few rows".into()),
                        },
                        Rows::Best(all) => match all.get(place) {
                            Some(best) => sequence.take(*best, words),
                            None => Err("a pass has too few rows".into()),
                        },
                    });
                    self.stats.completion_tokens += u64::from(chosen.is_ok());
                    chosen.err()
                }
                Err(_) if shared => {
                    sequence.restart(model);
                    None
                }
                Err(message) => Some(message.clone()),
            };
            if let Some(message) = failed {
                self.stats.failures += u64::from(rows.is_ok());
                (self.limits.log)(LogEvent::Failure { message });
                sequence
                    .fail(ApiError::server("The model failed on this request; the server's log says why."));
            }
        }
    }
}
