//! A podvmm that serves its API, and how to talk to it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use api::http::{Client, ClientError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Payload;
use crate::payload::Protocol;
use crate::podvmm::{Podvmm, Running};

/// A podvmm that serves, in its own folder, and a guest for it.
#[derive(Debug)]
pub struct Service {
    pub folder: TempDir,
    pub payload: Payload,
    pub running: Running,
}

impl Service {
    pub fn start(code: &[u8]) -> Self {
        Self::start_with(code, |_| Vec::new())
    }

    /// With more arguments, which may name the kernel.
    pub fn start_with(code: &[u8], more: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let payload = Payload::new(code, Protocol::Pvh);
        let folder = TempDir::new().expect("there is a folder for temporary files");
        let socket = folder.path().join("api");
        let socket = socket.to_str().expect("temporary files have plain names");
        let arguments = ["--api-socket", socket, "-v"].map(String::from);
        let running = Podvmm::new(arguments.into_iter().chain(more(payload.path()))).spawn();
        let service = Self {
            folder,
            payload,
            running,
        };
        while UnixStream::connect(service.socket()).is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        service
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket()).expect("podvmm serves")
    }

    pub fn definition(&self) -> Value {
        json!({
            "payload": {"kernel": self.payload.path()},
            "cpus": {"boot_vcpus": 1, "max_vcpus": 3},
            "memory": {"size": 64 << 20},
            "serial": {"mode": "Null"},
            "console": {"mode": "Off"},
        })
    }

    /// Tells it to end, and sees it gone.
    pub fn dismiss(self) {
        put(&mut self.client(), "vmm.shutdown", None).expect("it may always end");
        let outcome = self.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(!self.folder.path().join("api").exists());
    }

    pub fn proc(&self, folder: &str) -> usize {
        let path = format!("/proc/{}/{folder}", self.running.pid());
        fs::read_dir(path).expect("it runs").count()
    }

    /// Bytes of memory that the host has given it.
    pub fn resident(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.running.pid());
        let statm = fs::read_to_string(path).expect("it runs");
        let pages = statm.split(' ').nth(1).expect("statm has seven fields");
        4096 * pages.parse::<u64>().expect("they are numbers")
    }

    pub fn files(&self) -> usize {
        fs::read_dir(self.folder.path())
            .expect("it is ours")
            .count()
    }

    pub fn maps(&self) -> usize {
        let path = format!("/proc/{}/maps", self.running.pid());
        let maps = fs::read_to_string(path).expect("it runs");
        maps.lines().count()
    }
}

pub fn put(client: &mut Client, name: &str, body: Option<Value>) -> Result<Vec<u8>, ClientError> {
    let body = body.map(|body| body.to_string());
    client.call("PUT", &format!("/api/v1/{name}"), body.as_deref(), &[])
}

pub fn get(client: &mut Client, name: &str) -> Value {
    let body = client
        .call("GET", &format!("/api/v1/{name}"), None, &[])
        .expect("it is not refused");
    serde_json::from_slice(&body).expect("answers are JSON")
}

pub fn refusal(result: Result<Vec<u8>, ClientError>) -> (u16, String) {
    match result {
        Err(ClientError::Refused { status, why }) => (status, why.join(": ")),
        other => panic!("not refused: {other:?}"),
    }
}
