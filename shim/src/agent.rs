//! The agent in the guest, asked over vsock. Nothing here depends on which agent it is, beyond the
//! protocol.

pub(crate) mod stdio;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost::Message;
use protocol::agent::messages;
use protocol::agent::messages::Empty;
use protocol::agent::oci;
use protocol::agent::{AGENT_SERVICE, FOLLOWS_THE_CLOCK, HEALTH_SERVICE, PIDS_OF_ANOTHER, PORT};
use protocol::policy::Policy;
use protocol::ttrpc::{CallError, Client, Code, Status};

use crate::host::logging::MAX_TEXT_CHARS;
use crate::host::network::Settings;

/// Longest answer of an agent, in bytes: a piece of output ([`stdio`]), or the figures of a container with hundreds of
/// disks. Entries of two bytes each become 48 in memory.
const MAX_ANSWER: u32 = 64 << 10;
/// How long an ordinary call may take: guests can be slow, and one that hangs is found out here.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a kill may take before the whole guest is taken to hang.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How long the guest has to write its files when it ends.
const FAREWELL: Duration = Duration::from_secs(2);
/// How many random bytes a guest is reseeded with.
const SEED_BYTES: usize = 64;
/// How late a word of the time may come at most, as far as it can be helped.
const PROMPT: Duration = Duration::from_millis(10);
/// How many times the time of day is said, at most, while each word comes late.
const MAX_WORDS: u32 = 3;
/// The time between tries to reach the agent.
const PAUSE: Duration = Duration::from_millis(10);

/// Why it cannot be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReachError {
    #[error("the VM ended before its agent answered")]
    Dead,
    #[error("the guest's agent does not answer within {0:?}")]
    Late(Duration),
    #[error("talk to the guest's agent")]
    Io(#[source] io::Error),
}

/// A process in the guest.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) container: String,
    pub(crate) exec: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.exec.as_str() {
            "" => write!(f, "the first process of {}", self.container),
            exec => write!(f, "process {exec} of {}", self.container),
        }
    }
}

/// One of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// What not every agent can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Whether the agent can apply seccomp profiles.
    pub(crate) seccomp: bool,
    /// Whether a container can see the processes of another one.
    pub(crate) pids_of_another: bool,
    /// Whether the agent can be told the time now and then, and slew the guest's clock.
    pub(crate) follows_the_clock: bool,
}

/// Of the answer to `UpdateRoutes`, which lists all routes of the guest, what is of use here.
#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RoutesSet {
    /// As in [`messages::Routes`].
    #[prost(uint32, tag = "1000")]
    exact: u32,
}

/// A connection to the agent.
#[derive(Debug)]
pub(crate) struct Agent(Client);

impl Agent {
    /// Waits for the agent behind the vsock's socket, as long as `lives` says the VM does.
    pub(crate) fn reach(
        vsock: &Path,
        timeout: Duration,
        lives: &dyn Fn() -> bool,
    ) -> Result<Self, ReachError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReachError::Late(timeout));
            }
            match dial(vsock, left) {
                Ok(stream) => {
                    let agent = Self::over(stream).map_err(ReachError::Io)?;
                    if agent.check(left).is_ok() {
                        return Ok(agent);
                    }
                }
                Err(error) => log::trace!("reach the agent: {error}"),
            }
            if !lives() {
                return Err(ReachError::Dead);
            }
            thread::sleep(PAUSE);
        }
    }

    /// Talks to the agent at the other end of `stream`.
    pub(crate) fn over(stream: UnixStream) -> io::Result<Self> {
        Client::with_max_answer(stream, MAX_ANSWER).map(Self)
    }

    /// Checks whether the agent answers in time.
    pub(crate) fn check(&self, timeout: Duration) -> Result<(), CallError> {
        let request = messages::CheckRequest::default();
        let timeout = Some(timeout);
        let _: messages::HealthCheckResponse =
            self.call(HEALTH_SERVICE, "Check", &request, timeout)?;
        Ok(())
    }

    /// Reseeds a restored guest's random numbers with `seed`, for other guests were restored from the same
    /// snapshot, and steps its clock to the host's time.
    pub(crate) fn renew(&self, seed: Vec<u8>) -> Result<(), CallError> {
        let reseed = messages::ReseedRandomDevRequest { data: seed };
        self.tell("ReseedRandomDev", &reseed)?;
        self.tell_time(PATIENCE)
    }

    /// Tells the guest the time of day. A word that was long under way is said again, for the guest takes
    /// it as the time when it arrives.
    pub(crate) fn tell_time(&self, timeout: Duration) -> Result<(), CallError> {
        for _ in 0..MAX_WORDS {
            let began = Instant::now();
            let timeout = Some(timeout);
            let Empty {} = self.call(AGENT_SERVICE, "SetGuestDateTime", &date_time(), timeout)?;
            if began.elapsed() < PROMPT {
                break;
            }
        }
        Ok(())
    }

    /// Calls the agent. What it says of a refusal is made fit to be shown.
    fn call<A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
        timeout: Option<Duration>,
    ) -> Result<A, CallError> {
        let answer = self.0.call(service, method, request, timeout);
        answer.map_err(plain)
    }

    fn ask<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A, CallError> {
        self.call(AGENT_SERVICE, method, request, Some(PATIENCE))
    }

    fn tell(&self, method: &str, request: &impl Message) -> Result<(), CallError> {
        self.ask(method, request).map(|Empty {}| ())
    }

    /// Sets the guest's network up.
    pub(crate) fn network(&self, settings: Settings) -> Result<(), CallError> {
        for interface in settings.interfaces {
            let request = messages::UpdateInterfaceRequest {
                interface: Some(interface),
            };
            // What it says of the interface is of no use here.
            self.tell("UpdateInterface", &request)?;
        }
        let exact = settings.exact.routes.len() + settings.exact.rules.len();
        if exact + settings.routes.len() > 0 {
            let routes = messages::Routes {
                routes: settings.routes,
                exact: 0,
            };
            let request = messages::UpdateRoutesRequest {
                routes: Some(routes),
                exact: (exact > 0).then_some(settings.exact),
            };
            let set: RoutesSet = self.ask("UpdateRoutes", &request)?;
            if usize::try_from(set.exact).ok() != Some(exact) {
                let why = "the guest's agent sets no routes with metrics or tables, and no rules";
                return Err(Status::new(Code::Unimplemented, why).into());
            }
        }
        if !settings.neighbors.is_empty() {
            let neighbors = messages::ArpNeighbors {
                neighbors: settings.neighbors,
            };
            let request = messages::AddArpNeighborsRequest {
                neighbors: Some(neighbors),
            };
            self.tell("AddARPNeighbors", &request)?;
        }
        Ok(())
    }

    /// Prepares the guest for containers.
    pub(crate) fn create_sandbox(
        &self,
        request: &messages::CreateSandboxRequest,
    ) -> Result<(), CallError> {
        self.tell("CreateSandbox", request)
    }

    /// What the agent can do. An agent that does not obey `policy`, if there is one, is refused: it may be older
    /// than policies, or podvmm may be, which then has handed it none.
    pub(crate) fn abilities(&self, policy: Option<&Policy>) -> Result<Abilities, CallError> {
        let request = messages::GuestDetailsRequest::default();
        let details: messages::GuestDetailsResponse = self.ask("GetGuestDetails", &request)?;
        let details = details.agent_details.unwrap_or_default();
        let has = |name: &str| details.extra_features.iter().any(|feature| feature == name);
        if policy.is_some_and(|policy| !has(&policy.feature())) {
            let why = "it does not obey the policy of this node";
            return Err(Status::new(Code::FailedPrecondition, why).into());
        }
        Ok(Abilities {
            seccomp: details.supports_seccomp,
            pids_of_another: has(PIDS_OF_ANOTHER),
            follows_the_clock: has(FOLLOWS_THE_CLOCK),
        })
    }

    /// Ends the guest, which has a moment to write its files.
    pub(crate) fn destroy_sandbox(&self) -> Result<(), CallError> {
        let request = messages::DestroySandboxRequest {};
        let timeout = Some(FAREWELL);
        let Empty {} = self.call(AGENT_SERVICE, "DestroySandbox", &request, timeout)?;
        Ok(())
    }

    pub(crate) fn create_container(
        &self,
        request: &messages::CreateContainerRequest,
    ) -> Result<(), CallError> {
        self.tell("CreateContainer", request)
    }

    pub(crate) fn start_container(&self, id: &str) -> Result<(), CallError> {
        let container_id = id.into();
        self.tell(
            "StartContainer",
            &messages::StartContainerRequest { container_id },
        )
    }

    pub(crate) fn remove_container(&self, id: &str) -> Result<(), CallError> {
        let request = messages::RemoveContainerRequest {
            container_id: id.into(),
            timeout: 0,
        };
        let timeout = Some(KILL_PATIENCE);
        let Empty {} = self.call(AGENT_SERVICE, "RemoveContainer", &request, timeout)?;
        Ok(())
    }

    pub(crate) fn exec(&self, target: &Target, process: oci::Process) -> Result<(), CallError> {
        let request = messages::ExecProcessRequest {
            container_id: target.container.clone(),
            exec_id: target.exec.clone(),
            process: Some(process),
            ..messages::ExecProcessRequest::default()
        };
        self.tell("ExecProcess", &request)
    }

    pub(crate) fn signal(&self, target: &Target, signal: u32) -> Result<(), CallError> {
        let request = messages::SignalProcessRequest {
            container_id: target.container.clone(),
            exec_id: target.exec.clone(),
            signal,
        };
        let timeout = Some(KILL_PATIENCE);
        let Empty {} = self.call(AGENT_SERVICE, "SignalProcess", &request, timeout)?;
        Ok(())
    }

    /// Waits for a process to end, which the agent then forgets. Its output is to be read before.
    pub(crate) fn wait(&self, target: &Target) -> Result<u32, CallError> {
        let request = messages::WaitProcessRequest {
            container_id: target.container.clone(),
            exec_id: target.exec.clone(),
        };
        let end: messages::WaitProcessResponse =
            self.call(AGENT_SERVICE, "WaitProcess", &request, None)?;
        Ok(end.status.cast_unsigned())
    }

    /// Waits for output. Nothing is the end.
    pub(crate) fn read(
        &self,
        target: &Target,
        stream: Stream,
        len: u32,
    ) -> Result<Vec<u8>, CallError> {
        let method = match stream {
            Stream::Stdout => "ReadStdout",
            Stream::Stderr => "ReadStderr",
        };
        let request = messages::ReadStreamRequest {
            container_id: target.container.clone(),
            exec_id: target.exec.clone(),
            len,
        };
        let read: messages::ReadStreamResponse =
            self.call(AGENT_SERVICE, method, &request, None)?;
        if read.data.len() > len as usize {
            let why = "more output than was asked for";
            return Err(Status::new(Code::OutOfRange, why).into());
        }
        Ok(read.data)
    }

    /// Gives a process input, all of it, as long as it `is_wanted`; nothing ends that.
    pub(crate) fn write(
        &self,
        target: &Target,
        data: &[u8],
        is_wanted: &dyn Fn() -> bool,
    ) -> Result<(), CallError> {
        let (container_id, exec_id) = (target.container.clone(), target.exec.clone());
        if data.is_empty() {
            let request = messages::CloseStdinRequest {
                container_id,
                exec_id,
            };
            return self.tell("CloseStdin", &request);
        }
        let mut rest = data;
        while !rest.is_empty() {
            let request = messages::WriteStreamRequest {
                container_id: container_id.clone(),
                exec_id: exec_id.clone(),
                data: rest.to_vec(),
            };
            // It waits for the process to take it.
            let written = self
                .0
                .call_while(AGENT_SERVICE, "WriteStdin", &request, is_wanted);
            let written: messages::WriteStreamResponse = written.map_err(plain)?;
            let len = usize::try_from(written.len).unwrap_or(usize::MAX);
            rest = rest.get(len.max(1)..).unwrap_or_default();
        }
        Ok(())
    }

    pub(crate) fn resize_terminal(
        &self,
        target: &Target,
        rows: u32,
        columns: u32,
    ) -> Result<(), CallError> {
        let request = messages::TtyWinResizeRequest {
            container_id: target.container.clone(),
            exec_id: target.exec.clone(),
            row: rows,
            column: columns,
        };
        self.tell("TtyWinResize", &request)
    }

    pub(crate) fn update(&self, id: &str, resources: oci::LinuxResources) -> Result<(), CallError> {
        let request = messages::UpdateContainerRequest {
            container_id: id.into(),
            resources: Some(resources),
        };
        self.tell("UpdateContainer", &request)
    }

    pub(crate) fn stats(&self, id: &str) -> Result<messages::CgroupStats, CallError> {
        let container_id = id.into();
        let request = messages::StatsContainerRequest { container_id };
        let stats: messages::StatsContainerResponse = self.ask("StatsContainer", &request)?;
        Ok(stats.cgroup_stats.unwrap_or_default())
    }

    pub(crate) fn pause(&self, id: &str) -> Result<(), CallError> {
        let container_id = id.into();
        self.tell(
            "PauseContainer",
            &messages::PauseContainerRequest { container_id },
        )
    }

    pub(crate) fn resume(&self, id: &str) -> Result<(), CallError> {
        let container_id = id.into();
        self.tell(
            "ResumeContainer",
            &messages::ResumeContainerRequest { container_id },
        )
    }

    /// Waits for a container to run out of memory.
    pub(crate) fn next_oom(&self) -> Result<String, CallError> {
        let request = messages::GetOomEventRequest {};
        let event: messages::OomEvent = self.call(AGENT_SERVICE, "GetOOMEvent", &request, None)?;
        Ok(event.container_id)
    }

    /// Has the guest use all of its CPUs, which are `total` now.
    pub(crate) fn online_cpus(&self, total: u8) -> Result<(), CallError> {
        let request = messages::OnlineCpuMemRequest {
            wait: true,
            nb_cpus: total.into(),
            cpu_only: true,
        };
        self.tell("OnlineCPUMem", &request)
    }
}

/// An error whose text has no line ends and no orders to a terminal, and some length at most: a guest may have said it.
fn plain(error: CallError) -> CallError {
    let CallError::Refused(Status { code, message }) = error else {
        return error;
    };
    let mut text = String::new();
    for c in message.chars().take(MAX_TEXT_CHARS) {
        match c {
            '"' | '\'' | '\\' => text.push(c),
            _ => text.extend(c.escape_debug()),
        }
    }
    Status::new(code, text).into()
}

/// The time of day as the protocol has it.
fn date_time() -> messages::SetGuestDateTimeRequest {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    messages::SetGuestDateTimeRequest {
        sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        usec: now.subsec_micros().into(),
    }
}

/// Random numbers for a guest.
pub(crate) fn seed() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SEED_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Connects to the agent's port through podvmm, which holds the connection until the guest is up.
fn dial(vsock: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock)?;
    stream.set_read_timeout(Some(timeout))?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < 64 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    if !line.starts_with(b"OK") {
        let answer = String::from_utf8_lossy(&line).into_owned();
        return Err(io::Error::other(answer));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}
