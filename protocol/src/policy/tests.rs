use proptest::prelude::*;

use super::*;

fn policy(text: &str) -> Policy {
    format!("{TITLE}\n{text}").parse().unwrap()
}

fn why(text: &str) -> String {
    let error = format!("{TITLE}\n{text}").parse::<Policy>().unwrap_err();
    let source = std::error::Error::source(&error);
    let source = source.map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

#[test]
fn a_part_that_is_missing_allows_all_and_an_empty_one_nothing() {
    let open = policy("");
    assert_eq!(open, Policy::default());
    open.allow_call("ExecProcess").unwrap();
    open.allow_device(None, [None; 2]).unwrap();
    open.allow_mount("bind", "/").unwrap();
    let closed = policy("calls:\ndevices:\nmounts:\n");
    let said = closed.allow_call("ExecProcess").unwrap_err().to_string();
    let expected = "the node's policy forbids ExecProcess: its rules for calls do not allow it";
    assert_eq!(said, expected);
    let device = closed.allow_device(Some(Kind::Block), [Some(8), None]);
    assert_eq!(device.unwrap_err().what, "device b 8:*");
    let mount = closed.allow_mount("tmpfs", "shm").unwrap_err();
    assert_eq!(
        (mount.part, mount.what.as_str()),
        ("mounts", "mount tmpfs of \"shm\"")
    );
}

#[test]
fn calls_are_allowed_by_name() {
    let policy = policy("calls:\n CreateContainer\n");
    policy.allow_call("CreateContainer").unwrap();
    for other in ["ExecProcess", "SetPolicy", "createcontainer", ""] {
        assert!(policy.allow_call(other).is_err(), "{other}");
    }
    let exec = ["ExecProcess".parse().unwrap()];
    let rest = Policy {
        calls: Some(CallRule::all_but(&exec)),
        ..Policy::default()
    };
    let allowed = CALLS.map(|call| rest.allow_call(call).is_ok());
    let expected = CALLS.map(|call| call != "ExecProcess");
    assert_eq!(allowed, expected);
}

#[test]
fn a_device_is_allowed_by_all_of_its_numbers() {
    let policy = policy("devices:\n c 10:229\n c 136:*\n");
    let asked = |kind, major: Option<u32>, minor| policy.allow_device(kind, [major, minor]).is_ok();
    let c = Some(Kind::Character);
    assert!(asked(c, Some(10), Some(229)) && asked(c, Some(136), Some(7)));
    assert!(asked(c, Some(136), None));
    assert!(!asked(c, Some(10), None), "all of a major number are more");
    assert!(!asked(Some(Kind::Block), Some(10), Some(229)));
    assert!(!asked(None, Some(136), None), "block devices too");
    assert!(!asked(c, None, None));
    let all = super::tests::policy("devices:\n c *:*\n b *:*\n");
    all.allow_device(None, [None; 2]).unwrap();
}

#[test]
fn a_mount_is_allowed_by_its_type_and_source() {
    let policy = policy("mounts:\n tmpfs\n bind /run/a b/\n bind /dev/shm\n virtiofs kataShared\n");
    let asked = |kind, source| policy.allow_mount(kind, source).is_ok();
    for (kind, source) in [
        ("tmpfs", "anything"),
        ("bind", "/run/a b/c/d"),
        ("bind", "/dev/shm"),
        ("virtiofs", "kataShared"),
    ] {
        assert!(asked(kind, source), "{kind} {source}");
    }
    for (kind, source) in [
        ("bind", "/run/a b/../../etc"),
        ("bind", "/run/a b/c/.."),
        ("bind", "/run/a bc"),
        ("bind", "/run/a b"),
        ("bind", "/run"),
        ("bind", "/dev/shm/x"),
        ("bind", ""),
        ("virtiofs", "other"),
        ("proc", "tmpfs"),
        ("", ""),
    ] {
        assert!(!asked(kind, source), "{kind} {source}");
    }
}

#[test]
fn what_is_no_policy_is_refused_with_its_line() {
    assert!(why("calls:\n Exec\n").starts_with("line 3: \"Exec\" is no call of the agent's"));
    for device in [
        "c", "c 1", "u 1:1", "c 1:-1", "c +1:1", "c 1:1 ", "c 1:*:", "c:1:1", "a *:*", " c 1:1",
    ] {
        let said = why(&format!("devices:\n {device}\n"));
        assert!(
            said.starts_with("line 3: ") && said.contains("is no rule for devices"),
            "{said}"
        );
    }
    for mount in ["", " /x", "bind ", "bind /a\tb"] {
        assert!(why(&format!("mounts:\n {mount}\n")).contains("is no rule for mounts"));
    }
    for (text, line) in [
        ("calls:\ncalls:\n", 3),
        ("rest:\n", 2),
        (" ExecProcess\n", 2),
        ("calls:\n\n", 3),
        ("calls\n", 2),
    ] {
        let expected = ParseError::Part(line).to_string();
        assert_eq!(why(text), expected, "{text:?}");
    }
    let long = format!(
        "{TITLE}\ncalls:\n{}",
        " ExecProcess\n".repeat(MAX_LEN / 13 + 1)
    );
    let cut = format!("{TITLE}\ncalls:\n ExecProcess");
    for text in ["", "podvmm policy 2\n", TITLE, cut.as_str(), &long] {
        assert_eq!(text.parse::<Policy>(), Err(ParseError::Form));
    }
}

#[test]
fn policies_are_told_apart_by_their_feature() {
    let [open, closed] = ["", "calls:\n"].map(|text| policy(text).feature());
    assert_ne!(open, closed);
    assert_eq!(open.len(), FEATURE.len() + 16);
    assert_eq!(open, Policy::default().feature());
}

#[test]
fn what_is_needed_is_among_the_calls() {
    assert!(NEEDED.iter().all(|needed| CALLS.contains(needed)));
    assert!(CALLS.is_sorted() && NEEDED.is_sorted());
}

proptest! {
    #[test]
    fn a_policy_survives_the_wire(
        calls in prop::option::of(prop::sample::subsequence(&CALLS[..], 0..9)),
        devices in prop::option::of(prop::collection::vec("[cb] ([0-9]{1,5}|\\*):([0-9]{1,5}|\\*)", 0..5)),
        mounts in prop::option::of(prop::collection::vec("[a-z0-9]{1,9}( [^\\pC]{1,30})?", 0..5)),
    ) {
        fn rules<R: FromStr<Err = RuleError>>(texts: Option<Vec<String>>) -> Option<Vec<R>> {
            texts.map(|texts| texts.iter().map(|text| text.parse().unwrap()).collect())
        }
        let calls = calls.map(|calls| calls.into_iter().map(String::from).collect());
        let policy = Policy { calls: rules(calls), devices: rules(devices), mounts: rules(mounts) };
        prop_assert_eq!(policy.to_string().parse(), Ok(policy));
    }

    #[test]
    fn any_text_is_a_policy_or_refused(text in "(calls:|devices:|mounts:| |\n|\\PC|c 1:1){0,40}") {
        if let Ok(policy) = format!("{TITLE}\n{text}\n").parse::<Policy>() {
            prop_assert_eq!(policy.to_string().parse(), Ok(policy));
        }
    }
}
