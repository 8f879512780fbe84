//! What the tests share: the podvmm binary as a child process, and small guests
//! without an operating system.
//!
//! Tests need `/dev/kvm`. Where it is missing they fail and say so, unless
//! `PODVMM_TESTS_WITHOUT_KVM=skip` is set.
//!
//! Linux boots where a test is about booting. Other guests, and the pods of containerd's tests, go on
//! from templates in `target/tmp/podvmm-templates`, or where `PODVMM_TEST_TEMPLATES` says; if that is
//! empty, all of them boot.

pub mod containerd;
pub mod counter;
pub mod cri;
pub mod ctr;
pub mod guest;
pub mod helper;
pub mod host;
pub mod network;
pub mod node;
pub mod payload;
pub mod pod;
pub mod podvmm;
pub mod probe;
pub mod service;
pub mod template;
pub mod tree;

pub use payload::Payload;
pub use podvmm::{Outcome, Podvmm};
