//! The PVH boot protocol: `hvm_start_info`, its module list and memory map
//! (Xen's `start_info.h`, version 1).

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, GuestMemoryMmap};

use super::{BootError, BootInfo, memory_map};
use crate::layout::{CMDLINE_START, PVH_INFO_START, PVH_MEMMAP_START, PVH_MODLIST_START};

const START_MAGIC: u32 = 0x336e_c578;
const VERSION_WITH_MEMORY_MAP: u32 = 1;

pub(super) fn write(memory: &GuestMemoryMmap, info: BootInfo) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(info.ram, info.pci)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = info
        .initramfs
        .map(|(start, size)| hvm_modlist_entry {
            paddr: start.raw_value(),
            size,
            ..Default::default()
        })
        .into_iter()
        .collect();
    let start_info = hvm_start_info {
        magic: START_MAGIC,
        version: VERSION_WITH_MEMORY_MAP,
        nr_modules: u32::from(info.initramfs.is_some()),
        modlist_paddr: PVH_MODLIST_START.raw_value(),
        cmdline_paddr: CMDLINE_START.raw_value(),
        memmap_paddr: PVH_MEMMAP_START.raw_value(),
        memmap_entries: u32::try_from(map.len()).expect("there are few ranges"),
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, PVH_INFO_START);
    params.set_sections(&map, PVH_MEMMAP_START);
    params.set_modules(&modules, PVH_MODLIST_START);
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(BootError::Configure)
}
