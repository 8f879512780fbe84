//! Bringing a vCPU thread out of KVM_RUN by a signal.
//!
//! A signal interrupts KVM_RUN only while the thread is in it. For one that
//! arrives just before, its handler sets `immediate_exit` in the vCPU's shared
//! page, and KVM_RUN then returns at once (kvm/api.rst, 5. The kvm_run structure).

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of this thread's vCPU, or null.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// A vCPU that kicks of its own thread can interrupt.
#[derive(Debug)]
pub(super) struct Kick {
    vcpu: VcpuFd,
}

impl Kick {
    /// Ties `vcpu` to the calling thread.
    pub(super) fn for_this_thread(mut vcpu: VcpuFd) -> Self {
        let flag = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(flag.cast_const().cast());
        Self { vcpu }
    }

    pub(super) fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Forgets kicks that came so far.
    pub(super) fn clear(&mut self) {
        self.vcpu.set_kvm_immediate_exit(0);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // Before the page behind it is unmapped with the vCPU.
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

/// Makes the signal harmless but for the flag. Once a process.
pub(super) fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Brings `thread` out of KVM_RUN, or lets its next KVM_RUN return at once.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // Fails only for a thread that has ended.
    let _ = thread.kill(SIGRTMIN());
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    // SAFETY: null, or the flag byte in the page that `Kick` of this very thread
    // keeps mapped. KVM and this thread also access it, as a single byte.
    if let Some(flag) = unsafe { flag.as_ref() } {
        flag.store(1, Ordering::Relaxed);
    }
}
