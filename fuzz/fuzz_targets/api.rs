//! Any client at podvmm's API, and any podvmm at its client: bytes, and JSON that is almost right. Bytes are the
//! same requests in whatever pieces they come, what is understood can be written and read again, refusals are
//! answers, and what is held has some relation to what came.
#![no_main]

mod heap;
mod json;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use api::http::{self, Method, testing};
use api::route::{self, ROUTES};
use api::{Request, VmConfig};
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

use json::Change;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// What a client sends, and how many bytes come at once.
    Bytes(&'a [u8], u8),
    /// Bodies of some routes, sent at once.
    Bodies(Vec<(u8, &'a str)>, u8),
    /// A VM that is almost right, and a patch to it.
    Vm(Vec<(u16, Change)>, &'a str),
    /// What podvmm answers to the shim.
    Answer(u8, &'a [u8]),
    /// The body of such an answer.
    Body(u8, u16, &'a str),
}

/// What may be held of the heap for so many bytes of JSON: a map of one field takes 600 bytes.
fn held(bytes: usize) -> usize {
    (256 << 10) + 512 * bytes
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Bytes(bytes, piece) => serve(bytes, piece),
    Input::Bodies(bodies, piece) => {
        let mut bytes = Vec::new();
        for (route, body) in bodies {
            let route = &ROUTES[usize::from(route) % ROUTES.len()];
            let (method, path, len) = (route.method, route.path, body.len());
            let request =
                format!("{method} {path} HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{body}");
            bytes.extend(request.into_bytes());
        }
        serve(&bytes, piece);
    }
    Input::Vm(changes, patch) => {
        let mut vm = all_of_a_vm();
        json::change(&mut vm, &changes);
        let text = vm.to_string();
        if let Ok(vm) = VmConfig::parse(text.as_bytes()) {
            is_written(&vm);
        }
        if let Ok(patch) = serde_json::from_str::<Value>(patch)
            && let Ok(vm) = VmConfig::restored(text.as_bytes(), &patch, Vec::new())
        {
            is_written(&vm);
        }
    }
    Input::Answer(request, bytes) => ask(request, bytes),
    Input::Body(request, status, body) => {
        let len = body.len();
        let answer = format!("HTTP/1.1 {status} \r\nContent-Length: {len}\r\n\r\n{body}");
        ask(request, answer.as_bytes());
    }
});

/// A server gets the bytes in pieces.
fn serve(bytes: &[u8], piece: u8) {
    let whole = testing::requests([bytes]);
    let pieces = bytes.chunks(usize::from(piece).max(1));
    let most = held(bytes.len());
    let in_pieces = heap::bounded(most, || testing::requests(pieces));
    assert_eq!(told(&whole), told(&in_pieces));
    for request in in_pieces {
        match request {
            Ok((request, _)) => heap::bounded(most, || understand(request)),
            Err(refusal) => is_refusal(&refusal),
        }
    }
}

/// What can be compared of requests.
fn told(
    requests: &[Result<(http::Request, bool), http::Response>],
) -> Vec<Result<(&Method, &str, &[u8], bool), u16>> {
    let requests = requests.iter().map(|request| match request {
        Ok((request, is_kept)) => Ok((&request.method, &*request.path, &*request.body, *is_kept)),
        Err(refusal) => Err(refusal.status),
    });
    requests.collect()
}

fn understand(request: http::Request) {
    match route::request(request) {
        Ok(Request::Create(vm)) => is_written(&vm),
        Ok(_) => {}
        Err(error) => is_refusal(&route::response(&Err(error))),
    }
}

/// A refusal is an array of reasons, in ASCII.
fn is_refusal(response: &http::Response) {
    assert!((400..600).contains(&response.status));
    let reasons: Vec<String> = serde_json::from_slice(&response.body).expect("it has reasons");
    assert!(!reasons.is_empty() && response.body.is_ascii());
    assert!(testing::encode(response).ends_with(&response.body));
}

/// What is understood is the same once it is written and read again.
fn is_written(vm: &VmConfig) {
    if vm.check().is_err() {
        return;
    }
    let json = vm.json();
    let again = VmConfig::parse(json.to_string().as_bytes()).expect("it was understood");
    assert_eq!(again.json(), json);
    vm.host_paths();
}

/// A client gets these bytes for an answer.
fn ask(request: u8, bytes: &[u8]) {
    let (client, mut server) = UnixStream::pair().unwrap();
    server.write_all(bytes).unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut client = testing::client(client);
    heap::bounded(held(bytes.len()), || match request % 3 {
        0 => client.ping().map(drop),
        1 => client.info().map(drop),
        _ => client.boot(),
    })
    .ok();
}

fn all_of_a_vm() -> Value {
    let rate = json!({"size": 1, "one_time_burst": 1, "refill_time": 1});
    let rates = json!({"bandwidth": rate, "ops": rate});
    json!({
        "payload": {"kernel": "/k", "initramfs": "/i", "cmdline": "quiet"},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 2, "max_phys_bits": 40,
                 "topology": {"cores_per_die": 2}},
        "memory": {"size": 1 << 30, "hotplug_size": 1 << 30, "hotplugged_size": 1 << 27,
                   "hugepages": false, "thp": false, "shared": true},
        "disks": [{"path": "/d", "readonly": true, "direct": true, "num_queues": 2,
                   "queue_size": 64, "serial": "s", "rate_limiter_config": rates, "id": "d"}],
        "net": [{"tap": "t", "mac": "02:00:00:00:00:01", "mtu": 1400, "num_queues": 4,
                 "queue_size": 64, "offload_tso": false, "rate_limiter_config": rates,
                 "id": "n", "ip": "10.0.0.1", "mask": "255.0.0.0"}],
        "fs": [{"tag": "a", "shared_dir": "/s", "readonly": true, "cache": "none",
                "writeback": true, "num_queues": 2, "queue_size": 64, "id": "f"},
               {"tag": "b", "socket": "/v", "num_queues": 1, "queue_size": 512}],
        "balloon": {"size": 1, "deflate_on_oom": true, "free_page_reporting": true},
        "rng": {"src": "/dev/random"},
        "vsock": {"cid": 3, "socket": "/v", "id": "v"},
        "serial": {"mode": "File", "file": "/log"},
        "console": {"mode": "Socket", "socket": "/c"},
    })
}
