//! What a process costs, and a podvmm beside its guest: proc_pid_smaps(5), proc_pid_stat(5), cgroups(7).

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Less than a pod's guest has unless told otherwise, and more than anything else of podvmm's: heaps of
/// threads, of 64 MiB each, may follow on each other.
const LEAST_RAM: u64 = 512 << 20;

/// A line of maps, with what smaps says of it.
#[derive(Debug, Default)]
struct Mapping {
    range: Range<u64>,
    file: PathBuf,
    rss_bytes: u64,
    /// Mapped with `MAP_NORESERVE`, as guest RAM is.
    reserves_nothing: bool,
}

/// Resident memory of a process without what lies in `ram`, in bytes.
pub fn resident_without(pid: u32, ram: &[Range<u64>]) -> u64 {
    let mappings = mappings(pid).into_iter();
    let others = mappings.filter(|mapping| {
        let start = &mapping.range.start;
        !ram.iter().any(|range| range.contains(start))
    });
    others.map(|mapping| mapping.rss_bytes).sum()
}

/// Host addresses of a podvmm's guest RAM. `files` are those mapped over it.
pub fn guest_ram(pid: u32, files: &[PathBuf]) -> Vec<Range<u64>> {
    let files = files.iter().map(fs::canonicalize);
    let files: Vec<_> = files.map(|file| file.expect("it was booted")).collect();
    runs(&mappings(pid), &files)
}

/// Where guest RAM and what is mapped over it follow on each other for long enough.
fn runs(mappings: &[Mapping], files: &[PathBuf]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for mapping in mappings {
        if !mapping.reserves_nothing && !files.contains(&mapping.file) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == mapping.range.start => run.end = mapping.range.end,
            _ => runs.push(mapping.range.clone()),
        }
    }
    runs.retain(|run| run.end - run.start >= LEAST_RAM);
    runs
}

fn mappings(pid: u32) -> Vec<Mapping> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
    parse(&smaps)
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(range) = range(line) {
            let file = line.splitn(6, ' ').nth(5).unwrap_or_default().trim();
            mappings.push(Mapping {
                range,
                file: Path::new(file).into(),
                ..Mapping::default()
            });
        }
        let Some(mapping) = mappings.last_mut() else {
            continue;
        };
        if let Some(kib) = line.strip_prefix("Rss:") {
            let kib = kib.trim().trim_end_matches(" kB");
            mapping.rss_bytes = kib.parse::<u64>().expect("smaps counts in kB") << 10;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            mapping.reserves_nothing = flags.split_whitespace().any(|flag| flag == "nr");
        }
    }
    mappings
}

/// The addresses of a mapping, from the line of smaps that begins it.
fn range(line: &str) -> Option<Range<u64>> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

/// Some of proc_pid_stat(5), of a process or a thread.
#[derive(Debug)]
pub struct Stat {
    /// The first bytes of it.
    pub name: String,
    /// Z is one that has ended and that its parent has not waited for.
    pub state: char,
    /// Processor time, in user space and in the kernel.
    pub ticks: u64,
}

impl Stat {
    /// From its folder in /proc; nothing if it has ended.
    pub fn of(folder: &Path) -> Option<Self> {
        let stat = fs::read_to_string(folder.join("stat")).ok()?;
        let (start, rest) = stat.rsplit_once(')')?;
        let fields: Vec<_> = rest.split_whitespace().collect();
        // utime and stime, the 14th and 15th field of all.
        let ticks = fields.get(11..13)?.iter();
        Some(Self {
            name: start.split_once('(')?.1.to_owned(),
            state: fields.first()?.chars().next()?,
            ticks: ticks.filter_map(|field| field.parse::<u64>().ok()).sum(),
        })
    }
}

/// What the control group of a process is charged for the kernel's own memory, in either kind.
pub fn kernel_bytes(pid: u32) -> Option<u64> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    for group in groups.lines() {
        let mut fields = group.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        if controllers.split(',').any(|name| name == "memory") {
            let file = format!("/sys/fs/cgroup/memory{path}/memory.kmem.usage_in_bytes");
            return fs::read_to_string(file).ok()?.trim().parse().ok();
        }
        let file = format!("/sys/fs/cgroup{path}/memory.stat");
        let stat = fs::read_to_string(file).unwrap_or_default();
        let kernel = stat.lines().find_map(|line| line.strip_prefix("kernel "));
        if let Some(bytes) = kernel {
            return bytes.trim().parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
10000000-11000000 rw-p 00000000 00:00 0
Rss:                  12 kB
VmFlags: rd wr mr mw me nr sd
11000000-12000000 rw-p 00000000 08:01 9                                  /boot/a kernel
Rss:                 100 kB
VmFlags: rd wr mr mw me sd
12000000-32000000 rw-p 00000000 00:00 0
Rss:                1000 kB
VmFlags: rd wr mr mw me nr sd
32000000-32001000 r-xp 00000000 08:01 7                                  /bin/podvmm
Rss:                   4 kB
VmFlags: rd ex mr mw me sd
33000000-34000000 rw-p 00000000 00:00 0
Rss:                   8 kB
VmFlags: rd wr mr mw me nr sd
";

    #[test]
    fn guest_ram_is_what_is_large_and_reserves_nothing() {
        let mappings = parse(SMAPS);
        let ram = runs(&mappings, &["/boot/a kernel".into()]);
        let expected = 0x1000_0000..0x3200_0000;
        assert_eq!(ram, std::slice::from_ref(&expected));
        let rss: Vec<_> = mappings.iter().map(|mapping| mapping.rss_bytes).collect();
        assert_eq!(rss, [12, 100, 1000, 4, 8].map(|kib| kib << 10));
    }
}
