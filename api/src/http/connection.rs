//! Bytes of one client, turned into requests. Knows no socket, and holds no more than one request
//! and what came with it.

use std::mem;
use std::os::fd::OwnedFd;

use super::message::{Method, Request, Response};

/// Longest request line and headers together.
const MAX_HEAD: usize = 16 << 10;
/// Longest body. A VM's configuration is a few KiB.
const MAX_BODY: usize = 256 << 10;
const MAX_HEADERS: usize = 64;
/// More descriptors than any request needs: one for each queue pair of a network device.
pub(super) const MAX_FDS: usize = 32;

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Parsed {
    /// There is no whole request yet.
    Incomplete,
    /// The client waits for a word before it sends the body.
    Continue,
    /// One whole request, and whether the client wants the connection kept.
    Request(Request, bool),
    /// The connection can take no further request: answer this and close.
    Refuse(Response),
}

/// What is known of a request whose body is still to come.
#[derive(Debug)]
struct Head {
    method: Method,
    path: String,
    body_len: usize,
    keep_alive: bool,
    expects_continue: bool,
}

#[derive(Debug, Default)]
pub(super) struct Connection {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    head: Option<Head>,
}

impl Connection {
    /// Takes what came from the client.
    pub(super) fn receive(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The next request, if it is whole.
    pub(super) fn next(&mut self) -> Parsed {
        if self.fds.len() > MAX_FDS {
            return refuse(400, "too many file descriptors");
        }
        if self.head.is_none() {
            match parse_head(&self.bytes) {
                Ok(None) if self.bytes.len() > MAX_HEAD => {
                    return refuse(431, "the headers are longer than 16 KiB");
                }
                Ok(None) => return Parsed::Incomplete,
                Ok(Some((_, used))) if used > MAX_HEAD => {
                    return refuse(431, "the headers are longer than 16 KiB");
                }
                Ok(Some((head, used))) => {
                    self.bytes.drain(..used);
                    self.head = Some(head);
                }
                Err(refusal) => return Parsed::Refuse(refusal),
            }
        }
        match self.head.take() {
            Some(head) if self.bytes.len() >= head.body_len => {
                let rest = self.bytes.split_off(head.body_len);
                let request = Request {
                    method: head.method,
                    path: head.path,
                    body: mem::replace(&mut self.bytes, rest),
                    fds: mem::take(&mut self.fds),
                };
                Parsed::Request(request, head.keep_alive)
            }
            Some(mut head) => {
                let waits = mem::take(&mut head.expects_continue);
                self.head = Some(head);
                if waits {
                    Parsed::Continue
                } else {
                    Parsed::Incomplete
                }
            }
            None => Parsed::Incomplete,
        }
    }
}

fn refuse(status: u16, why: &str) -> Parsed {
    Parsed::Refuse(Response::refusal(status, [why]))
}

/// The head that `bytes` start with and its length, if it is whole.
fn parse_head(bytes: &[u8]) -> Result<Option<(Head, usize)>, Response> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let used = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(used)) => used,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Response::refusal(431, ["there are more than 64 headers"]));
        }
        Err(error) => {
            let error = error.to_string();
            return Err(Response::refusal(400, ["this is not HTTP/1.1", &error]));
        }
    };
    let target = parsed.path.unwrap_or_default();
    let path = target.split('?').next().unwrap_or_default();
    let mut head = Head {
        method: parsed.method.unwrap_or_default().into(),
        path: path.into(),
        body_len: 0,
        keep_alive: parsed.version == Some(1),
        expects_continue: false,
    };
    let mut length = None;
    for header in parsed.headers {
        let value = str::from_utf8(header.value).unwrap_or_default().trim();
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("Content-Length") {
            let this = content_length(value)?;
            if length.is_some_and(|other| other != this) {
                return Err(Response::refusal(400, ["two lengths of content"]));
            }
            length = Some(this);
        } else if is("Transfer-Encoding") {
            let why = "send the body with Content-Length, not in chunks";
            return Err(Response::refusal(501, [why]));
        } else if is("Connection") {
            let has = |token: &str| {
                value
                    .split(',')
                    .any(|word| word.trim().eq_ignore_ascii_case(token))
            };
            head.keep_alive = !has("close") && (head.keep_alive || has("keep-alive"));
        } else if is("Expect") {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Err(Response::refusal(
                    417,
                    ["only 100-continue can be expected"],
                ));
            }
            head.expects_continue = true;
        }
    }
    head.body_len = length.unwrap_or(0);
    Ok(Some((head, used)))
}

fn content_length(value: &str) -> Result<usize, Response> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    match value.parse() {
        Ok(length) if digits && length <= MAX_BODY => Ok(length),
        _ if digits => Err(Response::refusal(413, ["the body is longer than 256 KiB"])),
        _ => Err(Response::refusal(400, ["Content-Length is not a number"])),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(bytes: &[u8]) -> Connection {
        let mut connection = Connection::default();
        connection.receive(bytes, []);
        connection
    }

    fn request(connection: &mut Connection) -> (Request, bool) {
        match connection.next() {
            Parsed::Request(request, keep_alive) => (request, keep_alive),
            other => panic!("not a request: {other:?}"),
        }
    }

    fn refusal(bytes: &[u8]) -> u16 {
        match after(bytes).next() {
            Parsed::Refuse(response) => response.status,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_request_in_four_pieces_is_one_request() {
        let mut connection = Connection::default();
        let pieces = [
            "PUT /api/v1/vm.create HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n",
            "Content-Length: 7\r\n",
            "\r\n",
            "{\"a\":1}",
        ];
        for piece in &pieces[..3] {
            connection.receive(piece.as_bytes(), []);
            assert!(matches!(connection.next(), Parsed::Incomplete));
        }
        connection.receive(pieces[3].as_bytes(), []);
        let (request, keep_alive) = request(&mut connection);
        assert_eq!(request.path, "/api/v1/vm.create");
        assert_eq!(request.body, b"{\"a\":1}");
        assert!(keep_alive);
        assert!(matches!(connection.next(), Parsed::Incomplete));
    }

    #[test]
    fn requests_sent_at_once_are_told_apart() {
        let mut connection = after(
            b"GET /a?x=1 HTTP/1.1\r\n\r\nPUT /b HTTP/1.1\r\ncontent-length: 1\r\n\r\nxGET /c",
        );
        assert_eq!(request(&mut connection).0.path, "/a");
        assert_eq!(request(&mut connection).0.body, b"x");
        assert!(matches!(connection.next(), Parsed::Incomplete));
    }

    #[test]
    fn descriptors_belong_to_the_request_they_came_with() {
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut connection = Connection::default();
        connection.receive(b"PUT /n HTTP/1.1\r\n", [fd()]);
        connection.receive(b"Content-Length: 2\r\n\r\n{}", [fd()]);
        assert_eq!(request(&mut connection).0.fds.len(), 2);
        connection.receive(b"GET / HTTP/1.1\r\n\r\n", []);
        assert_eq!(request(&mut connection).0.fds.len(), 0);
        connection.receive(b"", (0..=MAX_FDS).map(|_| fd()));
        assert!(matches!(connection.next(), Parsed::Refuse(_)));
    }

    #[test]
    fn the_client_says_whether_the_connection_stays() {
        let keeps = |text: &str| request(&mut after(text.as_bytes())).1;
        assert!(keeps("GET / HTTP/1.1\r\n\r\n"));
        assert!(!keeps("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n"));
        assert!(!keeps("GET / HTTP/1.0\r\n\r\n"));
        assert!(keeps("GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"));
    }

    #[test]
    fn a_client_that_expects_a_word_gets_one() {
        let mut connection =
            after(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n");
        assert!(matches!(connection.next(), Parsed::Continue));
        assert!(matches!(connection.next(), Parsed::Incomplete));
        connection.receive(b"x", []);
        assert_eq!(request(&mut connection).0.body, b"x");
    }

    #[test]
    fn what_cannot_be_a_request_is_refused() {
        assert_eq!(refusal(b"\x16\x03\x01 hello"), 400);
        assert_eq!(
            refusal(b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
            400
        );
        let two = b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(refusal(two), 400);
        assert_eq!(
            refusal(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            501
        );
        assert_eq!(
            refusal(b"PUT / HTTP/1.1\r\nContent-Length: 262145\r\n\r\n"),
            413
        );
        let long = format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(MAX_HEAD));
        assert_eq!(refusal(long.as_bytes()), 431);
        let whole = format!("{long}\r\n\r\n");
        assert_eq!(refusal(whole.as_bytes()), 431);
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
        assert_eq!(refusal(many.as_bytes()), 431);
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_survived(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20),
            start in prop_oneof![Just(""), Just("PUT /x HTTP/1.1\r\nContent-Length: 3\r\n")],
        ) {
            let mut connection = after(start.as_bytes());
            for piece in pieces {
                connection.receive(&piece, []);
                while matches!(connection.next(), Parsed::Request(..) | Parsed::Continue) {}
            }
        }
    }
}
