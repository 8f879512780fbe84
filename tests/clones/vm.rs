//! The template and what goes on from it.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::protocol::HEALTH_SERVICE;
use agent::protocol::agent::{
    CheckRequest, CreateSandboxRequest, Empty, HealthCheckResponse, ReseedRandomDevRequest,
    SetGuestDateTimeRequest, Storage, UpdateInterfaceRequest,
};
use agent::protocol::types::{Interface, IpAddress, IpFamily};
use api::http::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::guest;
use tests::pod::{Agent, SHARED};
use tests::service::{Service, put};

/// A guest whose agent waits for a pod, as a snapshot.
pub(crate) struct Template {
    place: TempDir,
    /// How long the guest had run: at least since its agent answered, at most since it was started.
    pub(crate) age: [Duration; 2],
}

impl Template {
    pub(crate) fn boot() -> Self {
        let place = TempDir::new().unwrap();
        let share = share();
        let service = Service::start(&[]);
        let mut client = service.client();
        let mut config = config(
            &service,
            share.path(),
            &net("template", "02:00:00:00:00:01"),
        );
        config["payload"] = json!({
            "kernel": guest::folder().join("vmlinux"),
            "initramfs": guest::folder().join("initramfs.cpio"),
            "cmdline": "podvmm.pod",
        });
        config["cpus"] = json!({"boot_vcpus": 1, "max_vcpus": 2});
        config["memory"] = json!({"size": 512 << 20});
        config["balloon"] = json!({"size": 0});
        config["serial"] = json!({"mode": "Null"});
        config["console"] = json!({"mode": "Off"});
        put(&mut client, "vm.create", Some(config)).unwrap();
        let started = Instant::now();
        put(&mut client, "vm.boot", None).unwrap();
        let mut vm = Vm {
            service,
            client,
            resumed: started,
        };
        // It stays connected: a template's connections are not its clones'.
        let agent = vm.agent();
        let answered = Instant::now();
        check(&agent);
        vm.pause();
        let template = Self {
            place,
            age: [answered.elapsed(), started.elapsed()],
        };
        vm.snapshot(&template.folder());
        drop(agent);
        vm.end();
        eprintln!("the agent answered {:?} after vm.boot", answered - started);
        template
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.place.path().join("template")
    }
}

/// A VM with its podvmm.
pub(crate) struct Vm {
    pub(crate) service: Service,
    client: Client,
    /// When it went on.
    pub(crate) resumed: Instant,
}

impl Vm {
    pub(crate) fn restore(snapshot: &Path, share: &Path, net: &Value) -> Self {
        Self::restore_with(snapshot, share, net, &[])
    }

    /// With descriptors of taps.
    pub(crate) fn restore_with(
        snapshot: &Path,
        share: &Path,
        net: &Value,
        taps: &[BorrowedFd<'_>],
    ) -> Self {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = json!({
            "source_url": url(snapshot),
            "config": config(&service, share, net),
            "resume": true,
        });
        let resumed = Instant::now();
        let body = body.to_string();
        client
            .call("PUT", "/api/v1/vm.restore", Some(&body), taps)
            .unwrap();
        Self {
            service,
            client,
            resumed,
        }
    }

    /// Has its threads run when no others want to, or as others do.
    pub(crate) fn yield_to_others(&self, yields: bool) {
        let threads = format!("/proc/{}/task", self.service.running.pid());
        for thread in super::names(threads.as_ref()) {
            let nice = if yields { 19 } else { 0 };
            // SAFETY: takes no pointers.
            let set =
                unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.parse().unwrap(), nice) };
            assert_eq!(set, 0, "raising a priority again needs root");
        }
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.service.folder.path().join("vsock")
    }

    pub(crate) fn agent(&self) -> Agent {
        Agent::reach(&self.vsock())
    }

    pub(crate) fn pause(&mut self) {
        put(&mut self.client, "vm.pause", None).unwrap();
    }

    pub(crate) fn snapshot(&mut self, folder: &Path) {
        let body = json!({"destination_url": url(folder)});
        put(&mut self.client, "vm.snapshot", Some(body)).unwrap();
    }

    /// Ends it, and sees that it leaves nothing in its folder.
    pub(crate) fn end(mut self) {
        put(&mut self.client, "vmm.shutdown", None).unwrap();
        let outcome = self.service.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let left = super::names(self.service.folder.path());
        let left: Vec<_> = left.iter().filter(|name| !name.contains('_')).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// What differs from one VM to the next.
fn config(service: &Service, share: &Path, net: &Value) -> Value {
    json!({
        "vsock": {"cid": 3, "socket": service.folder.path().join("vsock")},
        "fs": [{"tag": "kataShared", "shared_dir": share}],
        "net": [net],
    })
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
