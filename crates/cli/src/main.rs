//! The one binary, `graft`.

fn main() {}
