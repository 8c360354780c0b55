//! A merge as a file: close to mergekit's recipes, so that one of those needs few changes.

use serde::{Deserialize, Serialize};

use crate::Setting;

/// What is to be merged and how; keys that do not exist are refused.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRecipe {
    /// The method's name.
    pub merge_method: String,
    /// The base, a directory or an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// The adapters, in order.
    #[serde(alias = "adapters")]
    pub models: Vec<RecipeInput>,
    /// Settings of the whole merge, and of the adapters that do not say otherwise.
    #[serde(default)]
    pub parameters: RecipeParameters,
}

/// One adapter of a recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeInput {
    /// A directory or an id.
    #[serde(alias = "adapter")]
    pub model: String,
    /// Its own settings.
    #[serde(default)]
    pub parameters: InputParameters,
}

/// What may differ by adapter.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InputParameters {
    /// Factor of its update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Setting>,
    /// Share of its elements that stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<Setting>,
}

/// Settings of a whole merge.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeParameters {
    /// For adapters that have no weight of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Setting>,
    /// For adapters that have no density of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<Setting>,
    /// Rank of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<i32>,
    /// Share of the squared singular values that each module keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<f64>,
    /// Divide by the sum of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalize: Option<bool>,
    /// Factor of the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lambda: Option<f64>,
    /// Place on the arc, 0 the first adapter and 1 the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t: Option<Setting>,
    /// Seed of what is drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}
