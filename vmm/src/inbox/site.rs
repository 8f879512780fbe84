//! Where a guest was when it could not go on.

use std::fmt;

/// Where a vCPU was, and the bytes it was about to execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    pub(crate) rip: Option<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rip {
            Some(rip) => write!(f, "at RIP {rip:#x}")?,
            None => f.write_str("at an unknown RIP")?,
        }
        if self.bytes.is_empty() {
            return f.write_str(", instruction bytes unreadable");
        }
        f.write_str(", instruction bytes")?;
        self.bytes
            .iter()
            .try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}
