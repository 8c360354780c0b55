//! Which rows go together, in which order, and the arrays that a step is given.
//!
//! Rows are sorted by length and cut into batches of neighbours, so that rows of a batch are about equally long; the
//! last batch may be smaller, for no row is left out. Each pass over the data permutes the batches anew.

use graft_ops::{Array, Form, Rows};

use crate::data::Split;
use crate::rng::Rng;
use crate::{Error, Result};

/// In MLX's form rows are padded to a multiple of this, so that few different shapes occur.
const PAD_TO: usize = 32;

/// The arrays of one batch.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The rows, as indices into the split's examples.
    pub examples: Vec<usize>,
    /// Inputs (N,) i32: every row without its last token, one row after another.
    pub tokens: Array,
    /// Where each row is in `tokens`.
    pub rows: Rows,
    /// Positions (M,) i32 in `tokens` whose next token is a target; none when that is all of them.
    pub positions: Option<Array>,
    /// Targets (M,) i32.
    pub targets: Array,
    /// M.
    pub count: usize,
}

impl Batch {
    /// Builds the batch of some examples: ragged in the CPU form, padded to equal length in MLX's.
    ///
    /// Padding is an input only: no target is ever a pad, and causal attention keeps it from the real tokens.
    pub fn new(split: &Split, examples: &[usize], form: Form) -> Self {
        let chosen: Vec<_> = examples.iter().filter_map(|i| split.examples.get(*i)).collect();
        let longest = chosen.iter().map(|e| e.tokens.len().saturating_sub(1)).max().unwrap_or(0);
        let width = match form {
            Form::Cpu => None,
            Form::Mlx => Some(longest.next_multiple_of(PAD_TO)),
        };
        let (mut tokens, mut lengths, mut positions, mut targets) = (vec![], vec![], vec![], vec![]);
        for example in chosen {
            let start = tokens.len();
            let inputs = example.tokens.len().saturating_sub(1);
            tokens.extend(example.tokens.iter().take(inputs).map(|t| *t as i32));
            tokens.resize(start + width.unwrap_or(inputs), 0);
            lengths.push((tokens.len() - start) as i32);
            for at in example.trained() {
                positions.push((start + at - 1) as i32);
                targets.push(example.tokens[at] as i32);
            }
        }
        let count = targets.len();
        let vector = |v: &[i32]| Array::from_slice(v, &[v.len() as i32]);
        Self {
            examples: examples.to_vec(),
            positions: (count != tokens.len()).then(|| vector(&positions)),
            tokens: vector(&tokens),
            rows: Rows::new(lengths),
            targets: vector(&targets),
            count,
        }
    }
}

/// The batches of a split: its examples sorted by length (then by place) and cut into groups of `batch_size`.
pub fn groups(split: &Split, batch_size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..split.examples.len()).collect();
    order.sort_by_key(|i| split.examples[*i].tokens.len());
    order.chunks(batch_size.max(1)).map(<[usize]>::to_vec).collect()
}

/// `count` batches of a split (all if `count` is negative), the same ones for the same seed.
pub fn fixed_groups(split: &Split, batch_size: usize, count: i64, seed: u64) -> Vec<Vec<usize>> {
    let all = groups(split, batch_size);
    let take = usize::try_from(count).unwrap_or(all.len()).min(all.len());
    let order = Rng::new(seed).permutation(all.len());
    order.into_iter().take(take).map(|i| all[i].clone()).collect()
}

/// An endless walk over the batches, a new permutation each pass.
#[derive(Debug, Clone)]
pub struct Walk {
    groups: Vec<Vec<usize>>,
    order: Vec<usize>,
    position: Position,
    rng: Rng,
}

/// Where a walk is: enough to continue it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Position {
    /// The generator before it permuted this pass.
    pub rng: [u64; 4],
    /// Passes done.
    pub pass: u64,
    /// Batches of this pass done.
    pub done: usize,
}

impl Walk {
    /// Starts at the first batch of the first pass.
    ///
    /// # Errors
    /// When the split has no rows, or fewer than one batch takes.
    pub fn new(split: &Split, batch_size: usize, seed: u64) -> Result<Self> {
        let rows = split.require()?.examples.len();
        if batch_size > rows {
            return Err(Error::BatchTooLarge { file: split.file.clone(), rows, batch_size });
        }
        let position = Position { rng: Rng::new(seed).state, pass: 0, done: 0 };
        Ok(Self::at(groups(split, batch_size), position))
    }

    /// Continues where `position` says.
    pub fn resume(&self, position: Position) -> Self {
        Self::at(self.groups.clone(), position)
    }

    fn at(groups: Vec<Vec<usize>>, position: Position) -> Self {
        let mut rng = Rng { state: position.rng };
        let order = rng.permutation(groups.len());
        Self { groups, order, position, rng }
    }

    /// The examples of the next batch.
    pub fn next_group(&mut self) -> &[usize] {
        if self.position.done >= self.order.len() {
            self.position = Position { rng: self.rng.state, pass: self.position.pass + 1, done: 0 };
            self.order = self.rng.permutation(self.groups.len());
        }
        let index = self.order[self.position.done];
        self.position.done += 1;
        &self.groups[index]
    }

    /// Where the walk is now.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// Batches of a pass.
    pub fn batches(&self) -> usize {
        self.groups.len()
    }
}
