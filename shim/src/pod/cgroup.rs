//! The pod's cgroup on the host: the shim and the VM are in it. Hosts have cgroups of version 2, or a
//! hierarchy for each controller (kernel, admin-guide/cgroup-v1).
//!
//! Of version 2 under systemd it is a scope of systemd's ([`crate::host::systemd`]), if its path is of
//! systemd's form. Others are made by hand, as folders.

mod figures;
mod limits;

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use protocol::containerd::figures::Metrics;

use crate::host::systemd::{self, Property, Value};

pub(crate) use limits::Limits;

/// What the VM and the shim may open of the host's devices; a guest that has podvmm open another
/// gets nothing. Making nodes is not using them, and pods unpack images.
const DEVICES: [(&str, &str); 15] = [
    ("/dev/kvm", "rw"),
    ("/dev/net/tun", "rw"),
    ("/dev/vhost-net", "rw"),
    ("/dev/vhost-vsock", "rw"),
    ("/dev/userfaultfd", "rw"),
    ("/dev/null", "rw"),
    ("/dev/zero", "rw"),
    ("/dev/full", "rw"),
    ("/dev/random", "rw"),
    ("/dev/urandom", "rw"),
    ("/dev/tty", "rw"),
    ("/dev/ptmx", "rw"),
    ("char-pts", "rw"),
    ("char-*", "m"),
    ("block-*", "m"),
];

/// How long a cgroup is waited for that a process is about to leave, and how often to look.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// What could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cgroup {}", .path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Systemd(#[from] systemd::Error),
    #[error("systemd started {unit}, but not as the cgroup {}", .path.display())]
    Elsewhere { unit: String, path: PathBuf },
}

/// One hierarchy: where it is mounted, and its controllers; none for version 2.
#[derive(Debug, PartialEq)]
struct Hierarchy {
    root: PathBuf,
    controllers: Vec<String>,
}

/// The hierarchies in the text of /proc/self/mountinfo.
fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let known = [
        "cpu",
        "cpuacct",
        "cpuset",
        "memory",
        "pids",
        "blkio",
        "devices",
        "freezer",
        "hugetlb",
        "net_cls",
        "net_prio",
        "perf_event",
    ];
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let root = PathBuf::from(left.split(' ').nth(4)?);
        let mut right = right.split(' ');
        let kind = right.next()?;
        let options = right.nth(1)?.split(',');
        let controllers: Vec<_> = options
            .filter(|option| known.contains(option))
            .map(String::from)
            .collect();
        match kind {
            "cgroup2" => Some(Hierarchy {
                root,
                controllers: Vec::new(),
            }),
            "cgroup" if !controllers.is_empty() => Some(Hierarchy { root, controllers }),
            _ => None,
        }
    };
    let mut found: Vec<_> = mountinfo.lines().filter_map(parse).collect();
    // Beside hierarchies of version 1 that of version 2 has nothing to limit.
    if found
        .iter()
        .any(|hierarchy| !hierarchy.controllers.is_empty())
    {
        found.retain(|hierarchy| !hierarchy.controllers.is_empty());
    }
    found
}

/// A unit of systemd's by the three parts of an OCI `cgroupsPath` of systemd's form,
/// `SLICE:PREFIX:NAME`: the slice, and the scope in it.
fn unit(cgroups_path: &str) -> Option<(&str, String)> {
    let parts: Vec<_> = cgroups_path.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return None;
    };
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    slice
        .ends_with(".slice")
        .then(|| (slice, format!("{prefix}-{name}.scope")))
}

/// Where an OCI `cgroupsPath` is below a hierarchy's root. Of systemd's, `a-b.slice` is below
/// `a.slice`, and `-.slice` is the root (systemd.slice(5)).
fn relative(cgroups_path: &str) -> Option<PathBuf> {
    let path = match unit(cgroups_path) {
        Some((slice, scope)) => {
            let stem = slice.strip_suffix(".slice")?;
            let mut path = PathBuf::new();
            if stem != "-" {
                let ends = stem.match_indices('-').map(|(at, _)| at);
                for end in ends.chain([stem.len()]).filter(|end| *end > 0) {
                    path.push(format!("{}.slice", &stem[..end]));
                }
            }
            path.join(scope)
        }
        None if cgroups_path.split(':').count() == 3 => return None,
        None => PathBuf::from(cgroups_path),
    };
    let names = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)));
    let path: PathBuf = names.collect();
    (!path.as_os_str().is_empty()).then_some(path)
}

/// The cgroup in one hierarchy.
#[derive(Debug)]
struct Place {
    hierarchy: Hierarchy,
    path: PathBuf,
}

impl Place {
    fn is_unified(&self) -> bool {
        self.hierarchy.controllers.is_empty()
    }

    /// Whether what the controller counts is there. In version 2 all are at one place.
    fn has(&self, controller: &str) -> bool {
        let names = &self.hierarchy.controllers;
        names.is_empty() || names.iter().any(|name| name == controller)
    }
}

/// A pod's cgroup, with this process in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    places: Vec<Place>,
    made: Vec<PathBuf>,
    /// The unit, if it is systemd's.
    scope: Option<String>,
    /// Where this process was before, in a hierarchy of version 2.
    before: Option<PathBuf>,
    limits: Mutex<Limits>,
}

/// Whether the host has cgroups of version 2 alone.
pub(crate) fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

impl Cgroup {
    /// Makes the cgroup that `cgroups_path` names, if it is not there, and moves this process into it.
    /// What it starts from now on begins there. None if the path names none.
    pub(crate) fn enter(cgroups_path: &str, limits: Limits) -> Result<Option<Self>, Error> {
        let Some(relative) = relative(cgroups_path) else {
            return Ok(None);
        };
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let place = |hierarchy: Hierarchy| Place {
            path: hierarchy.root.join(&relative),
            hierarchy,
        };
        let places: Vec<_> = hierarchies(&mountinfo).into_iter().map(place).collect();
        let before = places.first().filter(|place| place.is_unified());
        let mut cgroup = Self {
            before: before.and_then(|place| own(&place.hierarchy.root)),
            places,
            made: Vec::new(),
            scope: None,
            limits: Mutex::new(limits),
        };
        let is_unified = cgroup.places.iter().all(Place::is_unified);
        match unit(cgroups_path) {
            Some((slice, scope)) if is_unified && systemd::is_running() => {
                cgroup.start(slice, scope, limits)?;
            }
            _ => {
                let made = cgroup.make(&relative).and_then(|()| cgroup.take(0));
                if let Err(error) = made {
                    remove(&cgroup.made);
                    return Err(error);
                }
                cgroup.limit();
            }
        }
        Ok(Some(cgroup))
    }

    /// Has systemd make it, with this process in it.
    fn start(&mut self, slice: &str, scope: String, limits: Limits) -> Result<(), Error> {
        let text = |name, value: &str| Property::new(name, Value::Text(value.into()));
        let flag = |name, value| Property::new(name, Value::Flag(value));
        let mut properties = vec![
            text("Description", &format!("podvmm pod {scope}")),
            text("Slice", slice),
            // Or systemd would take away the controllers that it needs nowhere itself.
            flag("Delegate", true),
            flag("CPUAccounting", true),
            flag("MemoryAccounting", true),
            flag("IOAccounting", true),
            flag("TasksAccounting", true),
            // It is containerd that ends pods, when the host goes down as well.
            flag("DefaultDependencies", false),
            // One whose VM the kernel killed would stay as a failed unit.
            text("CollectMode", "inactive-or-failed"),
            text("DevicePolicy", "strict"),
            allow(&DEVICES),
            Property::new("PIDs", Value::Numbers(vec![std::process::id()])),
        ];
        let limits = limits.properties().into_iter();
        properties.extend(limits.filter(|limit| limit.value != Value::Number(u64::MAX)));
        systemd::start(&scope, &properties)?;
        let path = self.places.first().map(|place| place.path.clone());
        let path = path.unwrap_or_default();
        self.scope = Some(scope.clone());
        if path.is_dir() {
            return Ok(());
        }
        self.leave()?;
        stop(&scope);
        Err(Error::Elsewhere { unit: scope, path })
    }

    fn make(&mut self, relative: &Path) -> Result<(), Error> {
        for place in &self.places {
            let mut path = place.hierarchy.root.clone();
            for name in relative {
                let parent = path.clone();
                path.push(name);
                if place.is_unified() {
                    enable_controllers(&parent);
                }
                match fs::create_dir(&path) {
                    Ok(()) => self.made.push(path.clone()),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(source) => return Err(Error::File { path, source }),
                }
                if !place.is_unified() && place.has("cpuset") {
                    // A new cpuset of version 1 takes no process before it is told where its
                    // processes may run.
                    for file in ["cpuset.cpus", "cpuset.mems"] {
                        inherit(&parent.join(file), &path.join(file));
                    }
                }
            }
        }
        Ok(())
    }

    /// Moves a process there; 0 is this one. What it has used so far stays where it was. systemd
    /// leaves what is in a delegated scope to the shim that asked for the scope.
    pub(crate) fn take(&self, pid: u32) -> Result<(), Error> {
        let mut places = self.places.iter();
        places.try_for_each(|place| move_to(&place.path, pid))
    }

    /// Moves this process back to where it was, or else to the root of each hierarchy, so that the
    /// cgroup can go.
    pub(crate) fn leave(&self) -> Result<(), Error> {
        if let Some(before) = &self.before
            && move_to(before, 0).is_ok()
        {
            return Ok(());
        }
        self.places
            .iter()
            .try_for_each(|place| move_to(&place.hierarchy.root, 0))
    }

    /// What was made for it, to be removed in the opposite order.
    pub(crate) fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// The unit of systemd's that it is, if it is one.
    pub(crate) fn scope(&self) -> Option<&str> {
        self.scope.as_deref()
    }

    /// Lets what is in it read and write the disk at `path`, if there is one.
    pub(crate) fn allow_disk(&self, path: &Path) -> Result<(), Error> {
        let Some(scope) = &self.scope else {
            return Ok(());
        };
        let is_disk = fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
        if is_disk && let Ok(path) = fs::canonicalize(path) {
            let path = path.to_string_lossy();
            systemd::change(scope, &[allow(&[(&path, "rw")])])?;
        }
        Ok(())
    }

    /// Changes its limits, with `update` as they are.
    pub(crate) fn update(&self, update: impl FnOnce(Limits) -> Limits) {
        {
            let mut limits = self.limits.lock().expect("a panic ends the process");
            let before = *limits;
            *limits = update(before);
            if *limits == before {
                return;
            }
        }
        self.limit();
    }

    /// Holds it to its limits. Where that is not possible the guest still keeps them.
    fn limit(&self) {
        let limits = *self.limits.lock().expect("a panic ends the process");
        if let Some(scope) = &self.scope {
            if let Err(error) = systemd::change(scope, &limits.properties()) {
                log::warn!("limits of the pod: {}", api::chain(&error).join(": "));
            }
            return;
        }
        for place in self.places.iter().filter(|place| place.is_unified()) {
            for (file, value) in limits.files() {
                let path = place.path.join(file);
                // It has what it is to have where there is no such controller, and no limit.
                let default = Limits::default().files();
                if !path.exists() && default.contains(&(file, value.clone())) {
                    continue;
                }
                if let Err(error) = fs::write(&path, &value) {
                    log::warn!("write {value} to {}: {error}", path.display());
                }
            }
        }
    }

    /// What the pod has used of the host: the VM with its guest, and the shim.
    pub(crate) fn figures(&self) -> Metrics {
        figures::of(&self.places)
    }
}

fn allow(devices: &[(&str, &str)]) -> Property {
    let pair = |(path, access): &(&str, &str)| ((*path).to_owned(), (*access).to_owned());
    Property::new(
        "DeviceAllow",
        Value::Pairs(devices.iter().map(pair).collect()),
    )
}

/// The cgroup that this process is in, below the hierarchy of version 2 mounted at `root`.
fn own(root: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(root.join(path))
}

/// Lets what is below `folder` be limited and counted by all that the folder itself is (kernel,
/// admin-guide/cgroup-v2, Enabling and Disabling).
fn enable_controllers(folder: &Path) {
    let available = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    let control = folder.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    let is_enabled = |controller: &&str| enabled.split_whitespace().any(|it| it == *controller);
    for controller in available.split_whitespace().filter(|it| !is_enabled(it)) {
        // One at a time: a host without one of them has the others.
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            log::debug!("enable {controller} in {}: {error}", folder.display());
        }
    }
}

/// Removes cgroups, the last made first, as far as no process is in them. One that was killed may be there for a
/// moment more, while the kernel frees its memory; and so may the pod's own shim, which is in them, if containerd has
/// another one clean up while it ends.
pub(crate) fn remove(made: &[PathBuf]) {
    let deadline = Instant::now() + PATIENCE;
    for path in made.iter().rev() {
        let is_full =
            |error: &io::Error| error.kind() == io::ErrorKind::ResourceBusy && !has_cgroups(path);
        let mut removed = fs::remove_dir(path);
        while removed.as_ref().is_err_and(is_full) && Instant::now() < deadline {
            thread::sleep(PAUSE);
            removed = fs::remove_dir(path);
        }
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("remove cgroup {}: {error}", path.display());
        }
    }
}

/// Whether there are others below a cgroup, which are not its pod's.
fn has_cgroups(path: &Path) -> bool {
    let mut entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

/// Has systemd take a scope away.
pub(crate) fn stop(scope: &str) {
    if let Err(error) = systemd::stop(scope) {
        log::warn!("clean up {scope}: {}", api::chain(&error).join(": "));
    }
}

fn move_to(path: &Path, pid: u32) -> Result<(), Error> {
    let procs = path.join("cgroup.procs");
    fs::write(&procs, pid.to_string()).map_err(|source| Error::File {
        path: procs,
        source,
    })
}

fn inherit(from: &Path, to: &Path) {
    let is_empty = fs::read_to_string(to).is_ok_and(|text| text.trim().is_empty());
    if is_empty && let Ok(value) = fs::read(from) {
        // If it cannot be, entering the cgroup says so.
        let _ = fs::write(to, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_systemds_is_slices_within_slices() {
        let path = |text| relative(text).map(|path| path.display().to_string());
        let slice = "kubepods-burstable-podA_B.slice:cri-containerd:xyz";
        let expected = "kubepods.slice/kubepods-burstable.slice/\
            kubepods-burstable-podA_B.slice/cri-containerd-xyz.scope";
        assert_eq!(path(slice).as_deref(), Some(expected));
        assert_eq!(path("/default/../demo").as_deref(), Some("default/demo"));
        assert_eq!((path(""), path("/"), path("a:b:c")), (None, None, None));
    }

    #[test]
    fn hierarchies_of_version_1_come_before_that_of_version_2() {
        let v1 = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            31 25 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let v2 = "32 25 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let roots = |text: &str| {
            let found = hierarchies(text);
            found
                .iter()
                .map(|one| one.root.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(roots(&format!("{v1}{v2}")), ["/sys/fs/cgroup/memory"]);
        assert_eq!(roots(v2), ["/sys/fs/cgroup/unified"]);
    }

    #[test]
    fn the_root_slice_and_the_default_one_have_their_places() {
        let path = |text| relative(text).map(|path| path.display().to_string());
        assert_eq!(path("-.slice:p:n").as_deref(), Some("p-n.scope"));
        assert_eq!(path(":p:n").as_deref(), Some("system.slice/p-n.scope"));
        let named = unit("a-b.slice:cri-containerd:x");
        assert_eq!(named, Some(("a-b.slice", "cri-containerd-x.scope".into())));
        assert_eq!((unit("/default/x"), unit("a:b:c")), (None, None));
    }

    #[test]
    fn all_controllers_are_enabled_that_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text| fs::write(folder.path().join(file), text).unwrap();
        write("cgroup.controllers", "cpu memory pids\n");
        write("cgroup.subtree_control", "cpu pids\n");
        enable_controllers(folder.path());
        let control = folder.path().join("cgroup.subtree_control");
        assert_eq!(fs::read_to_string(control).unwrap(), "+memory");
    }
}
