//! Lies in answer to what the shim asks of a pod that runs.

use std::fs::File;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use prost::Message;
use protocol::agent::messages::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData,
    MemoryStats, PidsStats, StatsContainerResponse, ThrottlingData,
};
use protocol::containerd::figures::{self, Metrics};
use protocol::containerd::task::{Empty, ResizePtyRequest, StatsResponse, UpdateTaskRequest};
use serde_json::json;

use crate::pod::{DEADLINE, Holds, Pod, fifo};

/// Lies by which no call can succeed, and how many they are.
const FAILING: &str = "garbage,mistyped,deep,large,longer,refused,verbose";
/// Lies beside a true answer, which the shim finds all the same.
const HARMLESS: &str = "others,twice,kinds,honest";

/// The lies above, in answer to these methods.
fn lies(methods: &[&str]) -> String {
    let rules = methods
        .iter()
        .map(|method| format!("{method}={FAILING},{HARMLESS}"));
    rules.collect::<Vec<_>>().join(";")
}

/// How often a call fails whose answers are those of [`lies`], and then succeeds.
fn fails_and_recovers<T>(what: &str, mut call: impl FnMut() -> Result<T, String>) {
    for lie in FAILING.split(',') {
        let failed = call().err();
        assert!(failed.is_some(), "{what}: {lie}");
    }
    for lie in HARMLESS.split(',') {
        let failed = call().err();
        assert_eq!(failed, None, "{what}: {lie}");
    }
}

pub(crate) fn of_orders() {
    let methods = [
        "StatsContainer",
        "UpdateContainer",
        "PauseContainer",
        "TtyWinResize",
        "OnlineCPUMem",
        "SignalProcess",
    ];
    let pod = Pod::running("orders", &lies(&methods));
    let before = pod.holds();
    let id = pod.id.clone();
    fails_and_recovers("Stats", || stats(&pod));
    let mut memory = 1 << 30;
    fails_and_recovers("Update", || {
        memory -= 1 << 20;
        update(&pod, &json!({"memory": {"limit": memory}}))
    });
    let mut cpus = 1;
    fails_and_recovers("Update of CPUs", || {
        cpus += 1;
        update(
            &pod,
            &json!({"cpu": {"quota": cpus * 100_000, "period": 100_000}}),
        )
    });
    fails_and_recovers("ResizePty", || resize_terminal(&pod, DEADLINE));
    fails_and_recovers("Kill", || pod.kill(&id, "", 15));
    fails_and_recovers("Pause", || {
        let paused = pod.ask::<Empty>("Pause", &pod.process(&id, ""));
        if paused.is_ok() {
            let _: Empty = pod.ask("Resume", &pod.process(&id, "")).unwrap();
        }
        paused
    });
    stays_small("orders", &pod, before);
    pod.end();
}

pub(crate) fn of_containers() {
    let methods = ["CreateContainer", "StartContainer", "ExecProcess"];
    let all = lies(&methods).replace("Container=", "Container=honest,");
    let pod = Pod::running("containers", &all);
    let before = pod.holds();
    let mut number = 0;
    fails_and_recovers("Create", || {
        number += 1;
        let id = format!("c{number}");
        let created = pod.create(&id);
        if created.is_ok() {
            pod.delete(&id, "").unwrap();
        }
        created
    });
    fails_and_recovers("Start", || {
        number += 1;
        let id = format!("c{number}");
        pod.create(&id).unwrap();
        let started = pod.begin(&id, "");
        if started.is_ok() {
            pod.kill(&id, "", 9).unwrap();
        }
        let status = pod.wait(&id, "", DEADLINE);
        assert_eq!(status, if started.is_ok() { 137 } else { 127 });
        pod.delete(&id, "").unwrap();
        started
    });
    fails_and_recovers("Exec", || {
        number += 1;
        let exec = format!("exit{number}");
        let started = pod.exec(&exec, ["", ""]);
        if started.is_ok() {
            pod.wait(&pod.id, &exec, DEADLINE);
        }
        pod.delete(&pod.id, &exec).unwrap();
        started
    });
    stays_small("containers", &pod, before);
    pod.end();
}

/// What is wrong with a container's removal costs nothing on the host.
pub(crate) fn of_removals() {
    let pod = Pod::running(
        "removals",
        &format!("RemoveContainer={FAILING},{HARMLESS},never"),
    );
    let count = FAILING.split(',').chain(HARMLESS.split(',')).count();
    for number in 0..=count {
        let id = format!("c{number}");
        pod.create(&id).unwrap();
        pod.delete(&id, "").unwrap();
    }
    pod.end();
}

/// Streams with lies end, and their processes with them.
pub(crate) fn of_streams() {
    let pod = Pod::running(
        "streams",
        &lies(&["ReadStdout", "WriteStdin"])
            .replace("ReadStdout=", "ReadStdout=honest,bytes:100000,bytes:32769,"),
    );
    let before = pod.holds();
    let (input, output) = (pod.folder().join("in"), pod.folder().join("out"));
    drain(fifo(&output));
    let mut feed = fifo(&input);
    for number in 0..14 {
        feed.write_all(b"some input").unwrap();
        let exec = format!("exit{number}");
        let streams = [&input, &output].map(|path| path.to_str().unwrap());
        pod.exec(&exec, streams).unwrap();
        pod.wait(&pod.id, &exec, DEADLINE);
        pod.delete(&pod.id, &exec).unwrap();
    }
    stays_small("streams", &pod, before);
    pod.end();
}

/// Reads all that comes.
pub(crate) fn drain(mut output: File) {
    thread::spawn(move || io::copy(&mut output, &mut io::sink()));
}

/// The status of a process is one that a process can have.
pub(crate) fn of_statuses() {
    let said: [(i64, u32); 8] = [
        (-1, 255),
        (4_000_000_000, 255),
        (i64::from(i32::MAX), 255),
        (i64::MIN, 0),
        (256, 255),
        (255, 255),
        (9, 9),
        (0, 0),
    ];
    let says = said.map(|(status, _)| {
        let mut bytes = vec![8];
        prost::encoding::encode_varint(status.cast_unsigned(), &mut bytes);
        format!("says:{}", hex(&bytes))
    });
    let pod = Pod::running("statuses", &format!("WaitProcess={}", says.join(",")));
    // The pod's own first process waits already.
    let mut ends = Vec::new();
    for (number, (_, expected)) in said.into_iter().enumerate() {
        let exec = format!("exit{number}");
        pod.exec(&exec, ["", ""]).unwrap();
        let status = pod.wait(&pod.id, &exec, DEADLINE);
        assert_eq!(status, expected, "{number}");
        ends.push((exec.clone(), expected));
        pod.delete(&pod.id, &exec).unwrap();
    }
    pod.end();
}

/// Figures are those that a VM can have.
pub(crate) fn of_figures() {
    let huge = u64::MAX;
    let memory = MemoryData {
        usage: huge,
        max_usage: huge,
        failcnt: huge,
        limit: huge,
    };
    let pages = HugetlbStats {
        usage: huge,
        max_usage: huge,
        failcnt: huge,
    };
    let entry = |minor| BlkioStatsEntry {
        major: huge,
        minor,
        op: "read".into(),
        value: huge,
    };
    let stats_said = StatsContainerResponse {
        cgroup_stats: Some(CgroupStats {
            cpu_stats: Some(CpuStats {
                cpu_usage: Some(CpuUsage {
                    total_usage: huge,
                    percpu_usage: vec![huge; 100],
                    usage_in_kernelmode: huge,
                    usage_in_usermode: huge,
                }),
                throttling_data: Some(ThrottlingData {
                    periods: huge,
                    throttled_periods: huge,
                    throttled_time: huge,
                }),
            }),
            memory_stats: Some(MemoryStats {
                cache: huge,
                usage: Some(memory),
                swap_usage: Some(memory),
                kernel_usage: Some(memory),
                use_hierarchy: true,
                stats: [("anon".into(), huge), ("../../etc\n\0".into(), huge)].into(),
            }),
            pids_stats: Some(PidsStats {
                current: huge,
                limit: huge,
            }),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: (0..200).map(entry).collect(),
                ..BlkioStats::default()
            }),
            hugetlb_stats: ["2MB", "../../x", "a\nb", "\0", "", "1GB"]
                .map(|name| (name.into(), pages))
                .into(),
        }),
        network_stats: Vec::new(),
    };
    let says = hex(&stats_said.encode_to_vec());
    let pod = Pod::running(
        "figures",
        &format!("StatsContainer=says:{says},entries:4194000,entries:65000"),
    );
    let before = pod.holds();
    let seen = stats(&pod).unwrap();
    let vm = 576 << 20;
    let cpu = seen.cpu.unwrap();
    let minute = 60_000_000;
    for usec in [cpu.usage_usec, cpu.user_usec, cpu.system_usec] {
        assert!(usec < minute, "{cpu:?}");
    }
    let memory = seen.memory.unwrap();
    for bytes in [
        memory.usage,
        memory.max_usage,
        memory.swap_usage,
        memory.anon,
    ] {
        assert_eq!(bytes, vm, "{memory:?}");
    }
    assert_eq!(seen.pids.unwrap().current, 4 << 20);
    assert_eq!(seen.io.unwrap().usage.len(), 64);
    let mut names: Vec<_> = seen
        .hugetlb
        .iter()
        .map(|pages| pages.pagesize.as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["1GB", "2MB"]);
    // Empty entries: of two bytes each on the way, and of far more in memory.
    stats(&pod).unwrap_err();
    stats(&pod).unwrap();
    stays_small("figures", &pod, before);
    pod.end();
}

pub(crate) fn stats(pod: &Pod) -> Result<Metrics, String> {
    let stats: StatsResponse = pod.ask("Stats", &pod.process(&pod.id, ""))?;
    let stats = stats.stats.unwrap();
    assert_eq!(stats.type_url, figures::NAME);
    Ok(Metrics::decode(&stats.value[..]).unwrap())
}

pub(crate) fn update(pod: &Pod, resources: &serde_json::Value) -> Result<Empty, String> {
    let resources = prost_types::Any {
        type_url: String::new(),
        value: resources.to_string().into_bytes(),
    };
    let request = UpdateTaskRequest {
        id: pod.id.clone(),
        resources: Some(resources),
    };
    pod.ask("Update", &request)
}

pub(crate) fn resize_terminal(pod: &Pod, deadline: Duration) -> Result<Empty, String> {
    let request = ResizePtyRequest {
        id: pod.id.clone(),
        exec_id: String::new(),
        width: 80,
        height: 25,
    };
    pod.ask_within("ResizePty", &request, deadline)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How much more memory the shim may ever have had, in KiB.
const MOST_KIB: usize = 8 << 10;

/// The shim has what it had before, and had not much more meanwhile.
pub(crate) fn stays_small(what: &str, pod: &Pod, before: Holds) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = pod.holds();
        let more = now
            .most_resident_kib
            .saturating_sub(before.most_resident_kib);
        let is_small = more <= MOST_KIB
            && now.threads <= before.threads + 4
            && now.descriptors <= before.descriptors + 4;
        if is_small {
            println!("{what}: {before:?}, then {now:?}");
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: {before:?}, then {now:?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}
