//! Guest RAM: how it is backed, how KVM learns of it, and how files get into it.
//!
//! | backing | mapping | files placed into it |
//! |---|---|---|
//! | private (default) | anonymous, `MAP_PRIVATE` | mapped where aligned |
//! | shared | memfd, `MAP_SHARED`: another process can map it | copied |
//! | hugepages | 2 MiB pages of the host's pool | copied |
//!
//! A placed file is mapped `MAP_PRIVATE` over RAM: nothing is read before the
//! guest touches it, and VMs that boot the same kernel share its text in the
//! host's page cache. The file must not be truncated while the VM lives; the
//! guest dies if it is.

pub(crate) mod handover;
mod image;
mod pages;
mod placement;
mod remote;
pub(crate) mod remote_ram;
pub(crate) mod userfault;
mod written;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};

use api::{ByteSize, MemoryConfig};
use arch::ram::{self, RamRange};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

pub(crate) use self::image::{Extent, Layer, check_extents, check_len};
pub(crate) use self::pages::{are_pages, union, within};

/// A page of zeros; host and guest agree on the size.
pub(crate) const PAGE: [u8; 4096] = [0; 4096];
pub(crate) const PAGE_BYTES: u64 = PAGE.len() as u64;
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Why RAM could not be had or filled.
#[derive(Debug, Error)]
pub(crate) enum RamError {
    /// mmap failed.
    #[error("map {size} of guest RAM")]
    Map {
        /// How much RAM was to be mapped.
        size: ByteSize,
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The pool of huge pages is too small.
    #[error(
        "map {size} of guest RAM as huge pages: the host needs {pages} free 2 MiB pages \
         (see HugePages_Free in /proc/meminfo, set /proc/sys/vm/nr_hugepages)"
    )]
    HugePages {
        /// How much RAM was to be mapped.
        size: ByteSize,
        /// How many pages of 2 MiB that is.
        pages: u64,
        source: vm_memory::mmap::MmapRegionError,
    },
    /// memfd_create or ftruncate failed.
    #[error("create {size} of shared memory")]
    Memfd {
        /// How much shared memory was to be made.
        size: ByteSize,
        source: io::Error,
    },
    /// KVM_SET_USER_MEMORY_REGION failed.
    #[error("give KVM the RAM at {start:#x}")]
    Slot {
        /// Guest physical address of the range.
        start: u64,
        source: kvm_ioctls::Error,
    },
    /// There is no RAM where something should go.
    #[error("{len_bytes} bytes at {start:#x} do not fit into guest RAM")]
    DoesNotFit {
        /// Guest physical address where it should start.
        start: u64,
        /// Length of what should go there, in bytes.
        len_bytes: u64,
    },
    /// mmap over RAM failed.
    #[error("map a file over guest RAM at {start:#x}")]
    MapFile {
        /// Guest physical address where the file was to be mapped.
        start: u64,
        source: io::Error,
    },
    /// Reading the file into RAM failed.
    #[error("copy a file into guest RAM at {start:#x}")]
    Copy {
        /// Guest physical address where the file was to be copied.
        start: u64,
        source: GuestMemoryError,
    },
}

/// The guest's RAM. Must outlive the KVM VM whose slots point into it.
#[derive(Debug)]
pub(crate) struct Ram {
    memory: GuestMemoryMmap,
    /// Files may be mapped over it.
    private: bool,
    thp: bool,
    /// Where files are mapped over it, in offsets ([`image`]).
    mapped: Vec<Range<u64>>,
    /// The files of RAM that are mapped.
    layers: Vec<Layer>,
}

impl Ram {
    /// Reserves RAM as configured. Nothing is touched yet.
    pub(crate) fn new(config: &MemoryConfig) -> Result<Self, RamError> {
        let mut ranges = ram::ranges(config.size.bytes());
        if config.hotplug_size.0 > 0 {
            ranges.push(RamRange {
                start: ram::hotplug_start(config.size.bytes()),
                len_bytes: config.hotplug_size.0,
            });
        }
        let mut regions = Vec::with_capacity(ranges.len());
        for range in &ranges {
            let region = map(range.start, range.len_bytes, config)?;
            regions.push(
                GuestRegionMmap::new(region, range.start)
                    .expect("RAM is 1 TiB at most, far from the end of the address space"),
            );
        }
        let memory = GuestMemoryMmap::from_regions(regions)
            .expect("RAM ranges are sorted and do not overlap");
        Ok(Self {
            memory,
            private: !config.shared && !config.hugepages,
            thp: config.thp,
            mapped: Vec::new(),
            layers: Vec::new(),
        })
    }

    /// The RAM as devices and loaders see it.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Tells KVM where RAM lies: one slot a range.
    pub(crate) fn register(&self, vm: &VmFd) -> Result<(), RamError> {
        for (slot, region) in (0..).zip(self.memory.iter()) {
            let start = region.start_addr().raw_value();
            let (host, len) = (region.as_ptr(), region.len());
            log::debug!("guest RAM: {len} bytes at {start:#x}, host address {host:p}");
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region stays mapped while the VM exists: `Machine`
            // drops its VM before its `Ram`.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|source| RamError::Slot { start, source })?;
        }
        Ok(())
    }

    /// Puts `file_bytes` bytes of `file` from `file_offset` on at `start`,
    /// followed by zeros up to `memory_bytes`. RAM there must be untouched.
    pub(crate) fn place(
        &mut self,
        file: &File,
        file_offset: u64,
        file_bytes: u64,
        start: GuestAddress,
        memory_bytes: u64,
    ) -> Result<(), RamError> {
        let len = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
        if !self.memory.check_range(start, len) {
            return Err(RamError::DoesNotFit {
                start: start.raw_value(),
                len_bytes: memory_bytes,
            });
        }
        let aligned =
            file_offset.is_multiple_of(PAGE_BYTES) && start.raw_value().is_multiple_of(PAGE_BYTES);
        if self.private && aligned && file_bytes > 0 {
            self.map_file(file, file_offset, file_bytes, start)
        } else {
            self.copy_file(file, file_offset, file_bytes, start)
        }
    }

    fn copy_file(
        &self,
        file: &File,
        file_offset: u64,
        file_bytes: u64,
        start: GuestAddress,
    ) -> Result<(), RamError> {
        let failed = |source| RamError::Copy {
            start: start.raw_value(),
            source,
        };
        let len = usize::try_from(file_bytes).expect("checked against RAM");
        let mut file = file;
        io::Seek::seek(&mut file, io::SeekFrom::Start(file_offset))
            .map_err(|error| failed(GuestMemoryError::IOError(error)))?;
        self.memory
            .read_exact_volatile_from(start, &mut file, len)
            .map_err(failed)
    }

    fn map_file(
        &mut self,
        file: &File,
        file_offset: u64,
        file_bytes: u64,
        start: GuestAddress,
    ) -> Result<(), RamError> {
        let failed = |source| RamError::MapFile {
            start: start.raw_value(),
            source,
        };
        let mapped = file_bytes.next_multiple_of(PAGE_BYTES);
        let len = usize::try_from(mapped).expect("checked against RAM");
        let host = self
            .memory
            .get_slice(start, len)
            .map_err(|source| RamError::Copy {
                start: start.raw_value(),
                source,
            })?
            .ptr_guard_mut()
            .as_ptr();
        let offset = libc::off_t::try_from(file_offset)
            .map_err(|_| failed(io::Error::from_raw_os_error(libc::EOVERFLOW)))?;
        // SAFETY: `host` to `host + len` lies within one RAM mapping of ours
        // (`get_slice` checked it), so nothing but guest RAM is replaced, and it
        // stays part of what that mapping's owner unmaps. Rust holds no
        // references into guest RAM.
        let address = unsafe {
            libc::mmap(
                host.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        self.mapped.extend(self.offsets(start, mapped));
        // What follows in the file is not part of this RAM. In its place, the rest of the page gets
        // zeros.
        let tail = usize::try_from(mapped - file_bytes).expect("less than a page");
        self.memory
            .write_slice(&PAGE[..tail], start.unchecked_add(file_bytes))
            .map_err(|source| RamError::Copy {
                start: start.raw_value(),
                source,
            })
    }
}

fn map(start: GuestAddress, len_bytes: u64, config: &MemoryConfig) -> Result<MmapRegion, RamError> {
    let size = ByteSize(len_bytes);
    let len = usize::try_from(len_bytes).expect("RAM is 1 TiB at most");
    let file = if config.shared || config.hugepages {
        let file = memfd(len_bytes, config.hugepages);
        let file = file.map_err(|source| RamError::Memfd { size, source })?;
        Some(FileOffset::new(file, 0))
    } else {
        None
    };
    let build = || {
        let builder = MmapRegionBuilder::new(len);
        let builder = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match &file {
            // Without MAP_NORESERVE the kernel sets huge pages aside now: better
            // an error here than a SIGBUS when the guest touches one too many.
            Some(file) => builder
                .with_file_offset(file.clone())
                .with_mmap_flags(libc::MAP_SHARED),
            None => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        };
        builder.build()
    };
    let region = placement::aligned(len, build).map_err(|source| {
        if config.hugepages {
            RamError::HugePages {
                size,
                pages: len_bytes / HUGE_PAGE_BYTES,
                source,
            }
        } else {
            RamError::Map { size, source }
        }
    })?;
    if !config.hugepages {
        if config.thp {
            advise(&region, region.size(), libc::MADV_HUGEPAGE);
            // The first two megabytes hold the tables we write for the kernel:
            // a few pages, for which a huge one would have to be cleared.
            if start == GuestAddress(0) {
                let low = usize::try_from(HUGE_PAGE_BYTES).expect("it is 2 MiB");
                advise(&region, low.min(region.size()), libc::MADV_NOHUGEPAGE);
            }
        } else {
            advise(&region, region.size(), libc::MADV_NOHUGEPAGE);
        }
    }
    Ok(region)
}

/// Advice for the first `len` bytes. A kernel without transparent huge pages
/// refuses it, and RAM works all the same.
fn advise(region: &MmapRegion, len: usize, advice: libc::c_int) {
    debug_assert!(len <= region.size());
    // SAFETY: the range is within one mapping of ours, and neither advice changes
    // what it contains.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
    if result != 0 {
        log::debug!("no transparent huge pages: {}", io::Error::last_os_error());
    }
}

fn memfd(len_bytes: u64, hugepages: bool) -> io::Result<File> {
    let name = CString::new("podvmm-ram").expect("no NUL in it");
    let huge = if hugepages {
        libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
    } else {
        0
    };
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const START: GuestAddress = GuestAddress(0x20_0000);

    fn ram(shared: bool) -> Ram {
        let config = MemoryConfig {
            size: "32M".parse().unwrap(),
            shared,
            ..Default::default()
        };
        Ram::new(&config).unwrap()
    }

    /// Two pages of ones, then one of twos.
    fn file() -> File {
        let mut file = memfd(0, false).unwrap();
        file.write_all(&[1; 0x2000]).unwrap();
        file.write_all(&[2; 0x1000]).unwrap();
        file
    }

    fn bytes(ram: &Ram, from: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xff; len];
        ram.memory()
            .read_slice(&mut bytes, START.unchecked_add(from))
            .unwrap();
        bytes
    }

    #[test]
    fn addresses_of_guest_and_host_agree_modulo_2_mib() {
        for shared in [false, true] {
            let config = MemoryConfig {
                size: "3274M".parse().unwrap(),
                hotplug_size: ByteSize(128 << 20),
                shared,
                ..Default::default()
            };
            let ram = Ram::new(&config).unwrap();
            let offset = |region: &GuestRegionMmap| {
                region.as_ptr().addr() as u64 - region.start_addr().raw_value()
            };
            let offsets = ram.memory().iter().map(offset);
            let rests: Vec<_> = offsets.map(|it| it % HUGE_PAGE_BYTES).collect();
            assert_eq!(rests, [0; 3], "shared: {shared}");
        }
    }

    #[test]
    fn a_mapped_segment_ends_in_zeros_not_in_the_rest_of_the_file() {
        let mut ram = ram(false);
        ram.place(&file(), 0, 0x1800, START, 0x4000).unwrap();
        assert_eq!(bytes(&ram, 0x17ff, 1), [1]);
        assert_eq!(bytes(&ram, 0x1800, 0x2800), vec![0; 0x2800]);
    }

    #[test]
    fn writes_to_a_mapped_segment_leave_the_file_alone() {
        let (mut ram, file) = (ram(false), file());
        ram.place(&file, 0, 0x3000, START, 0x3000).unwrap();
        ram.memory().write_slice(&[9; 16], START).unwrap();
        let mut first = [0; 1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut first, 0).unwrap();
        assert_eq!((first, bytes(&ram, 0, 1)), ([1], vec![9]));
    }

    #[test]
    fn unaligned_segments_and_shared_ram_are_copied() {
        for (mut ram, offset, start) in [(ram(false), 0x1ff8, START), (ram(true), 0x2000, START)] {
            ram.place(&file(), offset, 0x10, start, 0x10).unwrap();
            assert_eq!(bytes(&ram, 8, 8), [2; 8]);
        }
    }

    #[test]
    fn what_does_not_fit_into_ram_is_refused() {
        let mut ram = ram(false);
        let start = GuestAddress((32 << 20) - 0x1000);
        assert!(matches!(
            ram.place(&file(), 0, 0x3000, start, 0x3000),
            Err(RamError::DoesNotFit { .. })
        ));
    }

    #[test]
    fn more_huge_pages_than_the_host_has_are_an_error_that_says_so() {
        let config = MemoryConfig {
            size: "1T".parse().unwrap(),
            hugepages: true,
            ..Default::default()
        };
        let error = Ram::new(&config).unwrap_err();
        assert!(matches!(error, RamError::HugePages { .. }), "{error:?}");
    }
}
