//! The two ends of a connection without a listening socket, for fuzzers.

use std::os::unix::net::UnixStream;

use super::connection::{Connection, Parsed};
use super::{Client, Request, Response};

/// What a server makes of a client's bytes, which come in `pieces`: each whole request and whether the connection is
/// kept after it, and last the refusal that ends the connection, if there is one.
pub fn requests<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Vec<Result<(Request, bool), Response>> {
    let mut connection = Connection::default();
    let mut all = Vec::new();
    for piece in pieces {
        connection.receive(piece, []);
        loop {
            match connection.next() {
                Parsed::Incomplete => break,
                Parsed::Continue => {}
                Parsed::Request(request, is_kept) => all.push(Ok((request, is_kept))),
                Parsed::Refuse(response) => {
                    all.push(Err(response));
                    return all;
                }
            }
        }
    }
    all
}

/// An answer as it goes over the wire.
pub fn encode(response: &Response) -> Vec<u8> {
    response.encode(true)
}

/// A client on a stream that is connected already.
pub fn client(stream: UnixStream) -> Client {
    Client::over(stream)
}
