//! Disks that come to a pod that runs, and go with its containers.

use std::fs;
use std::path::Path;

use protocol::agent::messages::{CreateContainerRequest, Device};
use tests::guest;
use tests::pod::{Agent, spec};
use tests::template::Vm;

/// How often one comes and goes.
const ROUNDS: usize = 20;

/// As Kata's shims do: the agent is told where on the PCI bus the disk is that was added.
pub(crate) fn disks_come_and_go_with_containers(agent: &Agent, vm: &mut Vm, folder: &Path) {
    if guest::transport() != "pci" {
        return;
    }
    let disk = folder.join("volume");
    for round in 0..ROUNDS {
        let mut content = format!("disk {round}\n").into_bytes();
        content.resize(4096, 0);
        fs::write(&disk, content).unwrap();
        let (id, place) = vm.add_disk(&disk);
        let more = CreateContainerRequest {
            devices: vec![Device {
                r#type: "blk".into(),
                id: place,
                container_path: "/dev/volume".into(),
                ..Device::default()
            }],
            ..CreateContainerRequest::default()
        };
        let script = "test -b /dev/volume && head -n 1 /dev/volume
            echo written | dd of=/dev/volume bs=512 seek=1 conv=sync,fsync 2>/dev/null";
        agent.create_with("volume", spec(script), more).unwrap();
        agent.start("volume").unwrap();
        let (err, out, status) = agent.outcome("volume", "");
        assert_eq!((out, status), (format!("disk {round}\n"), 0), "{err}");
        agent.remove("volume");
        vm.remove_device(&id);
        let written = fs::read(&disk).unwrap();
        assert_eq!(&written[512..520], b"written\n");
    }
}
