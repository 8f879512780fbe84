//! Any file as a kernel: what is said of it lies within the file and above the data of the boot, the boot's data
//! stays below 1 MiB, and however large the file, little memory is taken.
#![no_main]

mod heap;

use std::fs::File;
use std::os::unix::fs::FileExt;

use arbitrary::Arbitrary;
use arch::boot::{self, BootInfo, KernelImage};
use arch::{layout, ram};
use libfuzzer_sys::fuzz_target;
use rustix::fs::MemfdFlags;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// Notes of 64 KiB, and as many segments as there may be.
const MOST_HELD: usize = 160 << 10;
const MOST_SEGMENTS: usize = 64;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    image: Image<'a>,
    /// How long the file is at least; what is not written is a hole.
    len: Number,
    ram_mib: u16,
    cmdline: &'a str,
    initramfs: Option<(Number, Number)>,
}

#[derive(Arbitrary, Debug)]
enum Image<'a> {
    Bytes(&'a [u8]),
    Elf {
        entry: Number,
        programs: Vec<Program>,
        /// Where the program headers are, if not behind the ELF header.
        at: Option<Number>,
        notes: &'a [u8],
    },
    BzImage {
        setup_sects: u8,
        syssize: u8,
        is_old: bool,
        is_32: bool,
        pref_address: Number,
        /// In pages.
        init_size: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Program {
    kind: u8,
    offset: Number,
    paddr: Number,
    filesz: Number,
    memsz: Number,
}

/// A number at which things may go wrong.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Number {
    Any(u64),
    Small(u16),
    Mib(u16),
    FromEnd(u8),
}

impl Number {
    fn get(self) -> u64 {
        match self {
            Self::Any(number) => number,
            Self::Small(number) => number.into(),
            Self::Mib(number) => u64::from(number) << 20,
            Self::FromEnd(number) => u64::MAX - u64::from(number),
        }
    }
}

impl Image<'_> {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.to_vec(),
            Self::Elf {
                entry,
                programs,
                at,
                notes,
            } => {
                // ELF of 64 bits, little-endian; an executable for x86-64.
                let mut bytes =
                    b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
                bytes.extend(entry.get().to_le_bytes());
                bytes.extend(at.map_or(64, Number::get).to_le_bytes());
                bytes.extend([0; 8 + 4]);
                let count = u16::try_from(programs.len()).unwrap_or(u16::MAX);
                for number in [64, 56, count, 0, 0, 0] {
                    bytes.extend(number.to_le_bytes());
                }
                for program in programs {
                    // PT_LOAD, PT_NOTE and what is neither.
                    let kind = [1_u32, 4, 6][usize::from(program.kind % 3)];
                    bytes.extend(kind.to_le_bytes());
                    bytes.extend([0; 4]);
                    let Program {
                        offset,
                        paddr,
                        filesz,
                        memsz,
                        ..
                    } = program;
                    for number in [offset, paddr, paddr, filesz, memsz] {
                        bytes.extend(number.get().to_le_bytes());
                    }
                    bytes.extend([0; 8]);
                }
                bytes.extend(*notes);
                bytes
            }
            Self::BzImage {
                setup_sects,
                syssize,
                is_old,
                is_32,
                pref_address,
                init_size,
            } => {
                let mut bytes = vec![0; 0x270];
                let mut put = |at: usize, field: &[u8]| {
                    bytes[at..at + field.len()].copy_from_slice(field);
                };
                put(0x1f1, &[*setup_sects]);
                put(0x1f4, &u32::from(*syssize).to_le_bytes());
                put(0x202, b"HdrS");
                put(0x206, &[if *is_old { 0x0b } else { 0x0f }, 2]);
                put(0x236, &[u8::from(!is_32)]);
                put(0x258, &pref_address.get().to_le_bytes());
                put(0x260, &(u32::from(*init_size) << 12).to_le_bytes());
                bytes
            }
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    let file = rustix::fs::memfd_create(c"kernel", MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    let bytes = input.image.bytes();
    file.write_all_at(&bytes, 0).unwrap();
    // A file in memory has less than 2^63 bytes.
    let len = (input.len.get() >> 2).max(bytes.len() as u64);
    file.set_len(len).unwrap();
    let Ok(image) = heap::bounded(MOST_HELD, || KernelImage::read(&file)) else {
        return;
    };
    check(&image, len);
    let ram = ram::ranges(u64::from(input.ram_mib).max(1) << 20);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    let info = BootInfo {
        ram: &ram,
        cmdline: input.cmdline,
        initramfs: input
            .initramfs
            .map(|(start, len)| (GuestAddress(start.get()), len.get())),
        pci: true,
    };
    let _ = heap::bounded(MOST_HELD, || boot::write(&memory, &image, info));
    let mut kernel_ram = [0; 4096];
    let start = layout::KERNEL_RAM_START;
    memory.read_slice(&mut kernel_ram, start).unwrap();
    assert_eq!(kernel_ram, [0; 4096]);
});

fn check(image: &KernelImage, len: u64) {
    assert!((1..=MOST_SEGMENTS).contains(&image.segments.len()));
    for segment in &image.segments {
        let end = segment.file_offset.checked_add(segment.file_bytes);
        assert!(end.is_some_and(|end| end <= len), "{segment:x?}");
        assert!(segment.file_bytes <= segment.memory_bytes, "{segment:x?}");
        assert!(segment.start >= layout::KERNEL_RAM_START, "{segment:x?}");
        let end = segment.start.checked_add(segment.memory_bytes);
        assert!(end.is_some_and(|end| end <= image.end), "{segment:x?}");
    }
}
