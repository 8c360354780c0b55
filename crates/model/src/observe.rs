//! What a linear's inputs look like: their second moments, block by block, for rounding that knows which errors matter.
//!
//! The network runs with its adapter, since the moments of the answers it shall give are wanted. One block of weights is in
//! memory at a time, and the hidden states of all tokens; each block is read once.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use graft_adapters::{AdapterSet, Kind, Linear, Route, Table, Target};
use graft_ops::ffi::eval;
use graft_ops::{Array, Dtype, Input, RopeTable, Rows};
use graft_quant::{Checkpoint, Hessian};

use crate::decoder::{Pass, Seen};
use crate::load::Source;
use crate::{DecoderConfig, Error, Result, rope};

/// Tokens of a forward pass, at most.
const BATCH: usize = Observer::LENGTH;

/// A network that is run block by block over texts.
#[derive(Debug)]
pub struct Observer {
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: Dtype,
    rope: RopeTable,
    set: AdapterSet,
    /// Rows and their hidden states (N, E) before block `next`.
    batches: Vec<(Rows, Array)>,
    tokens: usize,
    next: usize,
    /// The moments of the block before `next`, by module path.
    held: BTreeMap<String, Rc<Hessian>>,
}

impl Observer {
    /// Tokens of a text that are observed, at most.
    pub const LENGTH: usize = 1024;

    /// Begins with the embedding of `texts` (token ids), each cut to [`Observer::LENGTH`].
    ///
    /// # Errors
    /// When the checkpoint is no model that runs here, the adapter does not fit it, or there are no tokens.
    pub fn new(
        checkpoint: Checkpoint,
        dtype: Dtype,
        set: &AdapterSet,
        texts: &[Vec<u32>],
    ) -> Result<Observer> {
        let (source, config) = Source::open(&checkpoint, dtype)?;
        let embedding = source.embedding()?;
        let own = set.only(|path| path == embedding.path);
        let table = own.table(checkpoint.dir(), |path| {
            (path == embedding.path).then_some(Target { weight: &embedding.weight, kind: Kind::Embedding })
        })?;
        let (mut batches, mut ids, mut lengths, mut tokens) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut embed = |ids: &mut Vec<i32>, lengths: &mut Vec<i32>| -> Result<()> {
            let array = Array::from_slice(ids, &[ids.len() as i32]);
            let h = embedding.forward(&array, dtype, &Route::Table(&table))?;
            eval([&h])?;
            batches.push((Rows::new(std::mem::take(lengths)), h));
            ids.clear();
            Ok(())
        };
        for text in texts.iter().filter(|text| !text.is_empty()) {
            let text = &text[..text.len().min(BATCH)];
            if ids.len() + text.len() > BATCH && !ids.is_empty() {
                embed(&mut ids, &mut lengths)?;
            }
            ids.extend(text.iter().map(|t| *t as i32));
            lengths.push(text.len() as i32);
            tokens += text.len();
        }
        if !ids.is_empty() {
            embed(&mut ids, &mut lengths)?;
        }
        if tokens == 0 {
            return Err(Error::Request("there are no tokens to observe a network with".into()));
        }
        let rope = rope::table(&config)?;
        let set = set.clone();
        Ok(Observer { checkpoint, config, dtype, rope, set, batches, tokens, next: 0, held: BTreeMap::new() })
    }

    /// Tokens that are observed.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The moments of the inputs of a linear with an adapter; none for other modules. Modules are asked for block by block:
    /// what came before is no longer there.
    ///
    /// # Errors
    /// When a module of an earlier block is asked for, or an array operation fails.
    pub fn moments(&mut self, path: &str) -> Result<Option<Rc<Hessian>>> {
        let block =
            path.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let blocks = self.config.layers as usize;
        match block {
            Some(block) if block < blocks && block + 1 < self.next => {
                return Err(Error::Request(format!("{path}: its block was left behind")));
            }
            Some(block) if block < blocks => {
                while self.next <= block {
                    self.advance()?;
                }
            }
            None if path == "lm_head" && !self.config.tied => {
                while self.next < blocks {
                    self.advance()?;
                }
                if !self.held.contains_key(path) {
                    self.head(path)?;
                }
            }
            _ => return Ok(None),
        }
        Ok(self.held.get(path).cloned())
    }

    /// Runs the next block and keeps the moments of its inputs.
    fn advance(&mut self) -> Result<()> {
        let (source, _) = Source::open(&self.checkpoint, self.dtype)?;
        let block = source.block(&self.config, self.next as i32)?;
        let linears = block.linears();
        let of = |path: &str| linears.iter().find(|linear| linear.path == path);
        let own = self.set.only(|path| of(path).is_some());
        let origin = PathBuf::from(self.checkpoint.dir());
        let table =
            own.table(&origin, |path| Some(Target { weight: &of(path)?.weight, kind: Kind::Linear }))?;
        let grams = Grams { table: &table, sums: RefCell::new(BTreeMap::new()) };
        let route = Route::Table(&table);
        let seen: &Seen = &|linears, input| grams.add(linears, input);
        for (rows, h) in &mut self.batches {
            let pass = Pass::new((self.config.head_dim, &self.rope), rows, &route, Some(seen));
            *h = block.forward(h, &pass, None, self.next)?;
            eval([&*h])?;
        }
        self.held = grams.finish(self.tokens)?;
        self.next += 1;
        Ok(())
    }

    /// The moments of the final norm's outputs, which the head reads.
    fn head(&mut self, path: &str) -> Result<()> {
        let (source, _) = Source::open(&self.checkpoint, self.dtype)?;
        let (norm, head) = (source.norm(&self.config, "model.norm".into())?, source.linear(path.into())?);
        let own = self.set.only(|name| name == path);
        let table =
            own.table(self.checkpoint.dir(), |_| Some(Target { weight: &head.weight, kind: Kind::Linear }))?;
        let grams = Grams { table: &table, sums: RefCell::new(BTreeMap::new()) };
        for (_, h) in &self.batches {
            let x = norm.forward(h, &Route::Base)?;
            grams.add(&[&head], (&x).into())?;
        }
        self.held = grams.finish(self.tokens)?;
        Ok(())
    }
}

/// Sums of x^T x by input, each with the paths of the linears that read it.
struct Grams<'a> {
    table: &'a Table,
    sums: RefCell<BTreeMap<Vec<String>, Array>>,
}

impl Grams<'_> {
    fn add(&self, linears: &[&Linear], input: Input) -> Result<()> {
        let paths: Vec<String> = linears.iter().map(|linear| linear.path.clone()).collect();
        if !paths.iter().any(|path| self.table.sites.contains_key(path)) {
            return Ok(());
        }
        let x = input.array()?.as_dtype(Dtype::Float32)?;
        let mut gram = x.transpose()?.matmul(&x)?;
        let mut sums = self.sums.borrow_mut();
        if let Some(sum) = sums.get(&paths) {
            gram = gram.add(sum)?;
        }
        eval([&gram])?;
        sums.insert(paths, gram);
        Ok(())
    }

    fn finish(self, tokens: usize) -> Result<BTreeMap<String, Rc<Hessian>>> {
        let mut held = BTreeMap::new();
        for (paths, sum) in self.sums.into_inner() {
            let hessian = Rc::new(Hessian::new(sum.divide(Array::from_f32(tokens as f32))?)?);
            held.extend(paths.into_iter().map(|path| (path, hessian.clone())));
        }
        Ok(held)
    }
}
