//! A policy: which of the host's calls a pod's agent obeys, and which devices and mounts it gives containers.
//!
//! The shim reads one from a file of the node's administrator and hands it to the guest at its boot, as lines:
//! the agent needs no parser of TOML or JSON for them. A policy lists what is allowed, in three parts. A part
//! that is missing allows all; one without rules allows nothing.

mod rules;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

pub use self::rules::{CallRule, DeviceRule, Kind, MountRule, RuleError};

/// Longest policy, in bytes, as a file of the node's and as the guest is handed it.
pub const MAX_LEN: usize = 64 << 10;

/// The first line of a policy, with the version of its form.
const TITLE: &str = "podvmm policy 1";

/// What the agent's extra feature by which it names its policy begins with.
const FEATURE: &str = "podvmm.policy=";

/// The calls of `grpc.AgentService` that podvmm's agent answers.
pub const CALLS: [&str; 31] = [
    "AddARPNeighbors",
    "CloseStdin",
    "CopyFile",
    "CreateContainer",
    "CreateSandbox",
    "DestroySandbox",
    "ExecProcess",
    "GetGuestDetails",
    "GetMetrics",
    "GetOOMEvent",
    "GetVolumeStats",
    "ListInterfaces",
    "ListRoutes",
    "OnlineCPUMem",
    "PauseContainer",
    "ReadStderr",
    "ReadStdout",
    "RemoveContainer",
    "ReseedRandomDev",
    "ResumeContainer",
    "SetGuestDateTime",
    "SignalProcess",
    "StartContainer",
    "StatsContainer",
    "TtyWinResize",
    "UpdateContainer",
    "UpdateEphemeralMounts",
    "UpdateInterface",
    "UpdateRoutes",
    "WaitProcess",
    "WriteStdin",
];

/// Those of them without which no pod runs, or none ends.
pub const NEEDED: [&str; 10] = [
    "CreateContainer",
    "CreateSandbox",
    "DestroySandbox",
    "GetGuestDetails",
    "RemoveContainer",
    "ReseedRandomDev",
    "SetGuestDateTime",
    "SignalProcess",
    "StartContainer",
    "WaitProcess",
];

/// What the agent obeys. Of a part that is `None` it obeys all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    pub calls: Option<Vec<CallRule>>,
    pub devices: Option<Vec<DeviceRule>>,
    pub mounts: Option<Vec<MountRule>>,
}

/// What a policy does not allow, and which part of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node's policy forbids {what}: its rules for {part} do not allow it")]
pub struct Forbidden {
    pub part: &'static str,
    pub what: String,
}

impl Policy {
    /// Whether the agent is to answer a call of this name.
    pub fn allow_call(&self, method: &str) -> Result<(), Forbidden> {
        allowed("calls", self.calls.as_deref(), method, |rule| {
            rule.covers(method)
        })
    }

    /// Whether a container is to use devices of these numbers; without a kind or a number, all of them.
    pub fn allow_device(
        &self,
        kind: Option<Kind>,
        numbers: [Option<u32>; 2],
    ) -> Result<(), Forbidden> {
        let kinds = [Kind::Character, Kind::Block];
        let mut kinds = kinds
            .into_iter()
            .filter(|own| kind.is_none_or(|kind| kind == *own));
        kinds.try_for_each(|kind| {
            let wanted = DeviceRule { kind, numbers };
            let what = format_args!("device {wanted}");
            allowed("devices", self.devices.as_deref(), what, |rule| {
                rule.covers(&wanted)
            })
        })
    }

    /// Whether the agent is to mount a file system of type `kind`, or with `bind` what is at `source`.
    pub fn allow_mount(&self, kind: &str, source: &str) -> Result<(), Forbidden> {
        let what = format_args!("mount {kind} of {source:?}");
        allowed("mounts", self.mounts.as_deref(), what, |rule| {
            rule.covers(kind, source)
        })
    }

    /// The extra feature by which the agent says that this is the policy it obeys. It tells policies apart that
    /// a mistake has mixed up; it is no proof.
    pub fn feature(&self) -> String {
        // FNV-1a, of 64 bits.
        let text = self.to_string();
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("{FEATURE}{hash:016x}")
    }
}

fn allowed<R>(
    part: &'static str,
    rules: Option<&[R]>,
    what: impl fmt::Display,
    covers: impl FnMut(&R) -> bool,
) -> Result<(), Forbidden> {
    match rules.is_none_or(|rules| rules.iter().any(covers)) {
        true => Ok(()),
        false => Err(Forbidden {
            part,
            what: what.to_string(),
        }),
    }
}

impl fmt::Display for Policy {
    /// The lines that the guest is handed: a title, then each part that there is, by its name, and its rules.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn part<R: fmt::Display>(
            f: &mut fmt::Formatter<'_>,
            name: &str,
            rules: Option<&[R]>,
        ) -> fmt::Result {
            let Some(rules) = rules else {
                return Ok(());
            };
            writeln!(f, "{name}:")?;
            rules.iter().try_for_each(|rule| writeln!(f, " {rule}"))
        }
        writeln!(f, "{TITLE}")?;
        part(f, "calls", self.calls.as_deref())?;
        part(f, "devices", self.devices.as_deref())?;
        part(f, "mounts", self.mounts.as_deref())
    }
}

/// Why lines are no policy. Lines count from 1.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "each is what its message says")]
pub enum ParseError {
    #[error("a policy has {MAX_LEN} bytes at most, and begins with a line {TITLE:?}")]
    Form,
    #[error("line {line}")]
    Rule { line: usize, source: RuleError },
    #[error("line {0} is no part of a policy, or one for the second time")]
    Part(usize),
}

impl FromStr for Policy {
    type Err = ParseError;

    /// Reads what is printed of one, to its last byte.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let is_whole = text.len() <= MAX_LEN && text.ends_with('\n');
        let mut lines = text.lines().enumerate().map(|(at, line)| (at + 1, line));
        if !is_whole || lines.next() != Some((1, TITLE)) {
            return Err(ParseError::Form);
        }
        fn add<R: FromStr<Err = RuleError>>(
            rules: Option<&mut Vec<R>>,
            (line, text): (usize, &str),
        ) -> Result<(), ParseError> {
            let rule = text
                .parse()
                .map_err(|source| ParseError::Rule { line, source })?;
            rules.ok_or(ParseError::Part(line))?.push(rule);
            Ok(())
        }
        let mut policy = Self::default();
        let mut part = "";
        for (number, line) in lines {
            if let Some(rule) = line.strip_prefix(' ') {
                match part {
                    "calls:" => add(policy.calls.as_mut(), (number, rule))?,
                    "devices:" => add(policy.devices.as_mut(), (number, rule))?,
                    "mounts:" => add(policy.mounts.as_mut(), (number, rule))?,
                    _ => return Err(ParseError::Part(number)),
                }
                continue;
            }
            part = line;
            match part {
                "calls:" if policy.calls.is_none() => policy.calls = Some(Vec::new()),
                "devices:" if policy.devices.is_none() => policy.devices = Some(Vec::new()),
                "mounts:" if policy.mounts.is_none() => policy.mounts = Some(Vec::new()),
                _ => return Err(ParseError::Part(number)),
            }
        }
        Ok(policy)
    }
}
