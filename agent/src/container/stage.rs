//! The process between the agent and a container's program: this program once more, in the
//! container's namespaces, which makes itself what the container is to be. One thread, so that it
//! may fork, and all memory its own.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use protocol::agent::oci::{Process, Spec};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::pty::OpenptFlags;
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags};

use super::launch::{CHANNEL, LAUNCH, Launch, NAMESPACES, Word, hear, say};
use super::seccomp::Filter;
use super::{identity, rootfs};
use crate::sys;

type Error = Box<dyn std::error::Error>;

/// Becomes what it is told to. Returns only if that fails, after having said so.
pub(crate) fn run() -> u8 {
    let Given {
        channel,
        launch,
        namespaces,
    } = Given::take();
    let (why, code) = match prepare(&channel, launch, namespaces) {
        Err(error) => (error.to_string(), 1),
        Ok((mut command, filter)) => match filter.map_or(Ok(()), |filter| filter.load()) {
            Err(error) => (format!("load the seccomp filter: {error}"), 1),
            Ok(()) => {
                let error = command.exec();
                let name = command.get_program().to_string_lossy();
                let is_missing = error.kind() == io::ErrorKind::NotFound;
                let code = if is_missing { 127 } else { 126 };
                (format!("{name}: {error}"), code)
            }
        },
    };
    // If the agent is gone, no process can receive this.
    let _ = say(channel.as_fd(), &Word::Failed(why));
    code
}

/// What the agent hands over, by number.
struct Given {
    channel: OwnedFd,
    launch: File,
    /// Whatever the agent has there, if there are none to enter.
    namespaces: OwnedFd,
}

impl Given {
    fn take() -> Self {
        // SAFETY: the agent starts this process with the channel there, and nothing else owns it.
        let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL) };
        // SAFETY: as above, with what is to be read.
        let launch = unsafe { OwnedFd::from_raw_fd(LAUNCH) };
        // SAFETY: as above; the agent keeps that number open.
        let namespaces = unsafe { OwnedFd::from_raw_fd(NAMESPACES) };
        Self {
            channel,
            launch: launch.into(),
            namespaces,
        }
    }
}

/// The program, and what it is to be held to: loaded last where no-new-privileges allows that.
fn prepare(
    channel: &OwnedFd,
    launch: File,
    namespaces: OwnedFd,
) -> Result<(Command, Option<Filter>), Error> {
    rustix::io::fcntl_setfd(channel, rustix::io::FdFlags::CLOEXEC)?;
    // Until it has its program its memory and descriptors are none of the container's business.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // First it is put into the container's cgroup.
    await_order(channel);
    let launch = Launch::from_file(launch)?;
    let first = launch.spec.as_ref().and_then(|spec| spec.process.as_ref());
    let process = first.or(launch.process.as_ref()).cloned();
    let process = process.ok_or("there is no process to become")?;
    identity::set_oom_score(&process).map_err(|error| format!("oom_score_adj: {error}"))?;
    match &launch.spec {
        Some(spec) => {
            if launch.shares_pids {
                enter_pids(&namespaces)?;
                go_on_as_sibling(channel)?;
            }
            enter(spec)?;
        }
        None => {
            join(&namespaces)?;
            go_on_as_sibling(channel)?;
        }
    }
    drop(namespaces);
    join_keyring(&launch)?;
    let uid = process.user.as_ref().map_or(0, |user| user.uid);
    if launch.spec.is_some() {
        // Now, for the host takes away what cannot be made, but not what cannot be started.
        find_program(&process)?;
    }
    if process.terminal {
        let is_first = launch.spec.is_some();
        say(
            channel.as_fd(),
            &Word::Terminal(terminal(&process, is_first)?),
        )?;
    }
    give_streams(uid)?;
    say(channel.as_fd(), &Word::Ready)?;
    await_order(channel);
    let command = command(&process)?;
    let mut filter = launch.seccomp;
    if !process.no_new_privileges
        && let Some(filter) = filter.take()
    {
        // While there is still the right to.
        let loaded = filter.load();
        loaded.map_err(|error| format!("load the seccomp filter: {error}"))?;
    }
    let cwd = match process.cwd.as_str() {
        "" => "/",
        cwd => cwd,
    };
    let chdir = || rustix::process::chdir(cwd);
    let failed = |errno| format!("{cwd}: {errno}");
    // Root may enter the image's folders; a volume may have some that only its user may.
    let entered = chdir();
    let is_closed = matches!(entered, Err(Errno::ACCESS | Errno::PERM));
    if !is_closed {
        entered.map_err(failed)?;
    }
    identity::assume(&process)?;
    if is_closed {
        chdir().map_err(failed)?;
    }
    Ok((command, filter))
}

/// Waits to be told to go on. Whatever is said tells it; if nothing is, there is no agent any more.
fn await_order(channel: &OwnedFd) {
    if !matches!(hear(channel.as_fd()), Ok(Some(_))) {
        std::process::exit(1);
    }
}

fn enter(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux.clone().unwrap_or_default();
    for (name, value) in &linux.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).map_err(|error| format!("sysctl {name}: {error}"))?;
    }
    if linux
        .namespaces
        .iter()
        .any(|namespace| namespace.r#type == "cgroup")
    {
        unshare_cgroup()?;
    }
    rootfs::enter(spec)
}

fn unshare_cgroup() -> io::Result<()> {
    // SAFETY: no other thread shares this one's descriptors: this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }?;
    Ok(())
}

/// Enters the namespaces of the container's first process.
fn join(first: &OwnedFd) -> Result<(), Error> {
    let kinds = ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::MOUNT;
    rustix::thread::move_into_thread_name_spaces(first.as_fd(), kinds)
        .map_err(|errno| format!("enter the container: {errno}"))?;
    Ok(())
}

/// Takes the session keyring of the container's: its processes share one, and see no keys of the
/// agent's or of another container's.
fn join_keyring(launch: &Launch) -> Result<(), Error> {
    let name = CString::new(launch.keyring.as_str())?;
    match sys::join_session_keyring(&name, launch.spec.is_some()) {
        // A kernel without keys.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        joined => joined.map_err(|error| format!("join the session keyring: {error}").into()),
    }
}

/// Has children born in this pid namespace.
fn enter_pids(namespace: &OwnedFd) -> Result<(), Error> {
    let kind = Some(LinkNameSpaceType::ProcessID);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
        .map_err(|errno| format!("enter the pod's pid namespace: {errno}"))?;
    Ok(())
}

/// Goes on as another process, which is in the pid namespace entered: this one stays where it is,
/// tells of it and ends.
fn go_on_as_sibling(channel: &OwnedFd) -> Result<(), Error> {
    let (mut told, telling) = io::pipe()?;
    // A namespace whose first process has ended has no more.
    let forked = sys::fork_sibling();
    match forked.map_err(|error| format!("start in the pid namespace: {error}"))? {
        0 => {
            // Whatever it says comes after.
            drop(telling);
            told.read_to_end(&mut Vec::new())?;
            rustix::process::setsid()?;
            Ok(())
        }
        pid => {
            say(channel.as_fd(), &Word::Pid(pid))?;
            std::process::exit(0);
        }
    }
}

/// Opens a terminal in the container and makes it this process's own. Returns the agent's end.
fn terminal(process: &Process, is_first: bool) -> Result<OwnedFd, Error> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    if let Some(size) = process.console_size {
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let size = rustix::termios::Winsize {
            ws_row: cells(size.height),
            ws_col: cells(size.width),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size)?;
    }
    // Not by its path, at which the container may have something else.
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    if is_first {
        rootfs::mount_console(slave.as_fd())?;
    }
    rustix::process::ioctl_tiocsctty(&slave)?;
    rustix::stdio::dup2_stdin(&slave)?;
    rustix::stdio::dup2_stdout(&slave)?;
    rustix::stdio::dup2_stderr(&slave)?;
    Ok(master)
}

/// Makes the standard streams the user's. A process that opens `/dev/stdout` opens the pipe or terminal
/// anew, which needs permission, and the agent made it as root.
fn give_streams(uid: u32) -> Result<(), Error> {
    let uid = Some(rustix::fs::Uid::from_raw(uid));
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for stream in streams {
        rustix::fs::fchown(stream, uid, None)
            .map_err(|errno| format!("give the user its standard streams: {errno}"))?;
    }
    Ok(())
}

/// The program with its arguments and environment; a name without a slash is looked for in its PATH.
fn command(process: &Process) -> Result<Command, Error> {
    let (name, arguments) = process
        .args
        .split_first()
        .ok_or("there is nothing to run")?;
    let path = match name.contains('/') {
        true => name.into(),
        false => search(name, variable(process, "PATH").unwrap_or_default()),
    };
    let mut command = Command::new(path);
    command.arg0(name).args(arguments).env_clear();
    if let Some(tunables) = std::env::var_os(sys::C_LIBRARY) {
        command.env(sys::C_LIBRARY, tunables);
    }
    if variable(process, "HOME").is_none() {
        let uid = process.user.as_ref().map_or(0, |user| user.uid);
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        command.env("HOME", home(&passwd, uid));
    }
    for text in &process.env {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        // std takes no such names, and neither do shells.
        if !key.is_empty() && CString::new(text.as_bytes()).is_ok() {
            command.env(key, OsStr::from_bytes(value.as_bytes()));
        }
    }
    Ok(command)
}

/// The value of a variable of its environment. Of several of a name the last counts.
fn variable<'a>(process: &'a Process, wanted: &str) -> Option<&'a str> {
    let variables = process.env.iter().filter_map(|text| text.split_once('='));
    let mut variables = variables.rev().filter(|(key, _)| *key == wanted);
    variables.next().map(|(_, value)| value)
}

/// An error if there is no such program.
fn find_program(process: &Process) -> Result<(), Error> {
    let name = process.args.first().ok_or("there is nothing to run")?;
    // Those that are told by a path are where they are told to be from their folder.
    let path = match name.contains('/') {
        true => std::path::Path::new("/").join(&process.cwd).join(name),
        false => search(name, variable(process, "PATH").unwrap_or_default()).into(),
    };
    match is_program(&path) {
        true => Ok(()),
        false => Err(format!("{name}: there is no such program").into()),
    }
}

fn is_program(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Where in `path` there is a program of this name; the name itself if nowhere.
fn search(name: &str, path: &str) -> String {
    let places = path.split(':').filter(|folder| !folder.is_empty());
    let mut places = places.map(|folder| format!("{folder}/{name}"));
    // With a slash, or it would be looked for in the agent's own PATH.
    places
        .find(|place| is_program(place.as_ref()))
        .unwrap_or_else(|| format!("./{name}"))
}

/// The home of a user by the text of /etc/passwd.
fn home(passwd: &str, uid: u32) -> String {
    let uid = uid.to_string();
    let fields = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let mut users =
        fields.filter(|fields| fields.len() == 7 && fields[2] == uid && !fields[5].is_empty());
    users
        .next()
        .map_or_else(|| "/".into(), |fields| fields[5].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    use rustix::process::dumpable_behavior;
    use std::time::Duration;

    /// Until it has its program, the process holds the agent's memory and descriptors. The container that
    /// it enters may have processes that look for such: they may not trace it, nor open what /proc has of it
    /// (ptrace(2), "Ptrace access mode checking"; the class of CVE-2016-9962).
    #[test]
    fn a_process_is_closed_to_the_container_before_it_enters() {
        const WITHIN: &str = "PODVMM_TEST_STAGE";
        const NAME: &str = "container::stage::tests::\
            a_process_is_closed_to_the_container_before_it_enters";
        if std::env::var_os(WITHIN).is_none() {
            // It is all of a process that is closed, so it is done in one of its own.
            let mut within = Command::new(std::env::current_exe().unwrap());
            within.args(["--exact", NAME, "--nocapture"]);
            let output = within.env(WITHIN, "yes").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && said.contains("1 passed"),
                "{said}"
            );
            return;
        }
        assert_eq!(dumpable_behavior(), Ok(DumpableBehavior::Dumpable));
        let flags = SocketFlags::CLOEXEC;
        let channel =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (agents, channel) = channel.unwrap();
        let nothing = || File::open("/dev/null").unwrap();
        // No order ever comes, so it stays before the first step.
        std::mem::forget(agents);
        std::thread::spawn(move || drop(prepare(&channel, nothing(), nothing().into())));
        let is_closed = || dumpable_behavior() == Ok(DumpableBehavior::NotDumpable);
        let closed = poll::until(Duration::from_secs(10), || is_closed().then_some(()));
        assert_eq!(closed, Some(()), "it waits, and can be traced");
    }

    #[test]
    fn a_home_is_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken:1\nme:x:1000:1000::/home/me:/bin/sh\n";
        assert_eq!(
            [0, 1000, 7].map(|uid| home(passwd, uid)),
            ["/root", "/home/me", "/"]
        );
    }

    #[test]
    fn a_program_that_is_missing_is_found_out_before_it_is_started() {
        let find = |name: &str, cwd: &str| {
            let process = Process {
                args: vec![name.into()],
                env: vec!["PATH=/nowhere".into(), "PATH=/bin".into()],
                cwd: cwd.into(),
                ..Process::default()
            };
            find_program(&process).map_err(|error| error.to_string())
        };
        for (name, cwd) in [
            ("sh", "/"),
            ("/bin/sh", "/x"),
            ("./sh", "/bin"),
            ("bin/sh", ""),
        ] {
            assert_eq!(find(name, cwd), Ok(()), "{name} in {cwd}");
        }
        let missing = "/nosuch: there is no such program";
        assert_eq!(find("/nosuch", "/"), Err(missing.into()));
        for (name, cwd) in [
            ("nosuch", "/bin"),
            ("./sh", "/"),
            ("/etc/passwd", "/"),
            ("/bin", "/"),
        ] {
            assert!(find(name, cwd).is_err(), "{name} in {cwd}");
        }
    }

    #[test]
    fn programs_are_looked_for_where_the_container_says() {
        assert_eq!(search("sh", "/nowhere:/bin"), "/bin/sh");
        assert_eq!(search("no-such-program", "/bin"), "./no-such-program");
    }
}
