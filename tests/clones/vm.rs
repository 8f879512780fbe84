//! What a clone is made with, and how it becomes a pod.

use std::fs::{self, File};
use std::io::Read;
use std::time::Duration;

use protocol::agent::HEALTH_SERVICE;
use protocol::agent::messages::{
    CheckRequest, CreateSandboxRequest, Empty, HealthCheckResponse, ReseedRandomDevRequest,
    SetGuestDateTimeRequest, Storage, UpdateInterfaceRequest,
};
use protocol::agent::types::{Interface, IpAddress, IpFamily};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::guest;
use tests::pod::{Agent, SHARED};
use tests::template::Vm;

/// Has its threads run when no others want to, or as others do.
pub(crate) fn yield_to_others(vm: &Vm, yields: bool) {
    let threads = format!("/proc/{}/task", vm.service.running.pid());
    for thread in fs::read_dir(threads).unwrap() {
        let thread = thread.unwrap().file_name().into_string().unwrap();
        let nice = if yields { 19 } else { 0 };
        // SAFETY: takes no pointers.
        let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.parse().unwrap(), nice) };
        assert_eq!(set, 0, "raising a priority again needs root");
    }
}

pub(crate) fn net(tap: &str, mac: &str) -> Value {
    json!({"tap": tap, "mac": mac})
}

/// A folder as a shim shares it, with a root file system for containers.
pub(crate) fn share() -> TempDir {
    let share = TempDir::new().unwrap();
    let root = guest::root(&["sh"]);
    fs::create_dir(share.path().join("one")).unwrap();
    fs::rename(root.keep(), share.path().join("one/rootfs")).unwrap();
    fs::write(share.path().join("greeting"), "hello\n").unwrap();
    share
}

/// Whether the agent is well.
pub(crate) fn check(agent: &Agent) {
    let health: HealthCheckResponse = agent
        .0
        .call(HEALTH_SERVICE, "Check", &CheckRequest::default(), None)
        .unwrap();
    assert_eq!(health.status, 1);
}

/// Who a pod is.
pub(crate) struct Pod {
    pub(crate) hostname: String,
    pub(crate) mac: String,
    pub(crate) address: String,
}

impl Pod {
    /// Tells a clone who it is, as a shim does.
    pub(crate) fn settle(&self, agent: &Agent) {
        let mut data = vec![0; 32];
        File::open("/dev/urandom")
            .unwrap()
            .read_exact(&mut data)
            .unwrap();
        let _: Empty = agent
            .ask("ReseedRandomDev", &ReseedRandomDevRequest { data })
            .unwrap();
        let now = now();
        let time = SetGuestDateTimeRequest {
            sec: now.as_secs().try_into().unwrap(),
            usec: now.subsec_micros().into(),
        };
        let _: Empty = agent.ask("SetGuestDateTime", &time).unwrap();
        let interface = Interface {
            device: "eth0".into(),
            name: "eth0".into(),
            addresses: vec![IpAddress {
                family: IpFamily::V4.into(),
                address: self.address.clone(),
                mask: "24".into(),
            }],
            hw_addr: self.mac.clone(),
            ..Interface::default()
        };
        let request = UpdateInterfaceRequest {
            interface: Some(interface.clone()),
        };
        let answer: Interface = agent.ask("UpdateInterface", &request).unwrap();
        assert_eq!(answer, interface);
        let sandbox = CreateSandboxRequest {
            hostname: self.hostname.clone(),
            sandbox_id: self.hostname.clone(),
            storages: vec![Storage {
                driver: "virtio-fs".into(),
                source: "kataShared".into(),
                fstype: "virtiofs".into(),
                mount_point: format!("{SHARED}/"),
                ..Storage::default()
            }],
            ..CreateSandboxRequest::default()
        };
        let _: Empty = agent.ask("CreateSandbox", &sandbox).unwrap();
    }
}

/// Since 1970.
pub(crate) fn now() -> Duration {
    std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap()
}
