//! What `podvmm` does by its first words: run a VM, be a client of one, give pages, look at the host.

pub mod check;
pub mod cli;
pub mod client;
mod guest;
pub mod help;
pub mod pages;
pub mod run;
