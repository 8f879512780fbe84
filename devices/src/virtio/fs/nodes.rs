//! Which file each number of the guest's stands for.
//!
//! A node remembers its folder and its name there, and which file that was. Its place (an O_PATH
//! descriptor) is opened when it is needed, from the nearest folder that has one, and checked to be
//! the same file still: the host may have changed the tree. Places are kept for a while, the least
//! used go first. A file whose name was removed can only be found by its place, so that is kept
//! until the guest forgets the file; if there is no room for it, the file is gone for the guest.
//!
//! ```text
//!            ┌───────── evicted ────────┐
//!            ▼                          │
//!          Named ── needed, opened ─▶ Placed ── name removed ─▶ Pinned
//!            │                          │                         │
//!            │ name removed, not found  │ the same, without room  │ given a name
//!            └───────────▶ Gone ◀───────┘          Placed ◀───────┘
//! ```
//!
//! A file system uses the inode number of a removed file again. So a node that is gone has no
//! identity: the next file with that number is another node. And the type of a file is a part of its
//! identity: a number that comes back as another kind of file is never taken for the old one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use serde::{Deserialize, Serialize};

use super::abi::ROOT;
use super::host::{self, Identity, LastingIdentity, Status};

/// What a snapshot keeps of a file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NodeState {
    pub(super) nodeid: u64,
    pub(super) parent: u64,
    pub(super) name: Vec<u8>,
    pub(super) lookups: u64,
    pub(super) orphan: bool,
    #[serde(default)]
    pub(super) identity: Option<LastingIdentity>,
}

/// How much the guest can make the host keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Nodes. Linux keeps some kilobytes of its own for each.
    pub(super) nodes: usize,
    /// Places that are kept because they may be needed again.
    pub(super) places: usize,
    /// Places of files that have no name any more.
    pub(super) orphans: usize,
}

/// Where a file is, right now.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) identity: Identity,
}

impl Place {
    /// The type bits of its mode, which never change.
    pub(super) fn kind(&self) -> u32 {
        self.identity.kind
    }
}

/// How a node's file can be found (see the module's diagram).
#[derive(Debug)]
enum Whereabouts {
    /// The file is found by its name in its folder.
    Named(Identity),
    /// The file has a name, but its place is open, so it need not be looked up.
    Placed {
        identity: Identity,
        fd: Arc<OwnedFd>,
        /// Used since it was last considered for eviction.
        recent: bool,
    },
    /// The file is found by its place alone: the root, and files without a name.
    Pinned(Identity, Arc<OwnedFd>),
    /// The file cannot be found any more.
    Gone,
}

#[derive(Debug)]
struct Node {
    at: Whereabouts,
    /// Number of the node's folder. The root's is its own.
    parent: u64,
    name: CString,
    /// How often the guest was told of it and has not said to forget.
    lookups: u64,
    /// Nodes whose parent it is.
    children: u64,
    /// How the file was when the guest last opened it: its cache has nothing older.
    opened: Option<Version>,
}

/// What changes with a file's content: its ctime, in seconds and nanoseconds.
pub(super) type Version = (u64, u32);

impl Node {
    /// What tells the node's file from others. `None` if that is gone.
    fn identity(&self) -> Option<Identity> {
        match &self.at {
            Whereabouts::Named(identity)
            | Whereabouts::Placed { identity, .. }
            | Whereabouts::Pinned(identity, _) => Some(*identity),
            Whereabouts::Gone => None,
        }
    }

    /// Whether the file has the name that is remembered here.
    fn has_name(&self) -> bool {
        match &self.at {
            Whereabouts::Named(_) | Whereabouts::Placed { .. } => true,
            Whereabouts::Pinned(..) | Whereabouts::Gone => false,
        }
    }

    fn is_known_as(&self, parent: u64, name: &CStr) -> bool {
        self.has_name() && self.parent == parent && self.name.as_c_str() == name
    }
}

#[derive(Debug)]
pub(super) struct Nodes {
    root: (Identity, Arc<OwnedFd>),
    nodes: HashMap<u64, Node>,
    /// The nodes that are not gone, by what they are.
    numbers: HashMap<Identity, u64>,
    /// The next number. None is used twice, so there are no generations.
    next: u64,
    /// Nodes that got a place, in the order they did. May name some that are gone.
    placed: VecDeque<u64>,
    /// Pinned nodes, without the root.
    orphans: usize,
    limits: Limits,
}

impl Nodes {
    /// Knows only the root.
    pub(super) fn new(root: Arc<OwnedFd>, limits: Limits) -> Result<Self, Errno> {
        let Status { identity, .. } = host::status(&root)?;
        Ok(Self::of((identity, root), limits))
    }

    /// Forgets all but the root. It makes no system calls but to close what it drops: a vCPU's thread does
    /// this when a driver resets the device, and may not make others.
    pub(super) fn clear(&mut self) {
        *self = Self::of(self.root.clone(), self.limits);
    }

    fn of(root: (Identity, Arc<OwnedFd>), limits: Limits) -> Self {
        let (identity, fd) = root.clone();
        let node = Node {
            at: Whereabouts::Pinned(identity, fd),
            parent: ROOT,
            name: CString::default(),
            lookups: 1,
            children: 0,
            opened: None,
        };
        Self {
            root,
            numbers: HashMap::from([(identity, ROOT)]),
            nodes: HashMap::from([(ROOT, node)]),
            next: ROOT + 1,
            placed: VecDeque::new(),
            orphans: 0,
            limits,
        }
    }

    /// The place where a node's file is. ESTALE if it is not where it was.
    pub(super) fn place(&mut self, nodeid: u64) -> Result<Place, Errno> {
        // Up to the nearest folder with a place. Were there a ring, it would not be longer than
        // there are nodes.
        let longest = self.nodes.len();
        let mut way = Vec::new();
        let mut at = nodeid;
        let mut fd = loop {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            match &mut node.at {
                Whereabouts::Placed { fd, recent, .. } => {
                    *recent = true;
                    break fd.clone();
                }
                Whereabouts::Pinned(_, fd) => break fd.clone(),
                Whereabouts::Named(_) if way.len() <= longest => {}
                Whereabouts::Named(_) | Whereabouts::Gone => return Err(Errno::STALE),
            }
            way.push(at);
            at = node.parent;
        };
        for at in way.into_iter().rev() {
            let node = &self.nodes[&at];
            fd = Arc::new(host::place_at(&fd, &node.name).map_err(gone)?);
            if Some(host::status(&fd)?.identity) != node.identity() {
                return Err(Errno::STALE);
            }
            self.keep_place(at, &fd);
        }
        let identity = self.nodes[&nodeid].identity().ok_or(Errno::STALE)?;
        Ok(Place { fd, identity })
    }

    /// The guest is told of `name` in `parent`. Returns its number.
    pub(super) fn enter(
        &mut self,
        parent: u64,
        name: &CStr,
        status: &Status,
    ) -> Result<u64, Errno> {
        let nodeid = self.find_or_add(parent, name, status)?;
        let node = self.nodes.get_mut(&nodeid).expect("just found or added");
        node.lookups = node.lookups.saturating_add(1);
        if !node.is_known_as(parent, name) {
            self.name(nodeid, parent, name);
        }
        Ok(nodeid)
    }

    /// The guest is told of a file that has no name, but this place.
    pub(super) fn enter_orphan(&mut self, fd: OwnedFd, status: &Status) -> Result<u64, Errno> {
        if self.orphans >= self.limits.orphans {
            return Err(Errno::NFILE);
        }
        let nodeid = self.find_or_add(ROOT, c"", status)?;
        let node = self.nodes.get_mut(&nodeid).expect("just found or added");
        node.lookups = node.lookups.saturating_add(1);
        if node.has_name() {
            node.at = Whereabouts::Pinned(status.identity, Arc::new(fd));
            self.orphans += 1;
        }
        Ok(nodeid)
    }

    /// The guest takes back `lookups` of the times it was told.
    pub(super) fn forget(&mut self, nodeid: u64, lookups: u64) {
        if nodeid == ROOT {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.lookups = node.lookups.saturating_sub(lookups);
            self.drop_unused(nodeid);
        }
    }

    /// The guest opens a file of this version; None if another may have the same. Whether that is what it was
    /// when it was opened before.
    pub(super) fn opened(&mut self, nodeid: u64, version: Option<Version>) -> bool {
        let Some(node) = self.nodes.get_mut(&nodeid) else {
            return false;
        };
        let before = std::mem::replace(&mut node.opened, version);
        version.is_some() && before == version
    }

    /// What the guest knows as `name` in `parent`, with its place open: its name is about to go.
    /// None if that is not how it is known here.
    pub(super) fn prepare_loss(
        &mut self,
        parent: u64,
        folder: &OwnedFd,
        name: &CStr,
    ) -> Option<u64> {
        let status = host::status_at(folder, name).ok()?;
        let nodeid = *self.numbers.get(&status.identity)?;
        if !self.nodes[&nodeid].is_known_as(parent, name) {
            return None;
        }
        // Without a place it will be stale, which is what it is then.
        let _ = self.place(nodeid);
        Some(nodeid)
    }

    /// The name went.
    pub(super) fn lose(&mut self, nodeid: Option<u64>) {
        let Some(node) = nodeid.and_then(|nodeid| self.nodes.get_mut(&nodeid)) else {
            return;
        };
        match &node.at {
            Whereabouts::Placed { identity, fd, .. } if self.orphans < self.limits.orphans => {
                node.at = Whereabouts::Pinned(*identity, fd.clone());
                self.orphans += 1;
            }
            // Nothing holds the file, so its inode number may soon be another's.
            Whereabouts::Named(identity) | Whereabouts::Placed { identity, .. } => {
                self.numbers.remove(identity);
                node.at = Whereabouts::Gone;
            }
            Whereabouts::Pinned(..) | Whereabouts::Gone => {}
        }
    }

    /// The file with this identity got another name.
    pub(super) fn moved(&mut self, identity: &Identity, parent: u64, name: &CStr) {
        if let Some(&nodeid) = self.numbers.get(identity) {
            self.name(nodeid, parent, name);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// What tells the shared folder from other files.
    pub(super) fn root(&self) -> LastingIdentity {
        let identity = self.nodes[&ROOT].identity();
        identity.expect("the root is pinned").lasting()
    }

    /// All nodes but the root, for a snapshot.
    pub(super) fn state(&self) -> (u64, Vec<NodeState>) {
        let known = self.nodes.iter().filter(|(nodeid, _)| **nodeid != ROOT);
        let nodes = known.map(|(nodeid, node)| NodeState {
            nodeid: *nodeid,
            parent: node.parent,
            name: node.name.to_bytes().to_vec(),
            lookups: node.lookups,
            orphan: !node.has_name(),
            identity: node.identity().map(|identity| identity.lasting()),
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by_key(|node| node.nodeid);
        (self.next, nodes)
    }

    /// Adds a node of another life, whose parent is there. It is gone if there is no such file now, or
    /// another one than then.
    pub(super) fn restore(&mut self, state: &NodeState, name: CString) -> Result<(), Errno> {
        let NodeState {
            nodeid,
            parent,
            lookups,
            ..
        } = *state;
        if self.nodes.len() >= self.limits.nodes {
            return Err(Errno::NFILE);
        }
        let status = match self.place(parent) {
            Ok(folder) if !state.orphan => host::status_at(&folder.fd, &name).ok(),
            _ => None,
        };
        let known = |status: &Status| self.numbers.contains_key(&status.identity);
        let same = |status: &Status| match state.identity {
            Some(identity) => identity == status.identity.lasting(),
            None => true,
        };
        let status = status.filter(|status| same(status) && !known(status));
        let parent_node = self.nodes.get_mut(&parent).ok_or(Errno::INVAL)?;
        parent_node.children += 1;
        let at = match status {
            Some(Status { identity, .. }) => {
                self.numbers.insert(identity, nodeid);
                Whereabouts::Named(identity)
            }
            None => Whereabouts::Gone,
        };
        let node = Node {
            at,
            parent,
            name,
            lookups,
            children: 0,
            opened: None,
        };
        self.nodes.insert(nodeid, node);
        Ok(())
    }

    pub(super) fn restore_next(&mut self, next: u64) {
        self.next = next;
    }

    fn find_or_add(&mut self, parent: u64, name: &CStr, status: &Status) -> Result<u64, Errno> {
        let full = self.nodes.len() >= self.limits.nodes;
        let vacant = match self.numbers.entry(status.identity) {
            Entry::Occupied(known) => return Ok(*known.get()),
            Entry::Vacant(_) if full => return Err(Errno::NFILE),
            Entry::Vacant(vacant) => vacant,
        };
        let parent_node = self.nodes.get_mut(&parent).ok_or(Errno::STALE)?;
        parent_node.children += 1;
        let nodeid = self.next;
        self.next += 1;
        vacant.insert(nodeid);
        let node = Node {
            at: Whereabouts::Named(status.identity),
            parent,
            name: name.into(),
            lookups: 0,
            children: 0,
            opened: None,
        };
        self.nodes.insert(nodeid, node);
        Ok(nodeid)
    }

    /// The file can be found there from now on.
    fn name(&mut self, nodeid: u64, parent: u64, name: &CStr) {
        if nodeid == ROOT || !self.nodes.contains_key(&parent) {
            return;
        }
        let node = self.nodes.get_mut(&nodeid).expect("the caller found it");
        if let Whereabouts::Pinned(identity, fd) = &node.at {
            let (identity, fd) = (*identity, fd.clone());
            node.at = Whereabouts::Named(identity);
            self.orphans -= 1;
            self.keep_place(nodeid, &fd);
        }
        let node = self.nodes.get_mut(&nodeid).expect("the caller found it");
        let old = std::mem::replace(&mut node.parent, parent);
        node.name = name.into();
        if old != parent {
            self.nodes
                .get_mut(&parent)
                .expect("it contains the parent")
                .children += 1;
            self.drop_child(old);
        }
    }

    /// Keeps the open place of a node that has a name.
    fn keep_place(&mut self, nodeid: u64, fd: &Arc<OwnedFd>) {
        while self.placed.len() >= self.limits.places {
            let oldest = self.placed.pop_front().expect("it is not empty");
            let Some(node) = self.nodes.get_mut(&oldest) else {
                continue;
            };
            if let Whereabouts::Placed {
                identity, recent, ..
            } = &mut node.at
            {
                if std::mem::take(recent) {
                    self.placed.push_back(oldest);
                } else {
                    node.at = Whereabouts::Named(*identity);
                }
            }
        }
        let node = self.nodes.get_mut(&nodeid).expect("the caller found it");
        if let Whereabouts::Named(identity) = node.at {
            node.at = Whereabouts::Placed {
                identity,
                fd: fd.clone(),
                recent: false,
            };
            self.placed.push_back(nodeid);
        }
    }

    fn drop_child(&mut self, nodeid: u64) {
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.children -= 1;
            self.drop_unused(nodeid);
        }
    }

    /// Drops the node if neither the guest nor a child needs it, and then perhaps its parent.
    fn drop_unused(&mut self, nodeid: u64) {
        let mut nodeid = nodeid;
        while nodeid != ROOT {
            let Some(node) = self.nodes.get(&nodeid) else {
                return;
            };
            if node.lookups > 0 || node.children > 0 {
                return;
            }
            let node = self.nodes.remove(&nodeid).expect("just seen");
            if let Some(identity) = node.identity() {
                self.numbers.remove(&identity);
            }
            if matches!(node.at, Whereabouts::Pinned(..)) {
                self.orphans -= 1;
            }
            nodeid = node.parent;
            if let Some(parent) = self.nodes.get_mut(&nodeid) {
                parent.children -= 1;
            }
        }
    }
}

/// The guest knew the file by a name that is not there any more.
fn gone(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR => Errno::STALE,
        other => other,
    }
}
