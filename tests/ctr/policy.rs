//! What the policy of a node forbids is refused, and says why.

use std::fs;
use std::path::Path;

use tests::containerd::{self, Ran};
use tests::ctr::Container;
use tests::node::{Node, eventually, step};

use super::on_a_node;

/// The one that allows all that podvmm uses.
const EXAMPLE: &str = include_str!("../../resources/kubernetes/policy.toml");

/// The policy without this line.
fn without(policy: &str, line: &str) -> String {
    assert!(policy.contains(line), "{line}");
    policy.replace(line, "")
}

/// Runs a container that is to be refused, and returns what is said of it.
fn refused(node: &Node, name: &str, config: &Path, options: &[&str]) -> String {
    let container = Container::new(node, name).with_config(config);
    let options = [&["--rm"], options].concat();
    let mut command = container.run(&node.containerd, &options, &["true"]);
    let ran: Ran = step(name, || command.output().unwrap()).into();
    assert_ne!(ran.code, Some(0), "{ran:?}");
    // ctr leaves a container that it could not start.
    node.containerd
        .ctr(&["containers", "delete", container.id()]);
    ran.stderr
}

/// The first pod boots, and the others are restored from its template, with its policy.
#[test]
fn what_the_nodes_policy_forbids_is_refused() {
    on_a_node(|node| {
        if !node.is_podvmm() {
            return;
        }
        let [config, policy] =
            ["policy-config.toml", "policy.toml"].map(|name| node.folder().join(name));
        containerd::write_config(&config, &node.folder().join("templates"), 0);
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, format!("{text}agent_policy = {policy:?}\n")).unwrap();
        fs::write(&policy, EXAMPLE).unwrap();
        let open = Container::new(node, "open").with_config(&config);
        step("open", || {
            open.start(&node.containerd, &[], &["sleep", "1000"])
        });
        let ran = open.exec(&node.containerd, &[], &["echo", "fine"]);
        assert_eq!(
            (ran.stdout.as_str(), ran.code),
            ("fine\n", Some(0)),
            "{ran:?}"
        );
        end(node, &open);

        let closed = without(
            &without(EXAMPLE, "  \"ExecProcess\",\n"),
            "  \"bind /sys/\",\n",
        );
        fs::write(&policy, &closed).unwrap();
        let container = Container::new(node, "closed").with_config(&config);
        step("closed", || {
            container.start(&node.containerd, &[], &["sleep", "1000"])
        });
        let ran = container.exec(&node.containerd, &[], &["echo", "fine"]);
        assert_ne!(ran.code, Some(0), "{ran:?}");
        let why = "the node's policy forbids ExecProcess: its rules for calls do not allow it";
        assert!(ran.stderr.contains(why) && ran.stdout.is_empty(), "{ran:?}");
        assert_eq!(container.state(&node.containerd), "RUNNING");
        end(node, &container);

        let said = refused(node, "device", &config, &["--device", "/dev/kmsg"]);
        assert!(
            said.contains("the node's policy forbids device c 1:11"),
            "{said}"
        );
        let mount = "type=bind,src=/sys/fs,dst=/mnt,options=rbind:ro";
        let said = refused(node, "mount", &config, &["--mount", mount]);
        assert!(
            said.contains("the node's policy forbids mount bind of"),
            "{said}"
        );

        let spoiled = format!("{closed}\ncals = []\n");
        fs::write(&policy, spoiled).unwrap();
        let said = refused(node, "spoiled", &config, &[]);
        assert!(
            said.contains(policy.to_str().unwrap()) && said.contains("cals"),
            "{said}"
        );
    });
}

fn end(node: &Node, container: &Container) {
    let id = container.id();
    let containerd = &node.containerd;
    containerd.ctr_must(&["tasks", "kill", "--signal", "KILL", id]);
    eventually("it ends", || container.state(containerd) == "STOPPED");
    container.delete(containerd);
}
