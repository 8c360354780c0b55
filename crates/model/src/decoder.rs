//! The one decoder graph: embedding, blocks of attention and MLP, norm, head.
//!
//! ```text
//! h = E[t]
//! h = h + o(attention(rope(norm(q(x))), rope(norm(k(x))), v(x)))   with x = norm(h)
//! h = h + down(silu(gate(x)) * up(x))                              with x = norm(h)
//! logits = head(norm(h))
//! ```

use graft_adapters::{Embedding, Kind, Linear, Norm, Route, Target};
use graft_ops::{Array, Dtype, Head, Input, RopeTable, Rows};

use crate::cache::rows_of;
use crate::{DecoderConfig, Error, KvCache, Result};

/// Rows of hidden states of which the head makes logits at a time where the loss needs them, so that no (N, V) logits are held.
pub const HEAD_CHUNK: i32 = 256;

/// A decoder with its weights. They are frozen; what a pass changes comes with its route.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: DecoderConfig,
    pub(crate) dtype: Dtype,
    pub(crate) embed: Embedding,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Norm,
    pub(crate) head: Option<Linear>,
    pub(crate) rope: RopeTable,
}

/// One block.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) attention: Attention,
    pub(crate) mlp: Mlp,
    pub(crate) input_norm: Norm,
    pub(crate) post_norm: Norm,
}

/// Grouped-query attention with rotary positions.
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) q_norm: Option<Norm>,
    pub(crate) k_norm: Option<Norm>,
}

/// The gated feed-forward part.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// Told of the input of linears that share one, before they read it.
pub(crate) type Seen<'a> = dyn Fn(&[&Linear], Input) -> Result<()> + 'a;

/// What all blocks of one pass share.
pub(crate) struct Pass<'a> {
    rows: &'a Rows,
    head: Head<'a>,
    route: &'a Route<'a>,
    seen: Option<&'a Seen<'a>>,
}

impl<'a> Pass<'a> {
    /// A pass of a network with this head dim and these positions, which `seen` watches.
    pub(crate) fn new(
        (dim, rope): (i32, &'a RopeTable),
        rows: &'a Rows,
        route: &'a Route<'a>,
        seen: Option<&'a Seen<'a>>,
    ) -> Self {
        Pass { rows, head: Head { dim, scale: 1.0 / (dim as f32).sqrt(), rope: Some(rope) }, route, seen }
    }

    fn see(&self, linears: &[&Linear], input: Input) -> Result<()> {
        self.seen.map_or(Ok(()), |seen| seen(linears, input))
    }
}

impl Attention {
    /// h (N, E) plus the attention of its norm x (N, E); `index` is the block's place in the caches.
    fn forward(&self, h: &Array, x: Input, pass: &Pass, caches: Caches, index: usize) -> Result<Array> {
        let normed = |y: Array, norm: &Option<Norm>| match norm {
            Some(norm) => norm.forward(&y, pass.route),
            None => Ok(y),
        };
        pass.see(&[&self.q, &self.k, &self.v], x)?;
        let [q, k, v] = Linear::forward_each([&self.q, &self.k, &self.v], x, pass.route)?;
        let (q, k) = (normed(q, &self.q_norm)?, normed(k, &self.k_norm)?);
        let y = match caches {
            None => graft_ops::attention(&q, &k, &v, pass.rows, pass.head)?,
            Some(caches) => {
                let mut layers: Vec<_> = caches.iter_mut().filter_map(|cache| cache.layer(index)).collect();
                graft_ops::attention_cached(&q, &k, &v, &mut layers, pass.rows, pass.head)?
            }
        };
        pass.see(&[&self.o], (&y).into())?;
        Ok(self.o.forward_onto(h, &y, pass.route)?)
    }
}

impl Block {
    pub(crate) fn forward(&self, h: &Array, pass: &Pass, caches: Caches, index: usize) -> Result<Array> {
        let x = self.input_norm.of(h, pass.route);
        let h = self.attention.forward(h, x, pass, caches, index)?;
        let x = self.post_norm.of(&h, pass.route);
        pass.see(&[&self.mlp.gate, &self.mlp.up], x)?;
        let [gate, up] = Linear::forward_each([&self.mlp.gate, &self.mlp.up], x, pass.route)?;
        let x = Input::Swiglu { gate: &gate, up: &up };
        pass.see(&[&self.mlp.down], x)?;
        Ok(self.mlp.down.forward_onto(&h, x, pass.route)?)
    }

    pub(crate) fn linears(&self) -> [&Linear; 7] {
        let (a, m) = (&self.attention, &self.mlp);
        [&a.q, &a.k, &a.v, &a.o, &m.gate, &m.up, &m.down]
    }

    fn norms(&self) -> impl Iterator<Item = &Norm> {
        let (q, k) = (&self.attention.q_norm, &self.attention.k_norm);
        [&self.input_norm, &self.post_norm].into_iter().chain(q).chain(k)
    }
}

/// The caches of all rows of a pass, one a row.
pub(crate) type Caches<'a, 'b> = Option<&'a mut [&'b mut KvCache]>;

impl Model {
    /// The values of config.json.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The dtype of activations and of everything that is not packed.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// All linears in checkpoint order, the untied head last.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(Block::linears).chain(&self.head)
    }

    /// The token embedding.
    pub fn embedding(&self) -> &Embedding {
        &self.embed
    }

    /// The linears of block `index`.
    pub fn block_linears(&self, index: usize) -> Option<[&Linear; 7]> {
        self.blocks.get(index).map(Block::linears)
    }

    /// The norms of block `index`.
    pub fn block_norms(&self, index: usize) -> impl Iterator<Item = &Norm> {
        self.blocks.get(index).into_iter().flat_map(Block::norms)
    }

    /// The module at `path` that an adapter may act on.
    pub fn target(&self, path: &str) -> Option<Target<'_>> {
        if path == self.embed.path {
            return Some(Target { weight: &self.embed.weight, kind: Kind::Embedding });
        }
        let linear = self.linears().find(|l| l.path == path)?;
        Some(Target { weight: &linear.weight, kind: Kind::Linear })
    }

    /// Bytes of all weights as held in memory.
    pub fn nbytes(&self) -> usize {
        let norms = self.blocks.iter().flat_map(Block::norms).chain([&self.norm]);
        self.embed.weight.nbytes()
            + self
                .linears()
                .map(|l| l.weight.nbytes() + l.bias.as_ref().map_or(0, Array::nbytes))
                .sum::<usize>()
            + norms.map(|n| n.weight.nbytes()).sum::<usize>()
    }

    fn pass<'a>(&'a self, rows: &'a Rows, route: &'a Route<'a>) -> Pass<'a> {
        Pass::new((self.config.head_dim, &self.rope), rows, route, None)
    }

    /// Tokens (N,) of all rows to hidden states (N, E) after the final norm.
    ///
    /// With caches (one a row) `rows.starts` must be what the caches hold; they advance by `rows.lengths`.
    ///
    /// # Errors
    /// When tokens, rows and caches do not fit each other, or an array operation fails.
    pub fn hidden(
        &self,
        tokens: &Array,
        rows: &Rows,
        mut caches: Caches<'_, '_>,
        route: &Route,
    ) -> Result<Array> {
        self.check_rows(tokens, rows, caches.as_deref())?;
        let pass = self.pass(rows, route);
        let mut h = self.embed.forward(tokens, self.dtype, route)?;
        for (index, block) in self.blocks.iter().enumerate() {
            h = block.forward(&h, &pass, caches.as_deref_mut(), index)?;
        }
        if let Some(caches) = caches {
            for (cache, &length) in caches.iter_mut().zip(&rows.lengths) {
                cache.advance(length);
            }
        }
        Ok(self.norm.forward(&h, route)?)
    }

    /// One block after another, for what needs them apart (recomputation, observation): h (N, E) to (N, E).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn block(&self, index: usize, h: &Array, rows: &Rows, route: &Route) -> Result<Array> {
        let block = self.blocks.get(index).ok_or_else(|| Error::Request(format!("no block {index}")))?;
        block.forward(h, &self.pass(rows, route), None, index)
    }

    /// Tokens (N,) to the first block's input (N, E).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn embed(&self, tokens: &Array, route: &Route) -> Result<Array> {
        Ok(self.embed.forward(tokens, self.dtype, route)?)
    }

    /// The norm before the head: h (N, E) to (N, E).
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn final_norm(&self, h: &Array, route: &Route) -> Result<Array> {
        Ok(self.norm.forward(h, route)?)
    }

    fn check_rows(&self, tokens: &Array, rows: &Rows, caches: Option<&[&mut KvCache]>) -> Result<()> {
        let total: i32 = rows.lengths.iter().sum();
        let fits = rows.starts.len() == rows.lengths.len()
            && caches.is_none_or(|caches| {
                caches.len() == rows.lengths.len()
                    && caches.iter().zip(&rows.starts).all(|(cache, start)| cache.len() == *start)
            });
        if tokens.shape() != [total] || total == 0 || !fits {
            return Err(Error::Request(format!(
                "expected {total} tokens in rows that continue their caches, found tokens {:?}, lengths {:?}, starts {:?}",
                tokens.shape(),
                rows.lengths,
                rows.starts
            )));
        }
        Ok(())
    }

    /// Hidden states (M, E) to logits (M, V), in the model's dtype.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn logits(&self, h: &Array, route: &Route) -> Result<Array> {
        Ok(match &self.head {
            Some(head) => head.forward(h, route)?,
            None => self.embed.as_linear(h, route)?,
        })
    }

    /// Path of the module that is the head: the embedding, where the two are tied.
    pub fn head_path(&self) -> &str {
        self.head.as_ref().map_or(&self.embed.path, |head| &head.path)
    }

    /// Loss in nats (M,), f32, of `targets` (M,) given hidden states (M, E): logsumexp of the logits minus the target's.
    ///
    /// No (M, V) logits are held: the plain head goes through one operation with a gradient to h; a head that the route
    /// changes is taken chunk by chunk.
    ///
    /// # Errors
    /// When an array operation fails.
    pub fn losses(&self, h: &Array, targets: &Array, route: &Route) -> Result<Array> {
        let (weight, bias) = match &self.head {
            Some(head) => (&head.weight, head.bias.as_ref()),
            None => (&self.embed.weight, None),
        };
        if !route.changes(self.head_path()) && bias.is_none() {
            return Ok(graft_ops::linear_cross_entropy(h, weight.as_ref(), targets, HEAD_CHUNK)?);
        }
        let mut parts = Vec::new();
        for start in (0..h.dim(0)).step_by(HEAD_CHUNK as usize) {
            let end = (start + HEAD_CHUNK).min(h.dim(0));
            let logits = self.logits(&rows_of(h, start, end)?, route)?;
            parts.push(graft_ops::cross_entropy(&logits, &rows_of(targets, start, end)?)?);
        }
        Ok(mlx_rs::ops::concatenate(&parts, 0)?)
    }
}
