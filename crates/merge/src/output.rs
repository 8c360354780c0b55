//! What stands in a new adapter directory beside its tensors.

use std::collections::BTreeMap;

use graft_adapters::{AdapterConfig, AdapterSet, FineTuneType, Fingerprint};
use graft_quant::Checkpoint;
use serde_json::{Value, json};

use crate::{Error, Result, Size};

/// The number of the block that a module is in.
pub(crate) fn layer_of(path: &str) -> Option<usize> {
    let mut parts = path.split('.');
    parts.find(|part| *part == "layers")?;
    parts.next()?.parse().ok()
}

/// How many blocks the config of a base names.
pub(crate) fn layers_of(base: &Checkpoint) -> Option<usize> {
    base.config().get("num_hidden_layers")?.as_u64().map(|n| n as usize)
}

/// mlx-lm's `num_layers` for modules `paths` of a model of `layers` blocks: the last ones from the first that has any.
pub(crate) fn last_layers<'a>(layers: usize, paths: impl Iterator<Item = &'a str>) -> i32 {
    let first = paths.filter_map(layer_of).min().unwrap_or(0);
    if first == 0 { -1 } else { layers.saturating_sub(first) as i32 }
}

/// A set without tensors: config and metadata of an adapter with s = 1 on `paths`, trained on the base of `fingerprint`.
pub(crate) fn described<'a>(
    kind: FineTuneType,
    num_layers: i32,
    rank: i32,
    paths: impl Iterator<Item = &'a str>,
    fingerprint: Option<Fingerprint>,
) -> Result<AdapterSet> {
    let mut config = AdapterConfig::plain(kind, num_layers, rank, paths);
    let mut metadata = BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
    if let Some(base) = fingerprint {
        let value = serde_json::to_value(base).map_err(Error::Report)?;
        metadata.insert(Fingerprint::KEY.into(), value.to_string());
        config.set_extra(Fingerprint::KEY, value);
    }
    Ok(AdapterSet { adapters: BTreeMap::new(), weights: BTreeMap::new(), config, metadata })
}

impl Size {
    /// Refuses a rank or an energy that means nothing.
    pub(crate) fn check(self) -> Result<()> {
        let refuse = |what: &str, expected: &str, found: String| {
            Err(Error::Recipe { what: what.into(), expected: expected.into(), found })
        };
        match self {
            Self::Rank(rank) if rank < 1 => refuse("rank", "at least 1", rank.to_string()),
            Self::Energy(share) if !(share > 0.0 && share <= 1.0) => {
                refuse("energy", "above 0 and at most 1", share.to_string())
            }
            _ => Ok(()),
        }
    }

    /// As a recipe says it.
    pub(crate) fn to_json(self) -> Value {
        match self {
            Self::Full => Value::Null,
            Self::Rank(rank) => json!({"rank": rank}),
            Self::Energy(share) => json!({"energy": share}),
        }
    }
}
