//! What the agent refuses, and with which words.

use protocol::agent::messages::Empty;
use protocol::agent::oci::{Hook, Hooks, LinuxNamespace, Mount};
use protocol::ttrpc::Code;
use tests::pod::{Agent, refusal, spec, strings};

/// A refusal says what was wrong, and leaves nothing of the container behind.
pub(crate) fn what_cannot_be_done_is_refused(agent: &Agent) {
    let mut nowhere = spec("true");
    nowhere.process.as_mut().expect("spec() has it").args = strings(&["no-such-program"]);
    let (code, why) = refusal(agent.create("nowhere", nowhere));
    assert_eq!(code, Code::Internal);
    assert!(why.contains("no-such-program"), "{why}");
    // Nothing is left of it.
    agent.create("nowhere", spec("true")).unwrap();
    let (code, _) = refusal(agent.create("nowhere", spec("true")));
    assert_eq!(code, Code::AlreadyExists);
    agent.remove("nowhere");

    assert_eq!(refusal(agent.start("absent")).0, Code::NotFound);
    assert_eq!(
        refusal(agent.ask("Dance", &Empty {})).0,
        Code::Unimplemented
    );
    // As by a Kata agent that knows no policies.
    let (code, why) = refusal(agent.ask("SetPolicy", &Empty {}));
    assert_eq!(code, Code::NotFound);
    assert_eq!(why, "/grpc.AgentService/SetPolicy is not supported");
    let mut apart = spec("true");
    apart
        .linux
        .as_mut()
        .unwrap()
        .namespaces
        .push(LinuxNamespace {
            r#type: "user".into(),
            path: String::new(),
        });
    let (_, why) = refusal(agent.create("apart", apart));
    assert_eq!(why, "a user namespace is not possible in a pod's VM");
    let mut lost = spec("true");
    lost.mounts.push(Mount {
        destination: "/data".into(),
        source: "/no/such/folder".into(),
        r#type: "bind".into(),
        options: Vec::new(),
    });
    let (_, why) = refusal(agent.create("lost", lost));
    assert!(why.starts_with("mount /no/such/folder on /data: "), "{why}");

    let mut hooked = spec("true");
    hooked.hooks = Some(Hooks {
        start_container: vec![Hook {
            path: "/bin/hook".into(),
            ..Hook::default()
        }],
        ..Hooks::default()
    });
    let (_, why) = refusal(agent.create("hooked", hooked));
    assert_eq!(
        why,
        "startContainer hook /bin/hook: no hooks are run in a guest"
    );
}
