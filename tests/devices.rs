//! All devices at once, with Linux in the guest. One boot with the files served by podvmm, one with
//! them served by virtiofsd, which has RAM that is shared. They are about drivers that find their
//! devices, and neither a command's streams nor virtiofsd's share could be taken along by a snapshot.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use guest_load::transfer::{self, Checksum};
use serde_json::Value;
use tempfile::TempDir;
use tests::helper::{Helper, virtiofsd};
use tests::host::Size;
use tests::network::{alone, links, set_up};
use tests::podvmm::kvm_is_here;
use tests::tree::manifest;
use tests::{Podvmm, guest};

const MIB: u64 = 1 << 20;
const BOOT: u64 = 256 * MIB;
/// Connections at once.
const CONNECTIONS: u32 = 20;
/// Bytes on each stream, each way. An emulated guest copies slowly.
const VSOCK_BYTES: Size = Size {
    real: 1 << 20,
    emulated: 64 << 10,
};
const TCP_BYTES: Size = Size {
    real: 8 << 20,
    emulated: 256 << 10,
};
/// As long as any guest may take for one thing.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a program might do to a tree, with an end that depends on nothing else.
const WORK: &str = r#"
set -e
cd /data
umask 027
mkdir -p a/b/c d
i=0; while [ $i -lt 20 ]; do echo "file $i" > a/f$i; i=$((i + 1)); done
dd if=/bin/busybox of=big bs=64k count=8 2>/quiet
echo middle | dd of=big bs=1 seek=10001 conv=notrunc 2>/quiet
cp -a a e; mv e/f1 e/moved; mv e d; mv a/f2 a/f3
ln a/f4 hard; ln -s ../a/f5 d/soft; ln -s /nowhere dangling; ln hard d/harder
chmod 4755 a/f6; chmod 1777 d; chmod 000 a/f7; chown 1000:1001 a/f8; chown -h 5:6 dangling
chown 7:8 a/f6; mknod fifo p; mknod -m 600 whiteout c 0 0
truncate -s 12345 a/f9; echo more >> a/f10; : > a/f11; rm a/f12 d/e/f13; mkdir x; rmdir x
exec 3<>gone; rm gone; echo removed >&3; exec 3>&-
mkdir group; chown 0:77 group; chmod 2775 group; echo x > group/inherits; mkdir group/also
tar cf tree.tar a; mkdir t; tar xf tree.tar -C t; rm tree.tar
find . -type f | sort | xargs md5sum > /sums; find . | sort > /names; rm -r t/a
if ls nothing 2>/quiet || mkdir a 2>/quiet || rmdir d 2>/quiet; then exit 1; fi
rm /quiet; sync"#;

/// What the guest does: vsock first, whose callers are not held for ever, the work, networks, and then
/// what the host says through the size of its memory, of which the kernel keeps some for itself. Sizes
/// may be over before it looks.
const SCRIPT: &str = r#"
guest_load vsock-serve 5000 20 && guest_load vsock-call 77 || exit
mount -t virtiofs tree /mnt && chroot /mnt /bin/sh -c "$1" && umount /mnt && echo worked || exit
ifconfig eth0 10.77.0.2 netmask 255.255.255.0 up && ifconfig eth1 10.78.0.2 netmask 255.255.255.0 up
cat /sys/class/net/eth0/address /sys/class/net/eth1/mtu /sys/class/net/eth0/carrier
ping -c 1 -W 60 10.77.0.1 >/dev/null && ping -c 1 -W 60 10.78.0.1 >/dev/null && echo pinged
guest_load tcp-serve 5000 2 || exit
total() { while read name kib _; do [ $name = MemTotal: ] && echo $kib; done < /proc/meminfo; }
at_least() { while [ $(total) -lt $1 ]; do sleep 1; done; }
mount -t tmpfs none /mnt
at_least 700000; echo grown
dd if=/dev/zero of=/mnt/file bs=1M count=64 2>/dev/null; echo written
at_least 820000; rm /mnt/file; echo removed
while [ $(total) -gt 262144 ]; do sleep 1; done; echo shrunk"#;

const TOLD: [&str; 10] = [
    "hello from the host",
    "worked",
    "02:00:00:00:00:07",
    "1400",
    "1",
    "pinged",
    "grown",
    "written",
    "removed",
    "shrunk",
];

fn plain(path: &Path) -> &str {
    path.to_str().expect("temporary files have plain names")
}

/// Waits until it is so.
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A tree to work on, and what comes of it when this host works on it.
fn trees() -> io::Result<(TempDir, TempDir)> {
    let tools = [
        "sh", "mkdir", "dd", "cp", "mv", "ln", "chmod", "chown", "mknod", "truncate", "rm",
        "rmdir", "tar", "find", "sort", "xargs", "md5sum", "ls", "sync",
    ];
    let trees = [(); 2].map(|()| guest::root(&tools));
    for tree in &trees {
        fs::create_dir(tree.path().join("data"))?;
    }
    let [shared, own] = trees;
    let status = Command::new("chroot")
        .arg(own.path())
        .args(["/bin/sh", "-c", WORK])
        .status()?;
    assert!(status.success(), "the host cannot do it");
    Ok((shared, own))
}

/// A stream to `port` of the guest. podvmm holds it until a program in the guest listens there.
fn call_vsock(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "connect {port}")?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend_from_slice(&byte);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
    Ok(stream)
}

/// A stream to a program of the guest's, once it listens.
fn call_tcp(address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().expect("an address");
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Sends a checked transfer and gets another one back.
fn exchange<S: Read + Write>(
    mut stream: S,
    end: impl FnOnce(&S) -> io::Result<()>,
    seed: u64,
    bytes: u64,
) -> io::Result<()> {
    transfer::send(&mut stream, seed, bytes)?;
    end(&stream)?;
    let mut stream = BufReader::new(stream);
    let sent = Checksum::of_sent(seed, bytes);
    assert_eq!(Checksum::read(&mut stream)?, sent);
    let received = Checksum::of_all(&mut stream)?;
    assert_eq!(received, Checksum::of_sent(sent.seed(), bytes));
    Ok(())
}

/// Connections in both directions, all of those to the guest at once.
fn streams(socket: &Path, listener: &UnixListener) -> io::Result<()> {
    let exchanges: Vec<_> = (1..=u64::from(CONNECTIONS))
        .map(|seed| {
            let socket = socket.to_path_buf();
            thread::spawn(move || {
                let end = |stream: &UnixStream| stream.shutdown(Shutdown::Write);
                exchange(
                    call_vsock(&socket, 5000)?,
                    end,
                    seed,
                    VSOCK_BYTES.here() as u64,
                )
            })
        })
        .collect();
    for exchange in exchanges {
        exchange.join().expect("no panic")?;
    }
    let (mut stream, _) = listener.accept()?;
    let mut hello = String::new();
    stream.read_to_string(&mut hello)?;
    assert_eq!(hello, "hello from the guest");
    stream.write_all(b"hello from the host")
}

fn frames() -> io::Result<()> {
    for (address, seed) in [("10.77.0.2:5000", 7), ("10.78.0.2:5000", 9)] {
        let end = |stream: &TcpStream| stream.shutdown(Shutdown::Write);
        exchange(call_tcp(address)?, end, seed, TCP_BYTES.here() as u64)?;
    }
    Ok(())
}

fn api(socket: &Path, arguments: &[&str]) -> Value {
    let socket = plain(socket);
    let call = ["api", "--json", "--socket", socket];
    let outcome = Podvmm::new(call.iter().chain(arguments)).run();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null)
}

/// How much memory the host has given to this process.
fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).expect("podvmm runs");
    let mut fields = text.split(' ').map(str::parse::<u64>);
    let pages = fields.nth(1).expect("statm has seven fields");
    pages.expect("they are numbers") * 4096
}

/// Memory is plugged, used, given back and unplugged, and the host has it each time.
fn sizes(socket: &Path, pid: u32) {
    let resize = |bytes: u64| api(socket, &["resize", "--memory", &bytes.to_string()]);
    let actual = || api(socket, &["info"])["memory_actual_size"].as_u64();
    let empty = resident(pid);
    resize(BOOT + 512 * MIB);
    wait_until("512 MiB plugged", || actual() == Some(BOOT + 512 * MIB));
    wait_until("a file of 64 MiB", || resident(pid) > empty + 56 * MIB);
    let mut written = 0;
    // Until the file is written; then the guest waits for more memory.
    wait_until("the whole file", || {
        thread::sleep(Duration::from_secs(3));
        let now = resident(pid);
        now == std::mem::replace(&mut written, now)
    });
    resize(BOOT + 640 * MIB);
    wait_until("freed pages reported", || {
        resident(pid) + 32 * MIB < written
    });
    let reported = resident(pid);
    resize(BOOT);
    wait_until("all of it unplugged", || actual() == Some(BOOT));
    wait_until("less resident", || resident(pid) < reported);
    let [empty, written, reported, unplugged] =
        [empty, written, reported, resident(pid)].map(|bytes| bytes / MIB);
    eprintln!(
        "resident MiB: {empty}, written {written}, reported {reported}, unplugged {unplugged}"
    );
}

/// A folder for sockets, and options that name them.
struct Places {
    folder: TempDir,
}

impl Places {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn run(
    share: impl FnOnce(&Places, &Path) -> (String, &'static str, Option<Helper>),
) -> io::Result<()> {
    let _one = guest::one_at_a_time();
    let folder = TempDir::new()?;
    let places = Places { folder };
    let (shared, own) = trees()?;
    let root = guest::root(&[
        "sh", "sleep", "mount", "umount", "dd", "rm", "ifconfig", "ping", "cat", "chroot",
    ]);
    let (fs, memory, _helper) = share(&places, shared.path());
    let (vsock, api) = (places.at("vsock"), places.at("api"));
    let listener = UnixListener::bind(places.at("vsock_77"))?;
    let transport = guest::transport();
    let options = [
        ["--rootfs", plain(root.path())],
        ["--memory", &format!("size=256M,hotplug_size=1G{memory}")],
        ["--balloon", "deflate_on_oom=on,free_page_reporting=on"],
        ["--fs", &fs],
        ["--net", "tap=fast0,mac=02:00:00:00:00:07"],
        [
            "--net",
            "tap=plain0,mtu=1400,offload_csum=off,offload_tso=off,offload_ufo=off",
        ],
        ["--vsock", &format!("cid=3,socket={}", vsock.display())],
        ["--api-socket", plain(&api)],
        ["--transport", &transport],
    ];
    let command = ["--", "/bin/sh", "-c", SCRIPT, "sh", WORK];
    let running = Podvmm::new(options.as_flattened().iter().chain(&command)).spawn();
    set_up("fast0", "10.77.0.1/24");
    set_up("plain0", "10.78.0.1/24");
    wait_until("vsock's socket", || vsock.exists());
    // Their callers are there before the guest is.
    streams(&vsock, &listener)?;
    frames()?;
    sizes(&api, running.pid());
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(
        outcome.stdout.lines().collect::<Vec<_>>(),
        TOLD,
        "{outcome:?}"
    );
    assert!(!vsock.exists(), "the socket is left behind");
    assert!(!links().contains("fast0") && !links().contains("plain0"));
    assert_eq!(manifest(shared.path())?, manifest(own.path())?);
    Ok(())
}

#[test]
fn all_devices_work_at_once() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        run(|_, shared| {
            let fs = format!("tag=tree,shared_dir={}", shared.display());
            (fs, "", None)
        })
        .unwrap();
    });
}

#[test]
fn all_devices_work_at_once_with_files_served_by_virtiofsd() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        run(|places, shared| {
            let socket = places.at("virtiofsd");
            let helper = virtiofsd(shared, &socket);
            let fs = format!("tag=tree,socket={}", socket.display());
            (fs, ",shared=on", Some(helper))
        })
        .unwrap();
    });
}
