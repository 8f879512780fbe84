//! A guest that counts, to be found counting on wherever its snapshot is restored.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::http::Client;
use serde_json::{Value, json};

use crate::code;
use crate::service::{Service, put, refusal};

// Counts, in memory, what it is sent, and answers with the count, a letter from 'A' on. A 'q' ends
// it. It has 8 MiB of memory that differ from zero, so that a snapshot takes its time; an 'r' has it
// read a word of each of their pages, and answer with 'r' if they are what they were.
code!(
    counter,
    ".code32",
    "mov edi, 0x1000000",
    "mov eax, 0x5a5a5a5a",
    "mov ecx, 0x200000",
    "cld",
    "rep stosd",
    "mov dword ptr [0x200000], 'A'",
    "1: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 1b",
    "mov dx, 0x3f8",
    "in al, dx",
    "cmp al, 'q'",
    "je 2f",
    "cmp al, 'r'",
    "je 4f",
    "mov eax, [0x200000]",
    "inc dword ptr [0x200000]",
    "out dx, al",
    "jmp 1b",
    "2: mov al, 0xfe",
    "out 0x64, al",
    "3: hlt",
    "jmp 3b",
    "4: mov esi, 0x1000000",
    "mov ecx, 0x800",
    "5: cmp dword ptr [esi], 0x5a5a5a5a",
    "jne 6f",
    "add esi, 0x1000",
    "dec ecx",
    "jnz 5b",
    "out dx, al",
    "jmp 1b",
    "6: mov al, '!'",
    "out dx, al",
    "jmp 1b",
);

/// A guest that counts.
#[derive(Debug)]
pub struct Counter {
    pub service: Service,
    pub client: Client,
    pub console: UnixStream,
}

impl Counter {
    pub fn boot() -> Self {
        Self::boot_with(&json!({}))
    }

    /// One whose memory has `more` fields.
    pub fn boot_with(memory: &Value) -> Self {
        let service = Service::start(counter());
        let mut client = service.client();
        let mut vm = service.definition();
        vm["serial"] = serial(&service);
        vm["balloon"] = json!({"size": 0});
        vm["memory"]["thp"] = false.into();
        for (key, value) in memory.as_object().expect("it is one") {
            vm["memory"][key] = value.clone();
        }
        put(&mut client, "vm.create", Some(vm)).expect("podvmm and its files are there");
        put(&mut client, "vm.boot", None).expect("podvmm and its files are there");
        Self::of(service, client)
    }

    /// Another one of a snapshot.
    pub fn restore(folder: &Path, more: &[(&str, Value)]) -> Self {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = restore_body(&service, folder, more);
        put(&mut client, "vm.restore", Some(body)).expect("podvmm and its files are there");
        Self::of(service, client)
    }

    pub fn of(service: Service, client: Client) -> Self {
        let console = UnixStream::connect(service.folder.path().join("serial"))
            .expect("podvmm and its files are there");
        let patience = Some(Duration::from_secs(60));
        console
            .set_read_timeout(patience)
            .expect("podvmm and its files are there");
        Self {
            service,
            client,
            console,
        }
    }

    pub fn count(&mut self) -> char {
        self.ask(b'.')
    }

    /// Has it read its 8 MiB.
    pub fn read_all(&mut self) -> char {
        self.ask(b'r')
    }

    fn ask(&mut self, what: u8) -> char {
        self.console
            .write_all(&[what])
            .expect("podvmm and its files are there");
        let mut said = [0];
        self.console
            .read_exact(&mut said)
            .expect("podvmm and its files are there");
        said[0].into()
    }

    pub fn snapshot(&mut self, folder: &Path, incremental: bool) {
        put(&mut self.client, "vm.pause", None).expect("podvmm and its files are there");
        let body = json!({"destination_url": url(folder), "incremental": incremental});
        put(&mut self.client, "vm.snapshot", Some(body)).expect("podvmm and its files are there");
        put(&mut self.client, "vm.resume", None).expect("podvmm and its files are there");
    }

    /// Whether a part of podvmm's memory is a file in `folder`.
    pub fn is_mapped_from(&self, folder: &Path) -> bool {
        let maps = format!("/proc/{}/maps", self.service.running.pid());
        let maps = fs::read_to_string(maps).expect("podvmm runs");
        let folder = folder.to_str().expect("temporary files have plain names");
        maps.contains(folder)
    }

    /// Has it try in vain. Returns the status and why.
    pub fn refused_snapshot(&mut self, folder: &Path, incremental: bool) -> (u16, String) {
        put(&mut self.client, "vm.pause", None).expect("it runs");
        let body = json!({"destination_url": url(folder), "incremental": incremental});
        let why = refusal(put(&mut self.client, "vm.snapshot", Some(body)));
        put(&mut self.client, "vm.resume", None).expect("it is paused");
        why
    }

    pub fn end(mut self) {
        self.console
            .write_all(b"q")
            .expect("podvmm and its files are there");
        let outcome = self.service.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
    }
}

/// What vm.restore is asked for a guest with `service`.
pub fn restore_body(service: &Service, folder: &Path, more: &[(&str, Value)]) -> Value {
    let mut body = json!({
        "source_url": url(folder),
        "config": {"serial": serial(service)},
        "resume": true,
    });
    for (key, value) in more {
        body[key] = value.clone();
    }
    body
}

fn serial(service: &Service) -> Value {
    json!({"mode": "Socket", "socket": service.folder.path().join("serial")})
}

pub fn url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// The names of files in a folder, and how many bytes each takes.
pub fn files(folder: &Path) -> Vec<(String, u64)> {
    use std::os::unix::fs::MetadataExt;
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("podvmm and its files are there")
        .map(|entry| {
            let entry = entry.expect("podvmm and its files are there");
            let name = entry
                .file_name()
                .into_string()
                .expect("podvmm and its files are there");
            (
                name,
                entry
                    .metadata()
                    .expect("podvmm and its files are there")
                    .blocks()
                    * 512,
            )
        })
        .collect();
    files.sort();
    files
}

pub fn names(folder: &Path) -> Vec<String> {
    files(folder).into_iter().map(|(name, _)| name).collect()
}

pub fn memory_files(folder: &Path) -> Vec<PathBuf> {
    let named = |(name, _): &(String, u64)| name.starts_with("memory-");
    let names = files(folder).into_iter().filter(named);
    names.map(|(name, _)| folder.join(name)).collect()
}
