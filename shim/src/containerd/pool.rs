//! The pool: VMs that wait for pods, as many for each size as the configuration says.
//!
//! Each has a shim of its own, which waits with it, in a folder laid out as a pod's. `start` renames
//! the folder to its pod's place, so that no other `start` can take it, tells the shim which pod it
//! has become, and starts another shim that waits. A VM that no pod took for a long time, or that
//! no pod could go on with any more, ends by itself.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;

use crate::config::{Config, Size};
use crate::containerd::orders::Orders;
use crate::host::place::{self, Place, fnv1a, make_private};
use crate::pod::error::Error;
use crate::pod::teardown;
use crate::pod::waiting::{self, Waiting};
use crate::vm::template::{Stamp, Template};

/// How long the processors are left to the pod that made room in the pool.
const HOLD_OFF: Duration = Duration::from_secs(5);
/// How long a VM waits.
const IDLE: Duration = Duration::from_secs(3600);
/// The time between looks at whether a VM that waits is still wanted.
const CHECK: Duration = Duration::from_secs(5);
/// How long the two shims may take to talk.
const PATIENCE: Duration = Duration::from_secs(2);
/// The time between looks at how many VMs wait.
const PAUSE: Duration = Duration::from_millis(200);
/// The greatest length of a shim's orders, in bytes.
const MAX_ORDERS_LEN: u64 = 16 << 10;
const YES: &[u8] = b"yes\n";

/// The VMs of one configuration that wait for pods of one size.
#[derive(Debug)]
pub(crate) struct Pool {
    folder: PathBuf,
    /// How the names of the VMs' folders begin.
    prefix: String,
    wanted: usize,
    config: PathBuf,
    size: Size,
}

impl Pool {
    /// The pool for pods of the template. None if they need what no VM has that waits.
    pub(crate) fn of(path: &Path, config: &Config, template: &Template) -> Option<Self> {
        if config.pool == 0 || template.interfaces() != 1 {
            return None;
        }
        let template_hash = fnv1a(template.folder().as_os_str().as_encoded_bytes());
        Some(Self {
            folder: folder(path),
            prefix: format!("{template_hash:08x}-"),
            wanted: config.pool.into(),
            config: path.into(),
            size: template.size,
        })
    }

    fn failed(&self, source: io::Error) -> Error {
        let folder = self.folder.clone();
        Error::Pool { folder, source }
    }

    /// The folders of those that wait or will, in order.
    fn members(&self) -> Vec<PathBuf> {
        let is_ours = |path: &PathBuf| name(path).starts_with(&self.prefix);
        members(&self.folder).into_iter().filter(is_ours).collect()
    }

    /// The folders of VMs that wait.
    fn ready(&self) -> impl Iterator<Item = PathBuf> {
        let waits = |folder: &PathBuf| Place::at(folder).shim().exists();
        self.members().into_iter().filter(waits)
    }

    /// Whether one is not too many.
    fn has(&self, member: &Path) -> bool {
        self.members()
            .iter()
            .take(self.wanted)
            .any(|it| it == member)
    }

    /// Makes the folder of one that waits that of a pod. Whether there was one.
    pub(crate) fn take(&self, place: &Place) -> bool {
        // If the rename fails, another process was faster.
        self.ready()
            .any(|folder| fs::rename(folder, place.path()).is_ok())
    }

    /// Starts as many that are to wait as are missing.
    pub(crate) fn fill(&self) -> io::Result<()> {
        // Members of other sizes, too: perhaps no pod ever asks for those again.
        for member in members(&self.folder) {
            if !lives(&member) {
                leave(&member);
            }
        }
        let program = std::env::current_exe()?;
        for _ in self.members().len()..self.wanted {
            Command::new(&program)
                .args(["-memory", &self.size.memory_mib.to_string(), "-config"])
                .arg(&self.config)
                .arg("wait")
                // One heap for all threads: they are many, and each does little.
                .env("MALLOC_ARENA_MAX", "1")
                .current_dir("/")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
        }
        Ok(())
    }

    /// Makes the folder of one more. None if there are enough.
    fn enroll(&self) -> io::Result<Option<PathBuf>> {
        make_private(&self.folder)?;
        // The others' turn comes when this is dropped.
        let lock = File::open(&self.folder)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        if self.members().len() >= self.wanted {
            return Ok(None);
        }
        let name = format!("{}{}", self.prefix, std::process::id());
        let folder = self.folder.join(name);
        make_private(&folder)?;
        Ok(Some(folder))
    }
}

/// Where the VMs of a configuration wait.
fn folder(config: &Path) -> PathBuf {
    let hash = fnv1a(config.as_os_str().as_encoded_bytes());
    Path::new(place::ROOT)
        .join("pool")
        .join(format!("{hash:08x}"))
}

fn members(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let folders = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    let mut members: Vec<_> = folders
        .filter(|path| !name(path).starts_with('.'))
        .collect();
    members.sort();
    members
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Whether the shim of a member is there, whose number its name ends with.
fn lives(member: &Path) -> bool {
    let name = name(member);
    let pid = name.rsplit('-').next().unwrap_or_default();
    Path::new("/proc").join(pid).exists()
}

/// Tells the shim in `place`, which waited, which pod it is for.
pub(crate) fn hand_over(place: &Place, orders: &Orders) -> io::Result<()> {
    let mut stream = UnixStream::connect(place.shim())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(orders)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer == YES {
        Ok(())
    } else {
        Err(io::Error::other("the shim that waited gives no answer"))
    }
}

/// A shim that is to be a pod's.
pub(crate) struct Called {
    pub(crate) orders: Orders,
    pub(crate) listener: UnixListener,
    pub(crate) waiting: Waiting,
}

/// Waits in the pool of the configuration at `path`, with so much memory. None if there is no need
/// to, or no longer.
pub(crate) fn wait(path: &Path, memory_mib: u64) -> Result<Option<Called>, Error> {
    let Some((config, template, pool)) = wanted(path, memory_mib) else {
        return Ok(None);
    };
    let failed = |source| pool.failed(source);
    let Some(folder) = pool.enroll().map_err(failed)? else {
        return Ok(None);
    };
    let is_wanted = |waiting: &Waiting| {
        let now = wanted(path, memory_mib);
        now.is_some_and(|(now, template, pool)| {
            // What its share is held to does not make another template.
            now.fs_rates() == config.fs_rates()
                && template == waiting.template
                && template.is_ready()
                && pool.has(&folder)
        })
    };
    let waits = || {
        thread::sleep(HOLD_OFF);
        if !template.await_made(config.agent_timeout(), || folder.exists()) {
            return Ok(None);
        }
        let shim = Stamp::of_program().map_err(failed)?;
        let place = Place::at(&folder);
        let waiting = Waiting::make(&config, template, &place)?;
        let listener = UnixListener::bind(place.shim()).map_err(failed)?;
        let since = Instant::now();
        loop {
            let taken = !folder.exists();
            if comes(&listener).map_err(failed)? {
                match answer(&listener) {
                    Ok(orders) => {
                        return Ok(Some(Called {
                            orders,
                            listener,
                            waiting,
                        }));
                    }
                    Err(error) => log::debug!("who came is no pod: {error}"),
                }
            } else if taken || waiting.vm.life.has_ended() {
                return Ok(None);
            } else if since.elapsed() > IDLE || !shim.holds() || !is_wanted(&waiting) {
                // `start` may have taken the folder just now; then it still connects.
                if leave(&folder) {
                    return Ok(None);
                }
            }
        }
    };
    let called = waits();
    if !matches!(called, Ok(Some(_))) {
        leave(&folder);
    }
    called
}

fn wanted(path: &Path, memory_mib: u64) -> Option<(Config, Template, Pool)> {
    let config = Config::read(path).ok()?;
    let size = Size {
        vcpus: 1,
        memory_mib,
    };
    let template = Template::for_pod(&config, size, 1)?;
    let pool = Pool::of(path, &config, &template)?;
    Some((config, template, pool))
}

/// Takes a folder out of its pool, with the VM in it, unless it is a pod's by now.
fn leave(folder: &Path) -> bool {
    let gone = folder.with_file_name(format!(".{}", name(folder)));
    let left = fs::rename(folder, &gone).is_ok();
    if left {
        teardown::pod(&Place::at(&gone));
    }
    left
}

/// Waits for a caller, a while.
fn comes(listener: &UnixListener) -> io::Result<bool> {
    let timeout = Timespec {
        tv_sec: CHECK.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let mut polled = [PollFd::new(listener, PollFlags::IN)];
    let count = retry_on_intr(|| poll(&mut polled, Some(&timeout)))?;
    Ok(count > 0)
}

/// Hears which pod this shim is for.
fn answer(listener: &UnixListener) -> io::Result<Orders> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    let mut reader = BufReader::new(stream).take(MAX_ORDERS_LEN);
    reader.read_line(&mut line)?;
    let orders = serde_json::from_str(&line)?;
    reader.get_mut().get_mut().write_all(YES)?;
    Ok(orders)
}

/// Makes the pool for pods without limits what the configuration at `path` says, and returns how
/// many VMs wait in it.
pub(crate) fn adjust(path: &Path, config: &Config) -> Result<usize, Error> {
    let template = if config.pool == 0 {
        None
    } else {
        Some(waiting::template(config)?)
    };
    let Some(pool) = template.and_then(|template| Pool::of(path, config, &template)) else {
        let folder = folder(path);
        for member in members(&folder) {
            leave(&member);
        }
        // Unless a VM joins at this moment, the pool is empty.
        let above = folder.ancestors().take(2);
        above.for_each(|folder| drop(fs::remove_dir(folder)));
        return Ok(0);
    };
    pool.fill().map_err(|source| pool.failed(source))?;
    let deadline = Instant::now() + config.agent_timeout();
    loop {
        let count = pool.ready().count();
        if count >= pool.wanted || Instant::now() > deadline {
            return Ok(count);
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn pool(wanted: usize) -> (TempDir, Pool) {
        let folder = tempfile::tempdir().unwrap();
        let pool = Pool {
            folder: folder.path().join("pool"),
            prefix: "0123abcd-".into(),
            wanted,
            config: "/config.toml".into(),
            size: Size {
                vcpus: 1,
                memory_mib: 576,
            },
        };
        (folder, pool)
    }

    #[test]
    fn there_are_no_more_than_wanted_and_each_is_taken_once() {
        let (folder, mut pool) = pool(1);
        let place = |name: &str| Place::at(&folder.path().join(name));
        assert!(!pool.take(&place("pod")));
        let member = pool.enroll().unwrap().unwrap();
        assert_eq!(pool.enroll().unwrap(), None);
        assert!(!pool.take(&place("pod")), "it is not ready");
        let _listener = UnixListener::bind(Place::at(&member).shim()).unwrap();
        assert!(pool.has(&member) && pool.take(&place("pod")));
        assert!(place("pod").shim().exists());
        assert!(!leave(&member), "it is a pod's");
        assert!(!pool.take(&place("other")));

        let member = pool.enroll().unwrap().unwrap();
        pool.wanted = 0;
        assert!(!pool.has(&member));
        assert!(leave(&member) && members(&pool.folder).is_empty());
    }

    #[test]
    fn another_sizes_vms_are_not_for_this_pod() {
        let (folder, mut pool) = pool(1);
        let member = pool.enroll().unwrap().unwrap();
        let _listener = UnixListener::bind(Place::at(&member).shim()).unwrap();
        pool.prefix = "4567cdef-".into();
        assert!(!pool.take(&Place::at(&folder.path().join("pod"))));
        assert!(pool.enroll().unwrap().is_some());
    }

    #[test]
    fn who_died_in_the_pool_is_taken_away_whatever_the_size() {
        let (_folder, mut pool) = pool(1);
        let living = pool.enroll().unwrap().unwrap();
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let dead = ["0123abcd", "4567cdef"].map(|size| format!("{size}-{}", child.id()));
        for name in dead {
            make_private(&pool.folder.join(name)).unwrap();
        }
        pool.wanted = 0;
        pool.fill().unwrap();
        assert_eq!(members(&pool.folder), [living]);
    }

    #[test]
    fn a_shim_that_waits_hears_whose_it_is() {
        let (folder, _) = pool(1);
        let place = Place::at(folder.path());
        let listener = UnixListener::bind(place.shim()).unwrap();
        let words = "-namespace default -address /a.sock -id demo start";
        let words = words.split(' ').map(Into::into);
        let arguments = crate::containerd::arguments::Arguments::parse(words).unwrap();
        let orders = Orders::new(&arguments, Path::new("/bundle"), "7".into());
        let told = thread::scope(|scope| {
            let heard = scope.spawn(|| answer(&listener).unwrap());
            hand_over(&place, &orders).unwrap();
            heard.join().unwrap()
        });
        assert_eq!(told, orders);
        for nonsense in [&b""[..], b"{}\n", &[b'{'; 20 << 10]] {
            let mut stream = UnixStream::connect(place.shim()).unwrap();
            thread::scope(|scope| {
                let heard = scope.spawn(|| answer(&listener).unwrap_err());
                // The thread that listens may have read enough before the end.
                let _ = stream.write_all(nonsense);
                drop(stream);
                heard.join().unwrap();
            });
        }
        drop(listener);
        hand_over(&place, &orders).unwrap_err();
    }
}
