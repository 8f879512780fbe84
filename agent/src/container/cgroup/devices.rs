//! Which devices a container may open or make nodes of. In version 2 of cgroups that is a program which
//! the kernel runs at each attempt (kernel: cgroup-v2.rst, Device controller; bpf(2)).

use protocol::agent::oci::{LinuxDevice, LinuxDeviceCgroup, LinuxResources};
use protocol::policy::Kind;

use super::{Cgroup, Error};
use crate::sys;

/// What may be asked for, as the program sees it (linux/bpf.h: BPF_DEVCG_ACC_*).
const ACCESSES: [(char, i32); 3] = [('m', 1), ('r', 2), ('w', 4)];
const MAKE: i32 = 1;
const ALL: i32 = 7;

/// Kinds of devices, as the program sees them (linux/bpf.h: BPF_DEVCG_DEV_*).
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// What every container may do, whatever its specification says, as by runc: make nodes of all devices,
/// and use those of memory and terminals. Kind, major and minor number, access.
const ALWAYS: [(i32, Option<i32>, Option<i32>, i32); 11] = [
    (CHARACTER, None, None, MAKE),
    (BLOCK, None, None, MAKE),
    (CHARACTER, Some(1), Some(3), ALL),
    (CHARACTER, Some(1), Some(5), ALL),
    (CHARACTER, Some(1), Some(7), ALL),
    (CHARACTER, Some(1), Some(8), ALL),
    (CHARACTER, Some(1), Some(9), ALL),
    (CHARACTER, Some(5), Some(0), ALL),
    (CHARACTER, Some(5), Some(2), ALL),
    (CHARACTER, Some(136), None, ALL),
    (CHARACTER, Some(5), Some(1), ALL),
];

/// Whether some accesses are allowed. Nothing said is any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    fn parse(rule: &LinuxDeviceCgroup) -> Result<Self, Error> {
        let wrong = || Error::Device(format!("{rule:?}"));
        let kind = match rule.r#type.as_str() {
            "" | "a" => None,
            "b" => Some(BLOCK),
            "c" | "u" => Some(CHARACTER),
            _ => return Err(wrong()),
        };
        let number = |number: i64| match number {
            ..0 => Ok(None),
            number => i32::try_from(number).map(Some).map_err(|_| wrong()),
        };
        let mut access = 0;
        for letter in rule.access.chars() {
            let found = ACCESSES.iter().find(|(known, _)| *known == letter);
            access |= found.ok_or_else(wrong)?.1;
        }
        Ok(Self {
            allow: rule.allow,
            kind,
            // No device has this number: the protocol has it for one that is not said.
            major: number(rule.major)?.filter(|major| *major != 0),
            minor: number(rule.minor)?,
            access: if access == 0 { ALL } else { access },
        })
    }

    /// The rule by which a container uses a device of its own.
    fn of(device: &LinuxDevice) -> Result<Self, Error> {
        Self::parse(&LinuxDeviceCgroup {
            allow: true,
            r#type: device.r#type.clone(),
            major: device.major,
            minor: device.minor,
            access: String::new(),
        })
    }

    fn is_of_all(&self) -> bool {
        (self.kind, self.major, self.minor, self.access) == (None, None, None, ALL)
    }

    /// Whether it allows no more than every container may.
    fn is_of_every_container(&self) -> bool {
        let within = |all: Option<i32>, own: Option<i32>| all.is_none() || all == own;
        ALWAYS.iter().any(|(kind, major, minor, access)| {
            self.kind == Some(*kind)
                && within(*major, self.major)
                && within(*minor, self.minor)
                && self.access & !access == 0
        }) || self.access == MAKE
    }
}

/// Devices of a kind and of numbers, major and minor; of any, where there is none.
pub(crate) type Devices = (Option<Kind>, [Option<u32>; 2]);

/// The devices that a container may use by its specification, besides those that all may. Exceptions that the
/// rules make are passed over: what is told is not less than what may be used.
pub(crate) fn used(
    resources: Option<&LinuxResources>,
    own: &[LinuxDevice],
) -> Result<Vec<Devices>, Error> {
    let rules = resources.map_or(&[][..], |resources| &resources.devices);
    let mut rules = rules
        .iter()
        .map(Rule::parse)
        .collect::<Result<Vec<_>, _>>()?;
    if are_open(&rules) {
        return Ok(vec![(None, [None; 2])]);
    }
    let closed = rules
        .iter()
        .rposition(|rule| !rule.allow && rule.is_of_all());
    rules.drain(..closed.map_or(0, |at| at + 1));
    for device in own.iter().filter(|device| device.r#type != "p") {
        rules.push(Rule::of(device)?);
    }
    rules.retain(|rule| rule.allow && !rule.is_of_every_container());
    let number = |number: Option<i32>| number.map(i32::cast_unsigned);
    let devices = rules.into_iter().map(|rule| {
        let kind = rule.kind.map(|kind| match kind {
            BLOCK => Kind::Block,
            _ => Kind::Character,
        });
        (kind, [rule.major, rule.minor].map(number))
    });
    Ok(devices.collect())
}

/// Whether a container with these rules may use all devices. Of several that match the last one counts.
fn are_open(rules: &[Rule]) -> bool {
    let last = rules.last();
    last.is_none_or(|last| last.allow && last.is_of_all())
}

impl Cgroup {
    /// Holds all who will be in it to the specification's rules, and gives them the container's own
    /// devices. Without rules all may be used.
    pub(crate) fn restrict_devices(
        &self,
        resources: &LinuxResources,
        own: &[LinuxDevice],
    ) -> Result<(), Error> {
        let rules = resources.devices.iter().map(Rule::parse);
        let mut rules = rules.collect::<Result<Vec<_>, _>>()?;
        if are_open(&rules) {
            return Ok(());
        }
        rules.extend(ALWAYS.map(|(kind, major, minor, access)| Rule {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }));
        for device in own.iter().filter(|device| device.r#type != "p") {
            rules.push(Rule::of(device)?);
        }
        let attached = sys::attach_device_filter(&self.path, &program(&rules));
        attached.map_err(|source| Error::File {
            path: self.path.clone(),
            source,
        })
    }
}

/// Instructions (linux/bpf_common.h, linux/bpf.h).
const LOAD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const SET: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
const SHIFT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
const IF_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_OTHER: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

/// Registers: the answer, what is asked (a `bpf_cgroup_dev_ctx`), and its parts.
const ANSWER: u8 = 0;
const ASKED: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// One instruction: a `bpf_insn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    value: i32,
}

impl Step {
    fn pack(self) -> u64 {
        let [a, b] = self.offset.to_ne_bytes();
        let [c, d, e, f] = self.value.to_ne_bytes();
        u64::from_ne_bytes([self.code, self.to | self.from << 4, a, b, c, d, e, f])
    }
}

const fn step(code: u8, to: u8, value: i32) -> Step {
    Step {
        code,
        to,
        from: 0,
        offset: 0,
        value,
    }
}

/// Tells what the last of the rules that match says; if none does, no.
fn steps(rules: &[Rule]) -> Vec<Step> {
    let load = |to, offset| Step {
        from: ASKED,
        offset,
        ..step(LOAD, to, 0)
    };
    let mut steps = vec![
        load(KIND, 0),
        load(ACCESS, 0),
        load(MAJOR, 4),
        load(MINOR, 8),
        step(AND, KIND, 0xffff),
        step(SHIFT, ACCESS, 16),
    ];
    for rule in rules.iter().rev() {
        steps.extend(decide(rule));
        // What could not be reached the kernel would not take.
        if rule.is_of_all() {
            return steps;
        }
    }
    steps.extend([step(SET, ANSWER, 0), step(EXIT, 0, 0)]);
    steps
}

/// Answers if the rule matches, and else goes on behind it.
fn decide(rule: &Rule) -> Vec<Step> {
    let mut steps = vec![step(SET, ANSWER, i32::from(rule.allow)), step(EXIT, 0, 0)];
    // From the last to the first: each knows how far it is to the end.
    let mut put = |condition: Step| {
        let offset = i16::try_from(steps.len()).expect("a rule has few steps");
        steps.insert(
            0,
            Step {
                offset,
                ..condition
            },
        );
    };
    for (register, number) in [(MINOR, rule.minor), (MAJOR, rule.major), (KIND, rule.kind)] {
        if let Some(number) = number {
            put(step(IF_OTHER, register, number));
        }
    }
    if rule.access == ALL {
        return steps;
    }
    // All that is asked has to be allowed; that some of it is denied is enough.
    let (code, mask) = match rule.allow {
        true => (IF_OTHER, ALL & !rule.access),
        false => (IF_EQUAL, rule.access),
    };
    put(step(code, ANSWER, 0));
    let copied = Step {
        from: ACCESS,
        ..step(MOVE, ANSWER, 0)
    };
    steps.splice(0..0, [copied, step(AND, ANSWER, mask)]);
    steps
}

fn program(rules: &[Rule]) -> Vec<u64> {
    steps(rules).into_iter().map(Step::pack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What the kernel would be told.
    fn run(steps: &[Step], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let asked = [access << 16 | kind, major, minor];
        let mut registers = [0_i64; 6];
        let mut at = 0;
        loop {
            let Step {
                code,
                to,
                from,
                offset,
                value,
            } = steps[at];
            let (to, from, value) = (usize::from(to), usize::from(from), i64::from(value));
            at += 1;
            let jump = usize::try_from(offset).unwrap();
            match code {
                LOAD => registers[to] = asked[jump / 4].into(),
                MOVE => registers[to] = registers[from],
                SET => registers[to] = value,
                AND => registers[to] &= value,
                SHIFT => registers[to] >>= value,
                IF_EQUAL => at += if registers[to] == value { jump } else { 0 },
                IF_OTHER => at += if registers[to] == value { 0 } else { jump },
                EXIT => return registers[0] != 0,
                other => panic!("{other:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroup {
            allow,
            r#type: kind.into(),
            major,
            minor,
            access: access.into(),
        }
    }

    #[test]
    fn the_last_rule_that_matches_counts() {
        let rules = [
            rule(false, "a", -1, -1, "rwm"),
            rule(true, "c", 1, 3, "rwm"),
            rule(true, "b", 254, -1, "r"),
            rule(false, "b", 254, 16, "rw"),
        ]
        .map(|rule| Rule::parse(&rule).unwrap());
        let steps = steps(&rules);
        let may = |kind, access, major, minor| run(&steps, kind, access, major, minor);
        assert!(may(CHARACTER, 6, 1, 3) && !may(BLOCK, 6, 1, 3) && !may(CHARACTER, 2, 1, 5));
        assert!(may(BLOCK, 2, 254, 0) && !may(BLOCK, 6, 254, 0) && !may(BLOCK, 2, 254, 16));
    }

    #[test]
    fn what_is_not_said_is_any() {
        let all = rule(false, "", 0, -1, "");
        assert!(Rule::parse(&all).unwrap().is_of_all());
        for wrong in [
            rule(true, "x", 1, 1, "r"),
            rule(true, "c", 1, 1, "rx"),
            rule(true, "c", i64::MAX, 1, "r"),
        ] {
            let refused = Rule::parse(&wrong).unwrap_err().to_string();
            assert!(refused.starts_with("a rule for devices: "), "{refused}");
        }
    }

    #[test]
    fn what_a_container_may_use_is_told_and_no_less() {
        let told = |rules: &[LinuxDeviceCgroup], own: &[LinuxDevice]| {
            let resources = LinuxResources {
                devices: rules.to_vec(),
                ..LinuxResources::default()
            };
            used(Some(&resources), own).unwrap()
        };
        let all = vec![(None, [None; 2])];
        let closed = rule(false, "a", -1, -1, "rwm");
        let open = rule(true, "a", -1, -1, "rwm");
        assert_eq!(used(None, &[]).unwrap(), all);
        assert_eq!(told(&[], &[]), all);
        assert_eq!(told(&[closed.clone(), open.clone()], &[]), all);
        let disk = (Some(Kind::Block), [Some(254), None]);
        let usual = [
            open,
            rule(true, "c", 10, 229, "rw"),
            closed,
            rule(true, "c", -1, -1, "m"),
            rule(true, "", -1, -1, "m"),
            rule(true, "c", 136, 7, "rwm"),
            rule(true, "c", 1, 3, "r"),
            rule(true, "b", 254, -1, "r"),
            rule(false, "b", 254, 1, "r"),
        ];
        assert_eq!(told(&usual, &[]), [disk]);
        // Of a part of all devices it is not all, and the last rule that matches counts.
        let readable = rule(true, "a", -1, -1, "r");
        assert_eq!(told(&[usual[2].clone(), readable], &[]), all);
        let device = |kind: &str, major, minor| LinuxDevice {
            r#type: kind.into(),
            major,
            minor,
            ..LinuxDevice::default()
        };
        let own = [device("c", 1, 1), device("p", 0, 0), device("u", 1, 5)];
        let memory = (Some(Kind::Character), [Some(1), Some(1)]);
        assert_eq!(told(&usual[2..4], &own), [memory]);
    }

    fn a_rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(1..3_i32);
        (any::<bool>(), number(), number(), number(), 1..=ALL).prop_map(
            |(allow, kind, major, minor, access)| Rule {
                allow,
                kind,
                major,
                minor,
                access,
            },
        )
    }

    proptest! {
        #[test]
        fn the_program_does_what_the_rules_say(
            rules in prop::collection::vec(a_rule(), 0..6),
            kind in 1..3_i32, access in 1..=ALL, major in 1..3_i32, minor in 1..3_i32,
        ) {
            let is = |wanted: Option<i32>, given| wanted.is_none_or(|wanted| wanted == given);
            let matches = |rule: &&Rule| {
                let asks = if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 };
                asks && is(rule.kind, kind) && is(rule.major, major) && is(rule.minor, minor)
            };
            let expected = rules.iter().rev().find(matches).is_some_and(|rule| rule.allow);
            prop_assert_eq!(run(&steps(&rules), kind, access, major, minor), expected);
        }
    }
}
