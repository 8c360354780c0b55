//! The chat page at `/`: one file that asks for nothing from elsewhere, and says so to the browser.

use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

/// The page.
pub(crate) const PAGE: &str = include_str!("page.html");

/// Its policy: its own style and script, known by their digests, and this server alone to talk to.
pub(crate) fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        format!(
            "default-src 'none'; style-src '{}'; script-src '{}'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash("style"),
            hash("script")
        )
    })
}

fn hash(element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let inner =
        PAGE.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(inner, _)| inner);
    format!("sha256-{}", STANDARD.encode(Sha256::digest(inner.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_for_nothing_from_elsewhere() {
        assert_eq!((PAGE.matches("<style>").count(), PAGE.matches("<script>").count()), (1, 1));
        for word in [
            "http://",
            "https://",
            "//cdn",
            "@import",
            "url(",
            "<link rel=\"stylesheet",
            "<img",
            "innerHTML",
            " style=\"",
            " onclick=",
        ] {
            assert!(!PAGE.contains(word), "the page holds {word}");
        }
        let empty = STANDARD.encode(Sha256::digest(b""));
        assert!(!policy().contains(&empty) && !policy().contains("unsafe"), "{}", policy());
    }
}
