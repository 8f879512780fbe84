//! What a snapshot keeps of a share: which names the guest knows and what it has open. Each name is
//! looked up anew, for another life may have another folder. If it has the same one, a name that has
//! come to stand for another file is stale for the guest, as is one that is missing: what the guest
//! has open must not become another file.

use std::collections::HashMap;
use std::ffi::CString;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::abi::ROOT;
use super::handles::{Handle, Lost};
use super::host::LastingIdentity;
use super::nodes::NodeState;
use super::server::{Server, is_name};
use crate::virtio::StateError;

/// Far more files than a guest can have asked for, and far from where numbers end.
const MOST_NUMBERS: u64 = 1 << 62;

/// A share as its guest knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// FUSE features agreed on.
    session: u64,
    /// The shared folder. Snapshots of older versions have none, nor identities of files.
    #[serde(default)]
    root: Option<LastingIdentity>,
    next: u64,
    nodes: Vec<NodeState>,
    handles: Vec<HandleState>,
}

/// A file the guest has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HandleState {
    fh: u64,
    nodeid: u64,
    flags: u32,
}

fn wrong(what: &str) -> StateError {
    StateError::Device(format!("its {what}"))
}

impl Server {
    /// The server's state for a snapshot. Nothing may be served meanwhile.
    pub(super) fn state(&self) -> FsState {
        let known = self.nodes();
        let (root, (next, nodes)) = (known.root(), known.state());
        drop(known);
        let open = self.handles.all().into_iter();
        let handles = open.map(|(fh, nodeid, flags)| HandleState {
            fh,
            nodeid,
            flags: flags.bits(),
        });
        FsState {
            session: self.session(),
            root: Some(root),
            next,
            nodes,
            handles: handles.collect(),
        }
    }

    /// Goes on where another server was.
    pub(super) fn restore(&self, state: FsState) -> Result<(), StateError> {
        self.clear();
        if state.session & !self.wanted() != 0 {
            return Err(wrong("guest relies on what is not offered here"));
        }
        self.agree(state.session);
        let mut nodes = state.nodes;
        if state.root != Some(self.nodes().root()) {
            // Of another folder, so none of its files is here.
            nodes.iter_mut().for_each(|node| node.identity = None);
        }
        self.restore_nodes(state.next, nodes)?;
        let open = state.handles.into_iter();
        let open = open.map(|HandleState { fh, nodeid, flags }| {
            let handle = self.reopen(nodeid, flags);
            let flags = OFlags::from_bits_retain(flags);
            (fh, handle.map_err(|_| Lost { nodeid, flags }))
        });
        match self.handles.restore(open) {
            true => Ok(()),
            false => Err(wrong("open files are not as a share can have them")),
        }
    }

    fn reopen(&self, nodeid: u64, flags: u32) -> Result<Handle, Errno> {
        let flags = self.open_flags(flags)? & !OFlags::TRUNC;
        let file = self.open_node(nodeid, flags)?;
        Ok(Handle::new(file, nodeid, flags))
    }

    fn restore_nodes(&self, next: u64, nodes: Vec<NodeState>) -> Result<(), StateError> {
        let count = nodes.len();
        if next > MOST_NUMBERS {
            return Err(wrong("files are more than there can have been"));
        }
        let mut children: HashMap<u64, Vec<NodeState>> = HashMap::new();
        for node in nodes {
            if node.nodeid <= ROOT || node.nodeid >= next {
                return Err(wrong("files have numbers that were never given"));
            }
            if !node.orphan && !is_name(&node.name) {
                return Err(wrong("files have names that are none"));
            }
            children.entry(node.parent).or_default().push(node);
        }
        let mut restored = 0;
        let mut ready = vec![ROOT];
        let mut known = self.nodes();
        while let Some(parent) = ready.pop() {
            for node in children.remove(&parent).unwrap_or_default() {
                let name = CString::new(node.name.clone());
                let name = name.map_err(|_| wrong("files have names that are none"))?;
                known
                    .restore(&node, name)
                    .map_err(|_| wrong("files are more than a share can have"))?;
                ready.push(node.nodeid);
                restored += 1;
            }
        }
        if restored != count || known.len() != count + 1 {
            return Err(wrong("files are not in folders, or there twice"));
        }
        known.restore_next(next);
        Ok(())
    }
}
