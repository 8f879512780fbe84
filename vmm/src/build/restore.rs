//! A machine that goes on where another one was, of which a snapshot was taken.

use api::VmConfig;
use arch::state::VcpuState;

use super::frame::{Devices, Frame, Host};
use super::{BuildError, Surroundings};
use crate::machine::Machine;
use crate::machine::vcpus::Vcpus;
use crate::memory::Ram;
use crate::memory::remote_ram::{RemoteRam, RemoteRamError};
use crate::snapshot::{Loaded, Pages};

/// Builds a machine whose vCPUs are parked where the snapshot was taken. Its devices rest, too, where they
/// were at work.
pub(crate) fn restore(
    config: &VmConfig,
    around: &Surroundings,
    mut loaded: Loaded,
) -> Result<Machine, BuildError> {
    let host = Host::open(config)?;
    let cpuid = loaded.cpuid(&host.kvm, &host.cpuid)?;
    let mut frame = Frame::new(host, config, cpuid)?;
    let devices = frame.devices(config, around, Some(&loaded))?;
    let remote = refill(config, &mut loaded, around, &devices, &mut frame.ram)?;
    // KVM may look into RAM when it is given a vCPU's state.
    let patience = remote.as_ref().map(RemoteRam::patience);
    frame.timeline.mark("memory");
    let states = loaded.vcpus(config.cpus.max().get())?;
    let common = frame.common(config, around, &devices);
    let vcpus = Vcpus::restore(common, &frame.vm, config.cpus.boot().get(), states)?;
    let board = loaded.board();
    board.restore(&frame.vm).map_err(BuildError::BoardState)?;
    drop(patience);
    let started = VcpuState::last_started(states);
    let mut machine = frame.machine(config, devices, vcpus);
    machine.remote = remote;
    machine.source = Some(loaded.source().clone());
    machine.shrink_from(started);
    Ok(machine)
}

/// Restores devices, then RAM: the devices decide which RAM there is. Returns the connection to the
/// process that gives RAM, if there is one.
fn refill(
    config: &VmConfig,
    loaded: &mut Loaded,
    around: &Surroundings,
    devices: &Devices,
    ram: &mut Ram,
) -> Result<Option<RemoteRam>, BuildError> {
    let allowed = loaded.memory(&config.memory)?;
    let transports = &devices.backplane.transports;
    let states = loaded.take_devices(transports.iter().map(|(id, _)| id.as_str()))?;
    for ((id, transport), state) in transports.iter().zip(states) {
        let mut transport = transport.lock().expect("no other thread has it yet");
        transport
            .restore(state)
            .map_err(|source| BuildError::DeviceState {
                device: id.clone(),
                source,
            })?;
    }
    if let Some(bridge) = &devices.backplane.bridge {
        let mut bridge = bridge.lock().expect("no other thread has it yet");
        bridge.restore(loaded.bridge()?);
    }
    match loaded.pages() {
        Pages::Files { layers, prefetch } => {
            ram.lay(layers, &allowed, false)
                .map_err(BuildError::SnapshotRam)?;
            if *prefetch {
                ram.prefetch(loaded.working_set().as_deref());
            }
            Ok(None)
        }
        Pages::Socket { .. } if !ram.is_private() => Err(RemoteRamError::NotPrivate.into()),
        Pages::Socket { path, covered } => {
            let inbox = around.inbox.clone();
            let remote = RemoteRam::hand_over(path, inbox, |userfault| {
                ram.expect(covered, &allowed, userfault)
            })?;
            Ok(Some(remote))
        }
    }
}
