//! Which file each number of the guest's stands for.
//!
//! A node remembers its folder and its name there, and which file that was. Its place (an O_PATH
//! descriptor) is opened when it is needed, from the nearest folder that has one, and checked to be
//! the same file still: the host may have changed the tree. Places are kept for a while, the least
//! used go first. A file whose name was removed can only be found by its place, so that is kept
//! until the guest forgets the file.
//!
//! ```text
//!            ┌───────── evicted ────────┐
//!            ▼                          │
//!          Named ── needed, opened ─▶ Placed ── name removed ─▶ Orphan
//! ```

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::abi::ROOT;
use super::host::{self, Identity, Status};
use super::state::NodeState;

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
    /// The type bits of its mode, which never change.
    pub(super) kind: u32,
}

#[derive(Debug)]
struct Node {
    identity: Identity,
    kind: u32,
    /// Its folder's number. The root's is its own.
    parent: u64,
    name: CString,
    /// How often the guest was told of it and has not said to forget.
    lookups: u64,
    /// Nodes whose parent it is.
    children: u64,
    fd: Option<Arc<OwnedFd>>,
    /// Used since it was last considered for eviction.
    recent: bool,
    orphan: bool,
}

#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Identity, u64>,
    /// The next number. None is used twice, so there are no generations.
    next: u64,
    /// Nodes that got a place, in the order they did. May name some that are gone.
    placed: VecDeque<u64>,
    orphans: usize,
    limits: Limits,
}

impl Nodes {
    /// Knows only the root.
    pub(super) fn new(root: Arc<OwnedFd>, limits: Limits) -> Result<Self, Errno> {
        let status = host::status(&root)?;
        let node = Node {
            identity: status.identity,
            kind: status.kind(),
            parent: ROOT,
            name: CString::default(),
            lookups: 1,
            children: 0,
            fd: Some(root),
            recent: false,
            orphan: false,
        };
        Ok(Self {
            numbers: HashMap::from([(node.identity, ROOT)]),
            nodes: HashMap::from([(ROOT, node)]),
            next: ROOT + 1,
            placed: VecDeque::new(),
            orphans: 0,
            limits,
        })
    }

    /// Where the file is. ESTALE if it is not where it was.
    pub(super) fn place(&mut self, nodeid: u64) -> Result<Place, Errno> {
        // Up to the nearest folder with a place. Were there a ring, it would not be longer than
        // there are nodes.
        let mut way = Vec::new();
        let mut at = nodeid;
        let mut fd = loop {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            if let Some(fd) = &node.fd {
                node.recent = true;
                break fd.clone();
            }
            if node.orphan || way.len() > self.nodes.len() {
                return Err(Errno::STALE);
            }
            way.push(at);
            at = self.nodes[&at].parent;
        };
        for at in way.into_iter().rev() {
            let node = &self.nodes[&at];
            fd = Arc::new(host::place_at(&fd, &node.name).map_err(gone)?);
            if host::status(&fd)?.identity != node.identity {
                return Err(Errno::STALE);
            }
            self.keep_place(at, &fd);
        }
        let node = &self.nodes[&nodeid];
        Ok(Place {
            fd,
            identity: node.identity,
            kind: node.kind,
        })
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
        if node.orphan || node.parent != parent || node.name.as_c_str() != name {
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
        if !node.orphan {
            node.orphan = true;
            node.fd = Some(Arc::new(fd));
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
        let node = &self.nodes[&nodeid];
        if node.orphan || node.parent != parent || node.name.as_c_str() != name {
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
        node.orphan = true;
        if node.fd.is_some() {
            if self.orphans < self.limits.orphans {
                self.orphans += 1;
            } else {
                node.fd = None;
            }
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

    /// All but the root, for a snapshot.
    pub(super) fn state(&self) -> (u64, Vec<NodeState>) {
        let known = self.nodes.iter().filter(|(nodeid, _)| **nodeid != ROOT);
        let nodes = known.map(|(nodeid, node)| NodeState {
            nodeid: *nodeid,
            parent: node.parent,
            name: node.name.to_bytes().to_vec(),
            lookups: node.lookups,
            orphan: node.orphan,
        });
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by_key(|node| node.nodeid);
        (self.next, nodes)
    }

    /// Adds a node of another life, whose parent is there. It is an orphan if there is no such
    /// file now.
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
        let status = status.filter(|status| !known(status));
        let parent_node = self.nodes.get_mut(&parent).ok_or(Errno::INVAL)?;
        parent_node.children += 1;
        let root = self.nodes[&ROOT].identity;
        if let Some(status) = &status {
            self.numbers.insert(status.identity, nodeid);
        }
        let node = Node {
            identity: status.map_or(root, |status| status.identity),
            kind: status.map_or(0, |status| status.kind()),
            parent,
            name,
            lookups,
            children: 0,
            fd: None,
            recent: false,
            orphan: status.is_none(),
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
            identity: status.identity,
            kind: status.kind(),
            parent,
            name: name.into(),
            lookups: 0,
            children: 0,
            fd: None,
            recent: false,
            orphan: false,
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
        if std::mem::take(&mut node.orphan)
            && let Some(fd) = node.fd.take()
        {
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

    fn keep_place(&mut self, nodeid: u64, fd: &Arc<OwnedFd>) {
        while self.placed.len() >= self.limits.places {
            let oldest = self.placed.pop_front().expect("it is not empty");
            let Some(node) = self.nodes.get_mut(&oldest) else {
                continue;
            };
            if node.orphan {
                continue;
            }
            if std::mem::take(&mut node.recent) {
                self.placed.push_back(oldest);
            } else {
                node.fd = None;
            }
        }
        let node = self.nodes.get_mut(&nodeid).expect("the caller found it");
        node.fd = Some(fd.clone());
        self.placed.push_back(nodeid);
    }

    fn drop_child(&mut self, nodeid: u64) {
        if let Some(node) = self.nodes.get_mut(&nodeid) {
            node.children -= 1;
            self.drop_unused(nodeid);
        }
    }

    /// Drops the node if nobody needs it, and then perhaps its parent.
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
            if self.numbers.get(&node.identity) == Some(&nodeid) {
                self.numbers.remove(&node.identity);
            }
            if node.orphan && node.fd.is_some() {
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
