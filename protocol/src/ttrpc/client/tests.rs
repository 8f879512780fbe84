use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::*;
use crate::agent::messages::{CheckRequest, Empty};

/// Far longer than anything here takes.
const LONG: Option<Duration> = Some(Duration::from_secs(60));

fn check(text: &str) -> CheckRequest {
    CheckRequest {
        service: text.into(),
    }
}

/// A frame that answers a call with `text`.
fn answer(stream: u32, kind: u8, text: &str) -> Vec<u8> {
    let response = Response {
        status: None,
        payload: check(text).encode_to_vec(),
    };
    frame::encode(stream, kind, &response.encode_to_vec()).unwrap()
}

/// What a client's call comes to when the other side sends these bytes.
fn answered_by(most: u32, bytes: &[u8]) -> Result<String, CallError> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let client = Client::with_max_answer(ours, most).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            frame::read(&mut theirs).unwrap();
            theirs.write_all(bytes).unwrap();
            // Whatever else the client says, until it is gone.
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        let said = client.call("echo", "Say", &check(""), LONG);
        drop(client);
        said.map(|said: CheckRequest| said.service)
    })
}

#[test]
fn answers_that_no_caller_waits_for_are_passed_over() {
    let others = [0, 2, 3, 999, u32::MAX].map(|stream| answer(stream, frame::RESPONSE, "other"));
    let kinds = [frame::REQUEST, 3, 0, u8::MAX].map(|kind| answer(1, kind, "other"));
    let right = answer(1, frame::RESPONSE, "right");
    let bytes = [others.concat(), kinds.concat(), right.repeat(3)].concat();
    assert_eq!(answered_by(1000, &bytes).unwrap(), "right");
}

#[test]
fn an_answer_has_the_length_that_its_caller_allows() {
    let said = |len| answered_by(1000, &answer(1, frame::RESPONSE, &"x".repeat(len)));
    assert_eq!(said(990).unwrap().len(), 990);
    match said(1000) {
        Err(CallError::Refused(status)) => assert_eq!(status.code, Code::ResourceExhausted),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_not_kept_takes_no_memory() {
    struct Counting(u64, usize);
    impl Read for Counting {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.1 = self.1.max(into.len());
            let count = into.len().min(usize::try_from(self.0).unwrap());
            self.0 -= count as u64;
            into[..count].fill(0xff);
            Ok(count)
        }
    }
    // The header says 4 GiB.
    let mut from = Counting(10 + u64::from(u32::MAX), 0);
    let header = frame::Header::read(&mut from).unwrap().unwrap();
    assert_eq!(header.payload(&mut from, MAX_MESSAGE).unwrap(), None);
    assert_eq!(from.0, 0);
    assert!(from.1 <= 64 << 10, "{} bytes are read at once", from.1);
}

#[test]
fn who_does_not_read_is_waited_for_no_longer_than_who_does_not_answer() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    let timeout = Some(Duration::from_millis(20));
    // More than there is room for.
    for _ in 0..20 {
        let began = Instant::now();
        let much = check(&"x".repeat(30 << 10));
        let late = client.call::<Empty>("echo", "Say", &much, timeout);
        late.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_message_that_was_sent_in_part_is_the_last() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    let much = check(&"x".repeat(3 << 20));
    let late = client.call::<Empty>("echo", "Say", &much, Some(Duration::from_millis(20)));
    assert!(matches!(late, Err(CallError::Late { .. })), "{late:?}");
    // The next one would be taken for its rest.
    let gone = client.call::<Empty>("echo", "Say", &Empty {}, LONG);
    let is_gone = matches!(gone, Err(CallError::Gone(_) | CallError::Send { .. }));
    assert!(is_gone, "{gone:?}");
}

#[test]
fn a_call_without_an_end_does_not_keep_others_from_theirs() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    let much = check(&"x".repeat(3 << 20));
    thread::scope(|scope| {
        scope.spawn(|| {
            client
                .call::<Empty>("echo", "Say", &much, None)
                .unwrap_err()
        });
        thread::sleep(Duration::from_millis(50));
        let timeout = Some(Duration::from_millis(20));
        let late = client.call::<Empty>("echo", "Say", &Empty {}, timeout);
        assert!(matches!(late, Err(CallError::Late { .. })), "{late:?}");
        drop(theirs);
    });
}

#[test]
fn an_answer_that_is_not_wanted_any_more_is_not_waited_for() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    let wanted = AtomicBool::new(true);
    let is_wanted = || wanted.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let call = || client.call_while::<Empty>("echo", "Say", &Empty {}, &is_wanted);
        let call = scope.spawn(call);
        thread::sleep(Duration::from_millis(20));
        assert!(!call.is_finished());
        wanted.store(false, Ordering::Relaxed);
        let error = call.join().unwrap().unwrap_err();
        assert!(matches!(error, CallError::Unwanted(_)), "{error:?}");
    });
    assert!(lock(&client.calls).waiting.as_ref().unwrap().is_empty());
}

#[test]
fn a_call_that_waits_keeps_its_number_when_all_others_were_used() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let client = Client::new(ours).unwrap();
    thread::scope(|scope| {
        let first = scope.spawn(|| client.call("echo", "Say", &Empty {}, LONG));
        assert_eq!(frame::read(&mut theirs).unwrap().unwrap().stream, 1);
        // As many calls later.
        lock(&client.calls).next = u32::MAX;
        for expected in [u32::MAX, 3] {
            let call = scope.spawn(|| client.call::<CheckRequest>("echo", "Say", &Empty {}, LONG));
            assert_eq!(frame::read(&mut theirs).unwrap().unwrap().stream, expected);
            theirs
                .write_all(&answer(expected, frame::RESPONSE, "it"))
                .unwrap();
            call.join().unwrap().unwrap();
        }
        theirs
            .write_all(&answer(1, frame::RESPONSE, "the first"))
            .unwrap();
        let first: CheckRequest = first.join().unwrap().unwrap();
        assert_eq!(first.service, "the first");
    });
}

#[test]
fn answers_that_come_together_are_read_together() {
    struct Counting<'a>(&'a [u8], &'a mut usize);
    impl Read for Counting<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            *self.1 += 1;
            self.0.read(into)
        }
    }
    let calls = Mutex::new(Calls {
        next: 1,
        waiting: Some(HashMap::new()),
    });
    let bytes = answer(1, frame::RESPONSE, "other").repeat(10_000);
    let mut count = 0;
    hear(Counting(&bytes, &mut count), &calls, MAX_MESSAGE);
    assert_eq!(count, bytes.len().div_ceil(frame::READ_AHEAD) + 1);
}
