//! Programs of the host's that belong to a container: those that take its output, and its hooks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tests::containerd::Ran;
use tests::ctr::Container;
use tests::guest;
use tests::node::{Node, eventually, step};

use super::on_a_node;

/// Makes a script, and says where.
fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// As `nerdctl run -d` has it, and `ctr run --log-uri`.
#[test]
fn output_goes_to_a_program_or_a_file() {
    on_a_node(|node| {
        let said = node.folder().join("said");
        // runc's shim tells it to end while there is output left to read.
        let text = "trap '' TERM; echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $1\" >$2; exec 5>&-
            cat <&3 >>$2; cat <&4 >>$2; echo end >>$2";
        let logger = script(node.folder(), "logger", text);
        let uri = format!("binary://{}?to={}", logger.display(), said.display());
        let container = runs_detached(node, "logged", &uri);
        let id = container.id();
        let expected = format!("default {id} to\nout\nerr\nend\n");
        assert_eq!(fs::read_to_string(&said).unwrap(), expected);

        let said = node.folder().join("logs/of/container");
        runs_detached(node, "filed", &format!("file://{}", said.display()));
        assert_eq!(fs::read_to_string(&said).unwrap(), "out\nerr\n");

        let container = Container::new(node, "nowhere");
        let uri = "binary:///no/such/logger";
        let mut command = container.run(&node.containerd, &["--log-uri", uri], &["true"]);
        let ran: Ran = step("ctr run", || command.output().unwrap()).into();
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stderr.contains("/no/such/logger"), "{ran:?}");
        forget(node, &container);
    });
}

/// Runs a container to its end, in the background, and deletes it.
fn runs_detached(node: &Node, name: &str, uri: &str) -> Container {
    let container = Container::new(node, name);
    let script = "echo out; sleep 1; echo err >&2";
    let options = ["--detach", "--log-uri", uri];
    let mut command = container.run(&node.containerd, &options, &["sh", "-c", script]);
    let ran: Ran = step("ctr run --log-uri", || command.output().unwrap()).into();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    eventually("it ends", || container.state(&node.containerd) == "STOPPED");
    container.delete(&node.containerd);
    container
}

/// What ctr leaves of a container that it could not start.
fn forget(node: &Node, container: &Container) {
    for kind in [
        &["tasks", "delete", "--force"][..],
        &["containers", "delete"],
    ] {
        let _ = node.containerd.ctr(&[kind, &[container.id()]].concat());
    }
}

/// The network is made by a hook, as nerdctl and docker make it, and taken away by another.
#[test]
fn hooks_make_the_network_and_take_it_away() {
    on_a_node(|node| {
        // runc runs it before the container's program runs, though after its own part.
        let started = if node.is_podvmm() {
            "running"
        } else {
            "created"
        };
        let root = guest::root(&["sh", "ip", "cat"]);
        let container = Container::new(node, "hooked");
        let said = node.folder().join("said");
        let said_at = said.display();
        let makes = script(
            node.folder(),
            "makes",
            &format!(
                "state=$(cat); pid=$(echo \"$state\" | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
                echo \"$1 $state\" >>{said_at}
                ip link add podvmm-hook type veth peer name eth0 netns $pid || exit 1
                ip link set podvmm-hook up
                within() {{ nsenter --target $pid --net \"$@\"; }}
                within ip address add 10.99.7.2/24 dev eth0; within ip link set eth0 up"
            ),
        );
        let text = format!("echo \"$1 $(cat)\" >>{said_at}; ip link del podvmm-hook; true");
        let takes = script(node.folder(), "takes", &text);
        let text = format!("echo \"$1 $(cat)\" >>{said_at}");
        let looks = script(node.folder(), "looks", &text);
        let hook = |path: &Path, kind: &str| {
            let path = path.to_str().unwrap();
            json!([{"path": path, "args": [path, kind], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}])
        };
        let spec = |hooks: Value| {
            let file = node.folder().join("config.json");
            let spec = spec(root.path(), container.cgroup(), hooks);
            fs::write(&file, spec.to_string()).unwrap();
            file
        };
        let file = spec(json!({
            "createRuntime": hook(&makes, "createRuntime"),
            "poststart": hook(&looks, "poststart"),
            "poststop": hook(&takes, "poststop"),
        }));
        let ran = ran(container.run_spec(&node.containerd, &file, &["--rm"]));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stdout.contains("inet 10.99.7.2/24"), "{ran:?}");
        told(
            &said,
            container.id(),
            &[
                ("createRuntime", "creating"),
                ("poststart", started),
                ("poststop", "stopped"),
            ],
        );

        // One that fails is the container's failure, and what hooks made before goes.
        fs::remove_file(&said).unwrap();
        let fails = script(node.folder(), "fails", "echo no bridge today >&2; exit 4");
        let file = spec(json!({
            "prestart": hook(&fails, "prestart"),
            "poststop": hook(&looks, "poststop"),
        }));
        let ran = self::ran(container.run_spec(&node.containerd, &file, &[]));
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stderr.contains("no bridge today"), "{ran:?}");
        told(&said, container.id(), &[("poststop", "stopped")]);
        forget(node, &container);

        if node.is_podvmm() {
            let file = spec(json!({"createContainer": hook(&looks, "createContainer")}));
            let ran = self::ran(container.run_spec(&node.containerd, &file, &[]));
            assert_ne!(ran.code, Some(0), "{ran:?}");
            assert!(ran.stderr.contains("createContainer hook /"), "{ran:?}");
            forget(node, &container);
        }
    });
}

fn ran(mut command: Command) -> Ran {
    step("ctr run --config", || command.output().unwrap()).into()
}

/// Each hook was told of the container in its state, and once.
fn told(said: &Path, id: &str, expected: &[(&str, &str)]) {
    let said = fs::read_to_string(said).unwrap();
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{said}");
    for (line, (kind, status)) in lines.iter().zip(expected) {
        let (of, state) = line.split_once(' ').unwrap();
        let state: Value = serde_json::from_str(state).unwrap();
        assert_eq!((of, &state["status"]), (*kind, &json!(status)), "{said}");
        assert_eq!(state["id"], json!(id), "{said}");
    }
}

/// A container that shows its network's address.
fn spec(root: &Path, cgroup: &str, hooks: Value) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", "ip -o -4 address show dev eth0"],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": root},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        ],
        "hooks": hooks,
        "linux": {"cgroupsPath": cgroup, "namespaces": namespaces},
    })
}
