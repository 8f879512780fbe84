//! podvmm's API as a client calls it: a method for each request, with the types that the server reads.

use std::os::fd::{AsFd, BorrowedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{NetConfig, Resize, TapSource, VmConfig};
use crate::http::{Client, ClientError};
use crate::request::{Ping, Restore, Snapshot, VmInfo};
use crate::route::PREFIX;

/// The requests: each returns what podvmm answered, or why it refused: [`ClientError::Refused`].
impl Client {
    /// Says which podvmm it is.
    pub fn ping(&mut self) -> Result<Ping, ClientError> {
        self.get("vmm.ping")
    }

    /// Defines the VM.
    pub fn create(&mut self, vm: &VmConfig) -> Result<(), ClientError> {
        self.put("vm.create", Some(vm), &[])
    }

    /// Adds a network device to a VM that does not run. Descriptors that it was passed go along.
    pub fn add_net(&mut self, net: &NetConfig) -> Result<(), ClientError> {
        let taps: Vec<_> = match net.source() {
            Ok(TapSource::Passed(fds)) => fds.iter().map(AsFd::as_fd).collect(),
            _ => Vec::new(),
        };
        self.put("vm.add-net", Some(net), &taps)
    }

    /// Builds the VM and lets it run.
    pub fn boot(&mut self) -> Result<(), ClientError> {
        self.order("vm.boot")
    }

    /// Says how the VM was defined, what it is and how large.
    pub fn info(&mut self) -> Result<VmInfo, ClientError> {
        self.get("vm.info")
    }

    /// Says what each device and the vCPUs have done.
    pub fn counters(&mut self) -> Result<Value, ClientError> {
        self.get("vm.counters")
    }

    /// Stops the vCPUs and the devices.
    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.order("vm.pause")
    }

    /// Lets a paused VM go on.
    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.order("vm.resume")
    }

    /// Sets sizes. The guest follows when it can.
    pub fn resize(&mut self, sizes: Resize) -> Result<(), ClientError> {
        self.put("vm.resize", Some(&sizes), &[])
    }

    /// Writes a paused VM to a folder.
    pub fn snapshot(&mut self, snapshot: &Snapshot) -> Result<(), ClientError> {
        self.put("vm.snapshot", Some(snapshot), &[])
    }

    /// Makes a VM of a snapshot. Its `fds` go along.
    pub fn restore(&mut self, restore: &Restore) -> Result<(), ClientError> {
        let taps: Vec<_> = restore.fds.iter().map(AsFd::as_fd).collect();
        self.put("vm.restore", Some(restore), &taps)
    }

    /// Ends the guest, and keeps what the VM is defined as.
    pub fn shutdown(&mut self) -> Result<(), ClientError> {
        self.order("vm.shutdown")
    }

    /// Ends the guest, if there is one, and podvmm.
    pub fn exit(&mut self) -> Result<(), ClientError> {
        self.order("vmm.shutdown")
    }

    fn get<T: DeserializeOwned>(&mut self, name: &str) -> Result<T, ClientError> {
        let body = self.call("GET", &format!("{PREFIX}{name}"), None, &[])?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Answer(error.to_string()))
    }

    fn order(&mut self, name: &str) -> Result<(), ClientError> {
        self.put(name, None::<&Value>, &[])
    }

    fn put<T: Serialize>(
        &mut self,
        name: &str,
        body: Option<&T>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let body = body.map(serde_json::to_string).transpose();
        let body = body.map_err(|error| ClientError::Body(error.to_string()))?;
        let path = format!("{PREFIX}{name}");
        self.call("PUT", &path, body.as_deref(), fds).map(drop)
    }
}
