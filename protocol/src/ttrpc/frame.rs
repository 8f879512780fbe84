//! Messages on the stream: a header of ten bytes, big-endian (length, number of the stream, kind,
//! flags), and as many bytes as it says.

use std::io::{self, Read, Write};

use super::MAX_MESSAGE;

pub(super) const REQUEST: u8 = 1;
pub(super) const RESPONSE: u8 = 2;

const HEADER_LEN: usize = 10;

/// Bytes of a message with as much of a process's input or output as is sent at once.
const USUAL_LEN: u32 = 64 << 10;

/// Bytes read at once: most requests and answers with their headers.
pub(super) const READ_AHEAD: usize = 4 << 10;

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
    let Some(header) = Header::read(from)? else {
        return Ok(None);
    };
    Ok(Some(Frame {
        stream: header.stream,
        kind: header.kind,
        payload: header.payload(from, MAX_MESSAGE)?,
    }))
}

/// What is said of a message before it comes.
#[derive(Debug)]
pub(super) struct Header {
    len: u32,
    pub(super) stream: u32,
    pub(super) kind: u8,
}

impl Header {
    /// Reads the next one. None where the stream ends before it.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
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
        Ok(Some(Self {
            len: u32::from_be_bytes([a, b, c, d]),
            stream: u32::from_be_bytes([e, f, g, h]),
            kind,
        }))
    }

    /// Reads the message's bytes. What is longer than `most` is passed over, and none.
    pub(super) fn payload(&self, from: &mut impl Read, most: u32) -> io::Result<Option<Vec<u8>>> {
        if self.len > most {
            return self.pass_over(from).map(|()| None);
        }
        let mut body = from.take(self.len.into());
        // In one piece if it is of a usual length; it grows with what comes, not with what is announced.
        let mut payload = vec![0; self.len.min(USUAL_LEN) as usize];
        body.read_exact(&mut payload)?;
        body.read_to_end(&mut payload)?;
        match body.limit() {
            0 => Ok(Some(payload)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Reads the message's bytes and keeps none of them.
    pub(super) fn pass_over(&self, from: &mut impl Read) -> io::Result<()> {
        let mut body = from.take(self.len.into());
        io::copy(&mut body, &mut io::sink())?;
        match body.limit() {
            0 => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Writes a message, in one piece where the stream takes that.
pub(super) fn write(to: &mut impl Write, stream: u32, kind: u8, payload: &[u8]) -> io::Result<()> {
    to.write_all(&encode(stream, kind, payload)?)
}

/// A message as it is written.
pub(super) fn encode(stream: u32, kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let len = u32::try_from(payload.len()).ok();
    let Some(len) = len.filter(|len| *len <= MAX_MESSAGE) else {
        return Err(io::Error::other("a message of more than 4 MiB"));
    };
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(len.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    Ok(bytes)
}
