//! adapter_config.json in mlx-lm's form: the few keys that decide the maths, the rest kept as it is.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// What was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FineTuneType {
    /// Low-rank update.
    Lora,
    /// Low-rank update with a magnitude per row.
    Dora,
    /// Whole weights.
    Full,
}

impl FineTuneType {
    /// mlx-lm's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Full => "full",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Lora, Self::Dora, Self::Full].into_iter().find(|t| t.name() == name)
    }
}

/// mlx-lm's `lora_parameters`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraParameters {
    /// R.
    pub rank: i32,
    /// s, used raw.
    pub scale: f32,
    /// Share of the branch's inputs dropped in training.
    pub dropout: f32,
    /// Module paths inside a block, or whole paths; none = every linear of the chosen blocks.
    pub keys: Option<Vec<String>>,
}

/// What adapter_config.json says, whatever wrote it.
#[derive(Debug, Clone)]
pub struct AdapterConfig {
    /// lora, dora or full.
    pub fine_tune_type: FineTuneType,
    /// The last N blocks; -1 and 0 mean all.
    pub num_layers: i32,
    /// Rank, scale and keys; none for `full`.
    pub parameters: Option<LoraParameters>,
    /// Scale by module path where it differs from `parameters.scale`; ranks follow from the tensors.
    pub scales: BTreeMap<String, f32>,
    /// All keys as read, or as they shall be written (training's arguments).
    pub raw: Map<String, Value>,
}

/// The key under which graft keeps what mlx-lm has no place for; mlx-lm ignores it.
const EXTRA: &str = "graft";

impl AdapterConfig {
    /// The config of an adapter on the modules `paths` of the last `num_layers` blocks, s = 1.
    pub fn plain<'a>(
        kind: FineTuneType,
        num_layers: i32,
        rank: i32,
        paths: impl Iterator<Item = &'a str>,
    ) -> Self {
        let parameters = LoraParameters { rank, scale: 1.0, dropout: 0.0, keys: Some(block_keys(paths)) };
        let (scales, raw) = (BTreeMap::new(), Map::new());
        Self { fine_tune_type: kind, num_layers, parameters: Some(parameters), scales, raw }
    }

    /// Reads mlx-lm's form.
    ///
    /// # Errors
    /// When a field that decides the maths is missing, of the wrong type or unknown.
    pub fn from_map(file: &Path, raw: Map<String, Value>) -> Result<Self> {
        let fail = |field: &str, expected: &str, found: Option<&Value>| Error::Config {
            file: file.to_path_buf(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.map_or_else(|| "nothing".to_owned(), Value::to_string),
        };
        let kind = match raw.get("fine_tune_type") {
            None => FineTuneType::Lora,
            Some(v) => v
                .as_str()
                .and_then(FineTuneType::from_name)
                .ok_or_else(|| fail("fine_tune_type", "\"lora\", \"dora\" or \"full\"", Some(v)))?,
        };
        let num_layers = match raw.get("num_layers") {
            None if kind == FineTuneType::Full => -1,
            v => v
                .and_then(Value::as_i64)
                .and_then(|n| i32::try_from(n).ok())
                .ok_or_else(|| fail("num_layers", "a whole number", v))?,
        };
        let parameters = if kind == FineTuneType::Full {
            None
        } else {
            let v = raw.get("lora_parameters");
            let map = v
                .and_then(Value::as_object)
                .ok_or_else(|| fail("lora_parameters", "an object with rank, scale and dropout", v))?;
            let rank = map
                .get("rank")
                .and_then(Value::as_i64)
                .and_then(|r| i32::try_from(r).ok())
                .filter(|r| *r > 0)
                .ok_or_else(|| fail("lora_parameters.rank", "a whole number above 0", map.get("rank")))?;
            let scale = map.get("scale").and_then(Value::as_f64).ok_or_else(|| {
                let hint = if map.contains_key("alpha") {
                    "a number (mlx-lm's scale = alpha / rank)"
                } else {
                    "a number"
                };
                fail("lora_parameters.scale", hint, map.get("scale"))
            })?;
            let keys = match map.get("keys") {
                None | Some(Value::Null) => None,
                Some(v) => Some(
                    serde_json::from_value(v.clone())
                        .map_err(|_| fail("lora_parameters.keys", "a list of module paths", Some(v)))?,
                ),
            };
            let dropout = map.get("dropout").and_then(Value::as_f64).unwrap_or(0.0);
            Some(LoraParameters { rank, scale: scale as f32, dropout: dropout as f32, keys })
        };
        let mut scales = BTreeMap::new();
        if let Some(map) = raw.get(EXTRA).and_then(|v| v.get("scales")).and_then(Value::as_object) {
            for (path, v) in map {
                let scale =
                    v.as_f64().ok_or_else(|| fail(&format!("graft.scales.{path}"), "a number", Some(v)))?;
                scales.insert(path.clone(), scale as f32);
            }
        }
        Ok(Self { fine_tune_type: kind, num_layers, parameters, scales, raw })
    }

    /// mlx-lm's form: keys sorted, what was read or given kept, the fields above written over it.
    pub fn to_map(&self) -> Map<String, Value> {
        let mut map: BTreeMap<String, Value> = self.raw.clone().into_iter().collect();
        map.insert("fine_tune_type".into(), self.fine_tune_type.name().into());
        map.insert("num_layers".into(), self.num_layers.into());
        let parameters = self.parameters.as_ref().map_or(Value::Null, |p| {
            let mut lora = Map::new();
            lora.insert("dropout".into(), number(p.dropout));
            if let Some(keys) = &p.keys {
                lora.insert("keys".into(), keys.clone().into());
            }
            lora.insert("rank".into(), p.rank.into());
            lora.insert("scale".into(), number(p.scale));
            lora.into()
        });
        map.insert("lora_parameters".into(), parameters);
        if !self.scales.is_empty() {
            let scales: Map<String, Value> =
                self.scales.iter().map(|(k, v)| (k.clone(), number(*v))).collect();
            let extra = map.entry(EXTRA.into()).or_insert_with(|| Map::new().into());
            if let Some(extra) = extra.as_object_mut() {
                extra.insert("scales".into(), scales.into());
            }
        }
        map.into_iter().collect()
    }

    /// s of a module.
    pub fn scale_of(&self, path: &str) -> f32 {
        let common = self.parameters.as_ref().map_or(1.0, |p| p.scale);
        self.scales.get(path).copied().unwrap_or(common)
    }

    /// Adds a key to graft's own part of the config.
    pub fn set_extra(&mut self, key: &str, value: Value) {
        let extra = self.raw.entry(EXTRA.to_owned()).or_insert_with(|| Map::new().into());
        if let Some(extra) = extra.as_object_mut() {
            extra.insert(key.to_owned(), value);
        }
    }

    /// A key of graft's own part of the config.
    pub fn extra(&self, key: &str) -> Option<&Value> {
        self.raw.get(EXTRA)?.get(key)
    }
}

/// Block-relative keys (`self_attn.q_proj`), each once, as mlx-lm's `keys` wants them.
pub(crate) fn block_keys<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut keys: Vec<String> = paths
        .map(|path| {
            let inner = path.split_once(".layers.").and_then(|(_, rest)| rest.split_once('.'));
            inner.map_or_else(|| path.to_owned(), |(_, key)| key.to_owned())
        })
        .collect();
    keys.sort();
    keys.dedup();
    keys
}

/// The shortest decimal that reads back as this f32, so that 0.1 is not written as 0.10000000149.
fn number(x: f32) -> Value {
    serde_json::from_str(&format!("{x:?}")).unwrap_or(Value::Null)
}
