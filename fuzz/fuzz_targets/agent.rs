//! Any host at the guest's agent, as far as nothing is done in the guest: frames and the requests in them, seccomp
//! profiles, files to be written, routes to be set, command lines. Each whole request has one answer; what is
//! understood is the same once it is said again; a filter is one that the kernel takes; no file is written but
//! below the folder for them.

mod heap;

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use prost::Message;
use protocol::agent::messages::{
    AddArpNeighborsRequest, CopyFileRequest, CreateContainerRequest, CreateSandboxRequest,
    OnlineCpuMemRequest, ReseedRandomDevRequest, SetGuestDateTimeRequest,
    UpdateEphemeralMountsRequest, UpdateInterfaceRequest, UpdateRoutesRequest, VolumeStatsRequest,
};
use protocol::agent::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use protocol::agent::{AGENT_SERVICE, HEALTH_SERVICE};
use protocol::ttrpc::{Call, MAX_MESSAGE, Service, Status, Workers, serve};

use crate::cmdline::BootArgs;
use crate::container::seccomp;
use crate::network::exact;
use crate::policy::Rules;
use crate::sandbox::Sandbox;
use crate::{copy, storage};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Stream(&'a [u8]),
    Calls(Vec<Asked<'a>>),
    Seccomp(Profile),
    Files(Vec<Piece<'a>>),
    Network(&'a [u8], Vec<(u8, u8)>),
    Words(&'a str),
}

/// Methods that are answered by the agent itself: of containers, and there are none, or of the agent.
const ANSWERED: [&str; 17] = [
    "StartContainer",
    "RemoveContainer",
    "UpdateContainer",
    "StatsContainer",
    "PauseContainer",
    "ResumeContainer",
    "ExecProcess",
    "SignalProcess",
    "WaitProcess",
    "ReadStdout",
    "ReadStderr",
    "WriteStdin",
    "CloseStdin",
    "TtyWinResize",
    "GetGuestDetails",
    "Nonsense",
    "",
];

/// Methods of which the request is read and said again.
const READ: [&str; 11] = [
    "CreateContainer",
    "CreateSandbox",
    "UpdateInterface",
    "UpdateRoutes",
    "AddARPNeighbors",
    "CopyFile",
    "SetGuestDateTime",
    "ReseedRandomDev",
    "OnlineCPUMem",
    "UpdateEphemeralMounts",
    "GetVolumeStats",
];

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const HEADER_LEN: usize = 10;

#[derive(Arbitrary, Debug)]
struct Asked<'a> {
    stream: u32,
    is_request: bool,
    service: u8,
    method: u8,
    payload: &'a [u8],
    /// By how much the length of its frame is a lie.
    lie: i8,
}

/// As ttrpc has it.
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

impl Asked<'_> {
    fn bytes(&self) -> Vec<u8> {
        let service = [AGENT_SERVICE, AGENT_SERVICE, HEALTH_SERVICE, "no.Service"];
        let method = usize::from(self.method) % (ANSWERED.len() + READ.len() + 2);
        let methods = ANSWERED.iter().chain(&READ).chain(&["Check", "Version"]);
        let request = Request {
            service: service[usize::from(self.service) % service.len()].into(),
            method: (*methods.collect::<Vec<_>>()[method]).into(),
            payload: self.payload.to_vec(),
        };
        let body = request.encode_to_vec();
        let len = u32::try_from(body.len()).expect("it is short");
        let len = len.saturating_add_signed(self.lie.into());
        let kind = if self.is_request { REQUEST } else { RESPONSE };
        let mut bytes = len.to_be_bytes().to_vec();
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(body);
        bytes
    }
}

/// The agent, but for what it would do in the guest.
struct Harmless(Arc<Sandbox>);

impl Service for Harmless {
    fn is_quick(&self, _service: &str, _method: &str) -> bool {
        true
    }

    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        if call.service != AGENT_SERVICE || ANSWERED.contains(&call.method) {
            return self.0.call(call);
        }
        match call.method {
            "CreateContainer" => said_again::<CreateContainerRequest>(call),
            "CreateSandbox" => said_again::<CreateSandboxRequest>(call),
            "UpdateInterface" => said_again::<UpdateInterfaceRequest>(call),
            "UpdateRoutes" => said_again::<UpdateRoutesRequest>(call),
            "AddARPNeighbors" => said_again::<AddArpNeighborsRequest>(call),
            "CopyFile" => said_again::<CopyFileRequest>(call),
            "SetGuestDateTime" => said_again::<SetGuestDateTimeRequest>(call),
            "ReseedRandomDev" => said_again::<ReseedRandomDevRequest>(call),
            "OnlineCPUMem" => said_again::<OnlineCpuMemRequest>(call),
            "UpdateEphemeralMounts" => said_again::<UpdateEphemeralMountsRequest>(call),
            "GetVolumeStats" => said_again::<VolumeStatsRequest>(call),
            _ => Err(call.unimplemented()),
        }
    }
}

fn said_again<Q: Message + Default + PartialEq>(call: &Call<'_>) -> Result<Vec<u8>, Status> {
    call.answer(|request: Q| {
        let again = Q::decode(&request.encode_to_vec()[..]);
        assert!(again.as_ref() == Ok(&request), "it is another");
        Ok(request)
    })
}

/// What is written there, for all who have it.
#[derive(Clone, Default)]
struct Answers(Arc<Mutex<Vec<u8>>>);

impl Write for Answers {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn service() -> &'static Arc<dyn Service> {
    static SERVICE: OnceLock<Arc<dyn Service>> = OnceLock::new();
    SERVICE.get_or_init(|| {
        let (sandbox, end) = Sandbox::start(Rules::default()).expect("it starts");
        std::mem::forget(end);
        Arc::new(Harmless(sandbox))
    })
}

/// The numbers of the streams of whole frames of a kind.
fn streams(mut bytes: &[u8], kind: u8) -> Vec<u32> {
    let mut streams = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let [a, b, c, d, e, f, g, h, this, _] = *header;
        let len = u32::from_be_bytes([a, b, c, d]);
        let Some(rest) = rest.get(len as usize..) else {
            break;
        };
        assert!(kind == REQUEST || len <= MAX_MESSAGE);
        if this == kind {
            streams.push(u32::from_be_bytes([e, f, g, h]));
        }
        bytes = rest;
    }
    streams
}

fn answer(bytes: &[u8]) {
    let service = service();
    let answers = Answers::default();
    // A part of two bytes becomes one of 300, and the buffers have their usual size.
    heap::bounded((128 << 10) + 512 * bytes.len(), || {
        let _ = serve(bytes, answers.clone(), service, &Workers::default());
    });
    let written = answers.0.lock().expect("no panic");
    assert_eq!(streams(&written, RESPONSE), streams(bytes, REQUEST));
}

/// The sanitizer's search for leaks is a process of its own, which the agent, being one that all others are left to,
/// would reap.
// SAFETY: the sanitizer calls it by this name, and takes a number that is not 0 for no search.
#[unsafe(no_mangle)]
extern "C" fn __lsan_is_turned_off() -> i32 {
    1
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Stream(bytes) => answer(bytes),
    Input::Calls(calls) => answer(&calls.iter().flat_map(Asked::bytes).collect::<Vec<_>>()),
    Input::Seccomp(profile) => compile(&profile),
    Input::Files(pieces) => write(&pieces),
    Input::Network(payload, indices) => set(payload, &indices),
    Input::Words(text) => {
        let _ = BootArgs::parse(text);
        let words: Vec<_> = text.split(' ').map(str::to_owned).collect();
        storage::options(&words);
    }
});

#[derive(Arbitrary, Debug)]
struct Profile {
    default: u8,
    number: Option<u32>,
    flags: u8,
    syscalls: Vec<Syscall>,
}

#[derive(Arbitrary, Debug)]
struct Syscall {
    names: Vec<u8>,
    action: u8,
    number: Option<u16>,
    /// Which argument, compared how, with which numbers.
    arguments: Vec<(u8, u8, u64, u64)>,
}

impl Profile {
    fn oci(&self) -> LinuxSeccomp {
        const ACTIONS: [&str; 10] = [
            "SCMP_ACT_ALLOW",
            "SCMP_ACT_ERRNO",
            "SCMP_ACT_KILL",
            "SCMP_ACT_KILL_PROCESS",
            "SCMP_ACT_TRAP",
            "SCMP_ACT_LOG",
            "SCMP_ACT_TRACE",
            "SCMP_ACT_NOTIFY",
            "SCMP_ACT_X",
            "",
        ];
        const NAMES: [&str; 10] = [
            "read", "write", "openat", "clone", "ioctl", "socket", "mount", "bpf", "statx", "none",
        ];
        const COMPARISONS: [&str; 8] = ["EQ", "NE", "LT", "LE", "GE", "GT", "MASKED_EQ", "X"];
        let action = |number: u8| ACTIONS[usize::from(number) % ACTIONS.len()].to_owned();
        let mut flags = Vec::new();
        for (bit, flag) in ["TSYNC", "LOG", "SPEC_ALLOW", "X"].iter().enumerate() {
            if self.flags & 1 << bit != 0 {
                flags.push(format!("SECCOMP_FILTER_FLAG_{flag}"));
            }
        }
        let syscalls = self.syscalls.iter().map(|syscall| LinuxSyscall {
            names: syscall
                .names
                .iter()
                .map(|name| NAMES[usize::from(*name) % NAMES.len()].to_owned())
                .collect(),
            action: action(syscall.action),
            errno_ret: syscall.number.map(u32::from),
            args: syscall
                .arguments
                .iter()
                .map(|(index, comparison, value, value_two)| LinuxSeccompArg {
                    index: (index % 8).into(),
                    value: *value,
                    value_two: *value_two,
                    op: format!(
                        "SCMP_CMP_{}",
                        COMPARISONS[usize::from(*comparison) % COMPARISONS.len()]
                    ),
                })
                .collect(),
        });
        LinuxSeccomp {
            default_action: action(self.default),
            default_errno_ret: self.number,
            flags,
            syscalls: syscalls.collect(),
            ..LinuxSeccomp::default()
        }
    }
}

/// What a filter is once it is encoded.
#[derive(Clone, PartialEq, Message)]
struct Program {
    #[prost(fixed64, repeated, tag = "1")]
    instructions: Vec<u64>,
    #[prost(uint32, tag = "2")]
    flags: u32,
}

/// A filter is one that the kernel takes (kernel/seccomp.c, net/core/filter.c): not too long, each jump leads on
/// within it, each load is of a whole number that is there, and the last instruction answers.
fn compile(profile: &Profile) {
    const LOAD: u16 = 0x20;
    const RETURN: u16 = 0x06;
    const JUMP: u16 = 0x05;
    let Ok(filter) = seccomp::compile(&profile.oci()) else {
        return;
    };
    let program = Program::decode(&filter.encode_to_vec()[..]).expect("it is one");
    let all = &program.instructions;
    assert!((1..=4096).contains(&all.len()));
    for (at, packed) in all.iter().enumerate() {
        let [a, b, met, unmet, k @ ..] = packed.to_le_bytes();
        let (code, k) = (u16::from_le_bytes([a, b]), u32::from_le_bytes(k));
        let on = |by: usize| assert!(at + 1 + by < all.len(), "{at} of {}", all.len());
        match code {
            LOAD => assert!(k < 64 && k % 4 == 0),
            RETURN => {}
            JUMP => on(k as usize),
            // Comparisons and the mask.
            0x15 | 0x25 | 0x35 => {
                on(met.into());
                on(unmet.into());
            }
            0x54 => on(0),
            other => panic!("{other:#x}"),
        }
    }
    let [a, b, ..] = all[all.len() - 1].to_le_bytes();
    assert_eq!(u16::from_le_bytes([a, b]), RETURN);
}

/// A piece of a file, or a folder or link.
#[derive(Arbitrary, Debug)]
struct Piece<'a> {
    path: Vec<u8>,
    kind: u8,
    offset: i64,
    size: i64,
    is_plain: bool,
    owner: (i32, i32),
    data: &'a [u8],
    target: u8,
}

impl Piece<'_> {
    fn request(&self, base: &Path) -> CopyFileRequest {
        const NAMES: [&str; 8] = ["a", "b", "l", "..", ".", "", "../secret", "/"];
        const TARGETS: [&str; 4] = ["../secret", "..", "/", "a"];
        const KINDS: [u32; 6] = [0o100_644, 0o040_755, 0o120_777, 0o644, 0o010_644, 0o104_755];
        let mut path = base.display().to_string();
        for name in &self.path {
            path.push('/');
            path.push_str(NAMES[usize::from(*name) % NAMES.len()]);
        }
        let file_mode = KINDS[usize::from(self.kind) % KINDS.len()];
        let target = TARGETS[usize::from(self.target) % TARGETS.len()];
        let data = match file_mode {
            0o120_777 => target.as_bytes(),
            _ => self.data,
        };
        let (offset, file_size) = match self.is_plain {
            true => (0, i64::try_from(data.len()).expect("it is short")),
            false => (self.offset, self.size),
        };
        CopyFileRequest {
            path,
            file_size,
            file_mode,
            dir_mode: 0o755,
            uid: self.owner.0,
            gid: self.owner.1,
            offset,
            data: data.to_vec(),
            ..CopyFileRequest::default()
        }
    }
}

/// Whatever links there are in the folder, what is around it stays as it is.
fn write(pieces: &[Piece<'_>]) {
    let outside = vmm_sys_util::tempdir::TempDir::new().expect("there is room");
    let outside = outside.as_path();
    let (base, secret) = (outside.join("base"), outside.join("secret"));
    fs::create_dir(&base).expect("there is room");
    fs::write(&secret, b"secret").expect("there is room");
    for piece in pieces.iter().take(16) {
        let _ = copy::copy_below(&base, &piece.request(&base));
    }
    assert_eq!(fs::read(&secret).expect("it is there"), b"secret");
    let metadata = fs::metadata(&secret).expect("it is there");
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&metadata),
        rustix::process::getuid().as_raw()
    );
    assert_eq!(fs::read_dir(outside).expect("it is there").count(), 2);
}

/// A route or rule is set on interfaces of this guest alone.
fn set(payload: &[u8], indices: &[(u8, u8)]) {
    use protocol::netlink::route::{FIXED_LEN, INTERFACE};
    use protocol::netlink::{attributes, number};
    let indices: HashMap<u32, u32> = indices
        .iter()
        .map(|(theirs, ours)| (u32::from(*theirs), 1000 + u32::from(*ours)))
        .collect();
    let _ = exact::rule(payload);
    if let Some((_, message)) = exact::route(payload, &indices) {
        let message = message.payload();
        assert!(message.len() <= payload.len().next_multiple_of(4));
        for (kind, value) in attributes(&message[FIXED_LEN..]) {
            if kind == INTERFACE {
                let index = number(value).expect("it was one");
                assert!(indices.values().any(|ours| *ours == index));
            }
        }
    }
}
