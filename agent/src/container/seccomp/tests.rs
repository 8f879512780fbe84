use proptest::prelude::*;

use super::*;

/// What the kernel would return. None where it would refuse the program.
fn run(program: &[Instruction], arch: u32, number: u32, args: [u64; 6]) -> Option<u32> {
    let mut data = [number.to_le_bytes(), arch.to_le_bytes()].concat();
    data.extend([0; 8]);
    data.extend(args.iter().flat_map(|arg| arg.to_le_bytes()));
    let (mut a, mut at) = (0_u32, 0_usize);
    loop {
        let Instruction { code, jt, jf, k } = *program.get(at)?;
        at += 1;
        let decide = |so: bool| usize::from(if so { jt } else { jf });
        match code {
            LOAD => {
                let k = k as usize;
                a = u32::from_le_bytes(data.get(k..k + 4)?.try_into().ok()?);
            }
            AND => a &= k,
            RETURN => return Some(k),
            JUMP => at += k as usize,
            IF_EQUAL => at += decide(a == k),
            IF_GREATER => at += decide(a > k),
            IF_NOT_LESS => at += decide(a >= k),
            _ => return None,
        }
    }
}

fn unpack(filter: &Filter) -> Vec<Instruction> {
    let unpack = |packed: &u64| {
        let [a, b, jt, jf, c, d, e, f] = packed.to_le_bytes();
        let code = u16::from_le_bytes([a, b]);
        let k = u32::from_le_bytes([c, d, e, f]);
        Instruction { code, jt, jf, k }
    };
    filter.instructions.iter().map(unpack).collect()
}

fn verdict(profile: &LinuxSeccomp, name: &str, args: [u64; 6]) -> u32 {
    let program = unpack(&compile(profile).unwrap());
    run(&program, ARCHITECTURE, number(name).unwrap(), args).unwrap()
}

fn rule(names: &[&str], action: &str, errno_ret: Option<u32>) -> LinuxSyscall {
    LinuxSyscall {
        names: names.iter().map(ToString::to_string).collect(),
        action: action.into(),
        errno_ret,
        args: Vec::new(),
    }
}

fn arg(index: u64, op: &str, value: u64, value_two: u64) -> LinuxSeccompArg {
    let op = format!("SCMP_CMP_{op}");
    LinuxSeccompArg {
        index,
        value,
        value_two,
        op,
    }
}

fn profile(default_action: &str, syscalls: Vec<LinuxSyscall>) -> LinuxSeccomp {
    LinuxSeccomp {
        default_action: default_action.into(),
        architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()],
        flags: Vec::new(),
        syscalls,
        default_errno_ret: None,
    }
}

#[test]
fn each_call_has_its_action() {
    let profile = profile(
        "SCMP_ACT_ERRNO",
        vec![
            rule(&["read", "write", "no_such_call"], "SCMP_ACT_ALLOW", None),
            rule(&["mkdirat"], "SCMP_ACT_ERRNO", Some(28)),
            rule(&["ptrace"], "SCMP_ACT_KILL_PROCESS", None),
            rule(&["kexec_load"], "SCMP_ACT_KILL", None),
            rule(&["mount"], "SCMP_ACT_TRAP", None),
            rule(&["reboot"], "SCMP_ACT_LOG", None),
            rule(&["bpf"], "SCMP_ACT_TRACE", Some(7)),
        ],
    );
    let verdicts = [
        "read",
        "write",
        "close",
        "mkdirat",
        "ptrace",
        "kexec_load",
        "mount",
        "reboot",
        "bpf",
    ]
    .map(|name| verdict(&profile, name, [0; 6]));
    assert_eq!(
        verdicts,
        [
            ALLOW,
            ALLOW,
            ERRNO | EPERM,
            ERRNO | 28,
            KILL_PROCESS,
            KILL_THREAD,
            TRAP,
            LOG,
            TRACE | 7
        ]
    );
}

#[test]
fn calls_newer_than_the_profile_are_unknown_to_the_kernel() {
    let newer = |default: &str, errno: Option<u32>, names: &[&str]| {
        let mut profile = profile(default, vec![rule(names, "SCMP_ACT_ALLOW", None)]);
        profile.default_errno_ret = errno;
        ["close", "statx", "openat2", "no_such_call"].map(|name| {
            let number = number(name).unwrap_or(9999);
            let program = unpack(&compile(&profile).unwrap());
            run(&program, ARCHITECTURE, number, [0; 6]).unwrap()
        })
    };
    let known = ["read", "statx", "no_such_call"];
    let (no, unknown) = (ERRNO | EPERM, ERRNO | ENOSYS);
    assert_eq!(
        newer("SCMP_ACT_ERRNO", None, &known),
        [no, ALLOW, unknown, unknown]
    );
    assert_eq!(
        newer("SCMP_ACT_ERRNO", Some(13), &known),
        [ERRNO | 13, ALLOW, unknown, unknown]
    );
    assert_eq!(
        newer("SCMP_ACT_KILL_PROCESS", None, &known),
        [KILL_PROCESS, ALLOW, unknown, unknown]
    );
    // A tracer or a log is to see new ones too, and one that knows none knows no newest.
    for (default, action) in [("LOG", LOG), ("TRACE", TRACE | EPERM), ("ALLOW", ALLOW)] {
        let verdicts = newer(&format!("SCMP_ACT_{default}"), None, &known);
        assert_eq!(verdicts, [action, ALLOW, action, action]);
    }
    assert_eq!(newer("SCMP_ACT_ERRNO", None, &["no_such_call"]), [no; 4]);
    // What is said of a call is known of it, whatever it is.
    let refused = rule(&["openat2"], "SCMP_ACT_ERRNO", None);
    let profile = profile("SCMP_ACT_ERRNO", vec![refused]);
    assert_eq!(verdict(&profile, "openat2", [0; 6]), no);
}

#[test]
fn other_architectures_get_nothing_done() {
    let program = unpack(&compile(&profile("SCMP_ACT_ALLOW", Vec::new())).unwrap());
    let run = |arch, number| run(&program, arch, number, [0; 6]);
    assert_eq!(run(0x4000_0003, 1), Some(KILL_PROCESS));
    assert_eq!(run(ARCHITECTURE, OTHER_NUMBERS + 1), Some(ERRNO | ENOSYS));
    assert_eq!(run(ARCHITECTURE, 1), Some(ALLOW));
}

#[test]
fn arguments_are_compared_with_all_their_bits() {
    const BIG: u64 = 5 << 32 | 7;
    let verdict = |op: &str, value, value_two, given| {
        let mut clone = rule(&["clone"], "SCMP_ACT_ALLOW", None);
        clone.args = vec![arg(2, op, value, value_two)];
        let given = [0, 0, given, 0, 0, 0];
        verdict(&profile("SCMP_ACT_ERRNO", vec![clone]), "clone", given) == ALLOW
    };
    for (op, less, equal, greater) in [
        ("EQ", false, true, false),
        ("NE", true, false, true),
        ("LT", true, false, false),
        ("LE", true, true, false),
        ("GE", false, true, true),
        ("GT", false, false, true),
    ] {
        for (given, expected) in [
            (BIG - 1, less),
            (7, less),
            (4 << 32 | 9, less),
            (BIG, equal),
            (BIG + 1, greater),
            (6 << 32, greater),
        ] {
            assert_eq!(verdict(op, BIG, 0, given), expected, "{given:#x} {op}");
        }
    }
    // As for clone in Docker's profile: none of the namespaces.
    assert!(verdict("MASKED_EQ", 0x7e02_0000, 0, 0x0120_0011));
    assert!(!verdict("MASKED_EQ", 0x7e02_0000, 0, 0x2000_0000));
    assert!(verdict("MASKED_EQ", 0xf << 32, 1 << 32, 0xff1 << 32));
}

#[test]
fn several_conditions_are_met_all_or_any() {
    let verdict = |args: Vec<_>, given: [u64; 2]| {
        let mut socket = rule(&["socket"], "SCMP_ACT_ALLOW", None);
        socket.args = args;
        let given = [given[0], given[1], 0, 0, 0, 0];
        verdict(&profile("SCMP_ACT_ERRNO", vec![socket]), "socket", given) == ALLOW
    };
    let both = || vec![arg(0, "EQ", 1, 0), arg(1, "NE", 2, 0)];
    assert!(verdict(both(), [1, 3]));
    assert!(!verdict(both(), [1, 2]) && !verdict(both(), [2, 3]));
    let either = || vec![arg(0, "EQ", 1, 0), arg(0, "EQ", 2, 0)];
    assert!(verdict(either(), [1, 0]) && verdict(either(), [2, 0]));
    assert!(!verdict(either(), [3, 0]));
}

#[test]
fn a_rule_without_conditions_goes_first() {
    let mut some = rule(&["clone"], "SCMP_ACT_TRAP", None);
    some.args = vec![arg(0, "EQ", 1, 0)];
    let all = rule(&["clone"], "SCMP_ACT_ALLOW", None);
    let profile = profile("SCMP_ACT_ERRNO", vec![some, all]);
    assert_eq!(verdict(&profile, "clone", [1, 0, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn what_is_not_known_is_refused() {
    let refused = |profile| compile(&profile).unwrap_err().to_string();
    let one = |rule| profile("SCMP_ACT_ALLOW", vec![rule]);
    assert_eq!(
        refused(profile("SCMP_ACT_DANCE", Vec::new())),
        "there is no seccomp action \"SCMP_ACT_DANCE\""
    );
    let notify = "seccomp action SCMP_ACT_NOTIFY is not possible in a pod's VM: \
                  its listener is on the node";
    assert_eq!(refused(profile("SCMP_ACT_NOTIFY", Vec::new())), notify);
    let of_one = one(rule(&["mount"], "SCMP_ACT_NOTIFY", None));
    assert_eq!(refused(of_one), notify);
    assert_eq!(
        refused(one(rule(&["read"], "SCMP_ACT_ERRNO", Some(5000)))),
        "a seccomp action SCMP_ACT_ERRNO of 5000 is out of range"
    );
    let mut strange = rule(&["read"], "SCMP_ACT_ERRNO", None);
    strange.args = vec![arg(6, "EQ", 0, 0)];
    assert_eq!(
        refused(one(strange.clone())),
        "a system call has no argument 6"
    );
    strange.args = vec![arg(0, "LIKE", 0, 0)];
    assert_eq!(
        refused(one(strange)),
        "there is no seccomp comparison \"SCMP_CMP_LIKE\""
    );
    let mut flags = profile("SCMP_ACT_ALLOW", Vec::new());
    flags.flags = ["TSYNC", "LOG", "SPEC_ALLOW"]
        .map(|name| format!("SECCOMP_FILTER_FLAG_{name}"))
        .to_vec();
    assert_eq!(compile(&flags).unwrap().flags, 7);
    flags.flags.push("FLAG".into());
    assert_eq!(refused(flags), "there is no seccomp flag \"FLAG\"");
}

#[test]
fn a_number_is_found_in_few_steps() {
    // Every second call of the first 300: the worst there is.
    let all = (0..300).filter_map(|number| syscalls::Sysno::new(number * 2));
    let names: Vec<_> = all.map(|number| number.name()).collect();
    let profile = profile("SCMP_ACT_ERRNO", vec![rule(&names, "SCMP_ACT_ALLOW", None)]);
    let program = unpack(&compile(&profile).unwrap());
    assert!(program.len() < 1000, "{}", program.len());
    for (number, allowed) in [
        (0, true),
        (1, false),
        (38, true),
        (299, false),
        (5000, false),
    ] {
        let verdict = run(&program, ARCHITECTURE, number, [0; 6]).unwrap();
        assert_eq!(verdict == ALLOW, allowed, "{number}");
    }
}

fn an_arg() -> impl Strategy<Value = LinuxSeccompArg> {
    const OPS: [&str; 7] = ["EQ", "NE", "LT", "LE", "GE", "GT", "MASKED_EQ"];
    let value = || prop_oneof![0..4_u64, (0..4_u64).prop_map(|high| high << 32 | 1)];
    let op = prop::sample::select(&OPS[..]);
    (0..6_u64, op, value(), value()).prop_map(|(index, op, one, two)| arg(index, op, one, two))
}

const NAMES: [&str; 5] = ["read", "write", "openat", "mkdirat", "no_such_call"];

fn a_rule() -> impl Strategy<Value = LinuxSyscall> {
    const ACTIONS: [&str; 4] = ["ALLOW", "ERRNO", "TRAP", "KILL_PROCESS"];
    let names = prop::sample::subsequence(&NAMES[..], 1..4);
    let action = prop::sample::select(&ACTIONS[..]);
    let args = prop::collection::vec(an_arg(), 0..4);
    (names, action, args).prop_map(|(names, action, args)| LinuxSyscall {
        args,
        ..rule(&names, &format!("SCMP_ACT_{action}"), None)
    })
}

/// What the profile says, read slowly.
fn expected(profile: &LinuxSeccomp, name: &str, args: [u64; 6]) -> u32 {
    let default = action(&profile.default_action, None).unwrap();
    let is_met = |arg: &LinuxSeccompArg| {
        let given = args[usize::try_from(arg.index).unwrap()];
        match arg.op.strip_prefix("SCMP_CMP_").unwrap() {
            "EQ" => given == arg.value,
            "NE" => given != arg.value,
            "LT" => given < arg.value,
            "LE" => given <= arg.value,
            "GE" => given >= arg.value,
            "GT" => given > arg.value,
            _ => given & arg.value == arg.value_two,
        }
    };
    let rules = profile.syscalls.iter().filter(|rule| {
        let is_named = rule.names.iter().any(|it| it == name);
        is_named && action(&rule.action, None).unwrap() != default
    });
    let rules: Vec<_> = rules.collect();
    let of_profile = profile.syscalls.iter().flat_map(|rule| &rule.names);
    let newest = of_profile.filter_map(|name| number(name)).max();
    if default != ALLOW && newest.is_some_and(|it| it > 0 && number(name) > Some(it)) {
        return ERRNO | ENOSYS;
    }
    let first = rules.iter().find(|rule| rule.args.is_empty());
    let first = first.or_else(|| {
        rules.iter().find(|rule| {
            let mut indices: Vec<_> = rule.args.iter().map(|arg| arg.index).collect();
            indices.sort_unstable();
            indices.dedup();
            match indices.len() == rule.args.len() {
                true => rule.args.iter().all(is_met),
                false => rule.args.iter().any(is_met),
            }
        })
    });
    first.map_or(default, |rule| action(&rule.action, None).unwrap())
}

proptest! {
    #[test]
    fn the_program_does_what_the_profile_says(
        allow: bool,
        rules in prop::collection::vec(a_rule(), 0..6),
        args in prop::array::uniform6(prop_oneof![0..5_u64, (0..5_u64).prop_map(|high| high << 32 | 1)]),
    ) {
        let default = if allow { "SCMP_ACT_ALLOW" } else { "SCMP_ACT_ERRNO" };
        let profile = profile(default, rules);
        for name in &NAMES[..4] {
            prop_assert_eq!(verdict(&profile, name, args), expected(&profile, name, args));
        }
    }

    #[test]
    fn any_profile_is_compiled_or_refused(
        default in "SCMP_ACT_(ALLOW|ERRNO|NOTIFY)|\\PC{0,9}",
        op in "SCMP_CMP_(EQ|LT|X)", index in 0..8_u64, number: u32,
    ) {
        let mut rule = rule(&["read"], "SCMP_ACT_TRACE", Some(number));
        rule.args = vec![LinuxSeccompArg { op, index, ..LinuxSeccompArg::default() }];
        let _ = compile(&profile(&default, vec![rule]));
    }
}
