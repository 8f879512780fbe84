//! Devices that come to a Linux that runs, are used, made larger, and go.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

use std::fs;
use std::io::Read;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use api::http::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::network::{alone, links, set_up};
use tests::podvmm::kvm_is_here;
use tests::service::{get, put};
use tests::{Podvmm, guest};

/// How often a disk and a network come and go.
const ROUNDS: usize = 100;
/// As long as any guest may take for one thing.
const PATIENCE: Duration = Duration::from_secs(120);
const BLOCK: usize = 512;

/// The guest's part of each round, from the file that says that there is something to find to the one that says
/// that it is used. Files by which it and the test tell each other are in a share of which nothing is cached. The
/// disk is vda, for the root file system is a share, too.
const SCRIPT: &str = r#"
set -e
mount -t virtiofs signals /mnt
there() { until [ "$1" "$2" ]; do sleep 0.02; done; }
device() { dirname "$(readlink -f /sys/$1/device)"; }
round=0
while [ $round -lt $1 ]; do
    there -e /mnt/plugged.$round
    echo 1 >/sys/bus/pci/rescan
    there -b /dev/vda
    there -d /sys/class/net/eth0
    [ "$(dd if=/dev/vda bs=512 count=1 2>/dev/null)" = "from the host $round" ]
    echo "from the guest $round" | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync 2>/dev/null
    ifconfig eth0 10.77.0.2 netmask 255.255.255.0 up
    ping -c 1 -W 60 10.77.0.1 >/dev/null
    : >/mnt/used.$round
    until [ "$(cat /sys/block/vda/size)" = 16 ]; do sleep 0.02; done
    there -e /mnt/leave.$round
    ifconfig eth0 down
    echo 1 >"$(device block/vda)/remove"
    echo 1 >"$(device class/net/eth0)/remove"
    : >/mnt/left.$round
    round=$((round + 1))
done
ls /sys/bus/pci/devices | wc -l
"#;

fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn device(client: &mut Client, request: &str, body: Value) -> String {
    let answer = put(client, request, Some(body)).unwrap();
    let answer: Value = serde_json::from_slice(&answer).unwrap();
    answer["id"].as_str().unwrap().to_owned()
}

/// A disk of blocks that are words, padded with zeroes.
fn image(words: &[String]) -> Vec<u8> {
    let block = |words: &String| {
        let mut block = words.clone().into_bytes();
        block.resize(BLOCK, 0);
        block
    };
    words.iter().flat_map(block).collect()
}

fn round(client: &mut Client, signals: &Path, disk: &Path, round: usize) {
    let signal = |name: &str| signals.join(format!("{name}.{round}"));
    let seen = |name: &str| {
        let file = signal(name);
        wait_until(name, || file.exists());
    };
    let none = String::new;
    fs::write(
        disk,
        image(&[format!("from the host {round}\n"), none(), none(), none()]),
    )
    .unwrap();
    let disk_id = device(client, "vm.add-disk", json!({ "path": disk }));
    let net_id = device(client, "vm.add-net", json!({"tap": "plugged0"}));
    set_up("plugged0", "10.77.0.1/24");
    fs::write(signal("plugged"), "").unwrap();
    seen("used");
    let size = json!({"id": disk_id, "desired_size": 16 * BLOCK});
    put(client, "vm.resize-disk", Some(size)).unwrap();
    // It is asked for while the guest has it in every second round, and otherwise when the guest has let go.
    let ids = [&disk_id, &net_id];
    let remove = |client: &mut Client| {
        for id in ids {
            put(client, "vm.remove-device", Some(json!({ "id": id }))).unwrap();
        }
    };
    let early = round.is_multiple_of(2);
    if early {
        remove(client);
        assert_eq!(get(client, "vm.info")["leaving"], json!(ids));
    }
    fs::write(signal("leave"), "").unwrap();
    seen("left");
    if early {
        wait_until("gone", || get(client, "vm.info")["leaving"] == Value::Null);
    } else {
        remove(client);
    }
    let info = get(client, "vm.info");
    assert_eq!(info["config"]["disks"], Value::Null);
    assert_eq!(info["config"]["net"], Value::Null);
    assert_eq!(get(client, "vm.counters")[disk_id.as_str()], Value::Null);
    let mut written = Vec::new();
    let mut file = fs::File::open(disk).unwrap();
    file.read_to_end(&mut written).unwrap();
    assert_eq!(written.len(), 16 * BLOCK);
    let said = format!("from the guest {round}\n");
    assert_eq!(&written[BLOCK..BLOCK + said.len()], said.as_bytes());
    assert!(!links().contains("plugged0"));
}

#[test]
fn a_disk_and_a_network_come_are_used_and_go() {
    if !kvm_is_here() {
        return;
    }
    alone(|| {
        let _one = guest::one_at_a_time();
        let folder = TempDir::new().unwrap();
        let applets = [
            "sh", "sleep", "dd", "ifconfig", "ping", "cat", "dirname", "readlink", "ls", "wc",
            "echo", "mount",
        ];
        let root = guest::root(&applets);
        let plain = |path: &Path| path.to_str().unwrap().to_owned();
        let (api, disk) = (folder.path().join("api"), folder.path().join("disk"));
        let signals = TempDir::new().unwrap();
        let share = format!(
            "tag=signals,cache=none,shared_dir={}",
            plain(signals.path())
        );
        let options = [
            ["--rootfs", &plain(root.path())],
            ["--transport", "pci"],
            ["--fs", &share],
            ["--memory", "size=256M"],
            ["--api-socket", &plain(&api)],
        ];
        let count = ROUNDS.to_string();
        let command = ["--", "/bin/sh", "-c", SCRIPT, "sh", &count];
        let running = Podvmm::new(options.as_flattened().iter().chain(&command)).spawn();
        wait_until("the API's socket", || api.exists());
        let mut client = Client::connect(&api).unwrap();
        wait_until("a guest that runs", || {
            get(&mut client, "vm.info")["state"] == "Running"
        });
        let held = |name: &str| {
            let path = format!("/proc/{}/{name}", running.pid());
            fs::read_dir(path).unwrap().count()
        };
        let mut before = None;
        for number in 0..ROUNDS {
            round(&mut client, signals.path(), &disk, number);
            let now = (held("fd"), held("task"));
            // The share opens files of its own, which come and go with what the guest looks at.
            let (descriptors, threads) = *before.get_or_insert(now);
            assert_eq!(now.1, threads, "in round {number}");
            assert!(now.0 < descriptors + 64, "{descriptors}, then {}", now.0);
        }
        drop(client);
        let outcome = running.wait();
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        // The bridge, two shares, entropy and the command's streams.
        assert_eq!(outcome.stdout.trim(), "5", "{outcome:?}");
    });
}
