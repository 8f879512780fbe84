//! The other end: one connection to a server, one request at a time.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use thiserror::Error;

use super::connection::MAX_FDS;

/// How long an answer may take. The slowest requests end a guest, which gets seconds.
const PATIENCE: Duration = Duration::from_secs(30);
const MAX_ANSWER: usize = 16 << 20;

/// Why there is no answer, or it is a refusal.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error("connect to {}", .path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("talk to podvmm")]
    Io(#[from] io::Error),
    /// A path that JSON cannot say.
    #[error("write the request: {0}")]
    Body(String),
    #[error("podvmm's answer makes no sense: {0}")]
    Answer(String),
    /// podvmm said no, and why.
    #[error("{}", .why.join(": "))]
    Refused { status: u16, why: Vec<String> },
}

/// A connection to podvmm's API.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connect = || {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| ClientError::Connect {
            path: path.into(),
            source,
        })?;
        Ok(Self { stream })
    }

    /// Sends a request and returns the body of its answer. `fds` are passed along.
    pub fn call(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&str>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, ClientError> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if let Some(body) = body {
            request.push_str("Content-Type: application/json\r\nContent-Length: ");
            request.push_str(&body.len().to_string());
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        request.push_str(body.unwrap_or_default());
        self.send(request.as_bytes(), fds)?;
        let (status, body) = self.answer()?;
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let why = serde_json::from_slice(&body)
            .unwrap_or_else(|_| vec![String::from_utf8_lossy(&body).into_owned()]);
        Err(ClientError::Refused { status, why })
    }

    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            let why = format!("at most {MAX_FDS} file descriptors go with a request");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why).into());
        }
        let sent = sendmsg(
            self.stream.as_fd(),
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(io::Error::from)?;
        self.stream.write_all(&bytes[sent..])?;
        Ok(())
    }

    fn answer(&mut self) -> Result<(u16, Vec<u8>), ClientError> {
        let mut bytes = Vec::new();
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut parsed = httparse::Response::new(&mut headers);
            let status = parsed
                .parse(&bytes)
                .map_err(|error| ClientError::Answer(error.to_string()))?;
            let httparse::Status::Complete(used) = status else {
                self.more(&mut bytes)?;
                continue;
            };
            let length = parsed
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case("Content-Length"))
                .and_then(|header| str::from_utf8(header.value).ok()?.trim().parse().ok())
                .unwrap_or(0);
            if length > MAX_ANSWER {
                return Err(ClientError::Answer(format!("{length} bytes long")));
            }
            let status = parsed.code.unwrap_or(0);
            let mut body = bytes.split_off(used);
            while body.len() < length {
                self.more(&mut body)?;
            }
            return Ok((status, body));
        }
    }

    fn more(&mut self, bytes: &mut Vec<u8>) -> Result<(), ClientError> {
        let mut piece = [0; 8 << 10];
        let count = self.stream.read(&mut piece)?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        bytes.extend_from_slice(&piece[..count]);
        Ok(())
    }
}
