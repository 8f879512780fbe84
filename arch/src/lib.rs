//! What the guest's CPUs and board look like, and how a kernel is started on
//! them.
//!
//! A leaf crate: it knows guest memory, KVM's types and the boot protocols,
//! never a device. Everything here is a function from a description to bytes in
//! guest memory or to registers; who owns the file descriptors is the caller's
//! business.
//!
//! To use it alone: take a guest's CPUID from `cpuid`, lay RAM out by [`ram`] and `layout`, write the
//! tables and what `boot` says the kernel wants into it, and set each vCPU up by `vcpu::configure`.
//! vmm's `build` does just that.
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
