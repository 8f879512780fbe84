//! The `podvmm` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmm::main()
}
