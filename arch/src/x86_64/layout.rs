//! The guest's physical address map.
//!
//! ```text
//! 0x0000_0500  GDT
//! 0x0000_7000  boot parameters (zero page, or hvm_start_info and its tables)
//! 0x0000_9000  page tables of the 64-bit boot protocol
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of conventional RAM
//! 0x000e_0000  ACPI tables, of a machine with a PCI bus, reserved
//! 0x000f_0000  MP table, reserved
//! 0x0010_0000  RAM: kernel, initramfs at its upper end
//! 0xc000_0000  MMIO hole: virtio-mmio windows
//! 0xe000_0000  BARs of PCI devices
//! 0xfec0_0000  IOAPIC, local APIC, KVM's pages
//! 0x1_0000_0000  RAM again
//! ```

use vm_memory::GuestAddress;

/// Global descriptor table in use when the kernel starts.
pub const GDT_START: GuestAddress = GuestAddress(0x500);
/// `boot_params`, the "zero page" of the Linux 64-bit boot protocol.
pub const ZERO_PAGE_START: GuestAddress = GuestAddress(0x7000);
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_INFO_START: GuestAddress = GuestAddress(0x7000);
/// PVH module list: one entry, the initramfs.
pub const PVH_MODLIST_START: GuestAddress = GuestAddress(0x7040);
/// PVH memory map table.
pub const PVH_MEMMAP_START: GuestAddress = GuestAddress(0x7100);
/// Page tables of the 64-bit boot protocol: three pages, identity-mapping 1 GiB.
pub const PAGE_TABLES_START: GuestAddress = GuestAddress(0x9000);
/// Kernel command line, NUL-terminated.
pub const CMDLINE_START: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line Linux reads on x86, its NUL included
/// (`COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX_BYTES: usize = 2048;
/// End of conventional RAM; real machines keep their EBDA from here on.
pub const LOW_RAM_END: GuestAddress = GuestAddress(0x9_fc00);
/// ACPI tables, with their root pointer first: where kernels look for it (ACPI 6.5 §5.2.5.1).
pub const ACPI_START: GuestAddress = GuestAddress(0xe_0000);
/// First byte past the area of the ACPI tables.
pub const ACPI_END: GuestAddress = GuestAddress(0xf_0000);
/// MP floating pointer structure and configuration table. Linux looks for it in
/// the BIOS area, 64 KiB from here.
pub const MPTABLE_START: GuestAddress = GuestAddress(0xf_0000);
/// First byte past the MP table's area.
pub const MPTABLE_END: GuestAddress = GuestAddress(0x10_0000);
/// RAM above the first MiB, where kernels are loaded.
pub const KERNEL_RAM_START: GuestAddress = GuestAddress(0x10_0000);

/// The hole in RAM below 4 GiB.
pub const MMIO_HOLE_START: GuestAddress = GuestAddress(0xc000_0000);
/// RAM continues here.
pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x1_0000_0000);
/// First virtio-mmio window.
pub const MMIO_WINDOWS_START: GuestAddress = GuestAddress(0xc000_0000);
/// Size of one virtio-mmio window in bytes.
pub const MMIO_WINDOW_BYTES: u64 = 0x1000;

/// Where BARs of PCI devices may be.
pub const PCI_WINDOW: std::ops::Range<u64> = 0xe000_0000..0xfec0_0000;

/// The ports by which a guest that reads ACPI tables learns which PCI devices have come or are to go: three
/// registers of four bytes.
pub const PCI_HOTPLUG_PORTS: u16 = 0xae00;
/// How many bytes they are.
pub const PCI_HOTPLUG_PORTS_LEN: u16 = 12;
/// IOAPIC pin that says so. With a PCI bus it is no device's.
pub const PCI_EVENT_GSI: u32 = 5;

/// IOAPIC registers (82093AA default).
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC_START: u32 = 0xfee0_0000;
/// Three pages KVM needs on Intel for real mode (KVM_SET_TSS_ADDR).
pub const KVM_TSS_START: usize = 0xfffb_d000;
/// One page KVM needs on Intel for real mode (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// IOAPIC pin of the first serial port, as on every PC.
pub const SERIAL_GSI: u32 = 4;
/// IOAPIC pins for devices: 0 to 4 belong to the PIT, keyboard, cascade and
/// serial ports.
pub const DEVICE_GSIS: std::ops::RangeInclusive<u32> = 5..=23;
