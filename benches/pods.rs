//! What a pod costs by podvmm and by runc, with a containerd of its own: a container alone, as
//! `ctr run` makes it, and a pod of one container by the CRI. Time until it runs and until nothing
//! of it is left, and the memory and processor time it takes meanwhile. Needs root.
//!
//! `PODVMM_ROUNDS` says how often each is run (2). Results go to `target/pods.json`; with
//! `PODVMM_UPDATE_DOCS` set, the tables of docs/pods.md are written from them. Set `PODVMM_BIN` and
//! `PODVMM_SHIM` to binaries of the profile `release`.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use benches::process::{self, Stat, kernel_bytes};
use benches::report::{machine, mebibytes, median, milliseconds, save, update};
use serde_json::{Map, Value, json};
use tests::ctr::Container;
use tests::node::{self, Node, processes_with};
use tests::pod::Agent;
use tests::{containerd, guest, podvmm};

/// The phases in which the host waits for the guest.
const OF_GUEST: [&str; 6] = [
    "guest_us",
    "renewal_us",
    "network_us",
    "sandbox_us",
    "container_us",
    "start_us",
];

/// What is run, by what, in the order of the table's columns.
const COLUMNS: [(&str, &str); 4] = [
    ("ctr", "podvmm"),
    ("ctr", "runc"),
    ("cri", "podvmm"),
    ("cri", "runc"),
];

/// The rows of the table, by the names of their figures.
const ROWS: [(&str, &str); 22] = [
    ("started_us", "from request to container started"),
    ("pod_us", "– the pod, by RunPodSandbox"),
    ("shim_us", "– – start of the shim"),
    ("prepare_us", "– – what the shim prepares"),
    ("vmm_us", "– – start of podvmm, until the guest runs"),
    ("guest_us", "– – **the guest, until its agent answers**"),
    ("renewal_us", "– – **its randomness and time made its own**"),
    ("network_us", "– – **the guest's network**"),
    ("sandbox_us", "– – **the agent's sandbox**"),
    ("container_us", "– – **making the first container**"),
    ("start_us", "– – **starting it**"),
    ("host_us", "– – all of that but what is bold"),
    ("create_us", "– the container, by CreateContainer"),
    ("run_us", "– and StartContainer"),
    ("gone_us", "from request to nothing left"),
    ("shim_bytes", "resident: the shim"),
    ("vmm_bytes", "resident: podvmm without guest RAM"),
    ("ram_bytes", "resident: guest RAM"),
    ("agent_bytes", "resident in the guest: the agent"),
    ("kernel_bytes", "of the host's kernel, charged to the pod"),
    (
        "idle_vcpu_milli_cpus",
        "processor time of an idle pod: **the guest**",
    ),
    (
        "idle_rest_milli_cpus",
        "the same: the shim and the rest of podvmm",
    ),
];

const PATIENCE: Duration = Duration::from_secs(60);
/// How long an idle pod is watched.
const IDLE: Duration = Duration::from_secs(10);
/// Whose processor time is told apart.
const IDLERS: [&str; 2] = ["idle_vcpu_milli_cpus", "idle_rest_milli_cpus"];
/// Of proc_pid_stat(5), a second's: as many on every architecture we run on.
const TICKS: u64 = 100;

/// One round's figures of one column.
type Figures = Map<String, Value>;

fn main() {
    if !podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let rounds = std::env::var("PODVMM_ROUNDS").map_or(2, |rounds| {
        rounds.parse().expect("PODVMM_ROUNDS is a number")
    });
    let mut node = Node::start();
    let mut samples = COLUMNS.map(|_| Vec::new());
    // The first of each only warms what the others need as well, and makes the templates.
    for (how, runtime) in COLUMNS {
        measure(&mut node, how, runtime, 0);
    }
    for round in 1..=rounds {
        for (samples, (how, runtime)) in samples.iter_mut().zip(COLUMNS) {
            let figures = measure(&mut node, how, runtime, round);
            eprintln!("{how}, {runtime}: {}", Value::Object(figures.clone()));
            samples.push(figures);
        }
    }
    // The host is not compared: that is what the tests are for.
    drop(node);

    let sizes = [
        ("shim_file_bytes", containerd::shim().to_path_buf()),
        ("podvmm_file_bytes", podvmm::binary().to_path_buf()),
        ("agent_file_bytes", guest::folder().join("initramfs.cpio")),
    ];
    let sizes = sizes.map(|(name, path)| {
        let metadata = fs::metadata(path).expect("it was just run");
        (name, metadata.len())
    });
    let tables = format!(
        "Measured on {}; medians of {rounds} rounds.\n\n{}\n{}",
        machine(),
        costs(&samples),
        goals(&samples, &sizes)
    );
    println!("{tables}");
    let columns = COLUMNS.iter().zip(&samples).map(
        |((how, runtime), rounds)| json!({ "how": how, "runtime": runtime, "rounds": rounds }),
    );
    save(
        "pods",
        &json!({
            "machine": machine(),
            "columns": columns.collect::<Vec<_>>(),
            "sizes": sizes.iter().copied().collect::<std::collections::BTreeMap<_, _>>(),
        }),
    );
    if std::env::var_os("PODVMM_UPDATE_DOCS").is_some() {
        update("docs/pods.md", "pods", tables);
    }
}

fn measure(node: &mut Node, how: &str, runtime: &str, round: u32) -> Figures {
    node.handler = runtime.into();
    let name = format!("{how}-{runtime}-{round}");
    match how {
        "ctr" => alone(node, &name),
        _ => pod(node, &name),
    }
}

/// A container that `ctr run` makes.
fn alone(node: &Node, name: &str) -> Figures {
    let mut figures = Figures::new();
    let containerd = &node.containerd;
    let container = Container::new(node, name);
    let id = container.id();
    time(&mut figures, "started_us", || {
        container.start(containerd, &[], &["sleep", "1000"]);
    });
    let family = Family::of(node, id);
    family.measure(node, id, &mut figures);
    time(&mut figures, "gone_us", || {
        containerd.ctr_must(&["tasks", "rm", "--force", id]);
        containerd.ctr_must(&["containers", "rm", id]);
        family.await_end();
    });
    figures
}

/// A pod of one container, as the kubelet asks for it.
fn pod(node: &Node, name: &str) -> Figures {
    let mut figures = Figures::new();
    let config = node.pod_config(name);
    let container = node::container("main", &["sleep", "1000"]);
    let asked = Instant::now();
    let pod = time(&mut figures, "pod_us", || {
        node.run_pod_of(config, &node.handler)
            .expect("the pod runs")
    });
    let id = time(&mut figures, "create_us", || {
        let created = node.cri.create(&pod.id, &pod.config, &container);
        created.expect("the container can be made")
    });
    time(&mut figures, "run_us", || {
        node.cri.start(&id).expect("the container starts")
    });
    figures.insert("started_us".into(), microseconds(asked.elapsed()));
    let family = Family::of(node, &pod.id);
    family.measure(node, &pod.id, &mut figures);
    time(&mut figures, "gone_us", || {
        node.cri.stop_pod(&pod.id).expect("the pod ends");
        node.cri.remove_pod(&pod.id).expect("the pod has ended");
        family.await_end();
    });
    figures
}

fn time<T>(figures: &mut Figures, name: &str, action: impl FnOnce() -> T) -> T {
    let asked = Instant::now();
    let result = action();
    figures.insert(name.into(), microseconds(asked.elapsed()));
    result
}

fn microseconds(time: Duration) -> Value {
    let micros = time.as_micros();
    json!(u64::try_from(micros).expect("rounds take minutes"))
}

/// What a running pod is on the host.
#[derive(Debug)]
struct Family {
    shim: u32,
    vmm: Option<Vmm>,
}

#[derive(Debug)]
struct Vmm {
    pid: u32,
    /// With the sockets of podvmm.
    folder: PathBuf,
}

impl Family {
    fn of(node: &Node, id: &str) -> Self {
        let socket = node.containerd.socket().display().to_string();
        let shim = only(&processes_with(&["containerd-shim-", &socket, id]));
        let vmm = node.is_podvmm().then(|| {
            let pid = only(&processes_with(&["podvmm ", "--api-socket", id]));
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"));
            let arguments = arguments.expect("it runs");
            let mut arguments = arguments.split('\0');
            let socket = arguments.find(|argument| argument.contains(id));
            let folder = socket.and_then(|socket| Path::new(socket).parent());
            let folder = folder.expect("its socket is in a folder").to_path_buf();
            Vmm { pid, folder }
        });
        Self { shim, vmm }
    }

    /// Watches it while it does nothing, then weighs it.
    fn measure(&self, node: &Node, id: &str, figures: &mut Figures) {
        let before = self.ticks();
        thread::sleep(IDLE);
        for ((name, before), after) in IDLERS.into_iter().zip(before).zip(self.ticks()) {
            let idle = (after - before) * 1000 / (TICKS * IDLE.as_secs());
            if self.vmm.is_some() || name != "idle_vcpu_milli_cpus" {
                figures.insert(name.into(), json!(idle));
            }
        }
        let shim = process::resident_without(self.shim, &[]);
        figures.insert("shim_bytes".into(), json!(shim));
        let Some(vmm) = &self.vmm else {
            return;
        };
        let files = ["vmlinux", "initramfs.cpio"].map(|name| guest::folder().join(name));
        let ram = process::guest_ram(vmm.pid, &files);
        assert!(!ram.is_empty(), "podvmm has a guest's RAM");
        let without = process::resident_without(vmm.pid, &ram);
        let all = process::resident_without(vmm.pid, &[]);
        figures.insert("vmm_bytes".into(), json!(without));
        figures.insert("ram_bytes".into(), json!(all - without));
        if let Some(kernel) = kernel_bytes(vmm.pid) {
            figures.insert("kernel_bytes".into(), json!(kernel));
        }
        let agent = Agent::reach(&vmm.folder.join("vm.vsock"));
        let agent = agent.figure("podvmm_agent_resident_memory_bytes");
        figures.insert("agent_bytes".into(), json!(agent));
        let phases = phases(&node.containerd.log(), id).expect("the shim logs its phases");
        for (name, ms) in phases {
            let seconds = ms.as_f64().expect("phases are numbers") / 1e3;
            let took = Duration::from_secs_f64(seconds);
            figures.insert(format!("{name}_us"), microseconds(took));
        }
        let of = |name: &str| figures.get(name).and_then(Value::as_u64);
        let all = of("pod_us").or_else(|| of("started_us")).unwrap_or(0);
        let guest: u64 = OF_GUEST.into_iter().filter_map(of).sum();
        figures.insert("host_us".into(), json!(all.saturating_sub(guest)));
    }

    /// Processor time that vCPUs and all other threads have taken.
    fn ticks(&self) -> [u64; 2] {
        let vmm = self.vmm.as_ref().map(|vmm| vmm.pid);
        let mut ticks = [0; 2];
        for pid in [self.shim].into_iter().chain(vmm) {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it lives");
            for thread in threads.flatten() {
                // One that has just ended has not done much.
                let Some(stat) = Stat::of(&thread.path()) else {
                    continue;
                };
                let of_guest = stat.name.starts_with("vcpu");
                ticks[usize::from(!of_guest)] += stat.ticks;
            }
        }
        ticks
    }

    fn is_there(&self) -> bool {
        // A process that has ended counts as gone, even if its parent has not waited for it yet.
        let lives = |pid: u32| {
            let stat = Stat::of(Path::new(&format!("/proc/{pid}")));
            stat.is_some_and(|stat| stat.state != 'Z')
        };
        let vmm = self.vmm.as_ref();
        lives(self.shim) || vmm.is_some_and(|vmm| lives(vmm.pid) || vmm.folder.exists())
    }

    fn await_end(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.is_there() {
            assert!(Instant::now() < deadline, "it is still there: {self:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn only(pids: &[i32]) -> u32 {
    assert_eq!(pids.len(), 1, "there is one: {pids:?}");
    u32::try_from(pids[0]).expect("pids are positive")
}

/// What a pod's shim says of where its time went.
fn phases(log: &str, id: &str) -> Option<Map<String, Value>> {
    let pod = format!("pod=\"{id}\"");
    let mut lines = log.lines().filter(|line| line.contains(&pod));
    let line = lines.find(|line| line.contains("phases_ms"))?;
    let (_, text) = line.split_once("msg=\"")?;
    let (text, _) = text.split_once("}}")?;
    let text = format!("{}}}}}", text.replace('\\', ""));
    let phases: Value = serde_json::from_str(&text).ok()?;
    phases["phases_ms"].as_object().cloned()
}

/// The middle of a figure, in its unit; nothing if it was not measured.
fn middle(rounds: &[Figures], name: &str) -> Option<u64> {
    let values = rounds
        .iter()
        .filter_map(|figures| figures.get(name)?.as_u64());
    let values: Vec<_> = values.collect();
    (!values.is_empty()).then(|| median(&values))
}

fn text(value: u64, name: &str) -> String {
    if name.ends_with("_bytes") {
        return mebibytes(value);
    }
    if name.ends_with("_cpus") {
        return format!("{value} m");
    }
    let time = Duration::from_micros(value);
    if time.as_secs() < 1 {
        milliseconds(time)
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// What each column costs.
fn costs(samples: &[Vec<Figures>]) -> String {
    let mut table = String::from(
        "| | `ctr run`, podvmm | `ctr run`, runc | CRI pod, podvmm | CRI pod, runc |\n\
         |---|---|---|---|---|\n",
    );
    for (name, title) in ROWS {
        let cell = |rounds: &Vec<Figures>| {
            let value = middle(rounds, name);
            value.map_or(String::new(), |value| text(value, name))
        };
        let cells: Vec<_> = samples.iter().map(cell).collect();
        table.push_str(&format!("| {title} | {} |\n", cells.join(" | ")));
    }
    table
}

/// What is to be small, and how small it is to be.
fn goals(samples: &[Vec<Figures>], sizes: &[(&str, u64)]) -> String {
    let most = |name: &str| {
        let rounds = samples
            .iter()
            .zip(COLUMNS)
            .flat_map(|(rounds, (_, runtime))| rounds.iter().filter(move |_| runtime == "podvmm"));
        let values = rounds.filter_map(|figures| figures.get(name)?.as_u64());
        values.max().expect("podvmm was measured")
    };
    let mut rows = vec![
        ("resident: the shim", most("shim_bytes"), "8 MiB"),
        (
            "resident: podvmm without guest RAM",
            most("vmm_bytes"),
            "4 MiB",
        ),
        (
            "resident in the guest: the agent",
            most("agent_bytes"),
            "6 MiB",
        ),
    ];
    let titles = [
        ("file: the shim", ""),
        ("file: podvmm", "4 MiB"),
        ("file: the agent, as initramfs", "4 MiB"),
    ];
    for ((title, goal), (_, bytes)) in titles.into_iter().zip(sizes) {
        rows.push((title, *bytes, goal));
    }
    let mut table = String::from("| | most | goal |\n|---|---|---|\n");
    for (title, bytes, goal) in rows {
        table.push_str(&format!("| {title} | {} | {goal} |\n", mebibytes(bytes)));
    }
    table
}
