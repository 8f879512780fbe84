//! A guest that tells what its clocks are and starts its other CPUs when asked.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use api::http::Client;
use serde_json::json;

use crate::code;
use crate::counter::{restore_body, url};
use crate::node::within;
use crate::service::{Service, put};

// Enables KVM's clock at 0x300000 and answers each byte it receives on the serial port.
//
// 'f': '0' plus the clock's flags (bit 0: stable; bit 1: the guest was stopped). Clears bit 1, as
//      Linux's watchdog does.
// 'n': starts the next CPU, which reads its time stamp counter. '=' if that lies between two readings
//      of the first CPU's, before and after; '<' or '>' if it does not.
// 'b': starts the next CPU, which counts for ever. No answer.
// 'c': '+' once that one has counted on.
// 'q': ends the guest.
code!(
    probe,
    ".code32",
    "mov esp, 0x80000",
    "mov ecx, 0x4b564d01",
    "mov eax, 0x300001",
    "xor edx, edx",
    "wrmsr",
    // What the other CPUs run: store the counter at 0x9000, say so at 0x9008, halt.
    "call 2f",
    ".byte 0x0f, 0x31, 0x66, 0xa3, 0x00, 0x90, 0x66, 0x89, 0x16, 0x04, 0x90",
    ".byte 0xc6, 0x06, 0x08, 0x90, 0x01, 0xf4, 0xeb, 0xfd",
    "2: pop esi",
    "mov edi, 0x8000",
    "mov ecx, 19",
    "cld",
    "rep movsb",
    // What one that counts runs: inc dword ptr [0x9020], and again.
    "mov dword ptr [0xa000], 0x2006ff66",
    "mov dword ptr [0xa004], 0x00f9eb90",
    "mov dword ptr [0xfee000f0], 0x1ff",
    "xor ebx, ebx",
    "1: mov dx, 0x3fd",
    "in al, dx",
    "test al, 1",
    "jz 1b",
    "mov dx, 0x3f8",
    "in al, dx",
    "cmp al, 'f'",
    "je 3f",
    "cmp al, 'n'",
    "je 4f",
    "cmp al, 'b'",
    "je 7f",
    "cmp al, 'c'",
    "je 8f",
    "mov al, 0xfe",
    "out 0x64, al",
    "9: hlt",
    "jmp 9b",
    "3: mov al, [0x30001d]",
    "and byte ptr [0x30001d], 0xfd",
    "and al, 3",
    "add al, '0'",
    "out dx, al",
    "jmp 1b",
    "4: inc ebx",
    "mov byte ptr [0x9008], 0",
    "rdtsc",
    "mov [0x9010], eax",
    "mov [0x9014], edx",
    "mov eax, ebx",
    "shl eax, 24",
    "mov [0xfee00310], eax",
    "mov dword ptr [0xfee00300], 0x4500",
    "mov [0xfee00310], eax",
    "mov dword ptr [0xfee00300], 0x4608",
    "5: cmp byte ptr [0x9008], 0",
    "je 5b",
    "rdtsc",
    "mov cl, '>'",
    "sub eax, [0x9000]",
    "sbb edx, [0x9004]",
    "jc 6f",
    "mov cl, '<'",
    "mov eax, [0x9000]",
    "mov edx, [0x9004]",
    "sub eax, [0x9010]",
    "sbb edx, [0x9014]",
    "jc 6f",
    "mov cl, '='",
    "6: mov al, cl",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 1b",
    "7: inc ebx",
    "mov eax, ebx",
    "shl eax, 24",
    "mov [0xfee00310], eax",
    "mov dword ptr [0xfee00300], 0x4500",
    "mov [0xfee00310], eax",
    "mov dword ptr [0xfee00300], 0x460a",
    "jmp 1b",
    "8: mov eax, [0x9020]",
    "5: cmp eax, [0x9020]",
    "je 5b",
    "mov cl, '+'",
    "jmp 6b",
);

/// A guest that tells about its clocks, in a podvmm that serves its API.
#[derive(Debug)]
pub struct Probe {
    pub service: Service,
    pub client: Client,
    console: UnixStream,
}

impl Probe {
    /// One that starts with `boot` of three vCPUs.
    pub fn boot(boot: u8) -> Self {
        let service = Service::start(probe());
        let mut client = service.client();
        let mut vm = service.definition();
        let socket = service.folder.path().join("serial");
        vm["cpus"] = json!({"boot_vcpus": boot, "max_vcpus": 3});
        vm["serial"] = json!({"mode": "Socket", "socket": socket});
        put(&mut client, "vm.create", Some(vm)).expect("the definition is right");
        put(&mut client, "vm.boot", None).expect("the kernel is there");
        Self::of(service, client)
    }

    /// A clone of the snapshot in `folder`.
    pub fn restore(folder: &Path) -> Self {
        let service = Service::start(&[]);
        let mut client = service.client();
        let body = restore_body(&service, folder, &[]);
        put(&mut client, "vm.restore", Some(body)).expect("the snapshot is whole");
        Self::of(service, client)
    }

    fn of(service: Service, client: Client) -> Self {
        let console = UnixStream::connect(service.folder.path().join("serial"))
            .expect("podvmm listens before it answers");
        console
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a timeout above zero is accepted");
        Self {
            service,
            client,
            console,
        }
    }

    fn ask(&mut self, question: u8) -> char {
        self.console.write_all(&[question]).expect("podvmm reads");
        let mut answer = [0];
        self.console
            .read_exact(&mut answer)
            .expect("the guest answers");
        answer[0].into()
    }

    /// The flags of the first CPU's clock. The guest clears that it was stopped.
    pub fn clock_flags(&mut self) -> ClockFlags {
        let flags = self.ask(b'f');
        let bits = flags.to_digit(10).expect("it answers with a digit");
        ClockFlags {
            is_stable: bits & 1 != 0,
            was_stopped: bits & 2 != 0,
        }
    }

    /// Has the guest start its next CPU and compare its time stamp counter with the first one's.
    pub fn start_next_cpu(&mut self) -> char {
        self.ask(b'n')
    }

    /// Has the guest start its next CPU, which is busy from then on.
    pub fn start_busy_cpu(&mut self) {
        self.console.write_all(b"b").expect("podvmm reads");
    }

    /// Has the guest's first CPU wait until the busy one has done something.
    pub fn waits_for_busy_cpu(&mut self) {
        assert_eq!(self.ask(b'c'), '+');
    }

    /// Processor time that a vCPU has used, of the guest and of KVM.
    pub fn vcpu_time(&self, index: usize) -> Duration {
        let tasks = format!("/proc/{}/task", self.service.running.pid());
        let tasks = fs::read_dir(tasks).expect("podvmm runs").flatten();
        let mut tasks = tasks.map(|task| task.path());
        let name = format!("vcpu{index}\n");
        let task = tasks
            .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm == name))
            .expect("the vCPU exists");
        // Nanoseconds on a processor, those waiting for one, and how often (Linux, sched-stats.rst).
        let times = fs::read_to_string(task.join("schedstat")).expect("podvmm runs");
        let time = times.split(' ').next().expect("it has three fields");
        Duration::from_nanos(time.parse().expect("they are numbers"))
    }

    /// Asserts how many threads of vCPUs podvmm has.
    pub fn has_vcpu_threads(&self, expected: usize) {
        // A new thread has its creator's name until it runs for the first time.
        within(Duration::from_secs(10), "threads of vCPUs", || {
            self.vcpu_threads() == expected
        });
    }

    fn vcpu_threads(&self) -> usize {
        let tasks = format!("/proc/{}/task", self.service.running.pid());
        let tasks = fs::read_dir(tasks).expect("podvmm runs");
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm"));
        let names = tasks.flatten().map(name);
        names.flatten().filter(|it| it.starts_with("vcpu")).count()
    }

    pub fn pause(&mut self) {
        put(&mut self.client, "vm.pause", None).expect("it runs");
    }

    pub fn resume(&mut self) {
        put(&mut self.client, "vm.resume", None).expect("it is paused");
    }

    pub fn resize(&mut self, vcpus: u8) {
        let size = json!({"desired_vcpus": vcpus});
        put(&mut self.client, "vm.resize", Some(size)).expect("it is within bounds");
    }

    /// Takes a snapshot of the paused guest.
    pub fn snapshot(&mut self, folder: &Path) {
        let body = json!({"destination_url": url(folder)});
        put(&mut self.client, "vm.snapshot", Some(body)).expect("the folder can be written");
    }

    pub fn end(mut self) {
        self.console.write_all(b"q").expect("podvmm reads");
        let outcome = self.service.running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
    }
}

/// What KVM's clock says of itself (kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockFlags {
    /// All vCPUs read the same time.
    pub is_stable: bool,
    /// The host had stopped the vCPU since the guest last looked.
    pub was_stopped: bool,
}
