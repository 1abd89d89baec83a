//! Builds the guest's program for release, so that it can travel inside `catnap`, and digests it, which at
//! every start would take longer than the start.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

use sha2::{Digest, Sha256};

fn main() {
    println!("cargo:rerun-if-changed=guest/src");
    println!("cargo:rerun-if-changed=images/site");
    println!("cargo:rerun-if-changed=guest/Cargo.toml");
    println!("cargo:rerun-if-changed=guest/Cargo.lock");

    // A folder of its own, shared by all profiles: cargo locks the folder that it builds in.
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target = out.ancestors().nth(5).expect("OUT_DIR lies five levels below the target folder").join("guest");
    let built = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"))
        .args(["build", "--release", "--locked", "--manifest-path", "guest/Cargo.toml", "--target-dir"])
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo could not be started");
    assert!(built.success(), "the guest's program does not build");
    let program = target.join(env::var("TARGET").expect("cargo sets TARGET")).join("release/catnap-guest");
    let digest = Sha256::digest(fs::read(&program).expect("the guest's program was just built"));
    println!("cargo:rustc-env=CATNAP_GUEST={}", program.display());
    println!("cargo:rustc-env=CATNAP_GUEST_DIGEST={digest:x}");
}
