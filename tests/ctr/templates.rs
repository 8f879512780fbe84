//! Pods restored from a template, and pods that claim an idle pooled VM.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::containerd::{self, Ran, has_templates};
use tests::ctr::{Container, signal};
use tests::network::PodNetwork;
use tests::node::{Node, eventually, processes_with, step};

use super::{on_a_node, phase};

/// The first pod makes a template, the next is restored from it as a guest of its own, with the pod's
/// networks, and one whose template is broken boots. Each of a template's guests is given randomness of its
/// own, the one that it was made of too. One failure changes nothing for the pods after
/// it; after three in a row a pod boots and makes the template anew.
#[test]
fn pods_go_on_from_a_template_or_boot() {
    on_a_node(|node| {
        // Its templates are its own: where the others boot it would do the same again.
        if !node.is_podvmm() || !has_templates() {
            return;
        }
        let templates = node.folder().join("templates");
        let config = node.folder().join("templates.toml");
        containerd::write_config(&config, &templates, 0);
        let network = PodNetwork::new(2);
        let log = |what: &str| node.containerd.log().matches(what).count();
        let first = run(node, "first", &config, &network);
        assert_eq!((log(&phase("template")), log(&phase("renewal"))), (1, 1));
        let since = Instant::now();
        thread::sleep(Duration::from_secs(5));
        let second = run(node, "second", &config, &network);
        assert_eq!((log(&phase("template")), log(&phase("renewal"))), (1, 2));
        assert_ne!(first.boot_id, second.boot_id);
        // For a clone the time since is none, however long it took to start.
        let since = since.elapsed().as_secs();
        assert!(
            second.uptime + 4 < first.uptime + since,
            "{first:?} and {second:?}, {since} s later"
        );

        let made = fs::read_dir(&templates).unwrap().next().unwrap().unwrap();
        let (memory, hidden) = (memory_of(&made.path()), made.path().join("hidden"));
        fs::rename(&memory, &hidden).unwrap();
        let third = run(node, "third", &config, &network);
        assert_ne!(third.boot_id, second.boot_id);
        assert_eq!(log("the VM boots, for its template"), 1);
        assert_eq!(log("failure 1 in a row"), 1);
        let failures = made.path().join("failures");
        let failure = fs::read_to_string(&failures).unwrap();

        fs::rename(&hidden, &memory).unwrap();
        run(node, "fourth", &config, &network);
        assert_eq!((log(&phase("template")), log(&phase("renewal"))), (1, 3));
        assert_eq!(log("its failures are forgotten"), 1);
        assert!(!failures.exists());

        // As three pods leave it.
        fs::write(&failures, failure.repeat(3)).unwrap();
        run(node, "fifth", &config, &network);
        assert_eq!((log(&phase("template")), log(&phase("renewal"))), (2, 4));
        assert_eq!(log("is made anew, for its clones failed"), 1);
        run(node, "sixth", &config, &network);
        assert_eq!((log(&phase("template")), log(&phase("renewal"))), (2, 5));
        assert!(!failures.exists());
    });
}

/// The file of a snapshot's RAM.
fn memory_of(snapshot: &Path) -> PathBuf {
    let files = fs::read_dir(snapshot).unwrap().map(|file| file.unwrap());
    let mut files = files.map(|file| file.path());
    let is_memory = |path: &PathBuf| path.to_str().unwrap().contains("/memory-");
    files.find(is_memory).unwrap()
}

/// VMs restored from a template wait for pods, and each is then one pod's alone.
#[test]
fn pods_take_vms_that_wait() {
    on_a_node(|node| {
        if !node.is_podvmm() {
            return;
        }
        let templates = match has_templates() {
            true => containerd::templates(),
            false => node.folder().join("templates"),
        };
        let config = node.folder().join("pool.toml");
        let pool = |size: usize| {
            containerd::write_config(&config, &templates, size);
            let mut command = Command::new(containerd::shim());
            let command = command.arg("pool").arg("-config").arg(&config);
            let ran: Ran = step(&format!("pool of {size}"), || command.output().unwrap()).into();
            assert_eq!(ran.stdout, format!("{size}\n"), "{ran:?}");
        };
        let log = |what: &str| node.containerd.log().matches(what).count();
        pool(1);
        let network = PodNetwork::new(1);
        let first = run(node, "first", &config, &network);
        // The shim did not wait for this guest, which differs from all others restored from the
        // template.
        assert_eq!((log(&phase("guest")), log(&phase("renewal"))), (0, 1));
        // By now another waits.
        pool(1);
        let second = run(node, "second", &config, &network);
        assert_eq!((log(&phase("guest")), log(&phase("renewal"))), (0, 2));
        assert_ne!(first.boot_id, second.boot_id);

        pool(2);
        let waiting = || processes_with(&["containerd-shim-", config.to_str().unwrap(), "wait"]);
        let shims = waiting();
        assert_eq!(shims.len(), 2);
        signal(shims[0], libc::SIGKILL);
        let third = run(node, "third", &config, &network);
        assert_ne!(third.boot_id, second.boot_id);
        let fourth = Container::new(node, "fourth").with_config(&config);
        step("fourth", || {
            fourth.start(&node.containerd, &[], &["sleep", "1000"])
        });
        let vmm = fourth.process(&node.containerd);
        let cgroups = fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
        assert!(cgroups.contains(fourth.id()), "{cgroups}");
        node.containerd
            .ctr_must(&["tasks", "kill", "--signal", "KILL", fourth.id()]);
        eventually("it ends", || fourth.state(&node.containerd) == "STOPPED");
        fourth.delete(&node.containerd);
        pool(0);
        eventually("no shim waits", || waiting().is_empty());
    });
}

/// What a guest says of itself.
#[derive(Debug)]
struct Guest {
    boot_id: String,
    uptime: u64,
}

/// Runs a container on a network, all of whose interfaces work in it, as does its clock.
fn run(node: &Node, name: &str, config: &Path, network: &PodNetwork) -> Guest {
    let container = Container::new(node, name).with_config(config);
    // With few programs: each takes a guest long.
    let script = "date +%s
        read id < /proc/sys/kernel/random/boot_id; read up _ < /proc/uptime; echo $id; echo ${up%.*}
        for link in /sys/class/net/eth*; do
            ping -q -c 1 -W 60 10.9.${link##*/eth}.1 >/dev/null
            status=$?; read address < $link/address; echo $status $address
        done";
    let namespace = format!("network:{}", network.path());
    let options = ["--rm", "--cap-add", "CAP_NET_RAW", "--with-ns", &namespace];
    let mut command = container.run(&node.containerd, &options, &["sh", "-c", script]);
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let before = now().as_secs();
    let ran: Ran = step(name, || command.output().unwrap()).into();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let said: Vec<_> = ran.stdout.lines().collect();
    let clock: u64 = said[0].parse().unwrap();
    assert!(
        (before..=now().as_secs()).contains(&clock),
        "{name}: the guest's clock is wrong"
    );
    let wanted: Vec<_> = (0..network.interfaces())
        .map(|number| format!("0 {}", PodNetwork::hardware(number)))
        .collect();
    assert_eq!(said[3..], wanted, "{name}: {ran:?}");
    Guest {
        boot_id: said[1].into(),
        uptime: said[2].parse().unwrap(),
    }
}
