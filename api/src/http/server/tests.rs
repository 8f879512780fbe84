use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::path::PathBuf;
use std::thread::JoinHandle;

use tempfile::TempDir;

use super::super::client::{Client, ClientError};
use super::super::message::Method;
use super::*;

/// A server that echoes bodies, in its own folder.
struct Echo {
    folder: TempDir,
    thread: Option<JoinHandle<()>>,
}

fn listen(folder: &TempDir) -> Server {
    let listener = UnixListener::bind(folder.path().join("api")).unwrap();
    Server::new(listener).unwrap()
}

impl Echo {
    fn start() -> Self {
        let folder = TempDir::new().unwrap();
        let mut server = listen(&folder);
        let thread = thread::spawn(move || {
            let (stop, _keep) = UnixStream::pair().unwrap();
            server.serve(stop.as_fd(), answer).unwrap();
        });
        Self {
            folder,
            thread: Some(thread),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).unwrap()
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.client().call("PUT", "/stop", None, &[]).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn answer(request: Request, reply: Reply) {
    let response = match (&request.method, request.path.as_str()) {
        (Method::Put, "/stop") => return reply.send(Next::AnswerAndStop(Response::done())),
        (Method::Put, "/late") => {
            thread::spawn(|| {
                thread::sleep(Duration::from_millis(200));
                reply.send(Next::Answer(Response::json(200, "late".into())));
            });
            return;
        }
        (Method::Put, "/fds") => Response::json(200, request.fds.len().to_string()),
        (Method::Get, "/big") => Response::json(200, "x".repeat(4 << 20)),
        (Method::Put, "/echo") => {
            let body = String::from_utf8(request.body).unwrap();
            Response::json(200, body)
        }
        _ => Response::refusal(404, ["nothing is there", "really"]),
    };
    reply.send(Next::Answer(response));
}

fn all(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_client_gets_answers_one_after_the_other() {
    let server = Echo::start();
    let mut client = server.client();
    for body in ["", "one", "two"] {
        let answer = client.call("PUT", "/echo", Some(body), &[]).unwrap();
        assert_eq!(answer, body.as_bytes());
    }
    let refused = client.call("GET", "/none", None, &[]).unwrap_err();
    assert!(matches!(refused, ClientError::Refused { status: 404, .. }));
    assert_eq!(refused.to_string(), "nothing is there: really");
}

#[test]
fn descriptors_arrive_with_their_request() {
    let server = Echo::start();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut client = server.client();
    let both = [null.as_fd(), null.as_fd()];
    assert_eq!(client.call("PUT", "/fds", Some("{}"), &both).unwrap(), b"2");
    assert_eq!(client.call("PUT", "/fds", Some("{}"), &[]).unwrap(), b"0");
}

#[test]
fn a_slow_client_delays_no_other_client() {
    let server = Echo::start();
    let mut slow = server.stream();
    slow.write_all(b"PUT /echo HTTP/1.1\r\nContent-Len")
        .unwrap();
    let mut deaf = server.stream();
    for _ in 0..4 {
        deaf.write_all(b"GET /big HTTP/1.1\r\n\r\n").unwrap();
    }
    let mut client = server.client();
    assert_eq!(client.call("PUT", "/echo", Some("x"), &[]).unwrap(), b"x");
    slow.write_all(b"gth: 2\r\n\r\nhi").unwrap();
    slow.shutdown(Shutdown::Write).unwrap();
    assert!(all(slow).ends_with("\r\n\r\nhi"));
    deaf.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all(deaf).matches("HTTP/1.1 200").count(), 4);
}

/// A client that has to wait for an answer delays no other client, gets the answer before those to
/// its later requests, and may leave.
#[test]
fn an_answer_may_come_late() {
    let server = Echo::start();
    let mut waiting = server.stream();
    waiting
        .write_all(b"PUT /late HTTP/1.1\r\n\r\nGET /none HTTP/1.1\r\n\r\n")
        .unwrap();
    waiting.shutdown(Shutdown::Write).unwrap();
    let mut left = server.stream();
    left.write_all(b"PUT /late HTTP/1.1\r\n\r\n").unwrap();
    drop(left);
    let mut client = server.client();
    for _ in 0..100 {
        assert_eq!(client.call("PUT", "/echo", Some("x"), &[]).unwrap(), b"x");
    }
    let answers = all(waiting);
    let late = answers.find("late").expect("it is answered");
    assert!(late < answers.find("HTTP/1.1 404").unwrap(), "{answers}");
}

#[test]
fn a_client_with_many_requests_delays_no_other_client_and_gets_all_answers() {
    let server = Echo::start();
    let mut greedy = server.stream();
    greedy
        .write_all("GET /none HTTP/1.1\r\n\r\n".repeat(500).as_bytes())
        .unwrap();
    let mut client = server.client();
    assert_eq!(client.call("PUT", "/echo", Some("x"), &[]).unwrap(), b"x");
    greedy.shutdown(Shutdown::Write).unwrap();
    assert_eq!(all(greedy).matches("HTTP/1.1 404").count(), 500);
}

#[test]
fn a_client_that_leaves_in_the_middle_is_forgotten() {
    let server = Echo::start();
    for text in [
        "",
        "PUT /ec",
        "PUT /echo HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc",
    ] {
        let mut stream = server.stream();
        stream.write_all(text.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(all(stream), "");
    }
    server
        .stream()
        .write_all(b"GET /big HTTP/1.1\r\n\r\n")
        .unwrap();
    assert_eq!(
        server
            .client()
            .call("PUT", "/echo", Some("x"), &[])
            .unwrap(),
        b"x"
    );
}

#[test]
fn garbage_is_answered_and_the_connection_closed() {
    let server = Echo::start();
    let mut stream = server.stream();
    stream.write_all(b"\0\0\0\0\r\n\r\n").unwrap();
    assert!(all(stream).starts_with("HTTP/1.1 400 \r\nConnection: close\r\n"));
}

#[test]
fn many_clients_are_served_and_leave_nothing() {
    let server = Echo::start();
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut clients: Vec<_> = (0..200).map(|_| server.client()).collect();
    for client in &mut clients {
        assert_eq!(client.call("PUT", "/echo", Some("x"), &[]).unwrap(), b"x");
    }
    let with_clients = open();
    drop(clients);
    let mut client = server.client();
    // The server learns of those that left before it answers a client that came later.
    client.call("PUT", "/echo", Some("x"), &[]).unwrap();
    assert!(open() + 300 < with_clients);
}

#[test]
fn another_thread_can_stop_it() {
    let folder = TempDir::new().unwrap();
    let mut server = listen(&folder);
    let (stop, other) = UnixStream::pair().unwrap();
    let thread = thread::spawn(move || server.serve(stop.as_fd(), answer));
    drop(other);
    thread.join().unwrap().unwrap();
}
