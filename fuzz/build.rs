//! The agent and the shim are fuzzed as their own programs, which bring their target along where this is set.

fn main() {
    println!("cargo::rustc-cfg=fuzzing");
}
