//! What a pod's containers use and may use, and the VM's size with it.

use std::fs;
use std::sync::Arc;

use protocol::agent::oci::LinuxResources;
use protocol::containerd::figures;

use super::Pod;
use crate::pod::error::{Error, asked};
use crate::pod::task::Container;
use crate::pod::{size, spec};

impl Pod {
    /// What a container has used, in the guest; of the pod's sandbox, what all of it has, on the
    /// host.
    pub(crate) fn figures(&self, id: &str) -> Result<figures::Metrics, Error> {
        self.container(id)?;
        let guest = self.guest()?;
        match &guest.cgroup {
            Some(cgroup) if guest.is_sandbox(id, &self.id) => Ok(cgroup.figures()),
            _ => {
                let stats = guest
                    .agent
                    .stats(id)
                    .map_err(asked("tell what it has used"))?;
                Ok(crate::pod::figures::of_guest(&stats, guest.bounds()))
            }
        }
    }

    /// Changes what a container may use, and the VM's size with it.
    pub(crate) fn update(&self, id: &str, mut resources: LinuxResources) -> Result<(), Error> {
        let container = self.container(id)?;
        let guest = self.guest()?;
        let cpus = spec::cpus(&resources);
        spec::check_cpus(&cpus)?;
        let (before, after) = {
            let mut limits = container.limits.lock().expect("a panic ends the process");
            let before = *limits;
            *limits = before.updated(&resources);
            (before, *limits)
        };
        let announced = guest.announced();
        guest.announce(announced.less(before, after));
        if id == self.id
            && !guest.is_sandbox(id, &self.id)
            && let Some(cgroup) = &guest.cgroup
        {
            cgroup.update(|limits| limits.updated(&guest.config, &resources));
        }
        spec::resources_for_guest(&mut resources);
        let update = || -> Result<(), Error> {
            // What grows has room before it is used, what shrinks is used no more before it goes.
            self.resize(false)?;
            let updated = guest.agent.update(id, resources);
            updated.map_err(asked("update the container"))?;
            if !cpus.is_empty() {
                container.set_cpus(&cpus);
                self.pin();
            }
            self.resize(true)
        };
        update().inspect_err(|_| {
            if before != after {
                *container.limits.lock().expect("a panic ends the process") = before;
                guest.announce(announced);
                let _ = self.resize(true);
            }
        })
    }

    /// Gives the VM the size that its containers need.
    pub(super) fn resize(&self, may_shrink: bool) -> Result<(), Error> {
        let _changing = self.changing.lock().expect("a panic ends the process");
        let guest = self.guest()?;
        let containers: Vec<_> = self.containers().values().cloned().collect();
        let workloads = containers
            .iter()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let limits = |container: &Arc<Container>| {
            *container.limits.lock().expect("a panic ends the process")
        };
        let mut limits: Vec<_> = workloads.map(limits).collect();
        if limits.is_empty() {
            limits.push(guest.announced());
        }
        let size = size::size(&guest.config, guest.announced(), limits.into_iter());
        guest.resize(size, may_shrink)
    }

    /// Has the VM run on the CPUs of its containers together; on all if one of them may.
    pub(super) fn pin(&self) {
        let Ok(guest) = self.guest() else { return };
        let containers: Vec<_> = self.containers().values().cloned().collect();
        let workloads = containers
            .iter()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let sets: Vec<_> = workloads.map(|container| container.cpus()).collect();
        guest.pin(&sets);
    }

    /// Has the host end a VM as it would end the most dispensable of its containers.
    pub(super) fn set_oom_score(&self) {
        let Ok(guest) = self.guest() else { return };
        let containers = self.containers();
        let workloads = containers
            .values()
            .filter(|container| !guest.is_sandbox(&container.id, &self.id));
        let score = workloads
            .map(|container| container.oom_score)
            .max()
            .unwrap_or(0);
        drop(containers);
        let path = format!("/proc/{}/oom_score_adj", guest.vm.pid());
        if let Err(error) = fs::write(&path, score.to_string()) {
            log::debug!("{path}: {error}");
        }
    }
}
