//! The pod's mounts in the mount namespace of a podvmm that is in a jail: it sees nothing of what is mounted
//! outside later. So whatever is mounted in the shared folder is shown there, too, as it is here, with what
//! may be done in it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::attributes::{Depth, change_readonly};

/// The shared folder as podvmm sees it. What is mounted there lives as long as this, or podvmm.
#[derive(Debug)]
pub(super) struct Mirror {
    namespace: File,
    /// Where the folder was when podvmm started, and is for it.
    shared: PathBuf,
}

impl Mirror {
    /// None if the process sees what this one sees.
    pub(super) fn of(pid: u32, shared: &Path) -> io::Result<Option<Self>> {
        let own = fs::metadata("/proc/self/ns/mnt")?;
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        let other = namespace.metadata()?;
        let is_other = (own.dev(), own.ino()) != (other.dev(), other.ino());
        Ok(is_other.then(|| Self {
            namespace,
            shared: shared.into(),
        }))
    }

    /// Shows what is mounted at `place`, with all below it, under the name that it has in the shared folder.
    pub(super) fn show(&self, place: &Path, name: &Path) -> io::Result<()> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let copy = open_tree(CWD, place, flags)?;
        let there = self.shared.join(name);
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        self.within(|| Ok(move_mount(&copy, c"", CWD, &there, flags)?))
    }

    /// Takes it away again, if it is there.
    pub(super) fn hide(&self, name: &Path) -> io::Result<()> {
        let there = self.shared.join(name);
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        self.within(|| match unmount(&there, flags) {
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        })
    }

    /// Makes it read-only, or writable again.
    pub(super) fn change_readonly(
        &self,
        name: &Path,
        depth: Depth,
        is_readonly: bool,
    ) -> io::Result<()> {
        let there = self.shared.join(name);
        self.within(|| change_readonly(&there, depth, is_readonly))
    }

    /// Does something on a thread that sees what podvmm sees.
    fn within(&self, act: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
        thread::scope(|scope| {
            let act = || {
                // SAFETY: it changes nothing but that this thread's folder is its own from now on.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
                let mounts = Some(LinkNameSpaceType::Mount);
                move_into_link_name_space(self.namespace.as_fd(), mounts)?;
                act()
            };
            let thread = thread::Builder::new().name("mirror".into());
            let thread = thread.spawn_scoped(scope, act)?;
            thread.join().expect("a panic ends the process")
        })
    }
}
