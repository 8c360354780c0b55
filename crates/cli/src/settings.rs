//! Settings of a training run: command line over YAML file over defaults, every key and type checked, nothing dropped silently.

use crate::args::{self, LoraArgs};
use crate::errors::Usage;
use anyhow::{Context, Result};
use graft_train::{Optimizer, Schedule};
use serde_json::{Map, Value, json};
use std::path::Path;

/// What a key holds.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bool,
    /// A whole number; at the top level at least this.
    Int(i64),
    Float,
    Text,
    /// A mapping with these keys.
    Map(Keys),
    /// A mapping with any keys.
    AnyMap,
    /// A mapping with these keys, or a list of such mappings.
    Maps(Keys),
    /// A list of texts.
    Texts,
    /// A list of numbers.
    Numbers,
}

/// Keys of a mapping.
type Keys = &'static [(&'static str, Kind)];

/// mlx_lm's settings and, from `resume` on, ours: key, kind and mlx_lm's default as JSON.
const KEYS: &[(&str, Kind, &str)] = &[
    ("model", Kind::Text, r#""Qwen/Qwen3-0.6b""#),
    ("train", Kind::Bool, "false"),
    ("fine_tune_type", Kind::Text, r#""lora""#),
    ("optimizer", Kind::Text, r#""adam""#),
    (
        "optimizer_config",
        Kind::Map(OPTIMIZERS),
        r#"{"adam": {}, "adamw": {}, "muon": {}, "sgd": {}, "adafactor": {}}"#,
    ),
    ("data", Kind::Text, r#""mlx-community/WikiSQL""#),
    ("seed", Kind::Int(ANY), "0"),
    ("num_layers", Kind::Int(-1), "16"),
    ("batch_size", Kind::Int(1), "4"),
    ("iters", Kind::Int(0), "1000"),
    ("val_batches", Kind::Int(-1), "25"),
    ("learning_rate", Kind::Float, "1e-5"),
    ("steps_per_report", Kind::Int(1), "10"),
    ("steps_per_eval", Kind::Int(1), "200"),
    ("resume_adapter_file", Kind::Text, "null"),
    ("adapter_path", Kind::Text, r#""adapters""#),
    ("save_every", Kind::Int(1), "100"),
    ("test", Kind::Bool, "false"),
    ("test_batches", Kind::Int(-1), "500"),
    ("max_seq_length", Kind::Int(2), "2048"),
    ("config", Kind::Text, "null"),
    ("grad_checkpoint", Kind::Bool, "false"),
    ("grad_accumulation_steps", Kind::Int(1), "1"),
    ("clear_cache_threshold", Kind::Int(0), "0"),
    ("lr_schedule", Kind::Map(SCHEDULE_KEYS), "null"),
    ("lora_parameters", Kind::Map(LORA_KEYS), r#"{"rank": 8, "dropout": 0.0, "scale": 20.0}"#),
    ("mask_prompt", Kind::Bool, "false"),
    ("report_to", Kind::Text, "null"),
    ("project_name", Kind::Text, "null"),
    ("trust_remote_code", Kind::Bool, "false"),
    ("hf_dataset", Kind::Maps(DATASET_KEYS), UNSET),
    ("prompt_feature", Kind::Text, UNSET),
    ("completion_feature", Kind::Text, UNSET),
    ("chat_feature", Kind::Text, UNSET),
    ("text_feature", Kind::Text, UNSET),
    ("resume", Kind::Bool, "false"),
    ("max_grad_norm", Kind::Float, "0.0"),
    ("sample_prompts", Kind::Text, UNSET),
];

/// The default of a key that mlx_lm does not have at all.
const UNSET: &str = "";
/// No bound here.
const ANY: i64 = i64::MIN;

const LORA_KEYS: Keys = &[
    ("rank", Kind::Int(ANY)),
    ("scale", Kind::Float),
    ("alpha", Kind::Float),
    ("dropout", Kind::Float),
    ("keys", Kind::Texts),
];
const SCHEDULE_KEYS: Keys = &[
    ("name", Kind::Text),
    ("arguments", Kind::Numbers),
    ("warmup", Kind::Int(ANY)),
    ("warmup_init", Kind::Float),
];
const OPTIMIZERS: Keys = &[
    ("adam", Kind::AnyMap),
    ("adamw", Kind::AnyMap),
    ("muon", Kind::AnyMap),
    ("sgd", Kind::AnyMap),
    ("adafactor", Kind::AnyMap),
];
const DATASET_KEYS: Keys = &[
    ("path", Kind::Text),
    ("train_split", Kind::Text),
    ("valid_split", Kind::Text),
    ("test_split", Kind::Text),
    ("mask_prompt", Kind::Bool),
    ("prompt_feature", Kind::Text),
    ("completion_feature", Kind::Text),
    ("chat_feature", Kind::Text),
    ("text_feature", Kind::Text),
    // Arguments of the datasets library; graft reads JSON lines, which have none.
    ("config", Kind::Map(&[])),
];

/// Settings of a run, complete and of the right types. `all` is what goes into adapter_config.json.
pub(crate) struct Settings {
    pub(crate) all: Map<String, Value>,
    /// Nobody asked for `mask_prompt`: it is the recipe's, which gives way to rows without a prompt.
    pub(crate) mask_is_default: bool,
}

/// Which defaults lie under a run.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Defaults {
    /// mlx_lm's.
    MlxLm,
    /// graft's recipe (`graft train`).
    Recipe,
}

impl Settings {
    /// Joins the sources. Errors: a file that cannot be read, unknown keys, wrong types, values out of range.
    pub(crate) fn new(args: &LoraArgs, defaults: Defaults) -> Result<Self> {
        Self::join(args, file_of(args.config.as_deref())?, defaults)
    }

    /// The settings of a run that has nothing but a settings file, whose name is `origin`.
    pub(crate) fn of_file(origin: &str, file: Map<String, Value>, defaults: Defaults) -> Result<Self> {
        let args = LoraArgs { config: Some(origin.into()), ..LoraArgs::default() };
        Self::join(&args, file, defaults)
    }

    fn join(args: &LoraArgs, file: Map<String, Value>, defaults: Defaults) -> Result<Self> {
        let origin = args.config.as_deref().unwrap_or("the settings");
        let mut all = defaults_of(defaults)?;
        let mask_in_file = file.contains_key("mask_prompt");
        let keys: Vec<_> = KEYS.iter().map(|(key, kind, _)| (*key, *kind)).collect();
        for (key, value) in checked(origin, "", file, &keys)? {
            match (all.get_mut(&key), value) {
                // What a file's lora_parameters leave out keeps its default, where mlx_lm stops with a KeyError.
                (Some(Value::Object(under)), Value::Object(mut over)) if key != "lr_schedule" => {
                    // mlx_lm reads `scale` alone; `alpha` is our extension and counts where there is no `scale`.
                    if over.contains_key("scale") {
                        over.remove("alpha");
                    }
                    merge(under, over);
                }
                (_, value) => {
                    all.insert(key, value);
                }
            }
        }
        let mask_is_default = defaults == Defaults::Recipe && !args.mask_prompt && !mask_in_file;
        let schedule_given = all.get("lr_schedule").is_some_and(|v| !v.is_null());
        all.extend(args.given());
        if let Some(Value::Object(lora)) = all.get_mut("lora_parameters") {
            if let Some(rank) = args.rank {
                lora.insert("rank".into(), rank.into());
            }
            if let Some(scale) = args.scale {
                lora.insert("scale".into(), scale.into());
                lora.remove("alpha");
            }
            let alpha = args.alpha.or_else(|| lora.get("alpha").and_then(Value::as_f64));
            lora.remove("alpha");
            let rank = lora.get("rank").and_then(Value::as_f64).unwrap_or_default();
            if let Some(alpha) = alpha.filter(|_| rank > 0.0) {
                lora.insert("scale".into(), (alpha / rank).into());
            }
        }
        let mut settings = Self { all, mask_is_default };
        if defaults == Defaults::Recipe {
            settings.all.insert("train".into(), true.into());
            if !schedule_given {
                settings.recipe_schedule();
            }
        }
        settings.ranges()?;
        Ok(settings)
    }

    /// The recipe's schedule: 5 % linear warm-up, then a cosine down to a tenth of the learning rate.
    fn recipe_schedule(&mut self) {
        let updates = (self.int("iters") / self.int("grad_accumulation_steps").max(1)).max(1);
        let warmup = updates / 20;
        let rate = self.float("learning_rate");
        let schedule = json!({"name": "cosine_decay", "warmup": warmup, "warmup_init": 0.0,
            "arguments": [rate, (updates - warmup).max(1), rate / 10.0]});
        self.all.insert("lr_schedule".into(), schedule);
    }

    fn ranges(&self) -> Result<()> {
        let choices: [(&str, &[&str]); 2] = [
            ("fine_tune_type", &["lora", "dora", "full"]),
            ("optimizer", &["adam", "adamw", "muon", "sgd", "adafactor"]),
        ];
        for (key, allowed) in choices {
            let value = self.text(key).unwrap_or_default();
            if !allowed.contains(&value) {
                return Err(usage(format!("{key} must be one of {}, not `{value}`", allowed.join(", "))));
            }
        }
        for (key, kind, _) in KEYS {
            let value = self.int(key);
            if let Kind::Int(least) = kind
                && value < *least
            {
                return Err(usage(format!("{} must be at least {least}, not {value}", flag_name(key))));
            }
        }
        let lora = self.all.get("lora_parameters").and_then(Value::as_object);
        let number = |key: &str| lora.and_then(|l| l.get(key)).and_then(Value::as_f64).unwrap_or_default();
        if number("rank") < 1.0 {
            return Err(usage(format!("lora_parameters.rank must be at least 1, not {}", number("rank"))));
        }
        if !(0.0..1.0).contains(&number("dropout")) {
            return Err(usage(format!(
                "lora_parameters.dropout must be in [0, 1), not {}",
                number("dropout")
            )));
        }
        let rate = self.float("learning_rate");
        if !(rate.is_finite() && rate >= 0.0) {
            return Err(usage(format!("--learning-rate must be a number of at least 0, not {rate}")));
        }
        let norm = self.float("max_grad_norm");
        if norm < 0.0 {
            return Err(usage(format!("--max-grad-norm must be at least 0 (0: no clipping), not {norm}")));
        }
        if self.flag("test") && self.int("test_batches") == 0 {
            return Err(usage("--test-batches 0 tests nothing: give a number, or -1 for all".into()));
        }
        // What the library would refuse once the model is loaded.
        Optimizer::from_config(self.text("optimizer").unwrap_or_default(), &self.optimizer_config())
            .map_err(|e| usage(e.to_string()))?;
        if let Some(schedule) = self.all.get("lr_schedule").filter(|v| !v.is_null()) {
            Schedule::from_value(schedule).map_err(|e| usage(e.to_string()))?;
        }
        if let Some(service) = self.text("report_to") {
            let advice = args::advice("lora", "report-to").unwrap_or_default();
            return Err(usage(format!("report_to: {service} is not supported: {advice}")));
        }
        if !self.flag("train") && !self.flag("test") {
            return Err(usage("nothing to do: give --train, --test or both".into()));
        }
        Ok(())
    }

    /// The settings of the chosen optimizer.
    pub(crate) fn optimizer_config(&self) -> Map<String, Value> {
        let own = self.map("optimizer_config").and_then(|all| all.get(self.text("optimizer")?)?.as_object());
        own.cloned().unwrap_or_default()
    }

    /// A whole number; 0 where a key is unset.
    pub(crate) fn int(&self, key: &str) -> i64 {
        self.all.get(key).and_then(Value::as_i64).unwrap_or_default()
    }

    /// A number; 0 where a key is unset.
    pub(crate) fn float(&self, key: &str) -> f64 {
        self.all.get(key).and_then(Value::as_f64).unwrap_or_default()
    }

    /// A switch; false where a key is unset.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.all.get(key).and_then(Value::as_bool).unwrap_or_default()
    }

    /// A text, unless unset.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.all.get(key).and_then(Value::as_str)
    }

    /// A mapping, unless unset.
    pub(crate) fn map(&self, key: &str) -> Option<&Map<String, Value>> {
        self.all.get(key).and_then(Value::as_object)
    }
}

fn usage(message: String) -> anyhow::Error {
    Usage(message).into()
}

fn flag_name(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// mlx_lm's CONFIG_DEFAULTS, or our recipe over them.
fn defaults_of(defaults: Defaults) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    for (key, _, default) in KEYS.iter().filter(|(.., default)| *default != UNSET) {
        all.insert((*key).into(), serde_json::from_str(default)?);
    }
    if defaults == Defaults::Recipe {
        // The reasons stand in README.md: AdamW at 2e-4 with warm-up and cosine decay, every block, rank 16 at
        // alpha 32, clipped gradients, only the answers in the loss, all of the validation set.
        all.extend(object(json!({
            "optimizer": "adamw", "learning_rate": 2e-4, "num_layers": -1, "iters": 600, "val_batches": -1,
            "steps_per_eval": 100, "max_grad_norm": 1.0, "mask_prompt": true,
            "lora_parameters": {"rank": 16, "dropout": 0.0, "scale": 2.0},
            "optimizer_config": OPTIMIZERS.iter().map(|(name, _)| {
                // mlx-lm's default leaves Adam's first steps several times too large.
                let corrected = name.starts_with("adam");
                ((*name).to_string(), if corrected { json!({"bias_correction": true}) } else { json!({}) })
            }).collect::<Map<_, _>>(),
        })));
    }
    Ok(all)
}

/// What a settings file says; nothing without one.
pub(crate) fn file_of(path: Option<&str>) -> Result<Map<String, Value>> {
    path.map_or_else(|| Ok(Map::new()), |path| read_yaml(Path::new(path)))
}

/// Lays a mapping over another, mappings within them too.
pub(crate) fn merge(under: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Object(under)), Value::Object(over)) => merge(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// The mapping that a value is; empty if it is none.
pub(crate) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The top level of a YAML file as JSON.
fn read_yaml(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the settings file {}", path.display()))?;
    let value: Value = serde_yaml_ng::from_str(&text)
        .map_err(|e| usage(format!("{} is not a YAML file of settings: {e}", path.display())))?;
    match value {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        other => {
            Err(usage(format!("{} must hold `key: value` settings, found {}", path.display(), found(&other))))
        }
    }
}

/// Checks names and types; unset (null) keys are left out.
fn checked(
    origin: &str,
    prefix: &str,
    map: Map<String, Value>,
    keys: &[(&str, Kind)],
) -> Result<Map<String, Value>> {
    let mut good = Map::new();
    for (key, value) in map {
        let Some((_, kind)) = keys.iter().find(|(k, _)| *k == key) else {
            let near = nearest(&key, keys.iter().map(|(k, _)| *k));
            let near = near.map(|n| format!("; did you mean `{prefix}{n}`?")).unwrap_or_default();
            return Err(usage(format!("{origin}: unknown key `{prefix}{key}`{near}")));
        };
        if !value.is_null() {
            let value = typed(origin, &format!("{prefix}{key}"), value, *kind)?;
            good.insert(key, value);
        }
    }
    Ok(good)
}

/// The value as its kind. A number may be written as a text (`1e-5` is one to a YAML 1.1 loader) and a switch as yes, no, on or off.
fn typed(origin: &str, name: &str, value: Value, kind: Kind) -> Result<Value> {
    let float = |value: &Value| match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse::<f64>().ok().filter(|x| x.is_finite()),
        _ => None,
    };
    let number =
        |value: &Value| if value.is_i64() { Some(value.clone()) } else { float(value).map(Value::from) };
    let shown = found(&value);
    let (expected, good) = match (kind, value) {
        (Kind::Bool, Value::String(s)) => (
            "true or false",
            match s.to_lowercase().as_str() {
                "yes" | "on" => Some(true.into()),
                "no" | "off" => Some(false.into()),
                _ => None,
            },
        ),
        (Kind::Bool, value) => ("true or false", Some(value).filter(Value::is_boolean)),
        (Kind::Int(_), value) => ("a whole number", Some(value).filter(Value::is_i64)),
        (Kind::Float, value) => ("a number", float(&value).map(Value::from)),
        (Kind::Text, value) => ("a text", Some(value).filter(Value::is_string)),
        (Kind::AnyMap, value) => ("a mapping", Some(value).filter(Value::is_object)),
        (Kind::Map(keys) | Kind::Maps(keys), Value::Object(map)) => {
            ("a mapping", Some(checked(origin, &format!("{name}."), map, keys)?.into()))
        }
        (Kind::Map(_), _) => ("a mapping", None),
        (Kind::Maps(keys), Value::Array(list)) => {
            let all = list.into_iter().map(|value| typed(origin, name, value, Kind::Map(keys)));
            ("a list", Some(all.collect::<Result<Vec<_>>>()?.into()))
        }
        (Kind::Maps(_), _) => ("a mapping or a list of mappings", None),
        (Kind::Texts, Value::Array(list)) if list.iter().all(Value::is_string) => {
            ("a list", Some(list.into()))
        }
        (Kind::Texts, _) => ("a list of texts", None),
        (Kind::Numbers, Value::Array(list)) => {
            ("a list of numbers", list.iter().map(number).collect::<Option<Vec<_>>>().map(Value::from))
        }
        (Kind::Numbers, _) => ("a list of numbers", None),
    };
    good.ok_or_else(|| usage(format!("{origin}: `{name}` must be {expected}, found {shown}")))
}

fn found(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(b) => format!("`{b}`"),
        Value::Number(n) => format!("the number {n}"),
        Value::String(s) => format!("the text `{s}`"),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a mapping".into(),
    }
}

/// The closest of `names` to `key`, if it is close enough to be meant.
fn nearest<'a>(key: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let key = key.replace('-', "_").to_lowercase();
    let near = names.map(|name| (distance(&key, name), name)).min()?;
    (near.0 <= (key.len() / 3).max(2)).then_some(near.1)
}

/// Levenshtein's distance of two short names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::FromArgMatches;

    fn settings(flags: &[&str], yaml: &str, defaults: Defaults) -> Result<Settings> {
        let args = ["graft", "lora"].iter().chain(flags);
        let matches = args::command().try_get_matches_from(args)?;
        let Command::Lora(args) = Cli::from_arg_matches(&matches)?.command else { unreachable!() };
        let file = serde_yaml_ng::from_str::<Value>(yaml)?;
        Settings::join(&args, file.as_object().cloned().unwrap_or_default(), defaults)
    }

    fn message(flags: &[&str], yaml: &str) -> String {
        match settings(flags, yaml, Defaults::MlxLm) {
            Ok(_) => String::new(),
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let s = settings(
            &["--train", "--iters", "7", "--num-layers", "-1"],
            "iters: 9\nbatch_size: 2\nlearning_rate: 1e-4\nlora_parameters: {rank: 4}",
            Defaults::MlxLm,
        )
        .unwrap();
        assert_eq!((s.int("iters"), s.int("batch_size"), s.int("seed"), s.int("num_layers")), (7, 2, 0, -1));
        assert_eq!(s.float("learning_rate"), 1e-4);
        let lora = s.map("lora_parameters").unwrap();
        assert_eq!((lora["rank"].as_i64(), lora["scale"].as_f64()), (Some(4), Some(20.0)));
    }

    #[test]
    fn alpha_is_scale_times_rank() {
        let s = settings(&["--train", "--rank", "16", "--alpha", "32"], "", Defaults::MlxLm).unwrap();
        assert_eq!(s.map("lora_parameters").unwrap()["scale"], 2.0);
        for (flags, yaml, scale) in [
            (&[][..], "{rank: 4, alpha: 8}", 2.0),
            // A file's scale wins over its alpha, as in mlx_lm; flags win over both.
            (&[], "{rank: 4, alpha: 8, scale: 5.0}", 5.0),
            (&["--alpha", "16"], "{rank: 4, alpha: 8, scale: 5.0}", 4.0),
            (&["--scale", "7"], "{rank: 4, alpha: 8}", 7.0),
            (&["--rank", "8"], "{rank: 4, alpha: 8}", 1.0),
        ] {
            let flags = [&["--train"], flags].concat();
            let s = settings(&flags, &format!("lora_parameters: {yaml}"), Defaults::MlxLm).unwrap();
            let lora = s.map("lora_parameters").unwrap();
            assert_eq!((&lora["scale"], lora.get("alpha")), (&json!(scale), None), "{flags:?} {yaml}");
        }
    }

    #[test]
    fn numbers_written_as_text_count() {
        let s = settings(
            &["--train"],
            "learning_rate: '1e-5'\nlr_schedule: {name: cosine_decay, arguments: ['1e-5', 100]}",
            Defaults::MlxLm,
        )
        .unwrap();
        assert_eq!(s.float("learning_rate"), 1e-5);
        assert_eq!(s.map("lr_schedule").unwrap()["arguments"], json!([1e-5, 100]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let m = message(&["--train"], "learning-rate: 1e-5");
        assert!(m.contains("`learning-rate`") && m.contains("`learning_rate`"), "{m}");
        let m = message(&["--train"], "lora_parameters: {rnak: 8}");
        assert!(m.contains("`lora_parameters.rnak`") && m.contains("`lora_parameters.rank`"), "{m}");
        let m = message(&["--train"], "iters: many");
        assert!(m.contains("`iters` must be a whole number") && m.contains("many"), "{m}");
        let m = message(&[], "");
        assert!(m.contains("--train"), "{m}");
        let m = message(&["--train"], "report_to: wandb");
        assert!(m.contains("wandb"), "{m}");
        let m = message(&["--train", "--batch-size", "0"], "");
        assert!(m.contains("--batch-size"), "{m}");
        let m = message(&["--test", "--test-batches", "0"], "");
        assert!(m.contains("--test-batches"), "{m}");
        assert_eq!(message(&["--train", "--test-batches", "0", "--iters", "0"], ""), "");
        let m = message(&["--train", "--max-grad-norm", "-1"], "");
        assert!(m.contains("--max-grad-norm"), "{m}");
        for value in ["nan", "inf"] {
            let m = message(&["--train", "--max-grad-norm", value], "");
            assert!(m.contains("a finite number"), "{m}");
        }
        let m = message(&["--train"], "lr_schedule: {name: sine, arguments: [1]}");
        assert!(m.contains("lr_schedule") && m.contains("sine"), "{m}");
        let m = message(&["--train"], "optimizer_config: {adam: {weight_decay: 0.1}}");
        assert!(m.contains("optimizer_config.adam") && m.contains("weight_decay"), "{m}");
    }

    #[test]
    fn the_recipe_trains_and_warms_up() {
        let s = settings(&["--iters", "200"], "", Defaults::Recipe).unwrap();
        assert!(s.flag("train"));
        assert_eq!(s.map("lr_schedule").unwrap()["warmup"], 10);
        let s = settings(&[], "optimizer_config: {adamw: {weight_decay: 0.1}}", Defaults::Recipe).unwrap();
        let adamw = json!({"bias_correction": true, "weight_decay": 0.1});
        assert_eq!(Value::from(s.optimizer_config()), adamw);
    }
}
