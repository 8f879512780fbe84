use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use prost::Message;
use rustix::event::{PollFd, PollFlags, poll};

use super::*;
use crate::agent::messages::{CheckRequest, Empty, ReadStreamResponse, WaitProcessRequest};

/// Says back what it is told. `Meet` waits until so many calls wait; `Sleep` for ever.
struct Echo(Barrier);

impl Service for Echo {
    fn is_quick(&self, _service: &str, method: &str) -> bool {
        matches!(method, "Say" | "Where")
    }

    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
            "Where" | "Elsewhere" => call.answer(|_: Empty| {
                let service = format!("{:?}", thread::current().id());
                Ok(CheckRequest { service })
            }),
            "Say" => call.answer(|request: CheckRequest| Ok(request)),
            "Meet" => call.answer(|_: Empty| {
                self.0.wait();
                Ok(Empty {})
            }),
            "Sleep" => call.answer(|_: Empty| -> Result<Empty, Status> {
                loop {
                    thread::park();
                }
            }),
            "Fill" => call.answer(|_: Empty| {
                let data = vec![0; MAX_MESSAGE as usize - 8];
                Ok(ReadStreamResponse { data })
            }),
            "Refuse" => Err(Status::new(Code::NotFound, "no such container")),
            _ => Err(call.unimplemented()),
        }
    }
}

const CALLERS: usize = 20;

fn server() -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let writer = theirs.try_clone().unwrap();
    let service: Arc<dyn Service> = Arc::new(Echo(Barrier::new(CALLERS)));
    thread::spawn(move || serve(&theirs, writer, &service, &Workers::default()));
    ours
}

fn say(client: &Client, text: &str) -> Result<String, CallError> {
    let request = CheckRequest {
        service: text.into(),
    };
    let said: CheckRequest = client.call("echo", "Say", &request, None)?;
    Ok(said.service)
}

#[test]
fn calls_are_answered_while_others_wait() {
    let client = Client::new(server()).unwrap();
    thread::scope(|scope| {
        let meet = || client.call::<Empty>("echo", "Meet", &Empty {}, None);
        let callers: Vec<_> = (1..CALLERS).map(|_| scope.spawn(meet)).collect();
        assert_eq!(say(&client, "meanwhile").unwrap(), "meanwhile");
        meet().unwrap();
        for caller in callers {
            caller.join().unwrap().unwrap();
        }
    });
}

#[test]
fn quick_calls_are_answered_by_who_reads_and_others_by_workers() {
    let client = Client::new(server()).unwrap();
    let place = |method| {
        let said: CheckRequest = client.call("echo", method, &Empty {}, None).unwrap();
        said.service
    };
    let reader = place("Where");
    assert_eq!(place("Where"), reader);
    let worker = place("Elsewhere");
    assert_ne!(worker, reader);
    assert_eq!(place("Where"), reader);
}

/// A server for all who connect to it.
fn reception(name: &str) -> impl Fn() -> Client {
    let name = format!("podvmm-{name}-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let service = Arc::new(Echo(Barrier::new(CALLERS)));
    let accept = move || Ok(Some(listener.accept()?.0.into()));
    receive(accept, service, |error| panic!("{error}")).unwrap();
    move || Client::new(UnixStream::connect_addr(&address).unwrap()).unwrap()
}

#[test]
fn all_who_connect_are_served_whether_others_speak_or_not() {
    let connect = reception("all");
    let silent: Vec<_> = (0..4).map(|_| connect()).collect();
    let busy: Vec<_> = (0..4).map(|_| connect()).collect();
    for client in busy.iter().chain(&silent) {
        assert_eq!(say(client, "here").unwrap(), "here");
    }
    for client in silent.iter().chain(&busy) {
        assert_eq!(say(client, "still").unwrap(), "still");
    }
}

#[test]
fn who_has_served_one_connection_serves_others() {
    let connect = reception("others");
    let place = || {
        let said: CheckRequest = connect().call("echo", "Where", &Empty {}, None).unwrap();
        said.service
    };
    let mut places: Vec<_> = (0..30).map(|_| place()).collect();
    places.sort();
    places.dedup();
    // Those there were at first, and any for one that was not free again yet.
    assert!(places.len() <= 5, "{places:?}");
}

#[test]
fn a_refusal_says_what_and_why() {
    let client = Client::new(server()).unwrap();
    let refusal = |method: &str| match client.call::<Empty>("echo", method, &Empty {}, None) {
        Err(CallError::Refused(status)) => (status.code, status.message),
        other => panic!("{other:?}"),
    };
    let missing = "no such container".to_string();
    assert_eq!(refusal("Refuse"), (Code::NotFound, missing));
    let unknown = "there is no echo/Fly".to_string();
    assert_eq!(refusal("Fly"), (Code::Unimplemented, unknown));
    assert_eq!(refusal("Fill").0, Code::ResourceExhausted);
}

#[test]
fn no_caller_waits_for_an_answer_that_cannot_come() {
    let client = Client::new(server()).unwrap();
    let patience = Some(Duration::from_millis(20));
    let late = client.call::<Empty>("echo", "Sleep", &Empty {}, patience);
    assert!(matches!(late, Err(CallError::Late { .. })), "{late:?}");
    assert_eq!(say(&client, "still here").unwrap(), "still here");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    thread::scope(|scope| {
        let call = scope.spawn(|| say(&client, "?"));
        (&theirs).read_exact(&mut [0; 10]).unwrap();
        drop(theirs);
        let gone = call.join().unwrap();
        assert!(matches!(gone, Err(CallError::Gone(_))), "{gone:?}");
    });
    say(&client, "?").unwrap_err();
}

/// Waits until its caller is gone, and tells whether that is known.
struct Loner(SyncSender<[bool; 2]>);

impl Service for Loner {
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        let before = call.is_orphan();
        let mut caller = [PollFd::from_borrowed_fd(call.caller(), PollFlags::empty())];
        poll(&mut caller, None).unwrap();
        self.0.send([before, call.is_orphan()]).unwrap();
        Err(call.unimplemented())
    }
}

#[test]
fn who_answers_learns_that_the_caller_is_gone() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (tell, told) = sync_channel(1);
    let service: Arc<dyn Service> = Arc::new(Loner(tell));
    let writer = theirs.try_clone().unwrap();
    thread::spawn(move || serve(&theirs, writer, &service, &Workers::default()));
    let client = Client::new(ours).unwrap();
    let patience = Some(Duration::from_millis(20));
    client
        .call::<Empty>("echo", "Wait", &Empty {}, patience)
        .unwrap_err();
    drop(client);
    assert_eq!(
        told.recv_timeout(Duration::from_secs(60)),
        Ok([false, true])
    );
}

/// Tells what was written when it hears that an answer is.
struct Listener(Arc<Mutex<Vec<u8>>>, SyncSender<usize>);

impl Service for Listener {
    fn call(&self, call: &Call<'_>) -> Result<Vec<u8>, Status> {
        call.answer(|request: CheckRequest| Ok(request))
    }

    fn answered(&self, call: &Call<'_>) {
        assert_eq!(call.method, "Say");
        self.1.send(self.0.lock().unwrap().len()).unwrap();
    }
}

struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_service_hears_of_an_answer_when_it_is_written() {
    let request = Request {
        service: "echo".into(),
        method: "Say".into(),
        ..Request::default()
    };
    let mut bytes = Vec::new();
    frame::write(&mut bytes, 1, frame::REQUEST, &request.encode_to_vec()).unwrap();
    let (written, (heard, hears)) = (Arc::default(), sync_channel(1));
    let service: Arc<dyn Service> = Arc::new(Listener(Arc::clone(&written), heard));
    let writer = Shared(Arc::clone(&written));
    serve(&bytes[..], writer, &service, &Workers::default()).unwrap();
    // A header of ten bytes, and nothing to say.
    assert_eq!(hears.recv().unwrap(), 10);
}

/// What comes back for a frame with this header and body.
fn answer(stream: &mut UnixStream, header: [u8; 10], body: &[u8]) -> frame::Frame {
    stream.write_all(&header).unwrap();
    stream.write_all(body).unwrap();
    frame::read(stream).unwrap().unwrap()
}

#[test]
fn a_message_that_is_too_long_is_refused_and_the_next_one_heard() {
    let mut stream = server();
    let long = vec![0; MAX_MESSAGE as usize + 1];
    let refused = answer(&mut stream, [0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0], &long);
    let refused = Response::decode(&refused.payload.unwrap()[..]).unwrap();
    assert_eq!(
        refused.status.unwrap().code,
        i32::from(Code::InvalidArgument)
    );
    let client = Client::new(stream).unwrap();
    assert_eq!(say(&client, "go on").unwrap(), "go on");
}

#[test]
fn what_is_no_request_is_refused_or_passed_over() {
    let mut stream = server();
    let code = |frame: frame::Frame| {
        let response = Response::decode(&frame.payload.unwrap()[..]).unwrap();
        response.status.unwrap().code
    };
    let even = answer(&mut stream, [0, 0, 0, 0, 0, 0, 0, 2, 1, 0], b"");
    assert_eq!(code(even), i32::from(Code::InvalidArgument));
    let garbage = answer(&mut stream, [0, 0, 0, 2, 0, 0, 0, 1, 1, 0], b"\xff\xff");
    assert_eq!(code(garbage), i32::from(Code::InvalidArgument));
    // Data of a stream that is none, then a call without a method.
    stream.write_all(&[0, 0, 0, 0, 0, 0, 0, 7, 3, 0]).unwrap();
    let empty = answer(&mut stream, [0, 0, 0, 0, 0, 0, 0, 3, 1, 0], b"");
    assert_eq!(
        (empty.stream, code(empty)),
        (3, i32::from(Code::Unimplemented))
    );
}

/// Threads stay, so there are some for all cases.
static WORKERS: OnceLock<Workers> = OnceLock::new();

#[test]
fn a_message_with_a_piece_of_output_is_read_in_few_calls() {
    struct Counting<'a>(&'a [u8], usize);
    impl Read for Counting<'_> {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.1 += 1;
            self.0.read(into)
        }
    }
    let mut bytes = Vec::new();
    frame::write(&mut bytes, 1, frame::RESPONSE, &[7; 33 << 10]).unwrap();
    let mut from = Counting(&bytes, 0);
    assert!(frame::read(&mut from).unwrap().is_some());
    assert_eq!(from.1, 2, "one for the header, one for the rest");
}

proptest! {
    #[test]
    fn any_bytes_are_frames_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut rest = &bytes[..];
        while let Ok(Some(frame)) = frame::read(&mut rest) {
            let payload = frame.payload.unwrap_or_default();
            prop_assert!(payload.len() <= bytes.len());
            let _ = Request::decode(&payload[..]);
            let _ = Response::decode(&payload[..]);
            let _ = WaitProcessRequest::decode(&payload[..]);
        }
    }

    #[test]
    fn a_server_survives_any_bytes(
        frames in proptest::collection::vec((any::<u32>(), 0..4_u8, proptest::collection::vec(any::<u8>(), 0..60)), 0..6),
        rest in proptest::collection::vec(any::<u8>(), 0..40),
        method in "(Say|Refuse|\\PC{0,5})",
    ) {
        let mut bytes = Vec::new();
        for (stream, kind, payload) in frames {
            frame::write(&mut bytes, stream, kind, &payload).unwrap();
        }
        let request = Request { service: "echo".into(), method, payload: rest.clone(), timeout_nano: -1 };
        frame::write(&mut bytes, 1, frame::REQUEST, &request.encode_to_vec()).unwrap();
        bytes.extend(rest);
        let service: Arc<dyn Service> = Arc::new(Echo(Barrier::new(1)));
        let workers = WORKERS.get_or_init(Workers::default);
        let _ = serve(&bytes[..], std::io::sink(), &service, workers);
    }

    #[test]
    fn a_frame_survives_the_wire(stream: u32, kind: u8, payload in proptest::collection::vec(any::<u8>(), 0..99)) {
        let mut bytes = Vec::new();
        frame::write(&mut bytes, stream, kind, &payload).unwrap();
        let frame = frame::read(&mut &bytes[..]).unwrap();
        prop_assert_eq!(frame, Some(frame::Frame { stream, kind, payload: Some(payload) }));
        prop_assert!(frame::read(&mut &bytes[..bytes.len() - 1]).is_err());
    }
}
