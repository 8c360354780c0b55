//! The `quantization` block of config.json.

use std::collections::BTreeMap;
use std::path::Path;

use graft_ops::ffi::Mode;
use serde_json::{Map, Value};

use crate::{Error, Grid, Result};

/// Which modules are packed, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quantization {
    /// The grid of every packed module that has no entry of its own; none in a dense model.
    pub default: Option<Grid>,
    /// Modules with a grid of their own, or none if they are to stay dense.
    pub paths: BTreeMap<String, Option<Grid>>,
}

impl Quantization {
    /// Reads the block; a config without one describes a dense model.
    ///
    /// # Errors
    /// When the block asks for a mode, a width or a group size that does not exist here, by field.
    pub fn from_config(file: &Path, config: &Map<String, Value>) -> Result<Quantization> {
        let foreign = config.get("quantization_config").and_then(|block| block.get("quant_method"));
        let (name, block) = match (config.get("quantization"), config.get("quantization_config")) {
            (Some(block), _) if !block.is_null() => ("quantization", block),
            (_, Some(_)) if foreign.is_some() => {
                return Err(Error::Unsupported {
                    file: file.to_path_buf(),
                    what: format!("quantization_config.quant_method {}", foreign.unwrap_or(&Value::Null)),
                    hint:
                        "weights as mlx-lm packs them are; convert the original model with `graft convert -q`"
                            .into(),
                });
            }
            (_, Some(block)) if !block.is_null() => ("quantization_config", block),
            _ => return Ok(Quantization::default()),
        };
        let Value::Object(block) = block else {
            return Err(Error::Config {
                file: file.to_path_buf(),
                field: name.into(),
                expected: "an object with group_size and bits".into(),
                found: block.to_string(),
            });
        };
        let default = Some(grid(file, name, block)?);
        let mut paths = BTreeMap::new();
        for (key, value) in block {
            match value {
                Value::Object(own) => {
                    paths.insert(key.clone(), Some(grid(file, &format!("{name}.{key}"), own)?));
                }
                Value::Bool(false) => {
                    paths.insert(key.clone(), None);
                }
                Value::Bool(true) => {
                    paths.insert(key.clone(), default);
                }
                _ => {}
            }
        }
        Ok(Quantization { default, paths })
    }

    /// Writes the block, as `quantization` and, as mlx-lm does, once more as `quantization_config`; removes both if
    /// nothing is packed.
    pub fn to_config(&self, config: &mut Map<String, Value>) {
        config.remove("quantization");
        config.remove("quantization_config");
        let Some(default) = self.default else { return };
        let mut block = entry(default);
        for (path, own) in &self.paths {
            let value = own.map_or(Value::Bool(false), |grid| Value::Object(entry(grid)));
            block.insert(path.clone(), value);
        }
        config.insert("quantization".into(), Value::Object(block.clone()));
        config.insert("quantization_config".into(), Value::Object(block));
    }

    /// The grid that the block gives `path`, if it is packed.
    pub fn grid_of(&self, path: &str) -> Option<Grid> {
        self.paths.get(path).copied().unwrap_or(self.default)
    }
}

fn entry(grid: Grid) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("group_size".into(), grid.group_size.into());
    map.insert("bits".into(), grid.bits.into());
    map.insert("mode".into(), grid.mode.name().into());
    map
}

fn grid(file: &Path, name: &str, block: &Map<String, Value>) -> Result<Grid> {
    let said = block.get("mode").filter(|mode| !mode.is_null());
    let Some(mode) = said.map_or(Some(Mode::Affine), |mode| mode.as_str().and_then(Mode::from_name)) else {
        return Err(Error::Unsupported {
            file: file.to_path_buf(),
            what: format!("{name}.mode {}", said.unwrap_or(&Value::Null)),
            hint: format!(
                "{} are; convert the original model with `graft convert -q`",
                Mode::ALL.map(Mode::name).join(", ")
            ),
        });
    };
    let usual = Grid::of(mode);
    // What mlx_lm's recipes leave open is null, and means MLX's default.
    let number = |key: &str, default: i32| {
        if block.get(key).is_some_and(Value::is_null) {
            return Ok(default);
        }
        block.get(key).and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok()).ok_or_else(|| {
            Error::Config {
                file: file.to_path_buf(),
                field: format!("{name}.{key}"),
                expected: "a whole number".into(),
                found: block.get(key).map_or_else(|| "nothing".into(), Value::to_string),
            }
        })
    };
    let grid =
        Grid { bits: number("bits", usual.bits)?, group_size: number("group_size", usual.group_size)?, mode };
    grid.check().map_err(|error| Error::Config {
        file: file.to_path_buf(),
        field: name.into(),
        expected: "a width and a group size that exist".into(),
        found: error.to_string(),
    })?;
    Ok(grid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &Value) -> Result<Quantization> {
        Quantization::from_config(Path::new("config.json"), config.as_object().unwrap())
    }

    #[test]
    fn overrides_are_read_also_as_the_recipes_of_mlx_lm_leave_them() {
        let block = read(&serde_json::json!({"quantization": {
            "group_size": 64, "bits": 2, "mode": "affine", "a": {"group_size": null, "bits": 6}, "b": false, "c": true,
        }}))
        .unwrap();
        let grid = |bits| Some(Grid::affine(bits, 64));
        assert_eq!(["a", "b", "c", "d"].map(|path| block.grid_of(path)), [grid(6), None, grid(2), grid(2)]);
    }

    #[test]
    fn modes_of_floats_have_their_own_numbers_only() {
        let block = serde_json::json!({"quantization": {
            "group_size": 32, "bits": 4, "mode": "mxfp4", "a": {"group_size": 64, "bits": 8, "mode": "affine"},
            "b": {"group_size": null, "bits": null, "mode": "nvfp4"}, "c": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        }});
        let own = read(&block).unwrap();
        let of = |mode| Some(Grid::of(mode));
        assert_eq!(
            ["a", "b", "c", "d"].map(|path| own.grid_of(path)),
            [Some(Grid::affine(8, 64)), of(Mode::Nvfp4), of(Mode::Mxfp8), of(Mode::Mxfp4)]
        );
        let mut config = Map::new();
        own.to_config(&mut config);
        assert_eq!(Quantization::from_config(Path::new("config.json"), &config).unwrap(), own);
        for (mode, size, named) in [("mxfp4", 64, "groups of 64"), ("nvfp4", 32, "nvfp4"), ("fp5", 32, "fp5")]
        {
            let wrong = serde_json::json!({"quantization": {"group_size": size, "bits": 4, "mode": mode}});
            let error = read(&wrong).unwrap_err().to_string();
            assert!(error.contains("quantization") && error.contains(named), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = read(&serde_json::json!({"quantization": {"group_size": 64}})).unwrap_err().to_string();
        assert!(error.contains("quantization.bits") && error.contains("a whole number"), "{error}");
    }
}
