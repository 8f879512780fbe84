//! File system device (virtio 1.3 §5.11): a folder of the host's, shared with the guest by FUSE.
//!
//! The server is our own and small. What libraries offer keeps a descriptor for each file that the
//! guest has ever seen, unless the host lets it open files by handle, which overlayfs does not and
//! which takes a capability; and they rely on a process of their own to be confined. Here a file is
//! known by its folder and its name, and opened anew when it is needed, so descriptors are bounded.
//! And the guest only ever says one name below one folder, which is opened without following it:
//! there is no path that could lead out of the share.
//!
//! ```text
//!  device   registers, tag                     handler ─▶ server ─▶ nodes    which file is which
//!  handler  a queue and its thread                           ├────▶ handles  what is open
//!  server   one request: parse, act, answer                  └────▶ host     system calls
//! ```
//!
//! Threads share [`nodes`] under a lock, which they hold to look a file up or to change names.
//! Reads and writes go by handle and take no lock.
//!
//! Locks of files are kept by the guest's kernel: they hold among the guest's processes.

mod abi;
mod device;
mod handler;
mod handles;
mod host;
mod nodes;
mod server;
mod state;
#[cfg(test)]
mod tests;
mod vhost_user;

pub use self::device::{Fs, FsConfig, FsError};
pub use self::server::Cache;
pub use self::state::FsState;
pub use self::vhost_user::{VhostUserFs, VhostUserFsConfig};
