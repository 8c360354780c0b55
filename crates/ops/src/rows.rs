//! Sequences of different length in one batch: their tokens are concatenated, so that padding does not exist.

use crate::{Exception, Result};

/// A ragged batch: the N = sum of `lengths` tokens of all rows, one row after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Tokens of each row in this batch.
    pub lengths: Vec<i32>,
    /// Position of each row's first token, that is, how many of its tokens are cached already.
    pub starts: Vec<i32>,
}

impl Rows {
    /// Rows that begin at position 0.
    pub fn new(lengths: Vec<i32>) -> Rows {
        let starts = vec![0; lengths.len()];
        Rows { lengths, starts }
    }

    /// N, the tokens of all rows together.
    pub fn tokens(&self) -> i32 {
        self.lengths.iter().sum()
    }

    /// The common length, if all rows have the same.
    pub fn equal_length(&self) -> Option<i32> {
        let first = *self.lengths.first()?;
        self.lengths.iter().all(|&length| length == first).then_some(first)
    }

    /// Fails unless the rows are well formed and hold exactly `tokens` tokens.
    pub fn check(&self, tokens: i32) -> Result<()> {
        if self.lengths.len() != self.starts.len() {
            return Err(Exception::custom(format!(
                "a batch of {} row lengths has {} starts",
                self.lengths.len(),
                self.starts.len()
            )));
        }
        if self.lengths.iter().chain(&self.starts).any(|&n| n < 0) {
            return Err(Exception::custom("a row has a negative length or start"));
        }
        let total: i64 = self.lengths.iter().map(|&n| i64::from(n)).sum();
        if total != i64::from(tokens) {
            return Err(Exception::custom(format!("the rows hold {total} tokens, the array has {tokens}")));
        }
        Ok(())
    }

    /// Where each row but the first begins in the concatenation.
    pub(crate) fn borders(&self) -> Vec<i32> {
        let mut at = 0;
        let mut borders = Vec::with_capacity(self.lengths.len());
        for &length in &self.lengths {
            at += length;
            borders.push(at);
        }
        borders.pop();
        borders
    }
}
