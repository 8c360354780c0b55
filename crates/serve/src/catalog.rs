//! Which name of a model stands for what. The base answers to its own names only, never in place of an unknown one.

use serde_json::{Value, json};

use crate::{ApiError, Error, Result};

/// The name that mlx-lm gives to whatever the server was started with.
pub const DEFAULT_MODEL: &str = "default_model";
/// Longest name of an adapter, in bytes.
const MAX_NAME: usize = 256;

/// Names and what they stand for.
#[derive(Debug, Clone)]
pub struct Catalog {
    base: String,
    adapters: Vec<String>,
    default: Option<usize>,
    created: u64,
}

impl Catalog {
    /// The base under the name `base`, adapters under theirs; a request that names no model gets `default`, or the base.
    ///
    /// # Errors
    /// When a name is empty, too long, taken, or when `default` is none of the adapters.
    pub fn new(base: &str, adapters: &[String], default: Option<&str>, created: u64) -> Result<Self> {
        let refuse = |name: &str, why: &str| Err(Error::Name { name: name.to_owned(), why: why.to_owned() });
        if base.is_empty() {
            return refuse(base, "the base needs a name that is not empty");
        }
        for (index, name) in adapters.iter().enumerate() {
            if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
                return refuse(name, "an adapter's name has 1 to 256 bytes and no control characters");
            }
            if name == base || name == DEFAULT_MODEL {
                return refuse(name, "the base has this name; give the adapter another");
            }
            if adapters[..index].contains(name) {
                return refuse(name, "two adapters have this name; give one of them another");
            }
        }
        let index_of = |wanted: &str| adapters.iter().position(|name| name == wanted);
        let default = match default {
            Some(wanted) => match index_of(wanted) {
                Some(index) => Some(index),
                None => return refuse(wanted, "no adapter has this name, so it cannot be the default"),
            },
            None => None,
        };
        Ok(Self { base: base.to_owned(), adapters: adapters.to_vec(), default, created })
    }

    /// What a request's `model` stands for (an adapter's index, or none for the base) and the name to answer with.
    ///
    /// # Errors
    /// 404 when nothing has this name.
    pub fn resolve(&self, model: Option<&str>) -> std::result::Result<(Option<usize>, String), ApiError> {
        match model {
            None => Ok((self.default, self.default.map_or(&self.base, |i| &self.adapters[i]).clone())),
            Some(DEFAULT_MODEL) => Ok((self.default, DEFAULT_MODEL.into())),
            Some(name) if name == self.base => Ok((None, name.to_owned())),
            Some(name) => match self.adapters.iter().position(|adapter| adapter == name) {
                Some(index) => Ok((Some(index), name.to_owned())),
                None => Err(ApiError::model_not_found(name)),
            },
        }
    }

    /// The body of `/v1/models`.
    pub fn list(&self) -> Value {
        let cards =
            std::iter::once(self.base_card()).chain(self.adapters.iter().map(|a| self.adapter_card(a)));
        json!({"object": "list", "data": cards.collect::<Value>()})
    }

    /// The body of `/v1/models/{name}`.
    ///
    /// # Errors
    /// 404 when nothing has this name.
    pub fn card(&self, name: &str) -> std::result::Result<Value, ApiError> {
        let (adapter, _) = self.resolve(Some(name))?;
        Ok(match adapter {
            None => self.base_card(),
            Some(index) => self.adapter_card(&self.adapters[index]),
        })
    }

    fn base_card(&self) -> Value {
        self.one(&self.base, None)
    }

    fn adapter_card(&self, name: &str) -> Value {
        self.one(name, Some(&self.base))
    }

    /// `root` is what the name stands for, `parent` the base under an adapter, as vLLM lists them.
    fn one(&self, name: &str, parent: Option<&str>) -> Value {
        json!({
            "id": name, "object": "model", "created": self.created, "owned_by": "graft",
            "root": name, "parent": parent,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_and_an_unknown_one_never_means_the_base() {
        let adapters = ["a".to_owned(), "b".to_owned()];
        let plain = Catalog::new("base", &adapters, None, 1).unwrap();
        assert_eq!(plain.resolve(None).unwrap(), (None, "base".into()));
        assert_eq!(plain.resolve(Some("default_model")).unwrap(), (None, "default_model".into()));
        assert_eq!(plain.resolve(Some("b")).unwrap(), (Some(1), "b".into()));
        assert_eq!(plain.resolve(Some("c")).unwrap_err().status, 404);
        let with = Catalog::new("base", &adapters, Some("a"), 1).unwrap();
        assert_eq!(with.resolve(None).unwrap(), (Some(0), "a".into()));
        assert_eq!(with.resolve(Some("default_model")).unwrap().0, Some(0));
        assert_eq!(with.resolve(Some("base")).unwrap().0, None);
        for (names, default) in
            [(&["base"][..], None), (&["a", "a"], None), (&[""], None), (&["a"], Some("x"))]
        {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            assert!(Catalog::new("base", &names, default, 1).is_err(), "{names:?}");
        }
    }
}
