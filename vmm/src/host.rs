//! What the host is and offers: its KVM, the signals it sends, the terminal of its user; what podvmm may ask of it.

pub(crate) mod inherited;
pub(crate) mod jail;
mod kvm;
pub(crate) mod signals;
pub(crate) mod terminal;
pub(crate) mod thread;

pub(crate) use self::kvm::{KvmKind, is_virtual_machine};
