//! The adapters on the engine's thread: their arrays, and what they are with another scale.
//!
//! What takes time (DoRA's factor needs a product with the base's weight) is done for one linear per turn, so that running
//! answers do not wait for an adapter to arrive.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::rc::Rc;

use graft_adapters::{Adapter, Error, Result, Site, StoredAdapter, Table};
use graft_model::Model;
use graft_ops::{Array, Exception, ffi};

use crate::generation::Key;
use crate::pass::caught;

/// Scaled adapters that are kept beside those that sequences hold.
const MAX_SCALED: usize = 64;

/// Told how the taking in of an adapter ended.
pub(crate) type Adopted = Box<dyn FnOnce(Result<()>) + Send>;

/// An adapter with its own scale.
struct Resident {
    table: Rc<Table>,
    /// The modules with a magnitude, from which factors for other scales follow.
    dora: HashMap<String, Adapter>,
}

/// Something that is not ready yet.
enum Work {
    /// An adapter whose modules become arrays.
    Adopt { slot: u64, rest: BTreeMap<String, StoredAdapter>, made: Resident, done: Adopted },
    /// An adapter whose factors are computed for another scale.
    Scale { key: Key, rest: Vec<String>, made: HashMap<String, Site> },
}

/// What a key stands for.
pub(crate) enum Found {
    /// It can be used.
    Ready(Rc<Table>),
    /// It is being made.
    Soon,
    /// It cannot be made, or there is none.
    Never(String),
}

/// All adapters of the engine.
pub(crate) struct Residents<'a> {
    model: &'a Model,
    held: HashMap<u64, Resident>,
    /// The last used one is the last.
    scaled: Vec<(Key, std::result::Result<Rc<Table>, String>)>,
    work: VecDeque<Work>,
}

impl<'a> Residents<'a> {
    pub(crate) fn new(model: &'a Model) -> Self {
        Self { model, held: HashMap::new(), scaled: Vec::new(), work: VecDeque::new() }
    }

    /// Begins to take an adapter in, which has to fit the base.
    pub(crate) fn adopt(&mut self, slot: u64, rest: BTreeMap<String, StoredAdapter>, done: Adopted) {
        let table = Rc::new(Table { sites: HashMap::new() });
        let made = Resident { table, dora: HashMap::new() };
        self.work.push_back(Work::Adopt { slot, rest, made, done });
    }

    /// Lets an adapter go. What runs has what it needs.
    pub(crate) fn release(&mut self, slot: u64) {
        self.held.remove(&slot);
        self.scaled.retain(|(key, _)| key.slot != slot);
        self.work.retain(|work| match work {
            Work::Adopt { slot: own, .. } => *own != slot,
            Work::Scale { key, .. } => key.slot != slot,
        });
    }

    /// Something is left for [`Residents::advance`].
    pub(crate) fn busy(&self) -> bool {
        !self.work.is_empty()
    }

    /// The arrays of an adapter; what has to be computed for it is begun.
    pub(crate) fn find(&mut self, key: Key) -> Found {
        let Some(resident) = self.held.get(&key.slot) else {
            return Found::Never("the adapter is not there".into());
        };
        if key.scale() == 1.0 {
            return Found::Ready(resident.table.clone());
        }
        if let Some(at) = self.scaled.iter().position(|(own, _)| *own == key) {
            let entry = self.scaled.remove(at);
            let found = match &entry.1 {
                Ok(table) => Found::Ready(table.clone()),
                Err(why) => Found::Never(why.clone()),
            };
            self.scaled.push(entry);
            return found;
        }
        if self.work.iter().any(|work| matches!(work, Work::Scale { key: own, .. } if *own == key)) {
            return Found::Soon;
        }
        let scaled = |site: &Site| Site { scale: site.scale * key.scale(), factor: None, ..site.clone() };
        let sites = &resident.table.sites;
        let made: HashMap<String, Site> = sites.iter().map(|(path, s)| (path.clone(), scaled(s))).collect();
        let rest: Vec<String> = resident.dora.keys().cloned().collect();
        if rest.is_empty() {
            let table = Rc::new(Table { sites: made });
            self.keep(key, Ok(table.clone()));
            return Found::Ready(table);
        }
        self.work.push_back(Work::Scale { key, rest, made });
        Found::Soon
    }

    fn keep(&mut self, key: Key, made: std::result::Result<Rc<Table>, String>) {
        if self.scaled.len() >= MAX_SCALED {
            drop(self.scaled.remove(0));
        }
        self.scaled.push((key, made));
    }

    /// Does what one linear needs. False if there was nothing to do.
    pub(crate) fn advance(&mut self) -> bool {
        let model = self.model;
        match self.work.pop_front() {
            None => return false,
            Some(Work::Adopt { slot, mut rest, mut made, done }) => match rest.pop_first() {
                None => {
                    self.held.insert(slot, made);
                    done(Ok(()));
                }
                Some((path, stored)) => match guarded(&path, || adopted(model, &path, &stored, &mut made)) {
                    Ok(()) => self.work.push_front(Work::Adopt { slot, rest, made, done }),
                    Err(e) => done(Err(e)),
                },
            },
            Some(Work::Scale { key, mut rest, mut made }) => {
                let resident = self.held.get(&key.slot);
                match (rest.pop(), resident) {
                    (None, _) => self.keep(key, Ok(Rc::new(Table { sites: made }))),
                    (Some(path), Some(resident)) => {
                        match guarded(&path, || rescaled(model, &path, &mut made, resident)) {
                            Ok(()) => self.work.push_front(Work::Scale { key, rest, made }),
                            Err(e) => self.keep(key, Err(e.to_string())),
                        }
                    }
                    // It was released meanwhile.
                    (Some(_), None) => {}
                }
            }
        }
        true
    }
}

/// The site of `path`, evaluated and put where it belongs.
fn adopted(model: &Model, path: &str, stored: &StoredAdapter, made: &mut Resident) -> Result<()> {
    let adapter = stored.adapter()?;
    let target = model.target(path).ok_or_else(|| failed(path, "the base has no such module"))?;
    let site = adapter.site(&target)?;
    ffi::eval([&site.a, &site.b].into_iter().chain(&site.factor))?;
    check(path, site.factor.as_ref())?;
    if adapter.magnitude.is_some() {
        ffi::eval(adapter.arrays())?;
        made.dora.insert(path.to_owned(), adapter);
    }
    // Nobody else has it yet.
    if let Some(table) = Rc::get_mut(&mut made.table) {
        table.sites.insert(path.to_owned(), site);
    }
    Ok(())
}

/// DoRA's factor of `path` for the scale that its site has.
fn rescaled(model: &Model, path: &str, made: &mut HashMap<String, Site>, from: &Resident) -> Result<()> {
    let (Some(site), Some(own)) = (made.get_mut(path), from.dora.get(path)) else { return Ok(()) };
    let target = model.target(path).ok_or_else(|| failed(path, "the base has no such module"))?;
    site.factor = Adapter { scale: site.scale, ..own.clone() }.factor(target.weight)?;
    ffi::eval(&site.factor)?;
    check(path, site.factor.as_ref())
}

fn check(path: &str, factor: Option<&Array>) -> Result<()> {
    match factor {
        Some(factor) if ffi::read::<f32>(factor)?.iter().any(|c| !c.is_finite()) => {
            Err(failed(path, "m / n is not finite with this scale"))
        }
        _ => Ok(()),
    }
}

/// Runs a part of a work; a panic in it ends the work with an error, of which whoever waits for it is told.
fn guarded(path: &str, part: impl FnOnce() -> Result<()>) -> Result<()> {
    caught(|| Ok(part())).unwrap_or_else(|panic| Err(failed(path, &panic)))
}

fn failed(path: &str, why: &str) -> Error {
    Error::Array(Exception::custom(format!("{path}: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_its_work_and_is_told() {
        let error = guarded("model.layers.0.x", || panic!("at {}", 3)).unwrap_err();
        assert!(error.to_string().contains("model.layers.0.x: at 3"), "{error}");
        assert!(guarded("x", || Ok(())).is_ok());
    }
}
