//! Which system calls a container's processes may make: the OCI profile as a program that the kernel
//! runs at each call (seccomp(2); kernel: Documentation/userspace-api/seccomp_filter.rst).
//!
//! The crate seccompiler has one action for all that match in a filter, and profiles have several.
//! Numbers are looked up by halves: at a filter's loading the kernel runs it once for each number to
//! know which are always allowed, which would take seconds of a list where the kernel is interpreted.

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;

use prost::Message;
use protocol::agent::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};

use crate::sys;

/// A profile that cannot be kept to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("there is no seccomp action {0:?}")]
    Action(String),
    #[error("seccomp action {NOTIFY} is not possible in a pod's VM: its listener is on the node")]
    Notify,
    #[error("a seccomp action {action} of {number} is out of range")]
    Number { action: String, number: u32 },
    #[error("there is no seccomp comparison {0:?}")]
    Comparison(String),
    #[error("a system call has no argument {0}")]
    Argument(u64),
    #[error("there is no seccomp flag {0:?}")]
    Flag(String),
    #[error("a seccomp filter of {0} instructions is longer than the kernel takes")]
    Length(usize),
}

/// A program for the kernel, as the container's process is handed it.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Filter {
    /// Each a `sock_filter`, from its first byte to its last the lowest to the highest.
    #[prost(fixed64, repeated, tag = "1")]
    instructions: Vec<u64>,
    #[prost(uint32, tag = "2")]
    flags: u32,
}

impl Filter {
    /// Holds this process and its children to it. Without the right to administer the system or
    /// no-new-privileges this fails.
    pub(crate) fn load(&self) -> io::Result<()> {
        let parts = self.instructions.iter().map(|packed| {
            let [a, b, jt, jf, k @ ..] = packed.to_le_bytes();
            libc::sock_filter {
                code: u16::from_le_bytes([a, b]),
                jt,
                jf,
                k: u32::from_le_bytes(k),
            }
        });
        sys::load_seccomp(&parts.collect::<Vec<_>>(), self.flags)
    }
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// The least number of a system call of x86's x32, which the guest's kernel has not.
const OTHER_NUMBERS: u32 = 0x4000_0000;

/// Offsets in a seccomp_data.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;
const MOST_ARGUMENTS: u64 = 6;

const KILL_THREAD: u32 = 0;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Asks a program of the node's at each call (OCI runtime specification, config-linux.md, Seccomp).
const NOTIFY: &str = "SCMP_ACT_NOTIFY";

const LONGEST_ERRNO: u32 = 4095;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The most instructions that a program may have (BPF_MAXINSNS).
const MOST_INSTRUCTIONS: usize = 4096;

/// One step of the program: the numbers of a `sock_filter` (linux/filter.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// BPF_LD | BPF_W | BPF_ABS
const LOAD: u16 = 0x20;
/// BPF_ALU | BPF_AND | BPF_K
const AND: u16 = 0x54;
/// BPF_RET | BPF_K
const RETURN: u16 = 0x06;
/// BPF_JMP | BPF_JA
const JUMP: u16 = 0x05;
/// BPF_JMP | BPF_K, and of these JEQ, JGT, JGE.
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_NOT_LESS: u16 = 0x35;

const fn step(code: u16, k: u32) -> Instruction {
    let (jt, jf) = (0, 0);
    Instruction { code, jt, jf, k }
}

/// Passes over `jt` steps if so, over `jf` if not.
const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

/// What becomes of a call if all conditions are met.
struct Rule {
    conditions: Vec<Condition>,
    action: u32,
}

/// A comparison of an argument with a value; masked, if there is a mask.
#[derive(Clone, Copy)]
struct Condition {
    argument: u32,
    comparison: Comparison,
    mask: u64,
    value: u64,
}

#[derive(Clone, Copy)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    NotGreater,
    NotLess,
    Greater,
    MaskedEqual,
}

/// Makes the program. Names of system calls that this machine has not are passed over, as are the
/// other architectures of a profile: the guest's kernel runs only its own.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Filter, Error> {
    let mut flags = 0;
    for flag in &profile.flags {
        flags |= match flag.as_str() {
            "SECCOMP_FILTER_FLAG_TSYNC" => 1,
            "SECCOMP_FILTER_FLAG_LOG" => 2,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
            other => return Err(Error::Flag(other.into())),
        };
    }
    let default = action(&profile.default_action, profile.default_errno_ret)?;
    let mut rules: BTreeMap<u32, Vec<Rule>> = BTreeMap::new();
    for syscall in &profile.syscalls {
        add_rules(&mut rules, syscall, default)?;
    }
    let program = program(&rules, default, newest(profile, default));
    if program.len() > MOST_INSTRUCTIONS {
        return Err(Error::Length(program.len()));
    }
    let pack = |step: &Instruction| {
        let [a, b] = step.code.to_le_bytes();
        let [c, d, e, f] = step.k.to_le_bytes();
        u64::from_le_bytes([a, b, step.jt, step.jf, c, d, e, f])
    };
    let instructions = program.iter().map(pack).collect();
    Ok(Filter {
        instructions,
        flags,
    })
}

/// What the kernel is to return for an action by its name.
fn action(name: &str, number: Option<u32>) -> Result<u32, Error> {
    let with = |action: u32, most: u32| {
        let number = number.unwrap_or(EPERM);
        let wrong = || Error::Number {
            action: name.into(),
            number,
        };
        (number <= most)
            .then_some(action | number)
            .ok_or_else(wrong)
    };
    match name {
        "SCMP_ACT_ALLOW" => Ok(ALLOW),
        "SCMP_ACT_ERRNO" => with(ERRNO, LONGEST_ERRNO),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Ok(KILL_THREAD),
        "SCMP_ACT_KILL_PROCESS" => Ok(KILL_PROCESS),
        "SCMP_ACT_TRAP" => Ok(TRAP),
        "SCMP_ACT_LOG" => Ok(LOG),
        "SCMP_ACT_TRACE" => with(TRACE, u16::MAX.into()),
        NOTIFY => Err(Error::Notify),
        other => Err(Error::Action(other.into())),
    }
}

/// The last system call that the profile's author knew, as far as the profile tells: the highest number
/// in it. A program that is refused a newer one is to take it for a kernel's that has none, and do
/// without, as runc has it. None if the default lets calls through.
fn newest(profile: &LinuxSeccomp, default: u32) -> Option<u32> {
    /// The part that says what is done (linux/seccomp.h: SECCOMP_RET_ACTION_FULL).
    const ACTION: u32 = 0xffff_0000;
    if [ALLOW, LOG, TRACE].contains(&(default & ACTION)) {
        return None;
    }
    let names = profile.syscalls.iter().flat_map(|rule| &rule.names);
    let newest = names.filter_map(|name| number(name)).max();
    newest.filter(|number| *number != 0)
}

fn add_rules(
    rules: &mut BTreeMap<u32, Vec<Rule>>,
    syscall: &LinuxSyscall,
    default: u32,
) -> Result<(), Error> {
    let action = action(&syscall.action, syscall.errno_ret)?;
    let conditions = syscall.args.iter().map(condition);
    let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
    // As runc has it: what happens anyway needs no rule, and of several conditions of one argument
    // any will do.
    let groups: Vec<&[Condition]> = match ambiguous(&conditions) {
        true => conditions.chunks(1).collect(),
        false => vec![&conditions],
    };
    for number in syscall.names.iter().filter_map(|name| number(name)) {
        if action != default {
            let rules = rules.entry(number).or_default();
            rules.extend(groups.iter().map(|group| Rule {
                conditions: group.to_vec(),
                action,
            }));
        }
    }
    Ok(())
}

fn ambiguous(conditions: &[Condition]) -> bool {
    let mut seen: Vec<_> = conditions.iter().map(|it| it.argument).collect();
    seen.sort_unstable();
    seen.windows(2).any(|pair| pair[0] == pair[1])
}

fn number(name: &str) -> Option<u32> {
    let number = syscalls::Sysno::from_str(name).ok()?;
    u32::try_from(number.id()).ok()
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, Error> {
    let argument = u32::try_from(arg.index).ok();
    let argument = argument.filter(|_| arg.index < MOST_ARGUMENTS);
    let argument = argument.ok_or(Error::Argument(arg.index))?;
    let comparison = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::NotGreater,
        "SCMP_CMP_GE" => Comparison::NotLess,
        "SCMP_CMP_GT" => Comparison::Greater,
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual,
        other => return Err(Error::Comparison(other.into())),
    };
    let (mask, value) = match comparison {
        Comparison::MaskedEqual => (arg.value, arg.value_two),
        _ => (u64::MAX, arg.value),
    };
    Ok(Condition {
        argument,
        comparison,
        mask,
        value,
    })
}

fn program(
    rules: &BTreeMap<u32, Vec<Rule>>,
    default: u32,
    newest: Option<u32>,
) -> Vec<Instruction> {
    let mut program = vec![
        step(LOAD, ARCH),
        branch(IF_EQUAL, ARCHITECTURE, 1, 0),
        step(RETURN, KILL_PROCESS),
        step(LOAD, NUMBER),
        branch(IF_NOT_LESS, OTHER_NUMBERS, 0, 1),
        step(RETURN, ERRNO | ENOSYS),
    ];
    program.extend(tree(&ranges(rules, default, newest)));
    program
}

/// Ranges of system calls in order: from which number on which instructions count.
fn ranges(
    rules: &BTreeMap<u32, Vec<Rule>>,
    default: u32,
    newest: Option<u32>,
) -> Vec<(u32, Vec<Instruction>)> {
    let otherwise = vec![step(RETURN, default)];
    let mut ranges = vec![(0, otherwise.clone())];
    let mut start = |at: u32, code: Vec<Instruction>| match ranges.last_mut() {
        Some((from, last)) if *from == at => *last = code,
        _ => ranges.push((at, code)),
    };
    for (number, rules) in rules {
        start(*number, decide(rules, default));
        start(number + 1, otherwise.clone());
    }
    if let Some(newest) = newest {
        start(newest + 1, vec![step(RETURN, ERRNO | ENOSYS)]);
    }
    ranges.dedup_by(|next, before| next.1 == before.1);
    ranges
}

/// Finds a number's range by halves.
fn tree(ranges: &[(u32, Vec<Instruction>)]) -> Vec<Instruction> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let [(start, code), ..] = high else {
        return Vec::new();
    };
    if low.is_empty() {
        return code.clone();
    }
    let (low, high) = (tree(low), tree(high));
    let mut program = match u8::try_from(low.len()) {
        Ok(len) => vec![branch(IF_NOT_LESS, *start, len, 0)],
        Err(_) => {
            let len = u32::try_from(low.len()).unwrap_or(u32::MAX);
            vec![branch(IF_NOT_LESS, *start, 0, 1), step(JUMP, len)]
        }
    };
    program.extend(low);
    program.extend(high);
    program
}

/// What is done about one number. A rule without conditions goes before those with, as libseccomp
/// has it.
fn decide(rules: &[Rule], default: u32) -> Vec<Instruction> {
    if let Some(rule) = rules.iter().find(|rule| rule.conditions.is_empty()) {
        return vec![step(RETURN, rule.action)];
    }
    let mut program = Vec::new();
    for rule in rules {
        let mut code = vec![step(RETURN, rule.action)];
        // From the last to the first: each knows how far it is to the end.
        for condition in rule.conditions.iter().rev() {
            let rest = u8::try_from(code.len()).expect("six conditions are short");
            code = [compare(condition, rest), code].concat();
        }
        program.extend(code);
    }
    program.push(step(RETURN, default));
    program
}

/// Goes on if the condition is met, and else passes over `rest` more steps. A register has 32 bits:
/// the higher half is looked at first.
fn compare(condition: &Condition, rest: u8) -> Vec<Instruction> {
    let (low, high) = halves(condition.value);
    let (mask_low, mask_high) = halves(condition.mask);
    let at = ARGUMENTS + 8 * condition.argument;
    let (load_high, load_low) = (step(LOAD, at + 4), step(LOAD, at));
    // Not equal in the higher half decides it: met if greater, or if less.
    let ordered = |code, met, unmet| {
        let (greater, less) = (met, unmet);
        vec![
            load_high,
            branch(IF_GREATER, high, greater + 3, 0),
            branch(IF_EQUAL, high, 0, less + 2),
            load_low,
            branch(code, low, met, unmet),
        ]
    };
    match condition.comparison {
        Comparison::Equal => vec![
            load_high,
            branch(IF_EQUAL, high, 0, rest + 2),
            load_low,
            branch(IF_EQUAL, low, 0, rest),
        ],
        Comparison::NotEqual => vec![
            load_high,
            branch(IF_EQUAL, high, 0, 2),
            load_low,
            branch(IF_EQUAL, low, rest, 0),
        ],
        Comparison::Greater => ordered(IF_GREATER, 0, rest),
        Comparison::NotLess => ordered(IF_NOT_LESS, 0, rest),
        Comparison::Less => ordered(IF_NOT_LESS, rest, 0),
        Comparison::NotGreater => ordered(IF_GREATER, rest, 0),
        Comparison::MaskedEqual => vec![
            load_high,
            step(AND, mask_high),
            branch(IF_EQUAL, high, 0, rest + 3),
            load_low,
            step(AND, mask_low),
            branch(IF_EQUAL, low, 0, rest),
        ],
    }
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

#[cfg(test)]
mod tests;
