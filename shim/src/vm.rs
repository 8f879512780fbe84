//! The pod's VM: a podvmm process of the shim's, in the pod's network namespace, driven over HTTP.

mod output;
pub(crate) mod template;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use api::http::{Client, ClientError};
use api::{
    BalloonConfig, ByteSize, ConfigError, CpuCount, CpusConfig, DiskConfig, FsConfig, MemoryConfig,
    NetConfig, Output, PayloadConfig, Resize, Restore, Snapshot, VmConfig, VsockConfig,
};
use protocol::contract::{POD_PARAMETER, SHARE_TAG};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use serde_json::json;

use self::output::{Lines, log_lines};
use crate::config::{Config, Jail, Size};
use crate::host::labels::Labels;
use crate::host::network::{self, Link, Settings};
use crate::host::place::{Place, make_private};
use crate::host::process::{Process, cpu_usec};
use crate::host::record::{Record, start_of};
use crate::vm::template::{Claim, Stamp, Template, Way};

const MIB: u64 = 1 << 20;
/// How long podvmm may take to open its socket.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the news of podvmm's end may take behind that of its socket's.
const NEWS: Duration = Duration::from_millis(100);
const STACK: usize = 256 << 10;
/// The vsock address of the guest.
const CID: u32 = 3;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("start {}", .path.display())]
    Start { path: PathBuf, source: io::Error },
    #[error("podvmm ended before it answered; its reason is in the log above")]
    Ended,
    #[error("podvmm was killed")]
    Killed,
    #[error("podvmm: {act}")]
    Api {
        act: &'static str,
        source: ClientError,
    },
    #[error("describe the VM")]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Network(#[from] network::Error),
    #[error("write down what is to be cleaned up")]
    Record(#[source] io::Error),
    #[error("make the template of what podvmm wrote")]
    Template(#[source] io::Error),
    #[error("watch podvmm")]
    Watch(#[source] io::Error),
    #[error("start a thread")]
    Thread(#[source] io::Error),
}

/// Whether the VM lives, and what waits for its end.
#[derive(Debug, Default)]
pub(crate) struct Life {
    end: Mutex<Option<End>>,
    ended: Condvar,
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The VM was killed by this shim, by another process, or by the kernel of a host that is out
    /// of memory.
    Killed,
    /// The VM ended by itself.
    Left,
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().expect("a panic ends the process")
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().is_some()
    }

    /// Whether it was killed, of which this may hear a little late.
    fn was_killed(&self) -> bool {
        self.end_within(NEWS) == Some(End::Killed)
    }

    /// Whether it has ended, or does so in time.
    pub(crate) fn ends_within(&self, patience: Duration) -> bool {
        self.end_within(patience).is_some()
    }

    fn end_within(&self, patience: Duration) -> Option<End> {
        let end = self
            .ended
            .wait_timeout_while(self.lock(), patience, |end| end.is_none());
        *end.expect("a panic ends the process").0
    }

    pub(crate) fn wait(&self) {
        let mut end = self.lock();
        while end.is_none() {
            end = self.ended.wait(end).expect("a panic ends the process");
        }
    }

    fn end(&self, end: End) {
        *self.lock() = Some(end);
        self.ended.notify_all();
    }
}

/// How a VM came to run.
#[derive(Debug)]
pub(crate) enum Start {
    /// The VM booted.
    Booted,
    /// The VM boots, and is to become a template.
    Model(Claim),
    /// The VM is restored from this snapshot of a template.
    Clone(Stamp),
}

/// A running VM. Dropping it does not end it: [`Vm::kill`] does.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) start: Start,
    /// The VM's size at first.
    pub(crate) size: Size,
    pid: u32,
    process: Process,
    api: PathBuf,
    pub(crate) life: Arc<Life>,
    /// The address of the guest's interface that waits for an interface of the host's.
    pub(crate) spare: Option<String>,
}

/// What a VM is made from.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a Config,
    pub(crate) place: &'a Place,
    pub(crate) size: Size,
    /// The template it can be restored from, or become.
    pub(crate) template: Option<&'a Template>,
    /// The path of the pod's network namespace; without one a new one is made.
    pub(crate) network: Option<&'a Path>,
    pub(crate) labels: Labels,
}

impl Vm {
    /// Starts podvmm and has it restore the VM from its template, or boot one. What the guest's network is
    /// to be is returned too; `record` is told of what would outlive the shim.
    pub(crate) fn start(plan: &Plan<'_>, record: &mut Record) -> Result<(Self, Settings), Error> {
        let life = Arc::new(Life::default());
        let (born, birth) = sync_channel(1);
        make_private(&plan.place.vm()).map_err(Error::Record)?;
        plan.labels.give(&plan.place.vm());
        let patience = plan.config.agent_timeout() / 2;
        let way = plan.template.map_or(Way::Boot, |it| it.way(patience));
        let jail = jail(plan, &way);
        let (podvmm, api, network, ends) = (
            plan.config.podvmm.clone(),
            plan.place.api(),
            plan.network.map(Path::to_path_buf),
            Arc::clone(&life),
        );
        record.network.clone_from(&network);
        record.write(plan.place).map_err(Error::Record)?;
        // The thread lives as long as the VM: when it goes, or the shim, the VM is killed.
        let watch = move || {
            let started = spawn(&podvmm, &api, &jail, network.as_deref());
            let (child, started) = match started {
                Ok((mut child, links, settings)) => {
                    let pid = child.id();
                    let process = Process::open(pid).map_err(Error::Watch);
                    if process.is_err() {
                        // The shim does not keep a VMM that it cannot watch.
                        let _ = child.kill();
                    }
                    let started = process.map(|process| (pid, process, links, settings));
                    (Some(child), started)
                }
                Err(error) => (None, Err(error)),
            };
            // The thread that asked for it waits for it.
            let _ = born.send(started);
            ends.end(child.map_or(End::Left, watch));
        };
        let thread = thread::Builder::new().name("vm".into()).stack_size(STACK);
        thread.spawn(watch).map_err(Error::Thread)?;
        let (pid, process, links, settings) = birth.recv().map_err(|_| Error::Ended)??;
        record.vmm = start_of(pid).map(|started| (pid, started));
        let spare = links.first().map(|link| link.mac.clone());
        let mut vm = Self {
            start: Start::Booted,
            size: plan.size,
            pid,
            process,
            api: plan.place.api(),
            life,
            spare: spare.filter(|_| plan.network.is_none()),
        };
        let made = record
            .write(plan.place)
            .map_err(Error::Record)
            .and_then(|()| vm.restore_or_boot(plan, way, links));
        match made {
            Ok(()) => Ok((vm, settings)),
            Err(_) if vm.fail() => Err(Error::Killed),
            Err(error) => Err(error),
        }
    }

    /// Restores the VM if there is a template that fits, or else boots it.
    fn restore_or_boot(
        &mut self,
        plan: &Plan<'_>,
        way: Way,
        links: Vec<Link>,
    ) -> Result<(), Error> {
        let mut client = self.client()?;
        // One may have come or gone since they were counted.
        let same = |template: &&Template| template.interfaces() == links.len();
        match (way, plan.template.filter(same)) {
            (Way::Clone(snapshot), Some(template)) => {
                (self.start, self.size) = (Start::Clone(snapshot), template.size);
                return restore(&mut client, template, plan, links);
            }
            (Way::Model(claim), Some(template)) => {
                (self.start, self.size) = (Start::Model(claim), template.size);
            }
            (Way::Boot, _) | (_, None) => {}
        }
        let vm = VmConfig {
            fs: vec![pods_share(plan)],
            vsock: Some(pods_vsock(plan.place)),
            ..definition(plan.config, self.size)?
        };
        client.create(&vm).map_err(failed("make the VM"))?;
        for link in links {
            let added = client.add_net(&net(link)?);
            added.map_err(failed("add a network"))?;
        }
        client.boot().map_err(failed("boot the VM"))
    }

    /// Takes a snapshot of the VM, and lets it go on.
    pub(crate) fn snapshot(&self, folder: &Path) -> Result<(), Error> {
        let snapshot = Snapshot {
            folder: folder.into(),
            incremental: false,
        };
        self.pause()?;
        let written = self.client()?.snapshot(&snapshot);
        // One that stands still would be waited for in vain.
        self.resume().inspect_err(|_| self.process.kill())?;
        written.map_err(failed("take a snapshot of the VM"))
    }

    /// Has it stand still. What waits for the guest meanwhile waits for [`Vm::resume`].
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.client()?.pause().map_err(failed("pause the VM"))
    }

    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.client()?.resume().map_err(failed("resume the VM"))
    }

    /// Notes that the folder that the VM was made in has another path now.
    pub(crate) fn moved(&mut self, place: &Place) {
        self.api = place.api();
    }

    /// Gives its interface that waits for one of the host's the only one in `pods`, a network
    /// namespace.
    pub(crate) fn join(&mut self, pods: &Path) -> Result<Settings, Error> {
        let own = PathBuf::from(format!("/proc/{}/ns/net", self.pid));
        let settings = network::connect_waiting(&own, pods)?;
        self.spare = None;
        Ok(settings)
    }

    /// Connects to podvmm, which may still be starting.
    fn client(&self) -> Result<Client, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.api) {
                Ok(client) => return Ok(client),
                Err(_) if self.life.has_ended() => return Err(Error::Ended),
                Err(source) if Instant::now() > deadline => {
                    let act = "open its socket";
                    return Err(Error::Api { act, source });
                }
                Err(_) => thread::sleep(Duration::from_micros(300)),
            }
        }
    }

    /// Tells podvmm how large the VM is to be. The guest follows when it can.
    pub(crate) fn resize(&self, size: Size) -> Result<(), Error> {
        let sizes = Resize {
            desired_vcpus: Some(vcpus(size.vcpus)?),
            desired_ram: Some(ByteSize(size.memory_mib * MIB)),
            ..Resize::default()
        };
        let resized = self.client()?.resize(sizes);
        resized.map_err(failed("resize the VM"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// How much of the host's processors' time it has used, in microseconds.
    pub(crate) fn cpu_usec(&self) -> u64 {
        // What cannot be told is no bound.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        stat.ok()
            .and_then(|stat| cpu_usec(&stat))
            .unwrap_or(u64::MAX)
    }

    /// Ends it as one that does not work. Returns whether it had been killed before.
    pub(crate) fn fail(&self) -> bool {
        let was_killed = self.life.was_killed();
        self.kill();
        was_killed
    }

    /// Ends it at once, and waits for that.
    pub(crate) fn kill(&self) {
        self.process.kill();
        self.life.wait();
    }
}

fn failed(act: &'static str) -> impl FnOnce(ClientError) -> Error {
    move |source| Error::Api { act, source }
}

/// Restores the VM from a template, with the pod's own share and sockets.
fn restore(
    client: &mut Client,
    template: &Template,
    plan: &Plan<'_>,
    links: Vec<Link>,
) -> Result<(), Error> {
    let mut restore = Restore::new(template.folder().into());
    restore.patch["fs"] = json!([pods_share(plan)]);
    restore.patch["vsock"] = json!(pods_vsock(plan.place));
    restore.patch["net"] = links
        .iter()
        .map(|link| json!({ "mac": link.mac }))
        .collect();
    restore.fds = links.into_iter().map(|link| link.tap).collect();
    restore.resume = true;
    client.restore(&restore).map_err(failed("restore the VM"))
}

fn net(link: Link) -> Result<NetConfig, Error> {
    let mut net = NetConfig::on(vec![link.tap]);
    net.mac = link.mac.parse()?;
    Ok(net)
}

fn pods_share(plan: &Plan<'_>) -> FsConfig {
    FsConfig {
        tag: SHARE_TAG.into(),
        shared_dir: Some(plan.place.shared()),
        rate_limiter_config: plan.config.fs_rates(),
        ..FsConfig::default()
    }
}

fn pods_vsock(place: &Place) -> VsockConfig {
    VsockConfig {
        cid: CID,
        socket: place.vsock(),
        ..VsockConfig::default()
    }
}

fn vcpus(count: u8) -> Result<CpuCount, ConfigError> {
    Ok(CpuCount::try_from(u32::from(count))?)
}

/// What all pods' VMs of a size have in common.
pub(crate) fn definition(config: &Config, size: Size) -> Result<VmConfig, ConfigError> {
    let most = config.most();
    // A kernel that has failed may hold what all of the pod waits for, so it is not to go on.
    let mut cmdline = format!("{POD_PARAMETER} quiet oops=panic panic=1 reboot=k console=ttyS0");
    let mut disks = Vec::new();
    if let Some(image) = &config.image {
        disks.push(DiskConfig {
            path: image.clone(),
            readonly: true,
            ..DiskConfig::default()
        });
        cmdline.push_str(" root=/dev/vda ro");
    }
    if !config.kernel_params.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&config.kernel_params);
    }
    // podvmm rounds it to what the guest can plug.
    let hotplug_mib = most.memory_mib.saturating_sub(size.memory_mib);
    Ok(VmConfig {
        payload: PayloadConfig {
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            cmdline,
            agent_policy: config.policy.as_ref().map(ToString::to_string),
            ..PayloadConfig::default()
        },
        cpus: CpusConfig::new(vcpus(size.vcpus)?, vcpus(most.vcpus.max(size.vcpus))?)?,
        memory: MemoryConfig {
            size: ByteSize(size.memory_mib * MIB).try_into()?,
            hotplug_size: ByteSize(hotplug_mib.next_multiple_of(128) * MIB),
            ..MemoryConfig::default()
        },
        balloon: Some(BalloonConfig {
            deflate_on_oom: true,
            free_page_reporting: true,
            ..BalloonConfig::default()
        }),
        disks,
        serial: Output::Tty,
        transport: config.transport,
        ..VmConfig::default()
    })
}

/// The arguments by which podvmm sees nothing of the host but what this VM needs.
fn jail(plan: &Plan<'_>, way: &Way) -> Vec<OsString> {
    let (config, place) = (plan.config, plan.place);
    let word = match config.jail {
        Jail::Off => return Vec::new(),
        Jail::On => "on",
        Jail::Required => "required",
    };
    let mut arguments = vec![OsString::from("--jail"), word.into()];
    if let Some(user) = config.user() {
        arguments.extend(["--jail-user".into(), user.to_string().into()]);
    }
    for label in plan.labels.for_podvmm() {
        arguments.extend(["--jail-label".into(), label.into()]);
    }
    let mut path = |access: &str, path: &Path| {
        let mut value = OsString::from(access);
        value.push("=");
        value.push(path);
        arguments.extend(["--jail-path".into(), value]);
    };
    let files = [
        Some(&config.kernel),
        config.initramfs.as_ref(),
        config.image.as_ref(),
    ];
    files
        .into_iter()
        .flatten()
        .for_each(|file| path("read", file));
    path("sockets", &place.vm());
    path("write", &place.shared());
    match way {
        Way::Clone(_) => {
            let folder = plan.template.map(Template::folder);
            folder.into_iter().for_each(|folder| path("read", folder));
        }
        Way::Model(claim) => path("write", &claim.making()),
        Way::Boot => {}
    }
    arguments
}

/// Starts podvmm in the pod's network namespace, with its interfaces connected to taps. If it has a `jail`, it
/// is the first process of a pid namespace.
fn spawn(
    podvmm: &Path,
    api: &Path,
    jail: &[OsString],
    network: Option<&Path>,
) -> Result<(Child, Vec<Link>, Settings), Error> {
    network::enter(network)?;
    let (links, settings) = match network {
        Some(_) => network::connect()?,
        None => (vec![network::prepare()?], Settings::default()),
    };
    let mut command = Command::new(podvmm);
    command
        .arg("--api-socket")
        .arg(api)
        .args(jail)
        .env_remove("MALLOC_ARENA_MAX")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let die_with_shim = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(die_with_shim) };
    let spawned = match jail {
        [] => command.spawn(),
        _ => in_new_pid_namespace(|| command.spawn()),
    };
    let child = spawned.map_err(|source| Error::Start {
        path: podvmm.into(),
        source,
    })?;
    Ok((child, links, settings))
}

/// Starts a process that is the first of a pid namespace. This thread's next ones are of its own again, so
/// that it can start threads.
fn in_new_pid_namespace(start: impl FnOnce() -> io::Result<Child>) -> io::Result<Child> {
    let own = File::open("/proc/self/ns/pid")?;
    // SAFETY: it changes nothing but the pid namespace of this thread's children.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    let child = start();
    let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID));
    let mut child = child?;
    if let Err(errno) = back {
        // The shim does not keep a VMM whose thread can do nothing more for it.
        let _ = child.kill();
        let _ = child.wait();
        return Err(errno.into());
    }
    Ok(child)
}

/// Puts what podvmm and the guest say into the log, and waits for the end.
fn watch(mut child: Child) -> End {
    let guest = child.stdout.take().map(|lines| log_lines("guest", lines));
    let vmm = child.stderr.take().map(|lines| log_lines("podvmm", lines));
    let end = match child.wait() {
        Ok(status) if status.signal() == Some(libc::SIGKILL) => {
            log::debug!("podvmm was killed");
            End::Killed
        }
        Ok(status) => {
            log::info!("podvmm ended: {status}");
            End::Left
        }
        Err(error) => {
            log::error!("wait for podvmm: {error}");
            End::Left
        }
    };
    let lines = [guest, vmm].into_iter().flatten().flatten();
    lines.for_each(Lines::end);
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_has_ended_though_its_console_is_held_open() {
        let mut command = Command::new("sh");
        let command = command
            .args(["-c", "sleep 8 & exit 1"])
            .stdout(Stdio::piped());
        let began = Instant::now();
        assert_eq!(watch(command.spawn().unwrap()), End::Left);
        assert!(began.elapsed() < Duration::from_secs(6));
    }

    #[test]
    fn who_killed_a_vm_did_not_end_it_by_itself() {
        for (line, killed) in [("kill -9 $$", true), ("exit 1", false)] {
            let mut command = Command::new("sh");
            let command = command.args(["-c", line]).stdout(Stdio::piped());
            let life = Life::default();
            assert!(!life.has_ended() && !life.was_killed());
            life.end(watch(command.spawn().unwrap()));
            assert_eq!((life.has_ended(), life.was_killed()), (true, killed));
            assert!(life.ends_within(Duration::ZERO));
        }
    }
}
