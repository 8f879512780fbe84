//! PID 1 of the guest: finds the root file system, runs the command there with its streams
//! connected to the host, reports its status and ends the VM. In a pod ([`serve`]) it runs containers
//! instead, as the shim asks for them.
//!
//! The guest's kernel may be interpreted, at half a millisecond for a system call: so a command has
//! one thread, no work is done before it is needed, and std's own start-up is passed over
//! (`no_main`).

#![cfg_attr(not(test), no_main)]
#![cfg_attr(fuzzing, allow(dead_code, reason = "a fuzzer calls what it fuzzes"))]

mod clock;
mod cmdline;
mod command;
mod container;
mod copy;
mod cpus;
mod devices;
mod dns;
mod figures;
#[cfg(fuzzing)]
#[path = "../../fuzz/fuzz_targets/agent.rs"]
mod fuzz;
mod limits;
mod modules;
mod mounts;
mod network;
mod policy;
mod poll;
mod ports;
mod reaper;
mod relay;
mod rootfs;
mod sandbox;
mod serve;
mod storage;
mod sys;

use std::error::Error;
use std::io::{self, Write};
use std::time::Duration;

use cmdline::BootArgs;
use command::{Command, Size, Streams};
use container::launch::{NAMESPACES, STAGE};
use container::stage;
use ports::{Ports, StatusPort};
use protocol::contract::Status;
use relay::{Children, Pump};

/// How long the host has to end the VM once it has been told the status.
const HOST_GRACE: Duration = Duration::from_secs(1);

/// Ctrl-D: what a terminal's user types to end the input.
const END_OF_INPUT: &[u8] = b"\x04";

/// The C library calls this as `main`.
#[cfg_attr(not(any(test, fuzzing)), unsafe(export_name = "main"))]
#[cfg_attr(test, expect(dead_code, reason = "tests have a main of their own"))]
extern "C" fn start() -> std::ffi::c_int {
    std::panic::set_hook(Box::new(|panic| {
        say(&panic.to_string());
        end_vm();
    }));
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == STAGE)
    {
        return stage::run().into();
    }
    if let Err(error) = run() {
        say(&describe(&*error));
    }
    end_vm();
    1
}

/// Ends the VM; outside of one, or if it is not obeyed, only this process.
fn end_vm() {
    if std::process::id() == 1 {
        say(&format!("reboot: {}", sys::reboot()));
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    mounts::first()?;
    sys::fill_descriptors(2);
    for error in modules::load() {
        say(&describe(&error));
    }
    match Command::read()? {
        Some(command) => run_command(&command),
        None if boot_args()?.pod => run_pod(),
        None => run_shell(),
    }
}

/// Runs the command for the host at the ports.
fn run_command(command: &Command) -> Result<(), Box<dyn Error>> {
    let Ports {
        stdin,
        stdout,
        stderr,
        mut status,
    } = Ports::open()?;
    let result = (|| {
        let terminal = Size::read()?;
        let children = Children::watch()?;
        enter_root()?;
        status.tell(&Status::Ready);
        let (pid, streams) = command.start(terminal)?;
        let (input, output) = match streams {
            Streams::Pipes {
                stdin: to,
                stdout: from,
                stderr: from_stderr,
            } => (
                Pump::new(stdin, to),
                vec![Pump::new(from, stdout), Pump::new(from_stderr, stderr)],
            ),
            Streams::Terminal(terminal) => (
                Pump::new(stdin, terminal.try_clone()?).with_farewell(END_OF_INPUT),
                vec![Pump::new(terminal, stdout)],
            ),
        };
        Ok(children.relay(pid, Some(status.button()), Some(input), output)?)
    })();
    finish(&mut status, result)
}

/// Tells the host how it went, after everything that the host is to find done.
fn finish(
    status: &mut StatusPort,
    result: Result<u8, Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    settle_disks();
    match &result {
        Ok(exit) => status.tell(&Status::Exit(*exit)),
        Err(error) => status.tell(&Status::Error(describe(&**error))),
    }
    std::thread::sleep(HOST_GRACE);
    result.map(drop)
}

/// Runs a shell on the console.
fn run_shell() -> Result<(), Box<dyn Error>> {
    let children = Children::watch()?;
    enter_root()?;
    let pid = Command::shell().start_on_console()?;
    children.relay(pid, None, None, Vec::new())?;
    settle_disks();
    Ok(())
}

/// Serves a pod's containers for the host.
fn run_pod() -> Result<(), Box<dyn Error>> {
    // Of what a container's process is given none may lie where it is to be put.
    sys::fill_descriptors(NAMESPACES);
    let rules = policy::Rules::read()?;
    enter_root()?;
    for (act, result) in limits::raise() {
        complain(act, result);
    }
    serve::run(rules)?;
    settle_disks();
    Ok(())
}

fn boot_args() -> Result<BootArgs, Box<dyn Error>> {
    let line = sys::read_file("/proc/cmdline")?;
    Ok(BootArgs::parse(&String::from_utf8_lossy(&line)))
}

/// Makes the guest what programs expect, with the root file system that the command line names.
fn enter_root() -> Result<(), Box<dyn Error>> {
    let BootArgs { root, pod } = boot_args()?;
    // Kata's shim names a disk even where the agent is in an initramfs, and there is none.
    let (root, missing) = match root {
        Some(root) if pod && !rootfs::is_there(&root) => (None, Some(root)),
        root => (root, None),
    };
    if let Some(missing) = missing {
        say(&format!(
            "{} is not there, so the root is an empty one",
            missing.source
        ));
    }
    if let Some(root) = &root {
        rootfs::enter(root)?;
    } else if pod {
        // Containers leave their root by pivot_root(2), which the initramfs is not made for.
        rootfs::enter_empty()?;
    }
    let read_only = root.is_some_and(|root| !root.writable && !root.overlay);
    for error in mounts::later(read_only) {
        say(&describe(&error));
    }
    complain("set the host name", sys::set_hostname("podvmm"));
    complain("bring the loopback interface up", sys::loopback_up());
    Ok(())
}

fn settle_disks() {
    complain("settle the disks", mounts::settle_disks());
}

/// Says it on the console, in one write: each is slow.
fn say(text: &str) {
    // Without a console the agent has nowhere to write this.
    let _ = io::stderr().write_all(format!("podvmm-agent: {text}\n").as_bytes());
}

/// Mentions on the console what went wrong. The agent goes on all the same.
fn complain(act: &str, result: io::Result<()>) {
    if let Err(error) = result {
        say(&format!("{act}: {error}"));
    }
}

/// An error and its causes in one line.
fn describe(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
