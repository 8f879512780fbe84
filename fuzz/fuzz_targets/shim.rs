//! Any guest's agent at the shim, and almost any words of containerd's: however the agent answers, each call ends,
//! figures and refusals are bounded, and little memory is taken; a description is read or refused, what the guest
//! gets of it has nothing of the host's, and no size is larger than the configuration has it.

mod heap;
mod json;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use protocol::agent::messages::CgroupStats;
use protocol::agent::oci::{LinuxResources, Spec};
use protocol::containerd::figures::Metrics;
use protocol::ttrpc::CallError;
use serde_json::{Value, json};

use crate::agent::{Agent, Stream, Target};
use crate::config::Config;
use crate::containerd::arguments::Arguments;
use crate::containerd::service::config_path;
use crate::containerd::start::Asked;
use crate::host::cpus;
use crate::pod::figures::{Bounds, of_guest};
use crate::pod::size::{Limits, size};
use crate::pod::spec;
use json::Change;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Agent(Vec<(u8, Vec<Frame<'a>>)>),
    Figures(&'a [u8], u32, u32),
    Spec(Vec<(u16, Change)>, u8),
    Text(&'a str),
    Asked(&'a [u8]),
    Cpus(Vec<(u16, u16)>, &'a str),
}

/// What an agent sends once it is asked.
#[derive(Arbitrary, Debug)]
struct Frame<'a> {
    /// Of another stream than the one that waits.
    stream: Option<u32>,
    is_request: bool,
    /// By how much its length is a lie.
    lie: Option<u32>,
    body: Body<'a>,
}

#[derive(Arbitrary, Debug)]
enum Body<'a> {
    Bytes(&'a [u8]),
    Answer(&'a [u8]),
    Refusal(i32, &'a str),
    Stats(Figures),
}

/// Figures as an agent has them, of which the numbers may be anything.
#[derive(Arbitrary, Debug)]
struct Figures {
    numbers: Vec<u64>,
    names: Vec<(u8, String)>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

impl Figures {
    fn stats(&self) -> CgroupStats {
        let mut numbers = self.numbers.iter().copied();
        let mut next = || numbers.next().unwrap_or(u64::MAX);
        let mut stats = CgroupStats::default();
        let cpu = stats.cpu_stats.get_or_insert_default();
        let usage = cpu.cpu_usage.get_or_insert_default();
        (usage.total_usage, usage.usage_in_kernelmode) = (next(), next());
        let memory = stats.memory_stats.get_or_insert_default();
        memory.usage.get_or_insert_default().usage = next();
        stats.pids_stats.get_or_insert_default().current = next();
        let disks = stats.blkio_stats.get_or_insert_default();
        for (number, name) in &self.names {
            match number % 3 {
                0 => {
                    memory.stats.insert(name.clone(), next());
                }
                1 => {
                    let pages = stats.hugetlb_stats.entry(name.clone()).or_default();
                    pages.usage = next();
                }
                _ => {
                    let entry = protocol::agent::messages::BlkioStatsEntry {
                        major: next() % 4,
                        op: name.clone(),
                        value: next(),
                        ..Default::default()
                    };
                    disks.io_service_bytes_recursive.push(entry);
                }
            }
        }
        stats
    }
}

impl Frame<'_> {
    fn body(&self) -> Vec<u8> {
        let answer = |payload: Vec<u8>| Response {
            status: None,
            payload,
        };
        let response = match &self.body {
            Body::Bytes(bytes) => return bytes.to_vec(),
            Body::Answer(payload) => answer(payload.to_vec()),
            Body::Refusal(code, message) => Response {
                status: Some(Status {
                    code: *code,
                    message: (*message).into(),
                }),
                payload: Vec::new(),
            },
            // In the answer it is field 1.
            Body::Stats(figures) => {
                let stats = figures.stats().encode_to_vec();
                let mut payload = vec![0x0a];
                prost::encoding::encode_varint(stats.len() as u64, &mut payload);
                payload.extend(stats);
                answer(payload)
            }
        };
        response.encode_to_vec()
    }

    fn bytes(&self, stream: u32) -> Vec<u8> {
        let body = self.body();
        let len = u32::try_from(body.len()).expect("it is short");
        let mut bytes = self.lie.unwrap_or(len).to_be_bytes().to_vec();
        bytes.extend(self.stream.unwrap_or(stream).to_be_bytes());
        bytes.extend([if self.is_request { 1 } else { 2 }, 0]);
        bytes.extend(body);
        bytes
    }

    /// Whether it answers who waits.
    fn answers(&self) -> bool {
        self.stream.is_none() && !self.is_request
    }
}

/// The agent: sends what it is to each time it is asked, and leaves when that is all, or when who asked would wait.
fn lie(mut stream: UnixStream, answers: &[(u8, Vec<Frame<'_>>)]) {
    for (_, frames) in answers {
        let mut header = [0; 10];
        if stream.read_exact(&mut header).is_err() {
            return;
        }
        let [a, b, c, d, e, f, g, h, ..] = header;
        let len = u32::from_be_bytes([a, b, c, d]);
        let mut body = vec![0; len as usize];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        let number = u32::from_be_bytes([e, f, g, h]);
        for frame in frames {
            if stream.write_all(&frame.bytes(number)).is_err() {
                return;
            }
        }
        let is_answered = frames.iter().any(Frame::answers);
        if !is_answered || frames.iter().any(|frame| frame.lie.is_some()) {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

const BOUNDS: Bounds = Bounds {
    memory_bytes: 1 << 30,
    cpu_usec: 1 << 40,
};

fn ask(agent: &Agent, question: u8) -> Result<(), CallError> {
    let target = Target {
        container: "c".into(),
        exec: String::new(),
    };
    match question % 9 {
        0 => agent.check(Duration::from_secs(60)),
        1 => {
            is_bounded(&of_guest(&agent.stats("c")?, BOUNDS), BOUNDS);
            Ok(())
        }
        2 => {
            let len = u32::from(question) * 7;
            let output = agent.read(&target, Stream::Stdout, len)?;
            assert!(output.len() <= len as usize);
            Ok(())
        }
        3 => agent.wait(&target).map(drop),
        4 => agent.abilities(None).map(drop),
        5 => agent.next_oom().map(drop),
        6 => agent.write(&target, &[7; 300], &|| true),
        7 => agent.signal(&target, 9),
        _ => agent.remove_container("c"),
    }
}

fn is_bounded(metrics: &Metrics, bounds: Bounds) {
    if let Some(cpu) = &metrics.cpu {
        let used = [cpu.usage_usec, cpu.user_usec, cpu.system_usec];
        assert!(used.iter().all(|used| *used <= bounds.cpu_usec));
    }
    if let Some(memory) = &metrics.memory {
        let used = [
            memory.usage,
            memory.max_usage,
            memory.swap_usage,
            memory.anon,
            memory.file,
        ];
        assert!(used.iter().all(|used| *used <= bounds.memory_bytes));
    }
    assert!(
        metrics
            .pids
            .as_ref()
            .is_none_or(|pids| pids.current <= 4 << 20)
    );
    assert!(metrics.io.as_ref().is_none_or(|io| io.usage.len() <= 64));
    assert!(metrics.hugetlb.len() <= 64);
    let is_plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    assert!(
        metrics
            .hugetlb
            .iter()
            .all(|pages| is_plain(&pages.pagesize))
    );
    assert!(metrics.encoded_len() <= 16 << 10);
}

/// What a guest says of a refusal can be shown.
fn is_plain(error: &CallError) {
    if let CallError::Refused(status) = error {
        let text = &status.message;
        assert!(text.len() <= 16 << 10, "{} bytes", text.len());
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

fn talk(answers: &[(u8, Vec<Frame<'_>>)]) {
    let (ours, theirs) = UnixStream::pair().expect("there are descriptors");
    let said: usize = answers
        .iter()
        .flat_map(|(_, frames)| frames)
        .map(|frame| frame.body().len() + 10)
        .sum();
    thread::scope(|scope| {
        scope.spawn(|| lie(theirs, answers));
        heap::bounded((256 << 10) + 128 * said, || {
            let agent = Agent::over(ours).expect("there are threads");
            for (question, _) in answers {
                if let Err(error) = ask(&agent, *question) {
                    is_plain(&error);
                    if !matches!(error, CallError::Refused(_) | CallError::Answer { .. }) {
                        break;
                    }
                }
            }
        });
    });
}

/// The thread that reads what the agent says ends by itself, some time after the agent has gone: until then the
/// sanitizer takes what it holds for a leak.
// SAFETY: the sanitizer calls it by this name, and takes a number that is not 0 for no search.
#[unsafe(no_mangle)]
extern "C" fn __lsan_is_turned_off() -> i32 {
    1
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Agent(answers) => talk(&answers),
    Input::Figures(bytes, mib, cpu) => {
        let bounds = Bounds {
            memory_bytes: u64::from(mib) << 20,
            cpu_usec: cpu.into(),
        };
        if let Ok(stats) = CgroupStats::decode(bytes) {
            is_bounded(&of_guest(&stats, bounds), bounds);
        }
    }
    Input::Spec(changes, how) => {
        let mut value = description();
        json::change(&mut value, &changes);
        take(value.to_string().as_bytes(), how);
    }
    Input::Text(text) => take(text.as_bytes(), 0),
    Input::Asked(bytes) => {
        let words = ["-id", "pod", "-namespace", "k8s.io", "start"];
        let arguments = Arguments::parse(words.map(Into::into)).expect("they are containerd's");
        heap::bounded((16 << 10) + 128 * bytes.len(), || {
            let asked = Asked::parse(bytes, &arguments);
            config_path(asked.options.as_ref());
            let all = asked.complete(&arguments);
            assert_eq!(
                (all.id, all.namespace),
                (arguments.id.clone(), arguments.namespace.clone())
            );
        });
    }
    Input::Cpus(ranges, text) => {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(first, last)| format!("{first}-{last}"))
            .collect();
        for text in [ranges.join(","), text.into()] {
            let most = (64 << 10) + 8 * text.len();
            let list = heap::bounded(most, || cpus::list(&text)).unwrap_or_default();
            assert!(list.is_sorted() && list.len() <= 1024);
        }
    }
});

fn config() -> Config {
    let text = "kernel = '/k'\ninitramfs = '/i'\nmax_vcpus = 4\nmax_memory_mib = 8192\n";
    toml::from_str(text).expect("it is a configuration")
}

/// containerd describes a container.
fn take(json: &[u8], how: u8) {
    let held = (64 << 10) + 1024 * json.len();
    let Ok(mut spec) = heap::bounded(held, || spec::parse::<Spec>(json, "it")) else {
        return;
    };
    let is_possible = spec::check(&spec, how & 1 != 0).is_ok();
    is_sized(&spec);
    let (seccomp, unified) = (how & 2 != 0, how & 4 != 0);
    spec::for_guest(&mut spec, "c", seccomp, unified);
    is_for_guest(&spec, seccomp);
    let again = Spec::decode(&spec.encode_to_vec()[..]);
    assert_eq!(again.as_ref(), Ok(&spec));
    if is_possible {
        assert!(spec.process.is_some() && spec.linux.is_some());
    }
}

fn is_sized(spec: &Spec) {
    let resources = spec
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone());
    let resources = resources.unwrap_or_default();
    let own = Limits::of(&resources);
    let of_pod = Limits::of_pod(spec);
    let less = of_pod.less(own, own.updated(&LinuxResources::default()));
    let config = config();
    for announced in [Limits::default(), of_pod, less] {
        let size = size(&config, announced, [own, own, of_pod].into_iter());
        assert!(size.vcpus <= 4 && size.memory_mib <= 8192, "{size:?}");
        assert!(size.vcpus > 0 && size.memory_mib > 0, "{size:?}");
    }
}

/// What the guest gets names nothing of the host's.
fn is_for_guest(spec: &Spec, seccomp: bool) {
    assert!(spec.hooks.is_none());
    assert!(
        spec.root
            .iter()
            .all(|root| root.path.starts_with("/run/kata-containers/"))
    );
    let mut processes = spec.process.iter();
    assert!(processes.all(|it| it.apparmor_profile.is_empty() && it.selinux_label.is_empty()));
    let Some(linux) = &spec.linux else { return };
    assert!(linux.mount_label.is_empty() && linux.intel_rdt.is_none());
    assert!(seccomp || linux.seccomp.is_none());
    for namespace in &linux.namespaces {
        assert!(namespace.path.is_empty());
        assert!(!["network", "time", "pid"].contains(&namespace.r#type.as_str()));
    }
    if let Some(resources) = &linux.resources {
        assert!(resources.network.is_none() && resources.block_io.is_none());
        assert!(resources.hugepage_limits.is_empty());
        let mut rules = resources.devices.iter();
        assert!(rules.all(|rule| !rule.allow || [-1, 1, 5, 136, 10].contains(&rule.major)));
        assert!(
            resources
                .cpu
                .iter()
                .all(|cpu| cpu.cpus.is_empty() && cpu.mems.is_empty())
        );
    }
}

/// A container with something of all.
fn description() -> Value {
    let hook = json!([{"path": "/bin/hook", "args": ["hook"], "timeout": 2}]);
    json!({
        "ociVersion": "1.1.0",
        "hostname": "pod",
        "root": {"path": "rootfs", "readonly": true},
        "process": {
            "terminal": false, "cwd": "/", "args": ["sh"], "env": ["PATH=/bin"],
            "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": [], "permitted": []},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}],
            "noNewPrivileges": true, "apparmorProfile": "a", "selinuxLabel": "s", "oomScoreAdj": 7},
        "mounts": [
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]},
            {"destination": "/m", "type": "bind", "source": "/h", "options": ["rbind", "rro"]}],
        "hooks": {"prestart": hook, "createRuntime": hook, "poststop": hook},
        "annotations": {
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod",
            "io.kubernetes.cri.sandbox-memory": "1000000", "io.kubernetes.cri.sandbox-cpu-quota": "5",
            "io.kubernetes.cri.sandbox-cpu-period": "1000"},
        "linux": {
            "mountLabel": "l",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "network", "path": "/n"},
                           {"type": "mount"}, {"type": "uts", "path": "/u"}],
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            "uidMappings": [{"containerID": 1, "hostID": 2, "size": 3}],
            "cgroupsPath": "/k/c", "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
            "intelRdt": {"l3CacheSchema": "x"},
            "resources": {
                "devices": [{"allow": false, "access": "rwm"},
                            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
                "memory": {"limit": 1 << 30, "swap": -1, "reservation": 5},
                "cpu": {"shares": 1024, "quota": 100_000, "period": 100_000, "cpus": "0-1", "mems": "0"},
                "pids": {"limit": 100},
                "blockIO": {"weight": 7},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
                "network": {"classID": 1},
                "unified": {"memory.high": "5", "cpuset.cpus": "0"}},
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                                      "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]}]},
        },
    })
}
