//! Messages that KVM sends for the PCI functions of a VM: a route for each vector that is open.
//!
//! vCPU threads change routes, as the guest writes MSI-X tables. KVM takes all routes at once, so there is a
//! lock for that; no device waits for it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use devices::pci::{Host, Message};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC, each with the GSI of its number. The first sixteen are the PICs' too.
const PINS: u32 = 24;
const PIC_PINS: u32 = 8;

/// The routes of a VM.
#[derive(Debug)]
pub(crate) struct Routes {
    /// The machine drops the VM before its RAM, so nothing else keeps it.
    vm: Weak<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// The GSIs of each function: its first, and the one after its last.
    functions: BTreeMap<u32, u32>,
    messages: BTreeMap<u32, Message>,
}

impl Routes {
    pub(crate) fn new(vm: &Arc<VmFd>) -> Arc<Self> {
        let vm = Arc::downgrade(vm);
        let table = Mutex::default();
        Arc::new(Self { vm, table })
    }

    /// The host's side of a function with so many vectors. None if KVM has no room for their routes.
    pub(crate) fn function(self: &Arc<Self>, vectors: usize) -> Option<FunctionHost> {
        let mut table = self.table();
        let first_gsi = table.reserve(u32::try_from(vectors).ok()?)?;
        Some(FunctionHost {
            routes: self.clone(),
            first_gsi,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("no thread panics while it holds the routes")
    }

    /// Has `gsi` mean `message`.
    fn set(&self, vm: &VmFd, gsi: u32, message: Message) -> io::Result<()> {
        let mut table = self.table();
        let before = table.messages.insert(gsi, message);
        if before == Some(message) {
            return Ok(());
        }
        let given = give(vm, &table.messages);
        if given.is_err() {
            // Or no other one could be given from then on.
            table.messages.remove(&gsi);
        }
        given
    }
}

impl Table {
    /// Takes `count` GSIs in a row for a function. Returns the first.
    fn reserve(&mut self, count: u32) -> Option<u32> {
        // KVM's own routes count, too.
        let most = u32::try_from(KVM_MAX_IRQ_ROUTES).ok()? - 2 * PIC_PINS;
        let mut first = PINS;
        for (start, end) in &self.functions {
            if start - first >= count {
                break;
            }
            first = *end;
        }
        let end = first.checked_add(count).filter(|end| *end <= most)?;
        self.functions.insert(first, end);
        Some(first)
    }

    /// Gives the GSIs of a function back. KVM forgets their routes when it is next given all.
    fn free(&mut self, first: u32) {
        if let Some(end) = self.functions.remove(&first) {
            self.messages.retain(|gsi, _| !(first..end).contains(gsi));
        }
    }
}

/// KVM_SET_GSI_ROUTING (kvm/api.rst 4.52): the routes that KVM has from the start, and those of messages.
fn give(vm: &VmFd, messages: &BTreeMap<u32, Message>) -> io::Result<()> {
    let pics = (0..2 * PIC_PINS).map(|pin| match pin.checked_sub(PIC_PINS) {
        None => chip(pin, KVM_IRQCHIP_PIC_MASTER, pin),
        Some(second) => chip(pin, KVM_IRQCHIP_PIC_SLAVE, second),
    });
    let pins = (0..PINS).map(|pin| chip(pin, KVM_IRQCHIP_IOAPIC, pin));
    let messages = messages.iter().map(|(gsi, message)| {
        let mut entry = kvm_irq_routing_entry {
            gsi: *gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
        entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
        entry.u.msi.address_hi = u32::from_le_bytes([e, f, g, h]);
        entry.u.msi.data = message.data;
        entry
    });
    let entries: Vec<_> = pics.chain(pins).chain(messages).collect();
    let routing = KvmIrqRouting::from_entries(&entries)
        .map_err(|error| io::Error::other(format!("{error:?}")))?;
    Ok(vm.set_gsi_routing(&routing)?)
}

fn chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

/// What KVM does for one function.
#[derive(Debug)]
pub(crate) struct FunctionHost {
    routes: Arc<Routes>,
    first_gsi: u32,
}

/// The function is gone, and its vectors are closed.
impl Drop for FunctionHost {
    fn drop(&mut self) {
        self.routes.table().free(self.first_gsi);
    }
}

impl FunctionHost {
    fn with_vm(&self, act: impl FnOnce(&VmFd) -> io::Result<()>) -> io::Result<()> {
        // A VM that is gone has no interrupts.
        self.routes.vm.upgrade().map_or(Ok(()), |vm| act(&vm))
    }

    fn gsi(&self, vector: u16) -> u32 {
        self.first_gsi + u32::from(vector)
    }
}

impl Host for FunctionHost {
    fn deliver(&self, vector: u16, event: &EventFd, message: Message) -> io::Result<()> {
        let gsi = self.gsi(vector);
        self.with_vm(|vm| {
            self.routes.set(vm, gsi, message)?;
            // KVM looks at what was written before it is told of the event fd.
            Ok(vm.register_irqfd(event, gsi)?)
        })
    }

    fn keep(&self, vector: u16, event: &EventFd) -> io::Result<()> {
        self.with_vm(|vm| Ok(vm.unregister_irqfd(event, self.gsi(vector))?))
    }

    fn watch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.with_vm(|vm| Ok(vm.register_ioevent(event, &address, NoDatamatch)?))
    }

    fn unwatch(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.with_vm(|vm| Ok(vm.unregister_ioevent(event, &address, NoDatamatch)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_have_their_gsis_alone_and_give_them_back() {
        let mut table = Table::default();
        let reserved = [3, 2, 5].map(|count| table.reserve(count));
        assert_eq!(reserved, [Some(24), Some(27), Some(29)]);
        table.messages.insert(27, Message::default());
        table.messages.insert(29, Message::default());
        table.free(27);
        assert_eq!(table.messages.keys().copied().collect::<Vec<_>>(), [29]);
        table.free(27);
        assert_eq!(table.reserve(3), Some(34), "two are free in between");
        assert_eq!(table.reserve(2), Some(27));
        assert_eq!(table.reserve(u32::MAX), None);
        assert_eq!(table.reserve(4096 - 16 - 37), Some(37));
        assert_eq!(table.reserve(1), None);
    }
}
