//! What containerd is told of the processes in a pod, and the number by which each event names a container.
//!
//! The processes are in the guest and have no number on the host, so one of the host's stands for all of a
//! container, its execs too. All events and answers of a container name the same one: clients match an end
//! to the start by it.

use std::sync::atomic::Ordering;

use protocol::containerd::events::{Event, TaskExecStarted, TaskExit, TaskStart};
use protocol::containerd::timestamp;

use super::Pod;
use crate::pod::state::Exit;
use crate::pod::task::{Container, Process};

impl Pod {
    pub(crate) fn publish(&self, event: Event) {
        self.events.publish(event);
    }

    /// The process that stands for all in the pod: its VMM, also when that has ended, for the ends of the
    /// containers are told after it. Before there is one it is the shim.
    pub(crate) fn pid(&self) -> u32 {
        match self.vmm.load(Ordering::Relaxed) {
            0 => std::process::id(),
            vmm => vmm,
        }
    }

    /// The number that stands for a container. The first has the VMM's, by whose namespaces others look
    /// at the pod. The others have that of a thread of the shim: `/proc` has an entry for it too, and a
    /// later container that is to see their processes is told them by it.
    pub(crate) fn pid_of(&self, container: &Container) -> u32 {
        match container.thread.get() {
            Some(thread) if container.id != self.id => *thread,
            _ => self.pid(),
        }
    }

    pub(super) fn tell_start(&self, container: &Container) {
        self.publish(Event::Start(TaskStart {
            container_id: container.id.clone(),
            pid: self.pid_of(container),
        }));
    }

    pub(super) fn tell_exec_start(&self, container: &Container, exec_id: &str) {
        self.publish(Event::ExecStarted(TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: exec_id.into(),
            pid: self.pid_of(container),
        }));
    }

    /// Notes the end of a process, once, and tells containerd.
    pub(super) fn ended(&self, container: &Container, process: &Process, exit: Exit) {
        let Ok(before) = process.change(|state| state.ended(exit)) else {
            return;
        };
        // Containerd was not told of an exec's start, so it is not told of an end.
        if before.is_to_start() && !process.target.exec.is_empty() {
            return;
        }
        self.publish(Event::Exit(TaskExit {
            container_id: container.id.clone(),
            id: process.name().into(),
            pid: self.pid_of(container),
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)),
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex, OnceLock};
    use std::time::SystemTime;

    use super::*;
    use crate::agent::Target;
    use crate::agent::stdio::Paths;
    use crate::host::phases::Phases;
    use crate::host::place::Place;
    use crate::pod::publish::Publisher;
    use crate::pod::size::Limits;
    use crate::pod::spec::hooks::Hooks;
    use crate::pod::state::State;

    const VMM: u32 = 4_000_001;
    const THREAD: u32 = 4_000_002;

    fn process(container: &str, exec: &str) -> Arc<Process> {
        let target = Target {
            container: container.into(),
            exec: exec.into(),
        };
        Arc::new(Process::new(target, Paths::default(), None))
    }

    fn container(id: &str) -> Container {
        Container {
            id: id.into(),
            bundle: "/bundle".into(),
            first: process(id, ""),
            thread: OnceLock::from(THREAD),
            execs: Mutex::default(),
            limits: Mutex::new(Limits::default()),
            cpus: Mutex::default(),
            hooks: Hooks::default(),
            oom_score: 0,
        }
    }

    /// What is told of a container of the pod `pod` that runs, with one exec that does and another that
    /// does not: in order, with the numbers.
    fn told(id: &str) -> Vec<(&'static str, String, u32)> {
        let (events, told) = Publisher::to_a_test();
        let phases = Phases::since(SystemTime::now());
        let place = Place::at(Path::new("/nowhere"));
        let pod = Pod::new("pod".into(), place, events, phases, None);
        pod.vmm.store(VMM, Ordering::Relaxed);
        let container = container(id);
        let execs = ["runs", "waits", "starts"].map(|name| process(id, name));
        for process in [&container.first, &execs[0]] {
            process.change(State::begin).unwrap();
            process.change(State::started).unwrap();
        }
        execs[2].change(State::begin).unwrap();
        pod.tell_start(&container);
        pod.tell_exec_start(&container, "runs");
        for process in execs.iter().chain([&container.first]) {
            for status in [7, 8] {
                pod.ended(&container, process, Exit::now(status));
            }
        }
        // The events end with who tells them.
        drop(pod);
        let all = told.map(|event| match event {
            Event::Start(event) => ("start", event.container_id, event.pid),
            Event::ExecStarted(event) => ("exec", event.exec_id, event.pid),
            Event::Exit(event) => {
                assert_eq!((event.container_id.as_str(), event.exit_status), (id, 7));
                ("exit", event.id, event.pid)
            }
            other => panic!("{other:?}"),
        });
        all.collect()
    }

    #[test]
    fn all_events_of_a_container_name_one_number() {
        for (id, pid) in [("pod", VMM), ("second", THREAD)] {
            let expected = [
                ("start", id.into(), pid),
                ("exec", "runs".into(), pid),
                ("exit", "runs".into(), pid),
                ("exit", id.into(), pid),
            ];
            assert_eq!(told(id), expected);
        }
    }
}
