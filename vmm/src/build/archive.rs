//! The files that the guest is handed (docs/guest-contract.md), as a cpio archive that follows the initramfs
//! (newc; Linux, buffer-format.rst of early user space).

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_444;

/// An archive of files by their paths in the guest, all in the folder `podvmm`. Nothing without files.
pub(crate) fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    if files.is_empty() {
        return archive;
    }
    append_entry(&mut archive, "podvmm", DIRECTORY, &[]);
    for (path, content) in files {
        append_entry(&mut archive, name_of(path), FILE, content);
    }
    append_entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

/// What the archive calls a file of the guest's root.
fn name_of(path: &str) -> &str {
    path.strip_prefix('/').unwrap_or(path)
}

/// One entry: a header of 13 numbers in hexadecimal, name and content, both
/// padded to 4 bytes.
fn append_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let links = 1;
    let name_bytes = name.len() + 1;
    let numbers = [
        0, // inode
        mode as usize,
        0, // user
        0, // group
        links,
        0, // time
        content.len(),
        0, // device, major and minor
        0,
        0, // device node, major and minor
        0,
        name_bytes,
        0, // checksum
    ];
    archive.extend_from_slice(b"070701");
    for number in numbers {
        archive.extend_from_slice(format!("{number:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name and content of every entry, as a reader of the format finds them.
    fn entries(mut archive: &[u8]) -> Vec<(String, Vec<u8>)> {
        let number =
            |bytes: &[u8]| usize::from_str_radix(std::str::from_utf8(bytes).unwrap(), 16).unwrap();
        let mut entries = Vec::new();
        while !archive.is_empty() {
            assert_eq!(&archive[..6], b"070701");
            let (content_bytes, name_bytes) = (number(&archive[54..62]), number(&archive[94..102]));
            let name = String::from_utf8(archive[110..110 + name_bytes - 1].to_vec()).unwrap();
            let content_at = (110 + name_bytes).next_multiple_of(4);
            let end = content_at + content_bytes;
            entries.push((name, archive[content_at..end].to_vec()));
            archive = &archive[end.next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn the_archive_holds_the_files_in_their_folder() {
        let files = [
            ("/podvmm/argv", b"a\0b c\0".to_vec()),
            ("/podvmm/tty", b"24 80".to_vec()),
        ];
        let expected: [(&str, &[u8]); 4] = [
            ("podvmm", b""),
            ("podvmm/argv", b"a\0b c\0"),
            ("podvmm/tty", b"24 80"),
            ("TRAILER!!!", b""),
        ];
        let expected = expected.map(|(name, content)| (name.to_owned(), content.to_vec()));
        assert_eq!(entries(&archive(&files)), expected);
        assert_eq!(archive(&[]), b"");
    }
}
