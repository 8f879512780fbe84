//! Generates the messages of CRI from the texts in `proto`. Each package is the module of its name.

use std::error::Error;

use prost_build::Config;

const TEXTS: [&str; 3] = ["cri/config.proto", "cri/requests.proto", "cri/status.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut config = Config::new();
    config.btree_map(["."]);
    config.compile_fds(protox::compile(TEXTS, ["proto"])?)?;
    Ok(())
}
