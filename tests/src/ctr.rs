//! Containers that ctr makes, and the events that containerd tells.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::containerd::{self, BUSYBOX, Containerd, Ran};
use crate::node::{Node, processes_with, took, within};

/// The name of one container, which no other test's has, and what it is run with.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: String,
    runtime: String,
    execs: Cell<u32>,
    /// Instead of the node's.
    config: Option<PathBuf>,
}

/// Whether this `ctr run` has an option, which the machine's may be too old for.
pub fn run_has(containerd: &Containerd, option: &str) -> bool {
    let has = containerd.ctr_must(&["run", "--help"]).contains(option);
    if !has {
        eprintln!("SKIPPED: this ctr run has no {option}");
    }
    has
}

impl Container {
    pub fn new(node: &Node, name: &str) -> Self {
        let id = format!("{name}-{}", std::process::id());
        Self {
            cgroup: format!("{}/{id}", node.cgroup()),
            runtime: containerd::runtime(&node.handler),
            id,
            execs: Cell::new(0),
            config: None,
        }
    }

    /// Made with another configuration of the runtime's.
    #[must_use]
    pub fn with_config(mut self, config: &Path) -> Self {
        self.config = Some(config.into());
        self
    }

    /// Made in another cgroup than one below the node's.
    #[must_use]
    pub fn with_cgroup(mut self, path: &str) -> Self {
        self.cgroup = path.into();
        self
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its cgroup's path, as an OCI description has it.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// `ctr run` with options, in the foreground unless they say otherwise.
    pub fn run(&self, containerd: &Containerd, options: &[&str], words: &[&str]) -> Command {
        let mut command = self.run_command(containerd);
        command.args(["--cgroup", &self.cgroup]).args(options);
        command.args([BUSYBOX, &self.id]).args(words);
        command
    }

    /// The same of what the file `spec` describes, a config.json of OCI's.
    pub fn run_spec(&self, containerd: &Containerd, spec: &Path, options: &[&str]) -> Command {
        let mut command = self.run_command(containerd);
        command.arg("--config").arg(spec);
        command.args(options).arg(&self.id);
        command
    }

    fn run_command(&self, containerd: &Containerd) -> Command {
        let mut command = containerd.ctr_command(&["run", "--runtime", &self.runtime]);
        let config = self.config.clone();
        if let Some(config) = config.or_else(|| containerd.runtime_config()) {
            command.arg("--runtime-config-path").arg(config);
        }
        command
    }

    /// Has it run in the background.
    pub fn start(&self, containerd: &Containerd, options: &[&str], words: &[&str]) {
        let options = [&["--detach", "--null-io"], options].concat();
        let ran: Ran = self
            .run(containerd, &options, words)
            .output()
            .expect("containerd is installed")
            .into();
        assert_eq!(ran.code, Some(0), "ctr run {}: {ran:?}", self.id);
    }

    pub fn exec_command(
        &self,
        containerd: &Containerd,
        options: &[&str],
        words: &[&str],
    ) -> Command {
        let number = self.execs.replace(self.execs.get() + 1);
        let exec_id = format!("exec-{number}");
        let mut command = containerd.ctr_command(&["tasks", "exec", "--exec-id", &exec_id]);
        command.args(options).arg(&self.id).args(words);
        command
    }

    /// Runs a program in it to its end.
    pub fn exec(&self, containerd: &Containerd, options: &[&str], words: &[&str]) -> Ran {
        let start = Instant::now();
        let output = self.exec_command(containerd, options, words).output();
        let ran: Ran = output.expect("containerd is installed").into();
        let words = words.join(" ");
        took(start, &format!("exec {words}: status {:?}", ran.code));
        ran
    }

    /// What `ctr tasks ls` says of it; nothing where it says nothing.
    pub fn state(&self, containerd: &Containerd) -> String {
        let listed = containerd.ctr_must(&["tasks", "ls"]);
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id));
        let state = line.and_then(|line| line.split_whitespace().nth(2));
        state.unwrap_or_default().to_owned()
    }

    /// Forgets it once it has ended.
    pub fn delete(&self, containerd: &Containerd) {
        containerd.ctr_must(&["tasks", "delete", &self.id]);
        containerd.ctr_must(&["containers", "delete", &self.id]);
    }

    /// The process of its shim.
    pub fn shim(&self, containerd: &Containerd) -> i32 {
        let socket = containerd.socket().display().to_string();
        only(
            processes_with(&["containerd-shim-", &socket, &self.id]),
            "shim",
        )
    }

    /// The process of its virtual machine.
    pub fn vmm(&self) -> i32 {
        only(self.vmms(), "virtual machine")
    }

    /// The same, if there is one.
    pub fn vmms(&self) -> Vec<i32> {
        processes_with(&["podvmm ", "--api-socket", &self.id])
    }

    /// The process of a container without a virtual machine.
    pub fn process(&self, containerd: &Containerd) -> i32 {
        let listed = containerd.ctr_must(&["tasks", "ls"]);
        let line = listed
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id));
        let pid = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        pid.expect("ctr lists it")
    }
}

fn only(pids: Vec<i32>, what: &str) -> i32 {
    assert_eq!(pids.len(), 1, "there is one {what}: {pids:?}");
    pids[0]
}

/// Sends a signal to a process that this test looked up.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: no memory of ours changes by a signal to another process.
    let result = unsafe { libc::kill(pid, signal) };
    assert_eq!(result, 0, "signal {signal} to {pid}");
}

/// All events since its making, as `ctr events` prints them.
#[derive(Debug)]
pub struct Events {
    child: Child,
    file: NamedTempFile,
}

impl Events {
    pub fn of(containerd: &Containerd) -> Self {
        let file = NamedTempFile::new().expect("there is a temporary folder");
        let out = file
            .as_file()
            .try_clone()
            .expect("there are file descriptors");
        let child = containerd
            .ctr_command(&["events"])
            .stdout(out)
            .stderr(Stdio::null())
            .spawn();
        // It does not say when it listens.
        thread::sleep(Duration::from_secs(1));
        Self {
            child: child.expect("containerd is installed"),
            file,
        }
    }

    pub fn text(&self) -> String {
        fs::read_to_string(self.file.path()).expect("the file is there")
    }

    /// The lines about a container's first process.
    fn lines(&self, id: &str) -> Vec<String> {
        let key = format!("\"container_id\":\"{id}\"");
        let text = self.text();
        let lines = text
            .lines()
            .filter(|line| line.contains(" /tasks/") && line.contains(&key));
        // An exec's end is told with its own id.
        let own = lines.filter(|line| match line.split_once("\"id\":\"") {
            Some((_, rest)) => rest.starts_with(&format!("{id}\"")),
            None => true,
        });
        own.map(str::to_owned).collect()
    }

    /// Waits until all of `topics` have been told of a container, each once and in this order.
    pub fn in_order(&self, id: &str, topics: &[&str]) {
        let topic = |line: &String| {
            let (_, rest) = line.split_once(" /tasks/")?;
            rest.split(' ').next().map(str::to_owned)
        };
        let found = || -> Vec<String> {
            let all = self.lines(id);
            let all = all.iter().filter_map(topic);
            all.filter(|topic| topics.contains(&topic.as_str()))
                .collect()
        };
        let what = format!("events {topics:?}");
        let start = Instant::now();
        while found() != topics && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(found(), topics, "{what}, among:\n{}", self.text());
    }

    /// The data of one event of a container.
    pub fn data(&self, id: &str, topic: &str) -> String {
        let topic = format!(" /tasks/{topic} ");
        let mut data = None;
        within(Duration::from_secs(10), &topic, || {
            data = self
                .lines(id)
                .into_iter()
                .find(|line| line.contains(&topic));
            data.is_some()
        });
        data.unwrap_or_default()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // It ends by itself with containerd.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
