//! What there is on this host that a pod may leave behind, to be compared.
//!
//! A snapshot is a set of lines, one for each process, mount, link, qdisc, filter, network
//! namespace, cgroup, loop device, socket and file that pods are made of. Needs root.
//!
//! On a host with other work, `PODVMM_HOST_IGNORE` names parts of lines to leave out, separated by
//! commas.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Folders whose content counts. A glob of the last part is allowed for `/tmp`.
const FOLDERS: [&str; 7] = [
    "/run/podvmm",
    "/run/containerd",
    "/run/runc",
    "/run/netns",
    "/run/kata-containers",
    "/var/lib/cni",
    "/dev/shm",
];

/// What our own temporary files begin with.
pub const PREFIX: &str = "podvmm-";

/// The programs that pods are run by.
const PROGRAMS: [&str; 7] = [
    "containerd",
    "podvmm",
    "runc",
    "virtiofsd",
    "ctr",
    "pause",
    "cloud-hypervis",
];

/// What a host's systemd starts by itself, in namespaces of its own, when devices come and go or
/// when a process asks systemd for something.
const SYSTEMDS: [&str; 3] = ["(udev-worker", "(sd-", "systemd-"];

/// What there was at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    pub fn take() -> Self {
        let parts = [
            processes(),
            mounts(),
            networks(),
            cgroups(),
            loops(),
            sockets(),
            files(),
        ];
        let ignored = std::env::var("PODVMM_HOST_IGNORE").unwrap_or_default();
        let ignored: Vec<_> = ignored.split(',').filter(|part| !part.is_empty()).collect();
        let lines = parts.into_iter().flatten();
        Self(
            lines
                .filter(|line| !ignored.iter().any(|part| line.contains(part)))
                .collect(),
        )
    }

    /// What is there now and was not, and the reverse. That a process has ended is no difference.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let left = after
            .0
            .difference(&self.0)
            .map(|line| format!("left {line}"));
        let gone = self.0.difference(&after.0);
        let gone = gone
            .filter(|line| !line.starts_with("process ") && !line.starts_with("socket "))
            .map(|line| format!("gone {line}"));
        left.chain(gone).collect()
    }

    /// What differs from now, once nothing does or after `patience`.
    pub fn difference_from_now(&self, patience: Duration) -> Vec<String> {
        let deadline = Instant::now() + patience;
        loop {
            let difference = self.difference(&Self::take());
            if difference.is_empty() || Instant::now() > deadline {
                return difference;
            }
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Panics with all that differs from now.
    pub fn check(&self, what: &str) {
        let difference = self.difference_from_now(Duration::from_secs(10));
        assert!(
            difference.is_empty(),
            "{what}: the host is not as it was:\n  {}",
            difference.join("\n  ")
        );
    }
}

/// Those of a pod: by program, or by living in namespaces of their own.
fn processes() -> Vec<String> {
    let own = namespaces(Path::new("/proc/self"));
    let family = family();
    let mut lines = Vec::new();
    for entry in entries(Path::new("/proc")) {
        let name = file_name(&entry);
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        let Some(stat) = Stat::of(&entry) else {
            continue;
        };
        let is_kernel = pid == 2 || stat.parent == 2;
        let is_systemds = SYSTEMDS.iter().any(|name| stat.comm.starts_with(name));
        if is_kernel || is_systemds || family.contains(&pid) || family.contains(&stat.parent) {
            continue;
        }
        // A zombie has no namespaces any more: its parent decides when it is gone.
        let theirs = namespaces(&entry);
        let apart = stat.state != 'Z' && theirs.iter().any(Option::is_some) && theirs != own;
        if apart || PROGRAMS.iter().any(|name| stat.comm.starts_with(name)) {
            let arguments = fs::read(entry.join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            let arguments: String = arguments.chars().take(200).collect();
            let Stat {
                comm,
                state,
                parent,
                started,
            } = stat;
            // Neither state nor parent tell one process from another.
            let _ = (state, parent);
            lines.push(format!("process {pid} {comm} [{started}]: {arguments}"));
        }
    }
    lines
}

/// This process and its ancestors; what they started is no pod's.
fn family() -> BTreeSet<u32> {
    let mut family = BTreeSet::new();
    let mut pid = std::process::id();
    while pid > 1 && family.insert(pid) {
        pid = Stat::of(&PathBuf::from(format!("/proc/{pid}"))).map_or(0, |stat| stat.parent);
    }
    family
}

fn namespaces(process: &Path) -> [Option<PathBuf>; 3] {
    ["mnt", "pid", "net"].map(|kind| fs::read_link(process.join("ns").join(kind)).ok())
}

/// Some of proc_pid_stat(5).
struct Stat {
    comm: String,
    state: char,
    parent: u32,
    started: u64,
}

impl Stat {
    fn of(process: &Path) -> Option<Self> {
        let text = fs::read_to_string(process.join("stat")).ok()?;
        let (start, rest) = text.rsplit_once(')')?;
        let fields: Vec<_> = rest.split_whitespace().collect();
        Some(Self {
            comm: start.split_once('(')?.1.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            started: fields.get(19)?.parse().ok()?,
        })
    }
}

fn mountinfo() -> Vec<(String, String)> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let fields = text.lines().filter_map(|line| {
        let (places, kind) = line.split_once(" - ")?;
        let point = places.split(' ').nth(4)?;
        Some((point.to_owned(), kind.split(' ').next()?.to_owned()))
    });
    fields.collect()
}

fn mounts() -> Vec<String> {
    // One place may be mounted on more than once.
    let mut times = BTreeMap::new();
    for mount in mountinfo() {
        *times.entry(mount).or_insert(0) += 1;
    }
    let numbered = times.into_iter().flat_map(|((point, kind), times)| {
        (1..=times).map(move |time| format!("mount {point} {kind} {time}"))
    });
    numbered.collect()
}

/// Namespaces with a name, and what is in them and in the host's own.
fn networks() -> Vec<String> {
    let mut lines = links_of("host", None);
    for (point, kind) in mountinfo() {
        if kind == "nsfs" {
            lines.push(format!("namespace {point}"));
            lines.extend(links_of(&point, Some(Path::new(&point))));
        }
    }
    lines
}

fn links_of(name: &str, namespace: Option<&Path>) -> Vec<String> {
    let mut lines = Vec::new();
    // The devices that can have filters.
    let mut queued = BTreeSet::new();
    for qdisc in json(namespace, &["tc", "-j", "qdisc", "show"]) {
        let (device, kind) = (text(&qdisc, "dev"), text(&qdisc, "kind"));
        lines.push(format!("qdisc {name} {device} {kind}"));
        if !matches!(kind.as_str(), "noqueue" | "noop") {
            queued.insert(device);
        }
    }
    for link in json(namespace, &["ip", "-j", "link"]) {
        let device = text(&link, "ifname");
        lines.push(format!("link {name} {device}"));
        if !queued.contains(&device) {
            continue;
        }
        for parent in ["ingress", "egress", "root"] {
            let shown = json(
                namespace,
                &["tc", "-j", "filter", "show", "dev", &device, parent],
            );
            let filters = shown
                .iter()
                .filter(|filter| filter.get("options").is_some());
            lines.extend(filters.map(|filter| format!("filter {name} {device} {parent} {filter}")));
        }
    }
    lines
}

fn text(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or_default().to_owned()
}

/// What a program prints; nothing where its link or namespace has just gone.
fn json(namespace: Option<&Path>, words: &[&str]) -> Vec<Value> {
    let mut command = match namespace {
        None => Command::new(words[0]),
        Some(path) => {
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--net={}", path.display()))
                .arg(words[0]);
            command
        }
    };
    let output = command.args(&words[1..]).output();
    let output = output.expect("iproute2 and util-linux are installed; resources/test does that");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Where hierarchies of cgroups are mounted.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = mountinfo().into_iter();
    let mounts = mounts.filter(|(_, kind)| kind == "cgroup" || kind == "cgroup2");
    mounts.map(|(point, _)| point.into()).collect()
}

fn cgroups() -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = hierarchies();
    while let Some(folder) = folders.pop() {
        let below = entries(&folder).into_iter().filter(|path| path.is_dir());
        for path in below {
            lines.push(format!("cgroup {}", path.display()));
            folders.push(path);
        }
    }
    lines
}

/// A group in every hierarchy, such as the kubelet makes for a pod; dropped, it is removed if empty.
#[derive(Debug)]
pub struct Cgroup(String);

impl Cgroup {
    /// Makes `/name`.
    pub fn new(name: &str) -> Self {
        for hierarchy in hierarchies() {
            let folder = hierarchy.join(name);
            fs::create_dir(&folder).unwrap_or_else(|error| {
                panic!("{}: {error}; cgroups need root", folder.display());
            });
        }
        Self(format!("/{name}"))
    }

    /// Its path in each hierarchy.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for hierarchy in hierarchies() {
            // What is in it is for a snapshot to find.
            let _ = fs::remove_dir(hierarchy.join(&self.0[1..]));
        }
    }
}

fn loops() -> Vec<String> {
    let devices = entries(Path::new("/sys/block")).into_iter();
    let lines = devices.filter_map(|device| {
        let file = fs::read_to_string(device.join("loop/backing_file")).ok()?;
        Some(format!("loop {} {}", file_name(&device), file.trim()))
    });
    lines.collect()
}

/// Sockets with a name that pods and what runs them listen on.
fn sockets() -> Vec<String> {
    let text = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7));
    let ours = names.filter(|name| name.contains("containerd") || name.contains("podvmm"));
    ours.map(|name| format!("socket {name}")).collect()
}

fn files() -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders: Vec<PathBuf> = FOLDERS.iter().map(PathBuf::from).collect();
    for entry in entries(&std::env::temp_dir()) {
        if file_name(&entry).starts_with(PREFIX) {
            lines.push(format!("file {}", entry.display()));
        }
    }
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            if !is_shared(&path) {
                lines.push(format!("file {}", path.display()));
            }
            if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
                folders.push(path);
            }
        }
    }
    lines
}

/// Whether it is a folder that all containerds of a host and their clients have together: they make it
/// once, and what is in it is each pod's.
fn is_shared(path: &Path) -> bool {
    let path = path.strip_prefix("/run/containerd").unwrap_or(path);
    ["fifo", "s", "runc"].map(Path::new).contains(&path) || path.parent() == Some(Path::new("runc"))
}

/// What is in a folder; nothing where there is none.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect()
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Whether this host's KVM interprets the guest's kernel, which takes seconds to start a program then.
pub fn is_emulating() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// How large a test is: as what users do, or smaller where KVM emulates. `PODVMM_TEST_PERCENT` is
/// how much of the first there is; by default all, and 1 where the host's own processors are emulated.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub real: usize,
    pub emulated: usize,
}

impl Size {
    /// The one for this host.
    pub fn here(self) -> usize {
        match is_emulating() {
            true => self.emulated,
            false => (self.real * percent() / 100).max(self.emulated),
        }
    }
}

fn percent() -> usize {
    if let Ok(text) = std::env::var("PODVMM_TEST_PERCENT") {
        return text.parse().expect("it is a number");
    }
    // QEMU's software CPU: an exit takes milliseconds there.
    let virt = Command::new("systemd-detect-virt").output();
    match virt.is_ok_and(|output| output.stdout == b"qemu\n") {
        true => 1,
        false => 100,
    }
}

/// Every thread of the host's programs and the call it waits in: what to look at when something hangs.
pub fn threads() -> String {
    let columns = "pid,tid,ppid,stat,etimes,wchan:24,comm,args";
    let output = Command::new("ps").args(["-eLo", columns]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_else(|error| format!("ps: {error}"));
    // The kernel's own threads have their names in brackets.
    let ours = text.lines().filter(|line| !line.ends_with(']'));
    let short = ours.map(|line| line.chars().take(200).collect::<String>());
    short.collect::<Vec<_>>().join("\n")
}

/// Panics unless this is root, saying why that is needed.
pub fn need_root() {
    let uid = fs::metadata("/proc/self").expect("/proc is mounted").uid();
    assert_eq!(
        uid, 0,
        "tests of pods need root, for networks, mounts and cgroups"
    );
}
