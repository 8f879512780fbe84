//! Guests of a few instructions: an ELF image around machine code that the
//! compiler's own assembler makes.

use std::io::Write;
use std::path::Path;

use tempfile::NamedTempFile;

/// Where payloads are linked, and entered.
pub const START: u64 = 0x10_0000;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
const NOTE_OFFSET: usize = 0x800;
const CODE_OFFSET: usize = 0x1000;

/// How a payload wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// An ELF image with a PVH note: 32-bit protected mode.
    Pvh,
    /// One without: 64-bit long mode.
    Linux64,
}

/// An ELF image on disk.
#[derive(Debug)]
pub struct Payload {
    file: NamedTempFile,
}

impl Payload {
    pub fn new(code: &[u8], protocol: Protocol) -> Self {
        Self::from_bytes(&image(code, protocol))
    }

    /// A file of any content.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut file = NamedTempFile::new().expect("there is a folder for temporary files");
        file.write_all(bytes).expect("and room in it");
        Self { file }
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The arguments that boot it.
    pub fn arguments(&self) -> [&str; 2] {
        [
            "--kernel",
            self.path()
                .to_str()
                .expect("temporary files have plain names"),
        ]
    }
}

/// An ELF image of one segment with `code`, and a PVH note if wanted.
pub fn image(code: &[u8], protocol: Protocol) -> Vec<u8> {
    let entry = START.to_le_bytes();
    let mut note = Vec::new();
    if protocol == Protocol::Pvh {
        let words: [u32; 3] = [4, 4, 18];
        words
            .iter()
            .for_each(|word| note.extend_from_slice(&word.to_le_bytes()));
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&entry[..4]);
    }
    let code_bytes = code.len() as u64;
    let headers = [
        program_header(
            1,
            CODE_OFFSET as u64,
            START,
            code_bytes,
            code_bytes + 0x1000,
        ),
        program_header(
            4,
            NOTE_OFFSET as u64,
            0,
            note.len() as u64,
            note.len() as u64,
        ),
    ];

    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let (executable, x86_64, version): (u16, u16, u32) = (2, 62, 1);
    bytes.extend_from_slice(&executable.to_le_bytes());
    bytes.extend_from_slice(&x86_64.to_le_bytes());
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&entry);
    bytes.extend_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
    bytes.extend_from_slice(&[0; 8 + 4]); // no section headers, no flags
    for half in [64, PROGRAM_HEADER_BYTES, 2, 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    headers
        .iter()
        .for_each(|header| bytes.extend_from_slice(header));
    bytes.resize(NOTE_OFFSET, 0);
    bytes.extend_from_slice(&note);
    bytes.resize(CODE_OFFSET, 0);
    bytes.extend_from_slice(code);
    bytes
}

fn program_header(kind: u32, offset: u64, address: u64, in_file: u64, in_memory: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&7_u32.to_le_bytes());
    for word in [offset, address, address, in_file, in_memory, 0x1000] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Machine code from assembly: `code!(NAME, ".code32", "hlt")` defines a
/// function `NAME` that returns its bytes. The code must not care where it lies.
#[macro_export]
macro_rules! code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".pushsection .rodata.payload, \"a\", @progbits",
            concat!(".global payload_", stringify!($name)),
            concat!("payload_", stringify!($name), ":"),
            $($line,)+
            ".code64",
            concat!(".global payload_end_", stringify!($name)),
            concat!("payload_end_", stringify!($name), ":"),
            ".popsection",
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("payload_", stringify!($name))]
                static FIRST: u8;
                #[link_name = concat!("payload_end_", stringify!($name))]
                static END: u8;
            }
            let first = &raw const FIRST;
            let len = (&raw const END).addr() - first.addr();
            // SAFETY: both labels delimit bytes of one read-only section.
            unsafe { core::slice::from_raw_parts(first, len) }
        }
    };
}
