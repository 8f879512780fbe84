//! Messages on the stream: a header of ten bytes, big-endian (length, number of the stream, kind,
//! flags), and as many bytes as it says.

use std::io::{self, Read, Write};

use super::MAX_MESSAGE;

pub(super) const REQUEST: u8 = 1;
pub(super) const RESPONSE: u8 = 2;

const HEADER_LEN: usize = 10;

/// Bytes of a message with as much of a process's input or output as is sent at once.
const USUAL_LEN: u32 = 64 << 10;

/// A message, whatever it says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) stream: u32,
    pub(super) kind: u8,
    /// The message's bytes; none if it was longer than a message may be.
    pub(super) payload: Option<Vec<u8>>,
}

/// Reads the next message. None where the stream ends between two.
pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER_LEN];
    let first = loop {
        match from.read(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    from.read_exact(&mut header[first..])?;
    let [a, b, c, d, e, f, g, h, kind, _flags] = header;
    let len = u32::from_be_bytes([a, b, c, d]);
    let mut body = from.take(len.into());
    let payload = if len > MAX_MESSAGE {
        io::copy(&mut body, &mut io::sink())?;
        None
    } else {
        // In one piece if it is of a usual length; it grows with what comes, not with what is announced.
        let mut payload = vec![0; len.min(USUAL_LEN) as usize];
        body.read_exact(&mut payload)?;
        body.read_to_end(&mut payload)?;
        Some(payload)
    };
    if body.limit() > 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Frame {
        stream: u32::from_be_bytes([e, f, g, h]),
        kind,
        payload,
    }))
}

/// Writes a message, in one piece where the stream takes that.
pub(super) fn write(to: &mut impl Write, stream: u32, kind: u8, payload: &[u8]) -> io::Result<()> {
    let len = u32::try_from(payload.len()).ok();
    let Some(len) = len.filter(|len| *len <= MAX_MESSAGE) else {
        return Err(io::Error::other("a message of more than 4 MiB"));
    };
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(len.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    to.write_all(&bytes)
}
