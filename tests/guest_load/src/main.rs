//! What the Linux tests and benches run inside the guest: the other ends of their transfers, and
//! loads on their devices. Linked statically.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use guest_load::neighbour;
use guest_load::transfer::{self, Checksum, RECORD_LEN, record};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["vsock-serve", port, count] => vsock_serve(number(port), number(count)),
        ["tcp-serve", port, count] => tcp_serve(number(port), number(count)),
        ["vsock-call", port] => vsock_call(number(port)),
        ["vsock-knock", cid, port] => vsock_knock(number(cid), number(port)),
        ["reach", port] => {
            let got = guest_load::reach::attempts(number(port));
            got.iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        ["watch", own, stop] => guest_load::reach::watch(own.as_ref(), stop.as_ref()),
        ["vsock-shell", port] => vsock_shell(number(port)),
        ["loads", port] => loads(number(port)),
        ["identity", host] => identity(host),
        ["busy", host, port] => busy(host, number(port)),
        ["map", path] => map(Path::new(path)),
        ["times"] => times(),
        ["shares", path] => shares(Path::new(path)),
        ["meets", path] => meets(Path::new(path)),
        ["lists", path] => lists(Path::new(path)),
        ["stuck", proc] => stuck(Path::new(proc)),
        ["requests", count, folder] => neighbour::requests(number(count), Path::new(folder)),
        ["disturb", what, mib, folder, host] => {
            neighbour::disturb(what, number(mib), Path::new(folder), host)
        }
        ["nothing"] => Ok(()),
        _ => Err(io::Error::other("unknown command")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest_load {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn number(word: &str) -> u32 {
    word.parse().expect("a number")
}

/// Serves `count` connections at once, each of which sends and gets a checked transfer.
fn vsock_serve(port: u32, count: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    let served: Vec<_> = (0..count)
        .map(|_| {
            let (stream, _) = listener.accept()?;
            Ok(thread::spawn(move || serve(stream)))
        })
        .collect::<io::Result<_>>()?;
    for thread in served {
        thread.join().expect("no panic")?;
    }
    Ok(())
}

/// Serves `count` connections one after the other in the same way.
fn tcp_serve(port: u32, count: u32) -> io::Result<()> {
    let port = u16::try_from(port).map_err(io::Error::other)?;
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    (0..count).try_for_each(|_| {
        let (stream, _) = listener.accept()?;
        serve(stream)
    })
}

/// Says whether who listens there keeps a connection of this guest's own, or ends it at once.
fn vsock_knock(cid: u32, port: u32) -> io::Result<()> {
    let mut stream = VsockStream::connect(&VsockAddr::new(cid, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let kept = match stream.read(&mut [0]) {
        Err(error) => error.kind() != io::ErrorKind::ConnectionReset,
        Ok(read) => read > 0,
    };
    println!("{}", if kept { "kept" } else { "ended" });
    Ok(())
}

/// Runs the line that each connection sends as a command of the shell, and sends back what that
/// says.
fn vsock_shell(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        let said = Command::new("/bin/sh").args(["-c", &line]).output()?;
        stream.write_all(&said.stdout)?;
        stream.write_all(&said.stderr)?;
        stream.end_sending()?;
        io::copy(&mut stream, &mut io::sink())?;
    }
}

/// A stream whose halves end one by one.
trait Halves: Read + Write {
    fn end_sending(&self) -> io::Result<()>;
}

impl Halves for VsockStream {
    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Halves for TcpStream {
    fn end_sending(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// Takes all the other end sends, answers with its checksum and as many bytes of its own.
fn serve(mut stream: impl Halves) -> io::Result<()> {
    let checksum = Checksum::of_all(&mut stream)?;
    stream.write_all(&checksum.to_bytes())?;
    transfer::send(&mut stream, checksum.seed(), checksum.len)?;
    stream.end_sending()?;
    // The other end goes first, so that nothing of ours is lost.
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}

/// Calls the host, says hello, ends its half and prints the answer.
fn vsock_call(port: u32) -> io::Result<()> {
    let mut stream = VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, port))?;
    stream.write_all(b"hello from the guest")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Tells a host's program who this guest is, and leaves a file.
fn identity(host: &str) -> io::Result<()> {
    let file = |path: &str| Ok::<_, io::Error>(fs::read_to_string(path)?.trim().to_owned());
    let mut random = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let hostname = file("/proc/sys/kernel/hostname")?;
    fs::write("/made", &hostname)?;
    let lines = [
        ("random", format!("{random:02x?}")),
        ("boot_id", file("/proc/sys/kernel/random/boot_id")?),
        ("mac", file("/sys/class/net/eth0/address")?),
        ("given", file("/given")?),
        ("hostname", hostname),
    ];
    let mut stream = TcpStream::connect(host)?;
    let uptime = file("/proc/uptime")?;
    let uptime = uptime.split(' ').next().unwrap_or_default();
    let time = std::time::SystemTime::UNIX_EPOCH.elapsed();
    let time = time.map_err(io::Error::other)?.as_secs_f64();
    // These are true now: they go first.
    let mut text = format!("time {time}\nuptime {uptime}\n");
    for (key, value) in lines {
        text.push_str(&format!("{key} {value}\n"));
    }
    stream.write_all(text.as_bytes())
}

/// Writes records to a file, has numbers echoed by the host, and sends to the host's vsock port, all
/// at once and until it cannot. Prints how each ended.
fn busy(host: &str, port: u32) -> io::Result<()> {
    thread::scope(|scope| {
        scope.spawn(|| println!("records: {:?}", write_records().map_err(kind)));
        scope.spawn(|| println!("tcp: {:?}", have_echoed(host).map_err(kind)));
        scope.spawn(|| {
            // The first is reset.
            for _ in 0..2 {
                match VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, port)) {
                    Ok(stream) => println!("vsock: {}", both_ends(stream)),
                    Err(error) => println!("vsock: connect {:?}", error.kind()),
                }
            }
        });
    });
    Ok(())
}

fn kind(error: io::Error) -> io::ErrorKind {
    error.kind()
}

fn write_records() -> io::Result<()> {
    let file = File::create("/records")?;
    (0..).try_for_each(|number| {
        file.write_all_at(&record(number), number * RECORD_LEN as u64)?;
        thread::sleep(PAUSE);
        Ok(())
    })
}

fn have_echoed(host: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(host)?;
    (0_u64..).try_for_each(|number| {
        stream.write_all(&number.to_le_bytes())?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        if u64::from_le_bytes(answer) != number {
            return Err(io::ErrorKind::InvalidData.into());
        }
        thread::sleep(PAUSE);
        Ok(())
    })
}

/// How reading what never comes and writing without end come to their ends.
fn both_ends(stream: VsockStream) -> String {
    let (mut reader, mut writer) = (&stream, &stream);
    thread::scope(|scope| {
        let read = scope.spawn(move || reader.read(&mut [0]));
        let block = Aligned::new();
        let wrote = loop {
            match writer.write_all(&block.0) {
                Ok(()) => thread::sleep(PAUSE),
                Err(error) => break error.kind(),
            }
        };
        let read = read.join().expect("no panic").map_err(kind);
        format!("read {read:?}, write {wrote:?}")
    })
}

/// Says for each empty line of its input what time it is, in seconds since 1970.
fn times() -> io::Result<()> {
    for line in io::stdin().lines() {
        if !line?.is_empty() {
            break;
        }
        let since = std::time::UNIX_EPOCH.elapsed().map_err(io::Error::other)?;
        println!("{}.{:09}", since.as_secs(), since.subsec_nanos());
    }
    Ok(())
}

/// Writes to a new file by a shared mapping, says so, and waits to be killed.
fn map(path: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path)?;
    file.set_len(PAGE as u64)?;
    let page = shared_page(&file)?;
    // SAFETY: these bytes are the first of a page that was just mapped to be written.
    unsafe { page.cast::<[u8; 6]>().write_volatile(*b"mapped") };
    println!("mapped");
    loop {
        thread::sleep(PATIENCE);
    }
}

/// The first page of a file, shared with all that map it, as long as this process lives.
fn shared_page(file: &File) -> io::Result<*mut u8> {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses where, so no other memory of this process changes.
    let page = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGE,
            access,
            MapFlags::SHARED,
            file,
            0,
        )
    }?;
    Ok(page.cast())
}

/// What [`shares`] has at `path`: a file with each kind of lock, one that is mapped, and one that is made
/// when the other has looked at all.
const SHARED: [&str; 4] = ["flock", "fcntl", "map", "made"];

/// Holds locks of files below `path`, watches it, and maps a file, until [`meets`] has seen all that.
fn shares(path: &Path) -> io::Result<()> {
    use rustix::fs::{FlockOperation, fcntl_lock, inotify};
    let [flocked, locked, mapped] = [0, 1, 2].map(|kind| File::create_new(path.join(SHARED[kind])));
    let (flocked, locked) = (flocked?, locked?);
    flocked.lock()?;
    fcntl_lock(&locked, FlockOperation::LockExclusive)?;
    mapped?.set_len(PAGE as u64)?;
    let mapped = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path.join(SHARED[2]))?;
    let page = shared_page(&mapped)?;
    // SAFETY: this byte is in a page that was just mapped to be written.
    unsafe { page.write_volatile(b'1') };
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::CREATE)?;
    println!("ready");
    let mut events = [0; 4096];
    let len = rustix::io::read(&watch, &mut events)?;
    let made = String::from_utf8_lossy(&events[..len]);
    println!("told of {}: {}", SHARED[3], made.contains(SHARED[3]));
    // SAFETY: this byte is in the page that was mapped, which another process writes to as well.
    println!("mapped: {}", char::from(unsafe { page.read_volatile() }));
    Ok(())
}

/// The user whom [`lists`] lets in.
const LISTED: u32 = 1000;

/// Makes the folder `path` for one user besides its owner, by an access control list that its files get as
/// well, and says who reads a file in it.
fn lists(path: &Path) -> io::Result<()> {
    // As <linux/posix_acl_xattr.h> has it: owner, one user, group, the most they get, others.
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1u16, 7u16, u32::MAX),
        (2, 7, LISTED),
        (4, 0, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        list.extend(id.to_le_bytes());
    }
    fs::create_dir(path)?;
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        rustix::fs::setxattr(path, name, &list, rustix::fs::XattrFlags::empty())?;
    }
    let file = path.join("file");
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    fs::write(&file, "read")?;
    for user in [LISTED, LISTED + 1] {
        let output = Command::new("/bin/cat").arg(&file).uid(user).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{user}: {said}");
    }
    println!("mode {:o}", fs::metadata(&file)?.permissions().mode());
    Ok(())
}

/// Says what it finds of what [`shares`] has at `path`, and tells it so.
fn meets(path: &Path) -> io::Result<()> {
    use rustix::fs::{FlockOperation, fcntl_lock};
    let open = |name| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path.join(name))
    };
    println!("flock is held: {}", open(SHARED[0])?.try_lock().is_err());
    let locked = open(SHARED[1])?;
    let free = fcntl_lock(&locked, FlockOperation::NonBlockingLockExclusive);
    println!("fcntl is held: {}", free.is_err());
    let page = shared_page(&open(SHARED[2])?)?;
    // SAFETY: this byte is in a page that was just mapped, which another process writes to as well.
    println!("mapped: {}", char::from(unsafe { page.read_volatile() }));
    // SAFETY: as above.
    unsafe { page.write_volatile(b'2') };
    File::create_new(path.join(SHARED[3])).map(drop)
}

/// Prints the tasks that sleep and let nothing wake them, for seconds, by the /proc given.
fn stuck(proc: &Path) -> io::Result<()> {
    let first = sleepers(proc)?;
    thread::sleep(PATIENCE);
    let second = sleepers(proc)?;
    first.intersection(&second).for_each(|it| println!("{it}"));
    Ok(())
}

/// Tasks in state D, with how often each has been switched to and from.
fn sleepers(proc: &Path) -> io::Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for process in fs::read_dir(proc)? {
        // What is no process has no tasks, and what has ended has none either.
        let Ok(tasks) = fs::read_dir(process?.path().join("task")) else {
            continue;
        };
        for task in tasks {
            let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
            let keys = ["Name:", "Pid:", "State:\tD", "voluntary_", "nonvoluntary_"];
            let lines = status.lines();
            let told: Vec<_> = lines
                .filter(|line| keys.iter().any(|key| line.starts_with(key)))
                .collect();
            if told.len() == keys.len() {
                found.insert(told.join(" "));
            }
        }
    }
    Ok(found)
}

/// Between two pieces of work.
const PAUSE: Duration = Duration::from_millis(10);
/// What is not stuck goes on within it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of one transfer of a load.
const BLOCK: usize = 64 << 10;
const PAGE: usize = 4 << 10;

/// Does what the host writes line by line, `NAME COUNT`, and answers each line when it is done.
fn loads(port: u32) -> io::Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, port))?;
    let (mut told, _) = listener.accept()?;
    let lines = BufReader::new(told.try_clone()?);
    for line in lines.lines() {
        let line = line?;
        let (name, count) = line.split_once(' ').ok_or(io::ErrorKind::InvalidData)?;
        load(name, number(count), &listener)?;
        writeln!(told, "done")?;
    }
    Ok(())
}

fn load(name: &str, count: u32, listener: &VsockListener) -> io::Result<()> {
    const FILE: &str = "/mnt/load";
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true);
        // Each is a request of its own, whatever the guest's cache may hold.
        options.custom_flags(libc::O_DIRECT).open(FILE)
    };
    let count = u64::from(count);
    match name {
        "idle" => Ok(()),
        "fs-write" => {
            (0..count).try_for_each(|at| open()?.write_all_at(&Aligned::new().0, at * BLOCK as u64))
        }
        "fs-read" => {
            let file = open()?;
            let mut block = Aligned::new();
            (0..count).try_for_each(|at| file.read_exact_at(&mut block.0, at * BLOCK as u64))
        }
        "fs-random-read" => {
            let file = open()?;
            let pages = file.metadata()?.len() / PAGE as u64;
            let mut block = Aligned::new();
            (0..count).try_for_each(|at| {
                let page = at.wrapping_mul(0x9e37_79b9) % pages;
                file.read_exact_at(&mut block.0[..PAGE], page * PAGE as u64)
            })
        }
        "fs-create" => (0..count)
            .try_for_each(|at| fs::write(Path::new("/mnt").join(at.to_string()), b"small")),
        "fs-stat" => (0..count)
            .try_for_each(|at| fs::metadata(Path::new("/mnt").join(at.to_string())).map(drop)),
        "vsock-out" => blocks_out(listener.accept()?.0, count),
        "vsock-in" => all_in(listener.accept()?.0),
        "vsock-echo" => echo(listener.accept()?.0),
        "tcp-out" => blocks_out(tcp()?, count),
        "tcp-in" => all_in(tcp()?),
        "tcp-echo" => echo(tcp()?),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn tcp() -> io::Result<TcpStream> {
    let stream = TcpListener::bind(("0.0.0.0", 7001))?.accept()?.0;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn blocks_out(mut stream: impl Halves, count: u64) -> io::Result<()> {
    let block = Aligned::new();
    (0..count).try_for_each(|_| stream.write_all(&block.0))?;
    stream.end_sending()?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

fn all_in(mut stream: impl Read) -> io::Result<()> {
    let mut block = Aligned::new();
    while stream.read(&mut block.0)? > 0 {}
    Ok(())
}

/// Each byte comes back, one by one.
fn echo(mut stream: impl Read + Write) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// A block as O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

impl Aligned {
    fn new() -> Box<Self> {
        Box::new(Self([7; BLOCK]))
    }
}
