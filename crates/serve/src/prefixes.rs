//! Keys and values of prompts that were read before, for prompts that begin with the same tokens.
//!
//! They belong to one base, one version of an adapter with one scale, and these tokens: a version that is loaded anew under
//! an old name finds nothing of the old one. What is taken from here is to the bit what reading would give
//! ([`graft_model::reusable`]).

use graft_model::{KvCache, reusable, shareable};

use crate::generation::Key;

/// One prompt's beginning.
struct Prefix {
    key: Option<Key>,
    tokens: Vec<u32>,
    cache: KvCache,
    bytes: usize,
    used: u64,
}

/// All prefixes that are kept.
#[derive(Default)]
pub(crate) struct Prefixes {
    kept: Vec<Prefix>,
    clock: u64,
}

impl Prefixes {
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Bytes of all.
    pub(crate) fn bytes(&self) -> usize {
        self.kept.iter().map(|prefix| prefix.bytes).sum()
    }

    /// The cache of as many first tokens of `prompt` as are kept and of use, if they are more than `read`.
    pub(crate) fn find(&mut self, key: Option<Key>, prompt: &[u32], read: usize) -> Option<KvCache> {
        let of_use = |prefix: &Prefix| reusable(common(&prefix.tokens, prompt), prompt.len());
        let own = self.kept.iter_mut().filter(|prefix| prefix.key == key);
        let (kept, prefix) =
            own.map(|prefix| (of_use(prefix), prefix)).max_by_key(|(kept, prefix)| (*kept, prefix.used))?;
        if kept <= read {
            return None;
        }
        self.clock += 1;
        prefix.used = self.clock;
        i32::try_from(kept).ok().map(|kept| prefix.cache.fork(kept))
    }

    /// Keeps what may be shared of `prompt`, of which the first tokens are in `cache`, if it fits into `room` bytes; older
    /// prefixes go for it.
    pub(crate) fn keep(&mut self, key: Option<Key>, prompt: &[u32], cache: &mut KvCache, room: usize) {
        let read = usize::try_from(cache.len()).unwrap_or(0).min(prompt.len());
        let tokens = &prompt[..shareable(read, prompt.len())];
        self.clock += 1;
        let known =
            self.kept.iter_mut().find(|prefix| prefix.key == key && prefix.tokens.starts_with(tokens));
        if let Some(prefix) = known {
            prefix.used = self.clock;
            return;
        }
        let Some(length) = i32::try_from(tokens.len()).ok().filter(|length| *length > 0) else { return };
        let cache = cache.fork(length);
        let bytes = cache.nbytes();
        if bytes > room {
            return;
        }
        // What this one says, too.
        self.kept.retain(|prefix| prefix.key != key || !tokens.starts_with(&prefix.tokens));
        self.shrink(room - bytes);
        self.kept.push(Prefix { key, tokens: tokens.to_vec(), cache, bytes, used: self.clock });
    }

    /// Lets the least recently used ones go until all take at most `bytes`.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        while self.bytes() > bytes {
            let oldest = self.kept.iter().enumerate().min_by_key(|(_, prefix)| prefix.used);
            let Some((at, _)) = oldest else { return };
            self.kept.swap_remove(at);
        }
    }

    /// Lets go what belongs to a version that is gone.
    pub(crate) fn forget(&mut self, slot: u64) {
        self.kept.retain(|prefix| prefix.key.is_none_or(|key| key.slot != slot));
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
