//! Guests that mean harm, on the real KVM and the real transport: each device, and both sides of each
//! rule. What they do is refused or survived; then a well-formed request to the same device is answered,
//! or this VM has ended with its reason. podvmm never hangs, panics or grows, and no byte changes that a
//! request does not name.

#[path = "hostile/balloon.rs"]
mod balloon;
#[path = "hostile/blk.rs"]
mod blk;
#[path = "hostile/console.rs"]
mod console;
#[path = "hostile/cpu.rs"]
mod cpu;
#[path = "hostile/driver.rs"]
mod driver;
#[path = "hostile/ends.rs"]
mod ends;
#[path = "hostile/fs.rs"]
mod fs;
#[path = "hostile/guest.rs"]
mod guest;
#[path = "hostile/legacy.rs"]
mod legacy;
#[path = "hostile/lifecycle.rs"]
mod lifecycle;
#[path = "hostile/mem.rs"]
mod mem;
#[path = "hostile/msix.rs"]
mod msix;
#[path = "hostile/net.rs"]
mod net;
#[path = "hostile/pci.rs"]
mod pci;
#[path = "hostile/plug.rs"]
mod plug;
#[path = "hostile/puppet.rs"]
mod puppet;
#[path = "hostile/registers.rs"]
mod registers;
#[path = "hostile/rig.rs"]
mod rig;
#[path = "hostile/rings.rs"]
mod rings;
#[path = "hostile/rng.rs"]
mod rng;
#[path = "hostile/suite.rs"]
mod suite;
#[path = "hostile/vsock.rs"]
mod vsock;
#[path = "hostile/wire.rs"]
mod wire;
