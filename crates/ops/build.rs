//! Decides whether our own CPU operations are compiled in, and compiles the C++ that MLX needs to know them.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=shim/primitive.cpp");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=GRAFT_NO_CPU_OPS");
    println!("cargo:rustc-check-cfg=cfg(graft_cpu)");

    let on_macos = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "macos");
    if on_macos || env::var_os("GRAFT_NO_CPU_OPS").is_some() {
        return;
    }
    println!("cargo:rustc-cfg=graft_cpu");

    let Some(include) = env::var_os("DEP_MLX_INCLUDE") else {
        println!(
            "cargo::error=mlx-sys says nothing about MLX's headers (DEP_MLX_INCLUDE is not set): run `cargo xtask setup` first"
        );
        return;
    };
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").file("shim/primitive.cpp").warnings(false);
    for directory in env::split_paths(&include) {
        build.include(directory);
    }
    for define in env::var("DEP_MLX_DEFINES").unwrap_or_default().split_whitespace() {
        build.define(define, None);
    }
    build.compile("graft_primitive");
}
