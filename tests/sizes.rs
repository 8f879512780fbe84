//! Pods that have much to do: long streams, long logs, many files and many containers.
//!
//! Sizes are those of users; where KVM emulates they are smaller. `PODVMM_TEST_HANDLER=runc` holds the
//! tests themselves to what runc does. Needs root.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use tests::containerd::{self, CRI};
use tests::cri::status::ContainerState;
use tests::guest;
use tests::host::Size;
use tests::node::{self, Node, Pod, eventually, mount, step};

/// Bytes through an exec, in and out.
const STREAM: Size = Size {
    real: 100_000_000,
    emulated: 4_000_000,
};

/// Lines that a container prints.
const LINES: Size = Size {
    real: 300_000,
    emulated: 20_000,
};

/// Files in a volume.
const FILES: Size = Size {
    real: 200_000,
    emulated: 2000,
};

/// Files in each folder of it.
const FILES_IN_FOLDER: usize = 1000;

/// Containers in a pod.
const CONTAINERS: Size = Size {
    real: 50,
    emulated: 4,
};

/// Containers that come and go, one after the other.
const ROUNDS: Size = Size {
    real: 3000,
    emulated: 3,
};

/// Runs `cases` in a pod on a node, which has to be clean afterwards, with a container that waits and
/// the folder that it has as `/files`.
fn in_a_pod(cases: impl FnOnce(&Node, &Pod, &str, &Path)) {
    if containerd::handler() == "podvmm" && !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let node = step("containerd", Node::shared);
    let pod = node.run_pod(node.pod_config("much"));
    let volume = node.folder().join("files");
    fs::create_dir(&volume).unwrap();
    let mut config = node::waiting("busy");
    config.mounts.push(mount(&volume, "/files"));
    let busy = node.run(&pod, &config);
    cases(&node, &pod, &busy, &volume);
    node.remove_pod(&pod);
    step("end of the node, the host compared", || node.end());
}

#[test]
fn long_streams_and_long_logs_come_whole() {
    in_a_pod(|node, pod, busy, _| {
        a_long_stream(node, busy);
        a_long_log(node, pod);
    });
}

/// They are killed as soon as they run, with files of theirs still being read.
#[test]
fn containers_come_and_go() {
    in_a_pod(|node, pod, first, _| {
        for round in 0..ROUNDS.here() {
            let deaf = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"];
            let deaf = node.run(pod, &node::container(&format!("c{round}"), &deaf));
            step("its end", || {
                node.cri.stop(&deaf, 0).unwrap();
                node.cri.remove(&deaf).unwrap();
            });
        }
        assert_eq!(node.sh(first, "echo here"), "here");
    });
}

#[test]
fn many_files_are_those_of_the_other_side() {
    in_a_pod(|node, _, busy, volume| {
        files_of_the_host(node, busy, volume);
        files_of_the_pod(node, busy, volume);
    });
}

#[test]
fn many_containers_run_in_a_pod() {
    in_a_pod(|node, pod, busy, _| many_containers(node, pod, busy));
}

/// All that an exec is sent comes back, while more is sent.
fn a_long_stream(node: &Node, container: &str) {
    let count = STREAM.here();
    let sent = node.folder().join("sent");
    let came = node.folder().join("came");
    // No two pieces are the same.
    let numbers = format!("seq 1 {count} | head -c {count}");
    let mut make = Command::new("sh");
    let make = make
        .args(["-c", &numbers])
        .stdout(File::create(&sent).unwrap());
    assert!(make.status().unwrap().success());
    let script = format!("head -c {count}; exit 3");
    let words = ["-n", CRI, "tasks", "exec", "--exec-id", "stream", container];
    let mut command = node.containerd.ctr_command(&words);
    let status = step(&format!("{count} bytes through an exec"), || {
        command
            .args(["sh", "-c", &script])
            .stdin(File::open(&sent).unwrap())
            .stdout(File::create(&came).unwrap())
            .status()
            .unwrap()
    });
    assert_eq!(status.code(), Some(3));
    let same = Command::new("cmp").args([&sent, &came]).status().unwrap();
    assert!(same.success(), "what came back is what was sent");
}

/// Every line is in the log, in order.
fn a_long_log(node: &Node, pod: &Pod) {
    let count = LINES.here();
    let script = format!("seq 1 {count}");
    let config = node::container("talks", &["sh", "-c", &script]);
    let talks = node.run(pod, &config);
    step(&format!("{count} lines of a log"), || {
        assert_eq!(node.ended(&talks).exit_code, 0);
    });
    let log = Path::new(&pod.config.log_directory).join("talks.log");
    let text = || fs::read_to_string(&log).unwrap();
    eventually("the log is whole", || text().lines().count() == count);
    for (line, number) in text().lines().zip(1..) {
        assert!(
            line.ends_with(&format!(" stdout F {number}")),
            "{number}: {line}"
        );
    }
    node.cri.remove(&talks).unwrap();
}

/// Those that are there are seen, read by name, and removed.
fn files_of_the_host(node: &Node, container: &str, volume: &Path) {
    let count = FILES.here();
    step(&format!("{count} files made on the host"), || {
        for number in 0..count {
            let folder = volume.join((number / FILES_IN_FOLDER).to_string());
            if number % FILES_IN_FOLDER == 0 {
                fs::create_dir(&folder).unwrap();
            }
            fs::write(folder.join(number.to_string()), []).unwrap();
        }
    });
    let listed = long_sh(node, container, "find", "find /files -type f | wc -l");
    assert_eq!(listed.trim(), count.to_string());
    long_sh(node, container, "rm", "rm -r /files/*");
    assert_eq!(fs::read_dir(volume).unwrap().count(), 0);
}

/// Runs a script that may take longer than a request of CRI, and gives what it prints.
fn long_sh(node: &Node, container: &str, name: &str, script: &str) -> String {
    let words = ["-n", CRI, "tasks", "exec", "--exec-id", name, container];
    let words = [&words[..], &["sh", "-c", script]].concat();
    step(name, || node.containerd.ctr_must(&words))
}

/// Those that the pod makes are seen, and removed, on the host.
fn files_of_the_pod(node: &Node, container: &str, volume: &Path) {
    let count = FILES.here();
    let script = format!(
        "n=0; while [ $n -lt {count} ]; do
            [ $((n % {FILES_IN_FOLDER})) != 0 ] || {{ cd /files && mkdir $n && cd $n || exit; }}
            : > $n || exit; n=$((n + 1)); done"
    );
    long_sh(node, container, "make", &script);
    step("they are seen on the host", || {
        let mut found = Vec::new();
        for folder in fs::read_dir(volume).unwrap() {
            for file in fs::read_dir(folder.unwrap().path()).unwrap() {
                let name = file.unwrap().file_name();
                found.push(name.to_str().unwrap().parse::<usize>().unwrap());
            }
        }
        found.sort_unstable();
        assert!(found.into_iter().eq(0..count));
    });
    step("and removed there", || fs::remove_dir_all(volume).unwrap());
    fs::create_dir(volume).unwrap();
}

/// More containers beside the first, each of which answers.
fn many_containers(node: &Node, pod: &Pod, first: &str) {
    let count = CONTAINERS.here();
    let started: Vec<_> = (1..count)
        .map(|number| node.run(pod, &node::waiting(&format!("c{number}"))))
        .collect();
    let running = || {
        let all = node.cri.containers().unwrap();
        let running = ContainerState::Running as i32;
        all.iter().filter(|it| it.state == running).count()
    };
    assert_eq!(running(), count);
    for container in &started {
        assert_eq!(node.sh(container, "echo here"), "here");
    }
    step("all but the first end", || {
        for container in &started {
            node.cri.stop(container, 30).unwrap();
            assert_eq!(node.ended(container).exit_code, 0);
            node.cri.remove(container).unwrap();
        }
    });
    assert_eq!(running(), 1);
    assert_eq!(node.sh(first, "echo here"), "here");
}
