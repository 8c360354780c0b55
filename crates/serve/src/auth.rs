//! Who may ask: keys, and under which name the server may be spoken to.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{self, HeaderMap, HeaderName};
use sha2::{Digest as _, Sha256};

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Keys of which a request has to show one. What is kept is their digests: a key is never printed, and to compare takes
/// as long for a nearly right one as for any other.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

impl ApiKeys {
    /// The keys; space around them is no part of them, and an empty one is none.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        let keys = keys.into_iter().map(str::trim).filter(|key| !key.is_empty());
        Self(keys.map(|key| digest(key.as_bytes())).collect())
    }

    /// There is none: everybody may ask.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a request shows one of them, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        if self.is_empty() {
            return true;
        }
        let bearer = bearer(headers);
        let plain = headers.get(X_API_KEY).map(|value| value.as_bytes());
        [bearer, plain].into_iter().flatten().any(|shown| self.holds(shown.trim_ascii()))
    }

    /// Whether it is one of the keys. Every key is compared whole, whether one was found or not.
    pub(crate) fn holds(&self, shown: &[u8]) -> bool {
        let shown = digest(shown);
        let same = |key: &[u8; 32]| {
            let difference = key.iter().zip(&shown).fold(0, |all, (a, b)| all | (a ^ b));
            std::hint::black_box(difference) == 0
        };
        self.0.iter().fold(false, |found, key| found | same(key))
    }
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The key of `Authorization: Bearer KEY`.
pub(crate) fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
}

/// Whether the request's `Host` is a name of this machine or one that was named.
///
/// A page anywhere can have its own name resolve to 127.0.0.1 and then ask as if from here. A server that listens on the
/// loopback only, and asks for no key, therefore answers to names of the loopback only.
pub(crate) fn host_allowed(headers: &HeaderMap, addr: SocketAddr, keys: &ApiKeys, named: &[String]) -> bool {
    if !addr.ip().is_loopback() || !keys.is_empty() || named.iter().any(|name| name == "*") {
        return true;
    }
    let Some(host) = headers.get(header::HOST) else { return true };
    let host = host.to_str().unwrap_or_default();
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((name, _)) => name,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let loopback = name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let known = ["localhost", "host.docker.internal"].iter().any(|own| name.eq_ignore_ascii_case(own));
    loopback || known || named.iter().any(|own| name.eq_ignore_ascii_case(own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn one_of_the_keys_has_to_be_shown() {
        let keys = ApiKeys::new(["one", " two\n", ""]);
        for (name, value, allowed) in [
            ("authorization", "Bearer one", true),
            ("authorization", "bearer two", true),
            ("authorization", "Bearer on", false),
            ("authorization", "Bearer ", false),
            ("authorization", "Basic one", false),
            ("authorization", "one", false),
            ("x-api-key", "two", true),
            ("x-api-key", "three", false),
            ("cookie", "one", false),
        ] {
            assert_eq!(keys.allow(&headers(&[(name, value)])), allowed, "{name}: {value}");
        }
        assert!(keys.allow(&headers(&[("authorization", "Bearer no"), ("x-api-key", "one")])));
        assert!(ApiKeys::new([" "]).allow(&headers(&[])));
        assert_eq!(format!("{keys:?}"), "ApiKeys(2)");
    }

    #[test]
    fn a_loopback_server_answers_to_its_own_names() {
        let here: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        let none = ApiKeys::default();
        for (host, allowed) in [
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("127.0.0.1:8080", true),
            ("[::1]:8080", true),
            ("127.1.2.3", true),
            ("evil.example:8080", false),
            ("localhost.evil.example", false),
            ("notlocalhost", false),
            ("10.0.0.1", false),
            ("", false),
        ] {
            assert_eq!(host_allowed(&headers(&[("host", host)]), here, &none, &[]), allowed, "{host}");
        }
        let evil = headers(&[("host", "evil.example")]);
        assert!(host_allowed(&evil, here, &none, &["evil.example".into()]));
        assert!(host_allowed(&evil, here, &ApiKeys::new(["k"]), &[]));
        assert!(host_allowed(&evil, "0.0.0.0:80".parse().unwrap(), &none, &[]));
    }
}
