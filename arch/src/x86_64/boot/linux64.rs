//! The Linux 64-bit boot protocol: `boot_params`, the "zero page".

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use vm_memory::{Address, GuestMemoryMmap};

use super::{BootError, BootInfo, memory_map};
use crate::layout::{CMDLINE_START, ZERO_PAGE_START};

/// For kernels that bring no setup header of their own (ELF images).
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

pub(super) fn write(
    memory: &GuestMemoryMmap,
    header: Option<&setup_header>,
    info: BootInfo,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.copied().unwrap_or_else(elf_header),
        ..Default::default()
    };
    params.hdr.cmd_line_ptr = low_half(CMDLINE_START.raw_value());
    params.hdr.cmdline_size = low_half(info.cmdline.len() as u64);
    if let Some((start, len_bytes)) = info.initramfs {
        params.hdr.ramdisk_image = low_half(start.raw_value());
        params.ext_ramdisk_image = high_half(start.raw_value());
        params.hdr.ramdisk_size = low_half(len_bytes);
        params.ext_ramdisk_size = high_half(len_bytes);
    }
    let map = memory_map(info.ram, info.pci);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(map.iter().copied()) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
    params.e820_entries = u8::try_from(map.len()).expect("there are few ranges");
    let params = BootParams::new(&params, ZERO_PAGE_START);
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(BootError::Configure)
}

fn elf_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        type_of_loader: LOADER_UNDEFINED,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits")
}

fn high_half(value: u64) -> u32 {
    low_half(value >> 32)
}
