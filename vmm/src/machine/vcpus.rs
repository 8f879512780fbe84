//! The vCPUs of a VM: those that exist, and what further ones are made of.
//!
//! The guest's tables name all vCPUs that it can ever have, but each one that exists costs time, memory in
//! KVM and a thread, and most guests never use more than they boot with. So a vCPU is made when the VM
//! first grows to it. KVM can add one to a VM that runs but cannot take one away, so from then on it is
//! kept, parked while it is not to run. In a snapshot those that do not exist are as those that the guest
//! has not started.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use arch::boot::Entry;
use arch::state::{MsrIndices, StateError, VcpuState};
use arch::vcpu::{self as arch_vcpu, Identity};
use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::inbox::{Event, Inbox};
use crate::machine::vcpu::{Buses, ExitCounters, Vcpu};

/// Why there is no such vCPU.
#[derive(Debug, Error)]
pub(crate) enum VcpuError {
    #[error("create vCPU {index}")]
    Create {
        index: u8,
        source: kvm_ioctls::Error,
    },
    /// The vCPU could not be set up.
    #[error("set up vCPU {index}")]
    Configure {
        index: u8,
        source: arch_vcpu::VcpuError,
    },
    #[error("start the thread of vCPU {index}")]
    Thread { index: u8, source: io::Error },
    #[error("the state of vCPU {index} in the snapshot")]
    Restore {
        index: u8,
        source: arch_vcpu::VcpuError,
    },
}

/// What all vCPUs of a VM have in common.
#[derive(Debug)]
pub(crate) struct Common {
    /// How many vCPUs there can be.
    pub(crate) possible: u8,
    /// CPUID of the vCPUs, but for their APIC ids.
    pub(crate) cpuid: CpuId,
    pub(crate) buses: Buses,
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) exits: Arc<ExitCounters>,
    pub(crate) inbox: Inbox,
}

/// The vCPUs of a VM, by their indexes.
#[derive(Debug)]
pub(crate) struct Vcpus {
    made: Vec<Vcpu>,
    /// The next ones, as far as KVM has made them. They stay here if something else fails: KVM makes each
    /// one only once.
    unfinished: VecDeque<VcpuFd>,
    common: Common,
}

impl Vcpus {
    /// The first `count` vCPUs of a guest that boots at `entry`.
    pub(crate) fn boot(
        common: Common,
        vm: &VmFd,
        count: u8,
        entry: Entry,
    ) -> Result<Self, VcpuError> {
        let mut vcpus = Self::none(common);
        vcpus.grow_with(vm, count, |fd, identity| {
            arch_vcpu::configure(fd, identity, entry).map_err(configure(identity.index))
        })?;
        Ok(vcpus)
    }

    /// The vCPUs of a snapshot: the first `count`, and all that its guest had ever started.
    pub(crate) fn restore(
        common: Common,
        vm: &VmFd,
        count: u8,
        states: &[VcpuState],
    ) -> Result<Self, VcpuError> {
        let mut vcpus = Self::none(common);
        let tsc = VcpuState::tsc(states);
        let count = if tsc.is_none_or(|tsc| tsc.set_rate(vm)) {
            count.max(VcpuState::last_started(states))
        } else {
            // One that is made later might have another rate.
            vcpus.common.possible
        };
        vcpus.grow_with(vm, count, |fd, identity| {
            let index = identity.index;
            let state = &states[usize::from(index)];
            let restored = state.restore(fd, identity, tsc);
            restored.map_err(|source| VcpuError::Restore { index, source })
        })?;
        Ok(vcpus)
    }

    fn none(common: Common) -> Self {
        Self {
            made: Vec::new(),
            unfinished: VecDeque::new(),
            common,
        }
    }

    /// Makes vCPUs until there are `count`, which wait for the guest to start them. If one cannot be made,
    /// those before it stay.
    pub(crate) fn grow(&mut self, vm: &VmFd, count: u8) -> Result<(), VcpuError> {
        self.grow_with(vm, count, |fd, identity| {
            arch_vcpu::add(fd, identity).map_err(configure(identity.index))
        })
    }

    fn grow_with(
        &mut self,
        vm: &VmFd,
        count: u8,
        mut prepare: impl FnMut(&VcpuFd, Identity<'_>) -> Result<(), VcpuError>,
    ) -> Result<(), VcpuError> {
        let made = self.number();
        // All of them before the first one is prepared: see `arch::tsc`.
        let unfinished = u8::try_from(self.unfinished.len()).expect("there are at most 254");
        for index in made + unfinished..count {
            let fd = vm.create_vcpu(index.into());
            let fd = fd.map_err(|source| VcpuError::Create { index, source })?;
            self.unfinished.push_back(fd);
        }
        for index in made..count {
            let fd = self.unfinished.pop_front().expect("it was just made");
            let identity = Identity {
                index,
                cpuid: &self.common.cpuid,
            };
            if let Err(error) = prepare(&fd, identity) {
                self.unfinished.push_front(fd);
                return Err(error);
            }
            match self.spawn(index, fd) {
                Ok(vcpu) => self.made.push(vcpu),
                Err((error, fd)) => {
                    self.unfinished.push_front(fd);
                    return Err(VcpuError::Thread {
                        index,
                        source: error,
                    });
                }
            }
        }
        Ok(())
    }

    fn spawn(&self, index: u8, fd: VcpuFd) -> Result<Vcpu, (io::Error, VcpuFd)> {
        let inbox = self.common.inbox.clone();
        let ended = Box::new(move |ending| {
            // `control` stops listening when it takes the machine down.
            let _ = inbox.send(Event::Ended(ending));
        });
        let buses = self.common.buses.clone();
        let memory = self.common.memory.clone();
        Vcpu::spawn(index, fd, buses, memory, self.exits().clone(), ended)
    }

    /// The number of vCPUs that exist.
    fn number(&self) -> u8 {
        u8::try_from(self.made.len()).expect("there are at most 254")
    }

    /// The vCPUs that exist.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Vcpu> {
        self.made.iter()
    }

    /// The exits of all of them.
    pub(crate) fn exits(&self) -> &Arc<ExitCounters> {
        &self.common.exits
    }

    /// What a snapshot keeps of every vCPU that there can be, with its index. None of one whose thread
    /// has ended. Those that exist must be parked.
    pub(crate) fn save(
        &self,
        indices: &Arc<MsrIndices>,
    ) -> impl Iterator<Item = (u8, Option<Result<VcpuState, StateError>>)> {
        (0..self.common.possible).map(move |index| {
            let state = match self.made.get(usize::from(index)) {
                Some(vcpu) => vcpu.save(indices),
                None => Some(Ok(VcpuState::not_started())),
            };
            (index, state)
        })
    }
}

/// Makes a [`VcpuError::Configure`] for vCPU `index`. For `map_err`.
fn configure(index: u8) -> impl Fn(arch_vcpu::VcpuError) -> VcpuError {
    move |source| VcpuError::Configure { index, source }
}
