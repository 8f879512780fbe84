//! What the guest's CPUs and board look like, and how a kernel is started on
//! them.
//!
//! A leaf crate: it knows guest memory, KVM's types and the boot protocols,
//! never a device. Everything here is a function from a description to bytes in
//! guest memory or to registers; who owns the file descriptors is the caller's
//! business.
//!
//! Each architecture offers the same names; this file re-exports those of the
//! one being built for.
#![deny(unsafe_code)]

pub mod ram;

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("podvmm runs on x86_64; aarch64 is to come as arch/src/aarch64 with the same names");
