//! A machine that boots: a kernel is loaded, told what there is, and entered.

use api::{Output, TransportConfig, VmConfig};
use arch::boot::{self, BootInfo, Entry, KernelImage};
use arch::{acpi, cpuid, mptable, ram};
use protocol::contract::POLICY_PATH;
use vm_memory::GuestAddress;

use super::frame::{Frame, Host};
use super::{BuildError, Surroundings};
use crate::build::archive::archive;
use crate::build::image::{load_initramfs, load_kernel};
use crate::console::command::Command;
use crate::host::KvmKind;
use crate::machine::Machine;
use crate::machine::vcpus::Vcpus;
use crate::memory::Ram;

/// Builds a machine whose vCPUs are parked at the kernel's entry point.
pub(crate) fn boot(config: &VmConfig, around: &Surroundings) -> Result<Machine, BuildError> {
    let host = Host::open(config)?;
    let possible = config.cpus.max().get();
    let cpuid = cpuid::for_guest(&host.cpuid, possible).ok_or(BuildError::ManyLeaves)?;
    let mut frame = Frame::new(host, config, cpuid)?;
    let kernel = load(config, around, &mut frame.ram)?;
    frame.timeline.mark("kernel");
    let devices = frame.devices(config, around, None)?;
    let entry = kernel.prepare(config, &devices.backplane.parameters, &frame.ram)?;
    frame.timeline.mark("memory");
    let common = frame.common(config, around, &devices);
    let vcpus = Vcpus::boot(common, &frame.vm, config.cpus.boot().get(), entry)?;
    Ok(frame.machine(config, devices, vcpus))
}

/// A kernel in RAM, and what it is to find.
struct Kernel {
    image: KernelImage,
    initramfs: Option<(GuestAddress, u64)>,
}

fn load(config: &VmConfig, around: &Surroundings, ram: &mut Ram) -> Result<Kernel, BuildError> {
    let image = load_kernel(ram, &config.payload.kernel)?;
    let initramfs = match &config.payload.initramfs {
        None => None,
        Some(path) => {
            let mut files = around
                .command
                .as_ref()
                .map(Command::files)
                .unwrap_or_default();
            let policy = config.payload.agent_policy.as_ref();
            files.extend(policy.map(|text| (POLICY_PATH, text.clone().into_bytes())));
            Some(load_initramfs(ram, path, &archive(&files), image.end)?)
        }
    };
    let cpus = config.cpus.max().get();
    mptable::write(ram.memory(), cpus)?;
    if config.transport == TransportConfig::Pci {
        acpi::write(ram.memory(), cpus, config.serial != Output::Off)?;
    }
    Ok(Kernel { image, initramfs })
}

impl Kernel {
    /// Tells it what there is, and says where it is entered.
    fn prepare(
        &self,
        config: &VmConfig,
        parameters: &[String],
        ram: &Ram,
    ) -> Result<Entry, BuildError> {
        let cmdline = cmdline(config, parameters);
        log::debug!("kernel command line: {cmdline}");
        let ranges = ram::ranges(config.memory.size.bytes());
        let info = BootInfo {
            ram: &ranges,
            cmdline: &cmdline,
            initramfs: self.initramfs,
            pci: config.transport == TransportConfig::Pci,
        };
        boot::write(ram.memory(), &self.image, info)?;
        Ok(self.image.entry)
    }
}

/// The kernel's command line: ours first, so that the user has the last word.
fn cmdline(config: &VmConfig, devices: &[String]) -> String {
    let mut words: Vec<String> = KvmKind::of_this_host()
        .kernel_parameters()
        .map(String::from)
        .collect();
    words.push(match config.transport {
        TransportConfig::Mmio => "pci=off".into(),
        // By configuration mechanism 1, and nothing else looked for.
        TransportConfig::Pci => "pci=conf1".into(),
    });
    let (boot, max) = (config.cpus.boot(), config.cpus.max());
    if boot < max {
        words.push(format!("maxcpus={boot}"));
    }
    if config.memory.hotplug_size.0 > 0 {
        // Plugged memory is used at once, for what can be moved and so taken away again.
        words.push("memhp_default_state=online_movable".into());
    }
    words.extend_from_slice(devices);
    if !config.payload.cmdline.is_empty() {
        words.push(config.payload.cmdline.clone());
    }
    words.join(" ")
}
