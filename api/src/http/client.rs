//! The other end: one connection to a server, one request at a time.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use thiserror::Error;

use super::connection::MAX_FDS;

/// How long an answer may take. The slowest requests end a guest, which gets seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest body of an answer. What podvmm says of itself takes some KiB.
const MAX_ANSWER: usize = 1 << 20;
/// Longest status line and headers together.
const MAX_HEAD: usize = 16 << 10;

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

    #[cfg(feature = "test-utils")]
    pub(super) fn over(stream: UnixStream) -> Self {
        Self { stream }
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

    /// The next answer. A podvmm that its guest has taken over may say anything, at any length and pace.
    fn answer(&mut self) -> Result<(u16, Vec<u8>), ClientError> {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = Vec::new();
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut parsed = httparse::Response::new(&mut headers);
            let status = parsed
                .parse(&bytes)
                .map_err(|error| ClientError::Answer(error.to_string()))?;
            let httparse::Status::Complete(used) = status else {
                if bytes.len() > MAX_HEAD {
                    return Err(ClientError::Answer("its headers do not end".into()));
                }
                self.more(&mut bytes, deadline)?;
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
                self.more(&mut body, deadline)?;
            }
            body.truncate(length);
            return Ok((status, body));
        }
    }

    fn more(&mut self, bytes: &mut Vec<u8>, deadline: Instant) -> Result<(), ClientError> {
        if Instant::now() > deadline {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
        let mut piece = [0; 8 << 10];
        let count = self.stream.read(&mut piece)?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        bytes.extend_from_slice(&piece[..count]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client makes of an answer that goes on with the same bytes as long as they are taken.
    fn endless(start: &str, more: &str) -> (ClientError, usize) {
        let (client, mut podvmm) = UnixStream::pair().unwrap();
        let (start, more) = (start.to_owned(), more.repeat(1024));
        let says = std::thread::spawn(move || {
            let mut said = start.len();
            podvmm.write_all(start.as_bytes()).unwrap();
            while podvmm.write_all(more.as_bytes()).is_ok() {
                said += more.len();
            }
            said
        });
        let mut client = Client { stream: client };
        let error = client.call("GET", "/", None, &[]).unwrap_err();
        drop(client);
        (error, says.join().unwrap())
    }

    #[test]
    fn an_answer_without_end_is_not_kept() {
        // What a socket holds is said, too.
        const MOST: usize = 1 << 20;
        let (error, said) = endless("HTTP/1.1 200 \r\nA: ", "aaaaaaaa");
        assert!(error.to_string().contains("do not end"), "{error}");
        assert!(said < MOST, "{said} bytes");
        let head = format!(
            "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n",
            MAX_ANSWER + 1
        );
        let (error, said) = endless(&head, "[[],[],[");
        assert!(error.to_string().contains("bytes long"), "{error}");
        assert!(said < MOST, "{said} bytes");
    }

    #[test]
    fn what_follows_an_answer_is_no_part_of_it() {
        let (client, mut podvmm) = UnixStream::pair().unwrap();
        podvmm
            .write_all(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 500 \r\n")
            .unwrap();
        let mut client = Client { stream: client };
        assert_eq!(client.call("GET", "/", None, &[]).unwrap(), b"{}");
    }
}
