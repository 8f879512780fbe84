//! ELF images (`vmlinux`), by their program headers alone.
//!
//! linux-loader's ELF loader copies as it reads. Here the headers become a
//! description first, so that the caller can map what is aligned instead of
//! copying it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use vm_memory::{Address, ByteValued, GuestAddress};

use super::{Entry, ImageError, KernelImage, Segment};

const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Longest note segment read; Linux has a few hundred bytes of notes.
const MAX_NOTE_BYTES: u64 = 64 << 10;
/// Note type "Xen, 32-bit physical entry point": where PVH starts.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

pub(super) fn read(file: &File, file_bytes: u64) -> Result<KernelImage, ImageError> {
    let header: Elf64_Ehdr = read_object(file, file_bytes, 0, "the ELF header")?;
    let ident = header.e_ident;
    if ident[EI_CLASS] != ELFCLASS64
        || ident[EI_DATA] != ELFDATA2LSB
        || header.e_machine != EM_X86_64
        || header.e_type != ET_EXEC
    {
        return Err(ImageError::WrongElf);
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>()
        || header.e_phnum > MAX_PROGRAM_HEADERS
    {
        return Err(ImageError::Malformed(
            "the ELF header describes no program headers we know",
        ));
    }

    let mut segments = Vec::new();
    let mut pvh = None;
    let mut end = GuestAddress(0);
    for index in 0..u64::from(header.e_phnum) {
        let at = index
            .checked_mul(size_of::<Elf64_Phdr>() as u64)
            .and_then(|offset| offset.checked_add(header.e_phoff))
            .ok_or(ImageError::Malformed(
                "program headers lie past the end of everything",
            ))?;
        let program: Elf64_Phdr = read_object(file, file_bytes, at, "the program headers")?;
        match program.p_type {
            PT_LOAD if program.p_memsz > 0 => {
                let segment = segment(&program, file_bytes)?;
                end = end.max(segment.start.unchecked_add(segment.memory_bytes));
                segments.push(segment);
            }
            PT_NOTE => pvh = pvh.or(pvh_entry(file, file_bytes, &program)?),
            _ => {}
        }
    }
    let entry = match pvh {
        Some(start) => Entry::Pvh(start),
        None => Entry::Linux64(GuestAddress(header.e_entry)),
    };
    Ok(KernelImage {
        segments,
        entry,
        end,
        setup_header: None,
    })
}

fn segment(program: &Elf64_Phdr, file_bytes: u64) -> Result<Segment, ImageError> {
    const OVERFLOW: ImageError = ImageError::Malformed("a segment ends past the end of everything");
    let file_end = program
        .p_offset
        .checked_add(program.p_filesz)
        .ok_or(OVERFLOW)?;
    if file_end > file_bytes {
        return Err(ImageError::Truncated {
            what: "a segment",
            end: file_end,
            file_bytes,
        });
    }
    if program.p_filesz > program.p_memsz {
        return Err(ImageError::Malformed(
            "a segment is longer in the file than in memory",
        ));
    }
    program
        .p_paddr
        .checked_add(program.p_memsz)
        .ok_or(OVERFLOW)?;
    Ok(Segment {
        file_offset: program.p_offset,
        file_bytes: program.p_filesz,
        start: GuestAddress(program.p_paddr),
        memory_bytes: program.p_memsz,
    })
}

/// Looks for the PVH entry point among the notes of a PT_NOTE segment.
fn pvh_entry(
    file: &File,
    file_bytes: u64,
    program: &Elf64_Phdr,
) -> Result<Option<GuestAddress>, ImageError> {
    let end = program.p_offset.saturating_add(program.p_filesz);
    if end > file_bytes {
        return Err(ImageError::Truncated {
            what: "the notes",
            end,
            file_bytes,
        });
    }
    if program.p_filesz > MAX_NOTE_BYTES {
        return Err(ImageError::Malformed("the notes take more than 64 KiB"));
    }
    let mut notes = vec![0; usize::try_from(program.p_filesz).expect("64 KiB at most")];
    file.read_exact_at(&mut notes, program.p_offset)
        .map_err(ImageError::Read)?;
    Ok(find_pvh_note(&notes))
}

/// Walks notes: name length, descriptor length, type, then name and
/// descriptor, each padded to 4 bytes.
fn find_pvh_note(mut notes: &[u8]) -> Option<GuestAddress> {
    let word = |bytes: &[u8]| bytes.try_into().map(u32::from_le_bytes).ok();
    loop {
        let name_bytes = word(notes.get(0..4)?)? as usize;
        let desc_bytes = word(notes.get(4..8)?)? as usize;
        let kind = word(notes.get(8..12)?)?;
        let rest = notes.get(12..)?;
        let name = rest.get(..name_bytes)?;
        let desc = rest.get(name_bytes.next_multiple_of(4)..)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc_bytes >= 4 {
            return word(desc.get(..4)?).map(|start| GuestAddress(start.into()));
        }
        notes = desc.get(desc_bytes.next_multiple_of(4)..)?;
    }
}

fn read_object<T: ByteValued + Default>(
    file: &File,
    file_bytes: u64,
    at: u64,
    what: &'static str,
) -> Result<T, ImageError> {
    let end = at.saturating_add(size_of::<T>() as u64);
    if end > file_bytes {
        return Err(ImageError::Truncated {
            what,
            end,
            file_bytes,
        });
    }
    let mut object = T::default();
    file.read_exact_at(object.as_mut_slice(), at)
        .map_err(ImageError::Read)?;
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(desc.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        for part in [name, desc] {
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let mut notes = note(b"Linux\0", 0x100, b"12345");
        notes.extend(note(
            b"Xen\0",
            XEN_ELFNOTE_PHYS32_ENTRY,
            &0x100_0340_u32.to_le_bytes(),
        ));
        assert_eq!(find_pvh_note(&notes), Some(GuestAddress(0x100_0340)));
    }

    #[test]
    fn other_xen_notes_are_no_entry_point() {
        assert_eq!(find_pvh_note(&note(b"Xen\0", 5, b"xen-3.0\0")), None);
    }

    proptest! {
        #[test]
        fn any_bytes_as_notes_are_survived(notes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = find_pvh_note(&notes);
        }
    }
}
