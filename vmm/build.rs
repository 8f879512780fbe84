//! Compiles the filters of system calls (src/host/thread/filters.txt) to programs that the kernel takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use syscalls::x86_64::Sysno;

const FILTERS: &str = "src/host/thread/filters.txt";

/// The calls of a kind of thread. One without rules is allowed whatever its arguments.
type Calls = BTreeMap<i64, Vec<SeccompRule>>;

fn main() {
    println!("cargo::rerun-if-changed={FILTERS}");
    let text = fs::read_to_string(FILTERS).expect("the filters are beside this file");
    let mut kinds = parse(&text);
    let every = kinds.remove("every").expect("there is [every]");
    let absent = kinds.remove("absent").expect("there is [absent]");
    for calls in kinds.values_mut() {
        add(calls, &every);
    }
    // Of another process.
    let page_server = kinds.remove("page-server").expect("there is [page-server]");
    let others: Vec<_> = kinds.values().cloned().collect();
    let control = kinds.get_mut("control").expect("there is [control]");
    for calls in &others {
        add(control, calls);
    }
    kinds.insert("page_server".into(), page_server);
    let mut source = String::new();
    let refuse = SeccompAction::Errno(38);
    write_program(&mut source, "absent", absent, SeccompAction::Allow, refuse);
    for (kind, calls) in kinds {
        let trap = SeccompAction::Trap;
        write_program(&mut source, &kind, calls, trap, SeccompAction::Allow);
    }
    let folder = env::var_os("OUT_DIR").expect("cargo says where");
    fs::write(Path::new(&folder).join("filters.rs"), source).expect("cargo's folder is writable");
}

/// The calls of each kind that the text has.
fn parse(text: &str) -> BTreeMap<String, Calls> {
    let mut kinds = BTreeMap::<_, Calls>::new();
    let mut kind = String::new();
    for line in text.lines() {
        let words = line.split('#').next().unwrap_or_default();
        let mut words = words.split_whitespace();
        let Some(word) = words.next() else { continue };
        if let Some(name) = word.strip_prefix('[') {
            kind = name.trim_end_matches(']').into();
            continue;
        }
        let call: Sysno = word
            .parse()
            .unwrap_or_else(|()| panic!("{word} is no system call"));
        let conditions: Vec<_> = words.map(condition).collect();
        let rules = match SeccompRule::new(conditions) {
            Ok(rule) => vec![rule],
            Err(_) => Vec::new(),
        };
        let one = Calls::from([(i64::from(call.id()), rules)]);
        add(kinds.entry(kind.clone()).or_default(), &one);
    }
    kinds
}

/// `1=5` or `2&4=0`.
fn condition(text: &str) -> SeccompCondition {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let parsed = || {
        let (left, value) = text.split_once('=')?;
        let value = number(value).ok()?;
        let (argument, operator) = match left.split_once('&') {
            Some((argument, mask)) => (argument, MaskedEq(number(mask).ok()?)),
            None => (left, Eq),
        };
        SeccompCondition::new(argument.parse().ok()?, Dword, operator, value).ok()
    };
    parsed().unwrap_or_else(|| panic!("{text} is no condition"))
}

/// Allows what `more` does, too.
fn add(calls: &mut Calls, more: &Calls) {
    for (call, rules) in more {
        match calls.get_mut(call) {
            None => {
                calls.insert(*call, rules.clone());
            }
            // It is allowed whatever its arguments.
            Some(there) if there.is_empty() || rules.is_empty() => there.clear(),
            Some(there) => {
                let is_new = |rule: &&SeccompRule| !there.contains(rule);
                let new: Vec<_> = rules.iter().filter(is_new).cloned().collect();
                there.extend(new);
            }
        }
    }
}

fn write_program(
    source: &mut String,
    kind: &str,
    calls: Calls,
    otherwise: SeccompAction,
    listed: SeccompAction,
) {
    let filter = SeccompFilter::new(calls, otherwise, listed, TargetArch::x86_64);
    let program: BpfProgram = filter
        .and_then(TryInto::try_into)
        .unwrap_or_else(|error| panic!("[{kind}]: {error}"));
    let (name, len) = (kind.to_uppercase(), program.len());
    // Writing to a String cannot fail.
    let _ = writeln!(source, "static {name}: [sock_filter; {len}] = [");
    for it in program {
        let (code, jt, jf, k) = (it.code, it.jt, it.jf, it.k);
        let _ = writeln!(
            source,
            "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},"
        );
    }
    let _ = writeln!(source, "];");
}
