//! ACPI tables (ACPI 6.5): for kernels that do not read the MP table, and find PCI devices that come and go by
//! themselves.
//!
//! A hardware-reduced platform (§4.1), which has none of the registers of old boards. The tables name its CPUs and
//! interrupt controllers, the bus and where its BARs may be, the serial port, and one device that interrupts
//! when devices come or are to go (§5.6.9, the Generic Event Device). On that, the guest's kernel runs the method
//! `PCNT` of the bus:
//!
//! ```text
//! which came  (PCIU) ─▶ Notify(device, device check)   ─▶ the kernel looks at it
//! which leave (PCID) ─▶ Notify(device, eject request)  ─▶ its driver lets go, then _EJ0
//! ```
//!
//! The two registers are a bit for each device, and read as what has changed since the last time.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method, MethodCall, Name,
    Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{
    ACPI_END, ACPI_START, IOAPIC_START, LOCAL_APIC_START, PCI_EVENT_GSI, PCI_HOTPLUG_PORTS,
    PCI_HOTPLUG_PORTS_LEN, PCI_WINDOW, SERIAL_GSI,
};

const OEM: [u8; 6] = *b"PODVMM";
const OEM_TABLE: [u8; 8] = *b"PODVMM  ";
const OEM_REVISION: u32 = 1;
/// Tables begin at multiples of it.
const ALIGNMENT: u64 = 16;

/// Devices of the bus that come and go: all but the bridge.
const SLOTS: std::ops::Range<u32> = 1..32;
/// What the kernel is told of a device: to look at it, and to let go of it (§5.6.6).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// Where the line of the machine's reset is, and what pulls it: the keyboard controller's.
const RESET_PORT: u64 = 0x64;
const RESET: u8 = 0xfe;
const COM1: u16 = 0x3f8;

/// Why the tables could not be written: guest RAM does not reach that far.
#[derive(Debug, Error)]
#[error("write the ACPI tables at {:#x}", ACPI_START.raw_value())]
pub struct AcpiError(#[from] GuestMemoryError);

/// Writes the tables of a machine with `cpus` CPUs (1 to 254) and perhaps a serial port to [`ACPI_START`], where
/// kernels look for them.
pub fn write(memory: &GuestMemoryMmap, cpus: u8, serial: bool) -> Result<(), AcpiError> {
    let mut area = Area {
        memory,
        // The root pointer is first.
        free: ACPI_START.unchecked_add(ALIGNMENT * 3),
    };
    let dsdt = area.put(&dsdt(serial))?;
    let fadt = area.put(&bytes(&fadt(dsdt)))?;
    let madt = area.put(&bytes(&madt(cpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.put(&bytes(&xsdt))?;
    Ok(memory.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), ACPI_START)?)
}

/// Where tables are written, one after the other.
struct Area<'a> {
    memory: &'a GuestMemoryMmap,
    free: GuestAddress,
}

impl Area<'_> {
    /// Returns where the table is.
    fn put(&mut self, table: &[u8]) -> Result<u64, GuestMemoryError> {
        let at = self.free;
        self.memory.write_slice(table, at)?;
        let end = at.unchecked_add(table.len() as u64).raw_value();
        self.free = GuestAddress(end.next_multiple_of(ALIGNMENT));
        debug_assert!(self.free <= ACPI_END);
        Ok(at.raw_value())
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// What kind of platform it is, and how it is reset (§5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    let port = gas::AddressSpace::SystemIo;
    fadt.reset_reg = GAS::new(port, 8, 0, AccessSize::ByteAccess, RESET_PORT);
    fadt.reset_value = RESET;
    fadt.finalize()
}

/// CPUs and interrupt controllers (§5.2.12). All CPUs are there; `maxcpus=` says how many start at once.
fn madt(cpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(LOCAL_APIC_START);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, local);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(cpus, IOAPIC_START, 0));
    madt
}

/// What there is on the board (§5.2.11.1).
fn dsdt(serial: bool) -> Vec<u8> {
    let mut board = vec![bus(), events()];
    board.extend(serial.then(serial_port));
    let scope = Scope::new(Path::new("\\_SB_"), all(&board));
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&bytes(&scope));
    dsdt.as_slice().to_vec()
}

/// Objects that are written already, and outlive what they were made of.
struct Raw(Vec<u8>);

impl Raw {
    fn of(object: &dyn Aml) -> Self {
        Self(bytes(object))
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn all(objects: &[Raw]) -> Vec<&dyn Aml> {
    objects.iter().map(|object| object as &dyn Aml).collect()
}

fn device(name: &str, hid: &dyn Aml, resources: &[Raw], more: Vec<Raw>) -> Raw {
    let mut objects = vec![
        Raw::of(&Name::new(Path::new("_HID"), hid)),
        Raw::of(&Name::new(Path::new("_UID"), &ZERO)),
        Raw::of(&Name::new(
            Path::new("_CRS"),
            &ResourceTemplate::new(all(resources)),
        )),
    ];
    objects.extend(more);
    Raw::of(&Device::new(Path::new(name), all(&objects)))
}

/// The PCI bus: where its registers and BARs are, its devices, and the method that tells of them.
fn bus() -> Raw {
    let low = u32::try_from(PCI_WINDOW.start).expect("it is below 4 GiB");
    let high = u32::try_from(PCI_WINDOW.end - 1).expect("it is below 4 GiB");
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let resources = [
        Raw::of(&AddressSpace::new_bus_number(0_u16, 0)),
        Raw::of(&IO::new(0xcf8, 0xcf8, 1, 8)),
        Raw::of(&AddressSpace::new_memory(cacheable, true, low, high, None)),
    ];
    let mut more = vec![
        Raw::of(&OpRegion::new(
            Path::new("PCST"),
            OpRegionSpace::SystemIO,
            &PCI_HOTPLUG_PORTS,
            &PCI_HOTPLUG_PORTS_LEN,
        )),
        Raw::of(&Field::new(
            Path::new("PCST"),
            FieldAccessType::DWord,
            FieldLockRule::NoLock,
            FieldUpdateRule::WriteAsZeroes,
            [*b"PCIU", *b"PCID", *b"B0EJ"]
                .map(|name| FieldEntry::Named(name, 32))
                .to_vec(),
        )),
    ];
    more.extend(SLOTS.map(slot));
    more.push(tell());
    more.push(Raw::of(&Method::new(
        Path::new("PCNT"),
        0,
        true,
        vec![
            &Store::new(&Local(0), &Path::new("PCIU")),
            &Store::new(&Local(1), &Path::new("PCID")),
            &MethodCall::new(Path::new("DVNT"), vec![&Local(0), &DEVICE_CHECK]),
            &MethodCall::new(Path::new("DVNT"), vec![&Local(1), &EJECT_REQUEST]),
        ],
    )));
    device("PCI0", &EISAName::new("PNP0A03"), &resources, more)
}

fn slot_name(slot: u32) -> Path {
    Path::new(&format!("S{slot:03}"))
}

/// A device of the bus, there or not, which can be ejected.
fn slot(slot: u32) -> Raw {
    Raw::of(&Device::new(
        slot_name(slot),
        vec![
            &Name::new(Path::new("_SUN"), &slot),
            &Name::new(Path::new("_ADR"), &(slot << 16)),
            &Method::new(
                Path::new("_EJ0"),
                1,
                true,
                vec![&Store::new(&Path::new("B0EJ"), &(1_u32 << slot))],
            ),
        ],
    ))
}

/// DVNT(devices, event): notifies each device whose bit is set.
fn tell() -> Raw {
    let tests: Vec<_> = SLOTS
        .map(|slot| {
            let bit = 1_u32 << slot;
            let is_set = And::new(&ZERO, &Arg(0), &bit);
            Raw::of(&If::new(
                &is_set,
                vec![&Notify::new(&slot_name(slot), &Arg(1))],
            ))
        })
        .collect();
    Raw::of(&Method::new(Path::new("DVNT"), 2, true, all(&tests)))
}

/// Interrupts when devices have come or are to go.
fn events() -> Raw {
    let event = Raw::of(&Method::new(
        Path::new("_EVT"),
        1,
        true,
        vec![&MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), vec![])],
    ));
    let line = Raw::of(&Interrupt::new(true, true, false, false, PCI_EVENT_GSI));
    device("GED_", &"ACPI0013", &[line], vec![event])
}

fn serial_port() -> Raw {
    let resources = [
        Raw::of(&Interrupt::new(true, true, false, false, SERIAL_GSI)),
        Raw::of(&IO::new(COM1, COM1, 1, 8)),
    ];
    device("COM1", &EISAName::new("PNP0501"), &resources, vec![])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cpus: u8) -> Vec<(String, Vec<u8>)> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write(&memory, cpus, true).unwrap();
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            bytes
        };
        let number = |bytes: &[u8]| {
            let mut number = [0; 8];
            number[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(number)
        };
        let root = read(ACPI_START.raw_value(), 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        let table = |at: u64| {
            let len = number(&read(at + 4, 4));
            let bytes = read(at, usize::try_from(len).unwrap());
            let name = String::from_utf8(bytes[..4].to_vec()).unwrap();
            (name, bytes)
        };
        let mut tables = vec![table(number(&root[24..32]))];
        let entries = tables[0].1[36..].to_vec();
        tables.extend(entries.chunks(8).map(|entry| table(number(entry))));
        let fadt = tables[1].1.clone();
        tables.push(table(number(&fadt[140..148])));
        tables.push(("RSD PTR ".into(), root));
        tables
    }

    #[test]
    fn each_table_is_found_from_the_root_and_sums_to_zero() {
        for cpus in [1, 254] {
            let tables = written(cpus);
            let names: Vec<_> = tables.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["XSDT", "FACP", "APIC", "DSDT", "RSD PTR "]);
            for (name, bytes) in &tables {
                let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0, "{name}");
            }
        }
    }

    #[test]
    fn all_cpus_and_the_interrupt_controller_are_named() {
        let tables = written(3);
        let madt = &tables[2].1;
        assert_eq!(madt[36..40], LOCAL_APIC_START.to_le_bytes());
        let cpus: Vec<_> = madt[44..68]
            .chunks(8)
            .map(|it| (it[0], it[3], it[4]))
            .collect();
        assert_eq!(cpus, [(0, 0, 1), (0, 1, 1), (0, 2, 1)]);
        assert_eq!(madt[68..70], [1, 12]);
        assert_eq!(madt[72..76], IOAPIC_START.to_le_bytes());
    }

    #[test]
    fn each_device_of_the_bus_can_come_and_go() {
        let tables = written(1);
        let dsdt = &tables[3].1;
        let count = |text: &[u8]| dsdt.windows(text.len()).filter(|it| it == &text).count();
        // Its definition, and where it is notified.
        for slot in SLOTS {
            assert_eq!(count(format!("S{slot:03}").as_bytes()), 2);
        }
        assert_eq!(count(b"_EJ0"), 31);
        assert_eq!(count(b"COM1"), 1);
    }
}
