//! What is wrong with answers. `LIES` has it, by the names of methods: `Check=garbage,twice;ReadStdout=never*` says
//! that the first answer to `Check` is garbage and the second comes twice, and that `ReadStdout` is never
//! answered. All others are honest.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use prost::Message;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// The longest message of the protocol, in bytes.
const MAX_MESSAGE: usize = 4 << 20;

#[derive(Clone, PartialEq, prost::Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// The lies that are still to be told, by method.
pub(crate) struct Lies(Mutex<HashMap<String, VecDeque<&'static str>>>);

impl Lies {
    pub(crate) fn parse(text: &str) -> Self {
        // They are needed as long as the program runs.
        let text: &'static str = text.to_owned().leak();
        let all = text.split(';').filter_map(|rule| rule.split_once('='));
        let all = all.map(|(method, lies)| (method.to_owned(), lies.split(',').collect()));
        Self(Mutex::new(all.collect()))
    }

    /// The next lie in answer to a method.
    pub(crate) fn next(&self, method: &str) -> Option<&'static str> {
        let mut all = self.0.lock().expect("no thread panics");
        let lies = all.get_mut(method)?;
        match lies.front()?.strip_suffix('*') {
            Some(forever) => Some(forever),
            None => lies.pop_front(),
        }
    }
}

/// What becomes of the connection after an answer.
#[derive(PartialEq)]
pub(crate) enum After {
    Goes,
    /// No more requests are read.
    Deaf,
}

/// The sending half of a connection.
#[derive(Clone)]
pub(crate) struct Output(pub(crate) Arc<Mutex<UnixStream>>);

impl Output {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().expect("no thread panics").write_all(bytes)
    }

    fn close(&self) -> io::Result<()> {
        let stream = self.0.lock().expect("no thread panics");
        stream.shutdown(Shutdown::Both)
    }

    /// Answers as it should.
    pub(crate) fn answer(&self, stream: u32, payload: Vec<u8>) -> io::Result<()> {
        self.send(&response(stream, payload))
    }

    /// Answers with a lie, where `honest` would be the truth.
    pub(crate) fn lie(&self, lie: &str, stream: u32, honest: Vec<u8>) -> io::Result<After> {
        let (name, value) = lie.split_once(':').unwrap_or((lie, ""));
        match name {
            "never" => {}
            "deaf" => return Ok(After::Deaf),
            "honest" => self.answer(stream, honest)?,
            "late" => {
                let (output, lateness) = (self.clone(), Duration::from_millis(number(value)));
                thread::spawn(move || {
                    thread::sleep(lateness);
                    output.answer(stream, honest)
                });
            }
            "closed" => self.close()?,
            "half" => {
                let whole = response(stream, [&honest[..], &[0x78, 0]].concat());
                self.send(&whole[..whole.len() - 1])?;
                self.close()?;
            }
            "halfheader" => {
                self.send(&[0, 0, 0])?;
                self.close()?;
            }
            "announced" => self.send(&header(u32::MAX, stream, RESPONSE))?,
            "endless" => {
                self.send(&header(u32::MAX, stream, RESPONSE))?;
                let output = self.clone();
                thread::spawn(move || {
                    while output.send(&[0; 64 << 10]).is_ok() {
                        // Others have work to do, too.
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            "twice" => {
                self.answer(stream, honest.clone())?;
                self.answer(stream, honest)?;
            }
            "others" => {
                let others = [0, stream + 1, stream + 1000, u32::MAX];
                for other in others.into_iter().cycle().take(1000) {
                    self.answer(other, vec![0; 100])?;
                }
                self.answer(stream, honest)?;
            }
            "kinds" => {
                for kind in [REQUEST, DATA, 0, u8::MAX] {
                    self.send(&frame(stream, kind, &[]))?;
                }
                self.answer(stream, honest)?;
            }
            "flood" => {
                for _ in 0..number(value) / 1000 {
                    self.send(&response(stream + 1001, vec![0; 8]).repeat(1000))?;
                }
                self.answer(stream, honest)?;
            }
            "refused" => self.send(&refusal(
                stream,
                -7,
                "../\u{1b}[2J\n\0\u{202e}".repeat(9000),
            ))?,
            "verbose" => self.send(&refusal(stream, -7, "\u{1}".repeat(4_000_000)))?,
            "missing" => self.send(&refusal(stream, 5, "there is none".into()))?,
            "garbage" => self.send(&frame(stream, RESPONSE, &[0xff; 40]))?,
            _ => self.answer(stream, payload(name, value))?,
        }
        Ok(After::Goes)
    }
}

/// An answer's message that is wrong.
fn payload(name: &str, value: &str) -> Vec<u8> {
    match name {
        // A field that is longer than the message.
        "mistyped" => vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f],
        // Groups in groups, of a field that no message has.
        "deep" => vec![0x7b; 60_000],
        "large" => field(0x7a, &vec![b'x'; MAX_MESSAGE - 32]),
        "longer" => vec![0; MAX_MESSAGE],
        // Empty entries: of 2 bytes each here, and of 48 in memory.
        "entries" => {
            let len = usize::try_from(number(value)).expect("it is short");
            let entries = [0x0a, 0].repeat(len / 2);
            field(0x0a, &field(0x22, &entries))
        }
        "bytes" => field(
            0x0a,
            &vec![b'x'; usize::try_from(number(value)).expect("it is short")],
        ),
        "says" => (0..value.len() / 2)
            .map(|at| u8::from_str_radix(&value[2 * at..2 * at + 2], 16).expect("it is hex"))
            .collect(),
        _ => panic!("no lie is called {name}"),
    }
}

fn number(text: &str) -> u64 {
    text.parse().expect("it is a number")
}

/// A field of bytes.
fn field(key: u8, bytes: &[u8]) -> Vec<u8> {
    let mut encoded = vec![key];
    prost::encoding::encode_varint(bytes.len() as u64, &mut encoded);
    encoded.extend(bytes);
    encoded
}

fn header(len: u32, stream: u32, kind: u8) -> Vec<u8> {
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes
}

fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("it is short");
    let mut bytes = header(len, stream, kind);
    bytes.extend(payload);
    bytes
}

fn response(stream: u32, payload: Vec<u8>) -> Vec<u8> {
    let status = None;
    frame(
        stream,
        RESPONSE,
        &Response { status, payload }.encode_to_vec(),
    )
}

fn refusal(stream: u32, code: i32, message: String) -> Vec<u8> {
    let response = Response {
        status: Some(Status { code, message }),
        payload: Vec::new(),
    };
    frame(stream, RESPONSE, &response.encode_to_vec())
}
