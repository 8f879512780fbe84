//! Deaths in a pod: if its VMM, its guest or its shim dies, at any time, containerd learns how the
//! pod ended, and nothing of the pod is left on the host. Needs root.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs::{self, DirEntry};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tests::containerd::{self, Containerd, Ran, handler};
use tests::ctr::{Container, Events, signal};
use tests::guest;
use tests::host::Snapshot;
use tests::node::{self, Node, eventually, step};

/// A pod that has ended with its VM is said to have been killed.
const KILLED: &str = "\"exit_status\":137";

/// Longer than the shim and containerd take to clean up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `cases` on a node, which has to be clean afterwards.
fn on_a_node(cases: impl FnOnce(&mut Node)) {
    // runc has no VM that could die.
    if handler() != "podvmm" || !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let mut node = step("containerd", Node::start);
    cases(&mut node);
    step("end of containerd, the host compared", || node.end());
}

/// Starts a container that sleeps.
fn sleeping(node: &Node, name: &str, options: &[&str]) -> Container {
    let container = Container::new(node, name);
    step(&format!("ctr run {name}"), || {
        container.start(&node.containerd, options, &["sleep", "1000"]);
    });
    container
}

/// Panics if the host has anything that it had not before, while containerd runs on.
fn nothing_is_left(before: &Snapshot, what: &str) {
    let left = before.difference_from_now(PATIENCE);
    assert!(left.is_empty(), "{what} leaves:\n  {}", left.join("\n  "));
}

#[test]
fn who_is_killed_leaves_nothing() {
    on_a_node(|node| {
        let before = Snapshot::take();
        the_vmm(node);
        nothing_is_left(&before, "the VMM's death");
        the_guest(node);
        nothing_is_left(&before, "the guest's death");
        a_hung_guest(node);
        nothing_is_left(&before, "a hung guest");
        a_guest_that_refuses_to_die(node);
        nothing_is_left(&before, "a guest that refuses to die");
        the_vmm_of_a_clone(node);
        nothing_is_left(&before, "the death of a VMM that just went on");
        the_shim(node);
        nothing_is_left(&before, "the shim's death");
        while_it_boots(node);
        nothing_is_left(&before, "a death while the guest boots");
    });
}

fn the_vmm(node: &Node) {
    let events = Events::of(&node.containerd);
    let container = sleeping(node, "vmm", &[]);
    let script = ["sh", "-c", "echo it runs; exec sleep 1000"];
    let mut exec = container.exec_command(&node.containerd, &[], &script);
    let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
    // ctr can be told of the script's end only once the script runs.
    let mut said = [0; 7];
    exec.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    signal(container.vmm(), libc::SIGKILL);
    has_ended(node, &container);
    assert_eq!(exec.wait().unwrap().code(), Some(137));
    container.delete(&node.containerd);
    events.in_order(container.id(), &["create", "start", "exit", "delete"]);
    assert!(events.data(container.id(), "exit").contains(KILLED));
}

/// The agent is the guest's first process, so it dies with the guest's kernel.
fn the_guest(node: &Node) {
    let events = Events::of(&node.containerd);
    let container = sleeping(node, "guest", &["--cap-add", "CAP_SYS_ADMIN"]);
    // Short of a panic it ends as well.
    let oops = container.exec(
        &node.containerd,
        &[],
        &["cat", "/proc/sys/kernel/panic_on_oops"],
    );
    assert_eq!(oops.stdout, "1\n", "{oops:?}");
    let crash = "mkdir /tmp/proc; mount -t proc proc /tmp/proc; echo c > /tmp/proc/sysrq-trigger";
    container.exec(&node.containerd, &[], &["sh", "-c", crash]);
    has_ended(node, &container);
    container.delete(&node.containerd);
    events.in_order(container.id(), &["create", "start", "exit", "delete"]);
    assert!(events.data(container.id(), "exit").contains(KILLED));
}

/// One whose agent answers nothing any more, as its VMM is stopped.
fn a_hung_guest(node: &Node) {
    let container = sleeping(node, "hung", &[]);
    signal(container.vmm(), libc::SIGSTOP);
    let start = Instant::now();
    step("kill a hung guest", || {
        let kill = ["tasks", "kill", "--signal", "KILL", container.id()];
        node.containerd.ctr_must(&kill);
        has_ended(node, &container);
        container.delete(&node.containerd);
    });
    let took = start.elapsed();
    assert!(took < Duration::from_secs(20), "it took {took:?}");
}

/// Its kernel cannot end a process that writes to a frozen file system, whatever the agent answers.
fn a_guest_that_refuses_to_die(node: &Node) {
    let mut config = node.pod_config("undying");
    node::pod_security(&mut config).privileged = true;
    let pod = node.run_pod(config);
    let script = "mknod /dev/loop-control c 10 237; mknod /dev/loop0 b 7 0; mkdir /tmp/frozen
        dd if=/dev/zero of=/tmp/image bs=1M count=1 && mke2fs -F /tmp/image &&
        mount -t ext4 -o loop /tmp/image /tmp/frozen && fsfreeze --freeze /tmp/frozen &&
        exec touch /tmp/frozen/ice";
    let mut config = node::container("undying", &["sh", "-c", script]);
    node::security(&mut config).privileged = true;
    let container = node.run(&pod, &config);
    let status = "awk '/^State:/ { print $2 }' /proc/1/status";
    eventually("the process is stuck", || {
        node.sh(&container, status) == "D"
    });
    step("kill a guest that refuses to die", || {
        node.cri.stop(&container, 0).unwrap();
    });
    assert_eq!(node.ended(&container).exit_code, 137);
    node.remove_pod(&pod);
}

fn the_shim(node: &Node) {
    let events = Events::of(&node.containerd);
    let container = sleeping(node, "shim", &[]);
    let vmm = container.vmm();
    signal(container.shim(&node.containerd), libc::SIGKILL);
    eventually("the VMM goes with its shim", || !is_alive(vmm));
    // containerd itself tells the end of a task whose shim is gone.
    events.in_order(container.id(), &["create", "start", "exit", "delete"]);
    assert!(events.data(container.id(), "exit").contains(KILLED));
    forget(node, &container);
}

/// At once, which its template is not to suffer for.
fn the_vmm_of_a_clone(node: &Node) {
    if !containerd::has_templates() {
        return;
    }
    let failures = || {
        let entries = fs::read_dir(containerd::templates()).into_iter().flatten();
        let has_failed = |entry: &DirEntry| entry.path().join("failures").exists();
        entries.flatten().filter(has_failed).count()
    };
    let before = failures();
    let container = Container::new(node, "clone");
    let mut command = container.run(&node.containerd, &["--detach", "--null-io"], &["true"]);
    let run = command.stderr(Stdio::piped()).spawn().unwrap();
    while container.vmms().is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    signal(container.vmm(), libc::SIGKILL);
    let ran: Ran = run.wait_with_output().unwrap().into();
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(failures(), before);
    forget(node, &container);
}

fn while_it_boots(node: &Node) {
    let boots = node.folder().join("boots.toml");
    containerd::write_config(&boots, Path::new(""), 0);
    for victim in ["vmm", "shim"] {
        let container = Container::new(node, &format!("early-{victim}")).with_config(&boots);
        let mut command = container.run(&node.containerd, &["--detach", "--null-io"], &["true"]);
        let run = command.stderr(Stdio::piped()).spawn().unwrap();
        eventually("there is a VMM", || !container.vmms().is_empty());
        // A guest boots in a second or two on hardware.
        thread::sleep(Duration::from_millis(300));
        match victim {
            "vmm" => signal(container.vmm(), libc::SIGKILL),
            _ => signal(container.shim(&node.containerd), libc::SIGKILL),
        }
        let ran: Ran = run.wait_with_output().unwrap().into();
        assert_eq!(ran.code, Some(1), "{ran:?}");
        if victim == "vmm" {
            assert!(
                ran.stderr.contains("the VM ended before"),
                "it says why: {ran:?}"
            );
        }
        forget(node, &container);
    }
}

/// Both at once, so that only the next containerd can clean up.
#[test]
fn what_died_with_containerd_is_cleaned_up_by_the_next() {
    on_a_node(|node| {
        let before = Snapshot::take();
        let container = sleeping(node, "orphan", &[]);
        let shim = container.shim(&node.containerd);
        node.containerd
            .restart_after(libc::SIGKILL, || signal(shim, libc::SIGKILL));
        eventually("its task is gone", || {
            container.state(&node.containerd).is_empty()
        });
        forget(node, &container);
        // Of the containerd that is another process now.
        let left = before.difference_from_now(PATIENCE);
        let left: Vec<_> = left
            .iter()
            .filter(|line| !line.contains(" containerd "))
            .collect();
        assert!(left.is_empty(), "{left:#?}");
    });
}

/// Tests share a containerd, which their program does not end by itself.
#[test]
fn a_test_program_that_is_killed_leaves_no_containerd() {
    let _one = guest::one_at_a_time();
    let before = Snapshot::take();
    // It has turns of its own there: the one of this host is ours.
    let folder = TempDir::new().unwrap();
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", "--ignored", "--nocapture", "waits_to_be_killed"]);
    program.env("TMPDIR", folder.path()).stdout(Stdio::piped());
    let mut program = program.spawn().unwrap();
    let said = BufReader::new(program.stdout.take().unwrap()).lines();
    let waits = said.map(Result::unwrap).any(|line| line.contains(WAITS));
    program.kill().unwrap();
    program.wait().unwrap();
    assert!(waits, "it has a containerd");
    let left = before.difference_from_now(Duration::from_secs(60));
    assert!(left.is_empty(), "{left:#?}");
    let left = fs::read_dir(folder.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["podvmm.lock"]);
}

/// What a program says that has a containerd.
const WAITS: &str = "has a containerd";

#[test]
#[ignore = "the test above runs and kills it"]
fn waits_to_be_killed() {
    let _containerd = Containerd::start();
    println!("{WAITS}");
    thread::sleep(Duration::from_secs(600));
}

fn has_ended(node: &Node, container: &Container) {
    eventually("it has ended", || {
        container.state(&node.containerd) == "STOPPED"
    });
}

/// Takes away what ctr knows of a container without a task.
fn forget(node: &Node, container: &Container) {
    eventually("ctr forgets it", || {
        let delete = ["containers", "delete", container.id()];
        let ran = node.containerd.ctr(&delete);
        ran.code == Some(0) || ran.stderr.contains("not found")
    });
}

fn is_alive(pid: i32) -> bool {
    // SAFETY: signal 0 asks only whether there is such a process.
    unsafe { libc::kill(pid, 0) == 0 }
}
