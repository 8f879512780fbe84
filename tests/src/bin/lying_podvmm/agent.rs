//! An agent without containers. Its processes do nothing until they are killed; execs by the name of `exit` end at
//! once.

use std::collections::{HashMap, HashSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;

use prost::Message;
use protocol::agent::FOLLOWS_THE_CLOCK;
use protocol::agent::messages::{
    AgentDetails, ExecProcessRequest, GuestDetailsResponse, ReadStreamRequest, Routes,
    SignalProcessRequest, UpdateRoutesRequest, WaitProcessRequest, WaitProcessResponse,
    WriteStreamRequest, WriteStreamResponse,
};

use crate::lies::{After, Lies, Output};

/// A call.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

/// A process, by its container's and its own identifier.
type Name = (String, String);

/// What waits for processes of a connection's to end.
#[derive(Default)]
struct Waiting {
    /// By the process waited for: streams and methods of the calls.
    calls: HashMap<Name, Vec<(u32, String)>>,
    /// Those that were killed; of a container as a whole without an identifier of a process.
    killed: HashSet<Name>,
}

/// Serves one connection.
pub(crate) fn serve(stream: &UnixStream, lies: &Lies) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    (&*stream).write_all(b"OK 1073741824\n")?;
    let output = Output(Arc::new(Mutex::new(stream.try_clone()?)));
    let mut waiting = Waiting::default();
    loop {
        let mut header = [0; 10];
        reader.read_exact(&mut header)?;
        let [a, b, c, d, e, f, g, h, _, _] = header;
        let mut payload = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
        reader.read_exact(&mut payload)?;
        let request = Request::decode(&payload[..]).map_err(io::Error::other)?;
        let call = u32::from_be_bytes([e, f, g, h]);
        if waiting.take(&request, call, lies, &output)? == After::Deaf {
            loop {
                thread::park();
            }
        }
    }
}

impl Waiting {
    /// Answers one call, or keeps it until its process ends.
    fn take(
        &mut self,
        request: &Request,
        call: u32,
        lies: &Lies,
        output: &Output,
    ) -> io::Result<After> {
        let method = request.method.as_str();
        let lie = lies.next(method);
        if lie.is_none()
            && let Some(process) = waited_for(request)
        {
            let first = (process.0.clone(), String::new());
            if self.killed.contains(&process) || self.killed.contains(&first) {
                output.answer(call, end(method))?;
            } else if process.1.starts_with("exit") {
                output.answer(call, Vec::new())?;
            } else {
                let calls = self.calls.entry(process).or_default();
                calls.push((call, method.into()));
            }
            return Ok(After::Goes);
        }
        match lie {
            Some(lie) => {
                let after = output.lie(lie, call, honest(request))?;
                if method == "SignalProcess" && lie != "honest" {
                    return Ok(after);
                }
                if after == After::Deaf {
                    return Ok(after);
                }
            }
            None => output.answer(call, honest(request))?,
        }
        if method == "SignalProcess" {
            self.end(request, lies, output)?;
        }
        Ok(After::Goes)
    }

    /// Ends what is signalled: a process, or all of a container.
    fn end(&mut self, request: &Request, lies: &Lies, output: &Output) -> io::Result<()> {
        let signal: SignalProcessRequest = decoded(request);
        if signal.signal != 9 || lies.next("death").is_some() {
            return Ok(());
        }
        let all = signal.exec_id.is_empty();
        let killed = (signal.container_id, signal.exec_id);
        self.calls.retain(|process, calls| {
            let is_killed = *process == killed || (all && process.0 == killed.0);
            if is_killed {
                for (call, method) in calls {
                    // The shim may be gone by now.
                    let _ = output.answer(*call, end(method));
                }
            }
            !is_killed
        });
        self.killed.insert(killed);
        Ok(())
    }
}

/// What a call that waits for a process is answered at the end of one that was killed.
fn end(method: &str) -> Vec<u8> {
    let status = i32::from(method == "WaitProcess") * 137;
    WaitProcessResponse { status }.encode_to_vec()
}

/// The process whose end such a call waits for.
fn waited_for(request: &Request) -> Option<Name> {
    match request.method.as_str() {
        "WaitProcess" => {
            let wait: WaitProcessRequest = decoded(request);
            Some((wait.container_id, wait.exec_id))
        }
        "ReadStdout" | "ReadStderr" => {
            let read: ReadStreamRequest = decoded(request);
            Some((read.container_id, read.exec_id))
        }
        // There is none.
        "GetOOMEvent" => Some((String::new(), String::new())),
        _ => None,
    }
}

/// The answer of an agent that does not lie.
fn honest(request: &Request) -> Vec<u8> {
    match request.method.as_str() {
        "GetGuestDetails" => {
            let details = AgentDetails {
                supports_seccomp: true,
                extra_features: vec![FOLLOWS_THE_CLOCK.into()],
                ..AgentDetails::default()
            };
            let details = GuestDetailsResponse {
                agent_details: Some(details),
                ..GuestDetailsResponse::default()
            };
            details.encode_to_vec()
        }
        "WriteStdin" => {
            let write: WriteStreamRequest = decoded(request);
            let len = u32::try_from(write.data.len()).expect("it is short");
            WriteStreamResponse { len }.encode_to_vec()
        }
        "UpdateRoutes" => {
            let exact = decoded::<UpdateRoutesRequest>(request).exact;
            let exact = exact.map_or(0, |exact| exact.routes.len() + exact.rules.len());
            let exact = u32::try_from(exact).expect("they are few");
            Routes {
                routes: Vec::new(),
                exact,
            }
            .encode_to_vec()
        }
        "ExecProcess" => {
            let exec: ExecProcessRequest = decoded(request);
            assert!(exec.process.is_some(), "the shim says what to run");
            Vec::new()
        }
        _ => Vec::new(),
    }
}

fn decoded<M: Message + Default>(request: &Request) -> M {
    M::decode(&request.payload[..]).expect("the shim says what it should")
}
