//! From a model directory to a [`Model`]: strict, so that what is missing, left over or misshapen is said at once.

use std::collections::BTreeMap;
use std::path::Path;

use graft_adapters::{Embedding, Linear, Norm};
use graft_ops::{Array, Dtype};
use graft_quant::{Checkpoint, Weight};

use crate::decoder::{Attention, Block, Mlp};
use crate::{DecoderConfig, Error, Model, Result, config_from_map, rope};

/// What a part of the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartKind {
    /// W (out, in), perhaps with a bias (out,).
    Linear {
        /// A bias belongs to it.
        bias: bool,
    },
    /// E (V, E).
    Embedding,
    /// w (E,).
    Norm,
}

/// One module that config.json promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Module path in the checkpoint.
    pub path: String,
    /// What it is.
    pub kind: PartKind,
    /// Shape of its weight: (out, in), (V, E), or (n, 1) of a norm.
    pub shape: (i32, i32),
}

/// Every module of the network that `config` describes, in checkpoint order.
pub fn parts(config: &DecoderConfig) -> Vec<Part> {
    let c = config;
    let mut parts = Vec::new();
    let mut add = |path: String, kind, shape| parts.push(Part { path, kind, shape });
    let linear = |bias| PartKind::Linear { bias };
    add("model.embed_tokens".into(), PartKind::Embedding, (c.vocab, c.hidden));
    for i in 0..c.layers {
        let at = |name: &str| format!("model.layers.{i}.{name}");
        add(at("input_layernorm"), PartKind::Norm, (c.hidden, 1));
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        add(at("self_attn.q_proj"), linear(c.qkv_bias), (q, c.hidden));
        add(at("self_attn.k_proj"), linear(c.qkv_bias), (kv, c.hidden));
        add(at("self_attn.v_proj"), linear(c.qkv_bias), (kv, c.hidden));
        add(at("self_attn.o_proj"), linear(c.output_bias), (c.hidden, q));
        if c.qk_norm {
            add(at("self_attn.q_norm"), PartKind::Norm, (c.head_dim, 1));
            add(at("self_attn.k_norm"), PartKind::Norm, (c.head_dim, 1));
        }
        add(at("post_attention_layernorm"), PartKind::Norm, (c.hidden, 1));
        add(at("mlp.gate_proj"), linear(c.mlp_bias), (c.feed_forward, c.hidden));
        add(at("mlp.up_proj"), linear(c.mlp_bias), (c.feed_forward, c.hidden));
        add(at("mlp.down_proj"), linear(c.mlp_bias), (c.hidden, c.feed_forward));
    }
    add("model.norm".into(), PartKind::Norm, (c.hidden, 1));
    if !c.tied {
        add("lm_head".into(), linear(false), (c.vocab, c.hidden));
    }
    parts
}

/// Tensors that some checkpoints carry and no one reads: buffers of old exports, and the head of a tied model.
pub(crate) fn ignored(config: &DecoderConfig, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.tied && name.starts_with("lm_head."))
}

impl Model {
    /// Loads a model directory with activations in `dtype`; packed weights stay packed, their scales as stored. The precision
    /// in use decides how they are laid out.
    ///
    /// # Errors
    /// When the directory is no model, its family is unknown, or its tensors are not exactly those that config.json
    /// promises.
    pub fn load(dir: &Path, dtype: Dtype) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open(dir)?, dtype)
    }

    /// As [`Model::load`], from a checkpoint that is open already.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn from_checkpoint(checkpoint: &Checkpoint, dtype: Dtype) -> Result<Self> {
        let (source, config) = Source::open(checkpoint, dtype)?;
        let blocks = (0..config.layers).map(|i| source.block(&config, i)).collect::<Result<_>>()?;
        let embed = source.embedding()?;
        let norm = source.norm(&config, "model.norm".into())?;
        let head = if config.tied { None } else { Some(source.linear("lm_head".into())?) };
        let rope = rope::table(&config)?;
        Ok(Self { config, dtype, embed, blocks, norm, head, rope })
    }
}

/// What config.json says, once the tensors are known to be those that it promises.
pub(crate) fn checked_config(checkpoint: &Checkpoint) -> Result<DecoderConfig> {
    let mut config = config_from_map(&checkpoint.dir().join("config.json"), checkpoint.config())?;
    if !checkpoint.config().contains_key("tie_word_embeddings") {
        // The default of this key differs between libraries and versions; the files know.
        config.tied = checkpoint.info("lm_head.weight").is_none();
    }
    verify(checkpoint, &config)?;
    Ok(config)
}

fn kinds(config: &DecoderConfig) -> BTreeMap<String, PartKind> {
    parts(config).into_iter().map(|p| (p.path, p.kind)).collect()
}

/// Compares what config.json promises with what the files hold.
fn verify(checkpoint: &Checkpoint, config: &DecoderConfig) -> Result<()> {
    let shapes = checkpoint.module_shapes();
    let mut problems = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    let vector = |name: &str, length: i32, problems: &mut Vec<String>| match checkpoint.info(name) {
        None => problems.push(format!("{name}: missing")),
        Some(info) if info.shape != [length as usize] => {
            problems.push(format!("{name}: expected shape [{length}], found {:?}", info.shape));
        }
        Some(_) => {}
    };
    for part in parts(config) {
        let name = |part_name: &str| format!("{}.{part_name}", part.path);
        match part.kind {
            PartKind::Norm => {
                vector(&name("weight"), part.shape.0, &mut problems);
                known.insert(name("weight"));
            }
            PartKind::Linear { .. } | PartKind::Embedding => {
                match shapes.get(&part.path) {
                    None => problems.push(format!("{}: missing", name("weight"))),
                    Some(&(out, input)) if (out as i32, input as i32) != part.shape => {
                        problems.push(format!(
                            "{}: expected shape {:?}, found {:?}",
                            name("weight"),
                            part.shape,
                            (out, input)
                        ))
                    }
                    Some(_) => {}
                }
                known.extend(["weight", "scales", "biases"].map(&name));
                if part.kind == (PartKind::Linear { bias: true }) {
                    vector(&name("bias"), part.shape.0, &mut problems);
                    known.insert(name("bias"));
                }
            }
        }
    }
    for name in checkpoint.names() {
        if !known.contains(name.as_str()) && !ignored(config, name) {
            problems.push(format!("{name}: a {} model has no such tensor", config.model_type));
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(Error::Weights { dir: checkpoint.dir().to_path_buf(), problems })
    }
}

/// Where the parts of a model come from.
pub(crate) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    kinds: BTreeMap<String, PartKind>,
}

impl<'a> Source<'a> {
    /// A checkpoint that holds exactly what its config.json promises.
    pub(crate) fn open(checkpoint: &'a Checkpoint, dtype: Dtype) -> Result<(Self, DecoderConfig)> {
        let mut config = config_from_map(&checkpoint.dir().join("config.json"), checkpoint.config())?;
        if !checkpoint.config().contains_key("tie_word_embeddings") {
            // The default of this key differs between libraries and versions; the files know.
            config.tied = checkpoint.info("lm_head.weight").is_none();
        }
        verify(checkpoint, &config)?;
        Ok((Self { checkpoint, dtype, kinds: kinds(&config) }, config))
    }

    pub(crate) fn embedding(&self) -> Result<Embedding> {
        let path = "model.embed_tokens";
        Ok(Embedding { weight: self.weight(path)?, path: path.into() })
    }

    fn weight(&self, path: &str) -> Result<Weight> {
        let weight = match self.checkpoint.weight(path)? {
            Weight::Dense(w) => Weight::Dense(w.as_dtype(self.dtype)?),
            packed => packed.arranged()?,
        };
        // Evaluated one by one, so that a cast never holds two copies of more than one tensor.
        weight.evaluate()?;
        Ok(weight)
    }

    fn vector(&self, name: &str) -> Result<Array> {
        let array = self.checkpoint.array(name)?.as_dtype(self.dtype)?;
        graft_ops::ffi::eval([&array])?;
        Ok(array)
    }

    pub(crate) fn linear(&self, path: String) -> Result<Linear> {
        let bias = self.kinds.get(&path) == Some(&PartKind::Linear { bias: true });
        let bias = if bias { Some(self.vector(&format!("{path}.bias"))?) } else { None };
        Ok(Linear { weight: self.weight(&path)?, bias, path })
    }

    pub(crate) fn norm(&self, config: &DecoderConfig, path: String) -> Result<Norm> {
        Ok(Norm { weight: self.vector(&format!("{path}.weight"))?, eps: config.norm_eps, path })
    }

    pub(crate) fn block(&self, config: &DecoderConfig, index: i32) -> Result<Block> {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let qk_norm = |name: &str| {
            if config.qk_norm { self.norm(config, at(name)).map(Some) } else { Ok(None) }
        };
        let attention = Attention {
            q: self.linear(at("self_attn.q_proj"))?,
            k: self.linear(at("self_attn.k_proj"))?,
            v: self.linear(at("self_attn.v_proj"))?,
            o: self.linear(at("self_attn.o_proj"))?,
            q_norm: qk_norm("self_attn.q_norm")?,
            k_norm: qk_norm("self_attn.k_norm")?,
        };
        let mlp = Mlp {
            gate: self.linear(at("mlp.gate_proj"))?,
            up: self.linear(at("mlp.up_proj"))?,
            down: self.linear(at("mlp.down_proj"))?,
        };
        Ok(Block {
            attention,
            mlp,
            input_norm: self.norm(config, at("input_layernorm"))?,
            post_norm: self.norm(config, at("post_attention_layernorm"))?,
        })
    }
}
