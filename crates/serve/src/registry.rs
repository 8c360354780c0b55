//! Which name stands for what: the base, and the version of each adapter that is served at present.
//!
//! A name is looked up once, when a request is admitted; from there on the request holds the version itself. The base
//! answers to its own names only, never in place of an unknown one.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde_json::{Value, json};

use crate::{ApiError, EngineStats, Error, Generation, Lease, Result};

/// The name that mlx-lm gives to whatever the server was started with.
pub const DEFAULT_MODEL: &str = "default_model";
/// Longest name of an adapter, in bytes.
const MAX_NAME: usize = 256;
/// What a name may be.
const NAME: &str = "an adapter's name has 1 to 256 bytes and no control characters";

/// Which adapters may come, from where, and who may send for them. It holds a secret, so it cannot be printed.
#[derive(Clone)]
pub struct AdapterPolicy {
    /// Directory below which adapters lie: a name that is not known is looked for here, and nothing is loaded from elsewhere
    /// while the server runs.
    pub root: Option<PathBuf>,
    /// What a request to load or unload must show. None: such requests are refused.
    pub admin_key: Option<String>,
    /// Most names.
    pub max_adapters: usize,
    /// Largest rank of a module.
    pub max_rank: usize,
    /// Most bytes of all versions in memory, those without a name included.
    pub max_bytes: usize,
}

impl Default for AdapterPolicy {
    fn default() -> Self {
        Self { root: None, admin_key: None, max_adapters: 64, max_rank: 256, max_bytes: 4 << 30 }
    }
}

/// A name and what it stands for.
#[derive(Debug)]
struct Named {
    name: String,
    generation: Arc<Generation>,
    /// Where it came from, below the root; the name itself if it came with the start.
    root: String,
    created: u64,
    /// A request named it, nobody loaded it: it may make room for others.
    on_demand: bool,
    used: u64,
}

#[derive(Debug, Default)]
struct Names {
    served: Vec<Named>,
    /// Every version that may still be in memory.
    all: Vec<Weak<Generation>>,
    clock: u64,
}

impl Names {
    fn position(&self, name: &str) -> Option<usize> {
        self.served.iter().position(|named| named.name == name)
    }

    fn live(&mut self) -> Vec<Arc<Generation>> {
        self.all.retain(|weak| weak.strong_count() > 0);
        self.all.iter().filter_map(Weak::upgrade).collect()
    }

    fn nbytes(&mut self) -> usize {
        self.live().iter().map(|generation| generation.nbytes()).sum()
    }

    fn retired(&mut self) -> Vec<Arc<Generation>> {
        let mut live = self.live();
        live.retain(|one| !self.served.iter().any(|named| Arc::ptr_eq(&named.generation, one)));
        live
    }
}

/// What a new version takes the place of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// The name must be free.
    New,
    /// The name may be taken, by the version of this content if one is given.
    Over(Option<String>),
    /// The name was asked for and must be free; it may be given up for others.
    OnDemand,
}

/// What is published under a name.
pub(crate) struct Published<'a> {
    pub(crate) name: &'a str,
    pub(crate) generation: &'a Arc<Generation>,
    pub(crate) root: &'a str,
    pub(crate) place: &'a Place,
    /// Seconds since 1970.
    pub(crate) created: u64,
}

/// Names and what they stand for.
pub(crate) struct Registry {
    base: String,
    default: Option<String>,
    created: u64,
    pub(crate) policy: AdapterPolicy,
    names: Mutex<Names>,
    /// Held while an adapter is loaded: one at a time.
    pub(crate) loading: Arc<tokio::sync::Mutex<()>>,
}

impl Registry {
    /// The base under the name `base`, the adapters of the start under theirs; a request that names no model gets `default`,
    /// or the base.
    ///
    /// # Errors
    /// When a name is empty, too long or taken, when `default` is none of the adapters, or when the adapters are more than
    /// the policy allows.
    pub(crate) fn new(
        base: &str,
        started: Vec<(String, Arc<Generation>)>,
        default: Option<&str>,
        policy: AdapterPolicy,
        created: u64,
    ) -> Result<Self> {
        let refuse = |name: &str, why: &str| Err(Error::Name { name: name.to_owned(), why: why.to_owned() });
        if base.is_empty() {
            return refuse(base, "the base needs a name that is not empty");
        }
        let registry = Self {
            base: base.to_owned(),
            default: default.map(str::to_owned),
            created,
            policy,
            names: Mutex::default(),
            loading: Arc::default(),
        };
        for (name, generation) in started {
            let (name, generation) = (name.as_str(), &generation);
            if registry.names().position(name).is_some() {
                return refuse(name, "two adapters have this name; give one of them another");
            }
            let fits = registry.fits(name, generation.rank(), generation.nbytes());
            let (place, root) = (&Place::New, name);
            let published =
                fits.and_then(|()| registry.publish(&Published { name, generation, root, place, created }));
            if let Err(e) = published {
                return refuse(name, &e.message);
            }
        }
        match default {
            Some(wanted) if registry.names().position(wanted).is_none() => {
                refuse(wanted, "no adapter has this name, so it cannot be the default")
            }
            _ => Ok(registry),
        }
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a name can be an adapter's.
    pub(crate) fn check_name(&self, name: &str) -> std::result::Result<(), ApiError> {
        let refuse = |message: String| {
            let code = Some("invalid_lora_name");
            Err(ApiError { code, ..ApiError::invalid("lora_name", message) })
        };
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return refuse(NAME.into());
        }
        if name == self.base || name == DEFAULT_MODEL {
            return refuse(format!("The base has the name `{name}`; give the adapter another."));
        }
        Ok(())
    }

    /// What a request's `model` stands for, held with `scale` times the adapter's own scale (none is the base), and the name
    /// to answer with.
    ///
    /// # Errors
    /// 404 when nothing has this name, 400 when a scale is given for the base.
    pub(crate) fn resolve(
        &self,
        model: Option<&str>,
        scale: f32,
    ) -> std::result::Result<(Option<Lease>, String), ApiError> {
        let wanted = match model {
            None | Some(DEFAULT_MODEL) => self.default.as_deref(),
            Some(name) if name == self.base => None,
            Some(name) => Some(name),
        };
        let Some(wanted) = wanted else {
            if scale != 1.0 {
                let why = "`adapter_scale` needs the name of an adapter as `model`";
                return Err(ApiError::invalid("adapter_scale", why));
            }
            return Ok((None, model.unwrap_or(&self.base).to_owned()));
        };
        let mut names = self.names();
        let Some(at) = names.position(wanted) else { return Err(ApiError::model_not_found(wanted)) };
        names.clock += 1;
        let clock = names.clock;
        let named = &mut names.served[at];
        named.used = clock;
        Ok((Some(Lease::new(&named.generation, scale)), model.unwrap_or(wanted).to_owned()))
    }

    /// A version of this content that is in memory.
    pub(crate) fn of_content(&self, content: &str) -> Option<Arc<Generation>> {
        self.names().live().into_iter().find(|generation| generation.content() == content)
    }

    /// Whether the name may be given a new version now.
    ///
    /// # Errors
    /// 400 when it is taken, 409 when another version has it than was expected.
    pub(crate) fn may(&self, name: &str, place: &Place) -> std::result::Result<(), ApiError> {
        self.check_name(name)?;
        may(&self.names(), name, place)
    }

    /// Makes room for a version: adapters that only a request brought here, and that nobody uses, go first.
    ///
    /// # Errors
    /// 409 when it passes a limit.
    pub(crate) fn fits(&self, name: &str, rank: usize, nbytes: usize) -> std::result::Result<(), ApiError> {
        let (policy, mut names) = (&self.policy, self.names());
        if rank > policy.max_rank {
            let message = format!("The adapter has rank {rank}; at most {} is served.", policy.max_rank);
            return Err(ApiError::request(409, "lora_rank_limit_exceeded", message));
        }
        loop {
            let count = names.served.len() + usize::from(names.position(name).is_none());
            let held = names.nbytes();
            let full = count > policy.max_adapters;
            if !full && held + nbytes <= policy.max_bytes {
                return Ok(());
            }
            let idle =
                names.served.iter().enumerate().filter(|(_, named)| {
                    named.on_demand && named.generation.leases() == 0 && named.name != name
                });
            match idle.min_by_key(|(_, named)| named.used).map(|(at, _)| at) {
                Some(at) => drop(names.served.remove(at)),
                None if full => {
                    let message = format!("{} adapters are served, which is the limit.", policy.max_adapters);
                    return Err(ApiError::request(409, "lora_adapter_limit_exceeded", message));
                }
                None => {
                    let message = format!(
                        "The adapter takes {nbytes} bytes beside the {held} of others; {} is the limit.",
                        policy.max_bytes
                    );
                    return Err(ApiError::request(409, "lora_bytes_limit_exceeded", message));
                }
            }
        }
    }

    /// Gives a name a version, at once and for all; the content of the one that had it is returned.
    ///
    /// # Errors
    /// As [`Registry::may`]; then the name stands for what it stood for.
    pub(crate) fn publish(&self, new: &Published) -> std::result::Result<Option<String>, ApiError> {
        self.check_name(new.name)?;
        let mut names = self.names();
        may(&names, new.name, new.place)?;
        let weak = Arc::downgrade(new.generation);
        if !names.all.iter().any(|own| Weak::ptr_eq(own, &weak)) {
            names.all.push(weak);
        }
        names.clock += 1;
        let named = Named {
            name: new.name.to_owned(),
            generation: new.generation.clone(),
            root: new.root.to_owned(),
            created: new.created,
            on_demand: *new.place == Place::OnDemand,
            used: names.clock,
        };
        let old = match names.position(new.name) {
            Some(at) => Some(std::mem::replace(&mut names.served[at], named)),
            None => {
                names.served.push(named);
                None
            }
        };
        drop(names);
        Ok(old.map(|old| old.generation.content().to_owned()))
    }

    /// Takes a name away; what holds its version goes on. The content is returned.
    ///
    /// # Errors
    /// 404 when no adapter has the name.
    pub(crate) fn unload(&self, name: &str) -> std::result::Result<String, ApiError> {
        let mut names = self.names();
        let Some(at) = names.position(name) else {
            let message = format!("The lora adapter '{name}' cannot be found.");
            let error = ApiError::request(404, "lora_adapter_not_found", message);
            return Err(ApiError { param: Some("lora_name".into()), ..error });
        };
        let named = names.served.remove(at);
        drop(names);
        Ok(named.generation.content().to_owned())
    }

    /// Sequences that hold what `lease` holds, itself left out; of the base, `all` less those that hold an adapter.
    pub(crate) fn holding(&self, lease: Option<&Lease>, all: usize) -> usize {
        match lease {
            Some(lease) => lease.generation().leases().saturating_sub(1),
            None => {
                let live = self.names().live();
                all.saturating_sub(live.iter().map(|generation| generation.leases()).sum())
            }
        }
    }

    /// Whether there is anything but the base.
    pub(crate) fn has_adapters(&self) -> bool {
        !self.names().served.is_empty()
    }

    /// Counts names and versions.
    pub(crate) fn count(&self, stats: &mut EngineStats) {
        let mut names = self.names();
        let live = names.live();
        stats.adapters = names.served.len();
        stats.generations = live.len();
        stats.retired = names.retired().len();
        stats.leases = live.iter().map(|generation| generation.leases()).sum();
        stats.adapter_bytes = names.nbytes();
    }

    /// The body of `/v1/models`.
    pub(crate) fn list(&self) -> Value {
        let names = self.names();
        let adapters = names.served.iter().map(|named| self.adapter_card(named));
        json!({"object": "list", "data": std::iter::once(self.base_card()).chain(adapters).collect::<Value>()})
    }

    /// The body of `/v1/models/{name}`.
    ///
    /// # Errors
    /// 404 when nothing has this name.
    pub(crate) fn card(&self, name: &str) -> std::result::Result<Value, ApiError> {
        let (lease, _) = self.resolve(Some(name), 1.0)?;
        if lease.is_none() {
            return Ok(self.base_card());
        }
        let wanted = if name == DEFAULT_MODEL { self.default.as_deref().unwrap_or(name) } else { name };
        let names = self.names();
        let at = names.position(wanted).ok_or_else(|| ApiError::model_not_found(name))?;
        Ok(self.adapter_card(&names.served[at]))
    }

    fn base_card(&self) -> Value {
        self.one(&self.base, &self.base, None, self.created)
    }

    fn adapter_card(&self, named: &Named) -> Value {
        let mut card = self.one(&named.name, &named.root, Some(&self.base), named.created);
        card["adapter_generation"] = named.generation.content().into();
        card
    }

    /// `root` is what the name stands for, `parent` the base under an adapter, as vLLM lists them.
    fn one(&self, name: &str, root: &str, parent: Option<&str>, created: u64) -> Value {
        json!({
            "id": name, "object": "model", "created": created, "owned_by": "graft",
            "root": root, "parent": parent,
        })
    }

    /// The body of `/v1/lora_adapters`.
    pub(crate) fn adapters(&self) -> Value {
        let mut names = self.names();
        let one = |generation: &Generation| {
            json!({
                "adapter_generation": generation.content(), "kind": generation.kind(), "rank": generation.rank(),
                "resident_bytes": generation.nbytes(), "active_leases": generation.leases(),
            })
        };
        let served = names.served.iter().map(|named| {
            let mut value = one(&named.generation);
            value["id"] = named.name.as_str().into();
            value["root"] = named.root.as_str().into();
            value["parent"] = self.base.as_str().into();
            value["created"] = named.created.into();
            value["on_demand"] = named.on_demand.into();
            value
        });
        let served: Value = served.collect();
        let retired: Value = names.retired().iter().map(|generation| one(generation)).collect();
        let policy = &self.policy;
        json!({
            "object": "list", "data": served, "retired": retired, "resident_bytes": names.nbytes(),
            "limits": {
                "adapters": policy.max_adapters, "rank": policy.max_rank, "bytes": policy.max_bytes,
            },
        })
    }
}

fn may(names: &Names, name: &str, place: &Place) -> std::result::Result<(), ApiError> {
    let found = names.position(name).map(|at| names.served[at].generation.content());
    match (place, found) {
        (Place::New | Place::OnDemand, Some(_)) => {
            let message = format!(
                "The lora adapter '{name}' has already been loaded. To load it in place, set `load_inplace` to true."
            );
            let code = Some("lora_adapter_already_loaded");
            Err(ApiError { code, ..ApiError::invalid("lora_name", message) })
        }
        (Place::Over(Some(expected)), found) if found != Some(expected) => {
            let found = found.unwrap_or("none");
            let message =
                format!("'{name}' was expected to have the generation {expected}, and has {found}.");
            Err(ApiError::request(409, "lora_generation_mismatch", message))
        }
        _ => Ok(()),
    }
}
