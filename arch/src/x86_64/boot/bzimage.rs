//! bzImages: a setup header, real-mode code we skip, and a compressed kernel
//! that unpacks itself (Linux x86 boot protocol).

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress};

use super::{Entry, ImageError, KernelImage, Segment};

/// "HdrS", the mark of boot protocol 2.00 and later.
const MAGIC: u32 = 0x5372_6448;
const HEADER_OFFSET: u64 = 0x1f1;
/// First protocol version with `xloadflags`.
const VERSION_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point's distance from the start of the loaded code.
const ENTRY_64_OFFSET: u64 = 0x200;
/// A loader without an id of its own.
const LOADER_UNDEFINED: u8 = 0xff;

pub(super) fn read(file: &File, file_bytes: u64) -> Result<KernelImage, ImageError> {
    let header_end = HEADER_OFFSET + size_of::<setup_header>() as u64;
    if file_bytes < header_end {
        return Err(ImageError::NotAKernel);
    }
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), HEADER_OFFSET)
        .map_err(ImageError::Read)?;
    if header.header != MAGIC {
        return Err(ImageError::NotAKernel);
    }
    if header.version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(ImageError::No64BitEntry);
    }
    // 0 means 4, for images of the nineties.
    let setup_sectors = u64::from(if header.setup_sects == 0 {
        4
    } else {
        header.setup_sects
    });
    let code_offset = (setup_sectors + 1) * 512;
    // In 16-byte units; the file may carry padding or a signature behind it.
    let code_bytes = u64::from(header.syssize) * 16;
    let code_end = code_offset + code_bytes;
    if code_bytes == 0 {
        return Err(ImageError::Malformed("a bzImage without code"));
    }
    if code_end > file_bytes {
        return Err(ImageError::Truncated {
            what: "the kernel",
            end: code_end,
            file_bytes,
        });
    }
    // It is loaded where it wants to run, so it need not move itself.
    let start = header.pref_address;
    let memory_bytes = u64::from(header.init_size).max(code_bytes);
    let past = |bytes| {
        start.checked_add(bytes).ok_or(ImageError::Malformed(
            "the kernel ends past the end of the address space",
        ))
    };
    let (end, entry) = (past(memory_bytes)?, past(ENTRY_64_OFFSET)?);
    header.type_of_loader = LOADER_UNDEFINED;
    Ok(KernelImage {
        segments: vec![Segment {
            file_offset: code_offset,
            file_bytes: code_bytes,
            start: GuestAddress(start),
            memory_bytes,
        }],
        entry: Entry::Linux64(GuestAddress(entry)),
        end: GuestAddress(end),
        setup_header: Some(Box::new(header)),
    })
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    /// A bzImage of one sector of code that wants to lie there.
    fn image(pref_address: u64) -> Result<KernelImage, ImageError> {
        let mut bytes = vec![0; 2048];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0x1f1, &[1]);
        put(0x1f4, &32_u32.to_le_bytes());
        put(0x202, &MAGIC.to_le_bytes());
        put(0x206, &VERSION_2_12.to_le_bytes());
        put(0x236, &XLF_KERNEL_64.to_le_bytes());
        put(0x258, &pref_address.to_le_bytes());
        let file = TempFile::new().unwrap();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        read(file.as_file(), 2048)
    }

    #[test]
    fn a_kernel_ends_and_is_entered_in_the_address_space() {
        let read = image(0x100_0000).unwrap();
        assert_eq!(read.entry, Entry::Linux64(GuestAddress(0x100_0200)));
        assert_eq!(read.end, GuestAddress(0x100_0200));
        for bytes in [1, 0x1ff, 0x200] {
            let refused = image(u64::MAX - bytes + 1).unwrap_err().to_string();
            assert!(refused.contains("past the end"), "{refused}");
        }
    }
}
