//! The pod's network: localhost within it, its address from the host, the host's from it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use tests::node::{self, Node, Pod, eventually, step};

/// Serves a folder by HTTP in a container.
fn serve(node: &Node, container: &str, port: u16, text: &str) {
    node.sh(
        container,
        &format!(
            "mkdir -p /tmp/www; echo {text} > /tmp/www/index.html; httpd -p {port} -h /tmp/www"
        ),
    );
}

/// What a web server says to a container.
fn fetched_by(node: &Node, container: &str, address: &str, port: u16) -> String {
    let request = "GET /index.html HTTP/1.0\\r\\n\\r\\n";
    let answer = node.sh(
        container,
        &format!("printf '{request}' | nc -w 20 {address} {port}"),
    );
    let (_, text) = answer.split_once("\r\n\r\n").expect("it answers");
    text.to_owned()
}

/// What a web server answers this host.
fn fetched(address: &str, port: u16) -> Option<String> {
    let to = format!("{address}:{port}").parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10)).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Of two containers in one pod.
pub(crate) fn shared(node: &Node, pod: &Pod, one: &str, two: &str) {
    serve(node, one, 8080, "hello");
    assert_eq!(
        node.sh(two, "wget -q -O - http://127.0.0.1:8080/index.html"),
        "hello"
    );
    let address = node.address(pod);
    let shown = node.sh(two, "ip -o address show dev eth0");
    assert!(
        shown.contains(&format!("{address}/24")),
        "{address} is not in {shown}"
    );
    step("the host reaches the pod", || {
        eventually("the pod answers", || {
            fetched(&address, 8080).is_some_and(|answer| answer.ends_with("hello\n"))
        });
    });
    let gateway = gateway(&address);
    let routes = node.sh(two, "ip route");
    assert!(
        routes.contains(&format!("default via {gateway} dev eth0")),
        "{routes}"
    );
    step("the pod reaches the host", || {
        reaches_the_host(node, two, &gateway)
    });
    node.sh(one, "kill $(pidof httpd)");
}

/// The bridge's address is the first of its network.
fn gateway(address: &str) -> String {
    let (network, _) = address.rsplit_once('.').unwrap();
    format!("{network}.1")
}

fn reaches_the_host(node: &Node, container: &str, gateway: &str) {
    let listener = TcpListener::bind((gateway, 0)).expect("the bridge has the address");
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        stream.write_all(b"well received\n").unwrap();
        (String::from_utf8_lossy(&text).into_owned(), peer)
    });
    let answer = node.sh(container, &format!("echo knock | nc {gateway} {port}"));
    let (text, _) = server.join().unwrap();
    assert_eq!((text.as_str(), answer.as_str()), ("knock", "well received"));
}

/// Of pods beside each other, one of them of another runtime.
pub(crate) fn between(node: &Node, first: &Pod, second: &Pod, plain: &Pod) {
    let pods = [first, second, plain];
    let addresses = pods.map(|pod| node.address(pod));
    assert!(
        addresses[0] != addresses[1] && addresses[1] != addresses[2],
        "{addresses:?}"
    );
    let containers = pods.map(|pod| {
        let container = node.run(pod, &node::waiting("peer"));
        serve(node, &container, 80, &pod.config.hostname);
        container
    });
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 1)] {
        let got = fetched_by(node, &containers[from], &addresses[to], 80);
        assert_eq!(
            got, pods[to].config.hostname,
            "from {}",
            pods[from].config.hostname
        );
    }
    let apart = |at: usize| node.sh(&containers[at], "echo mine > /dev/shm/note; hostname");
    assert_eq!([apart(0), apart(1)], ["first", "second"]);
    assert_eq!(
        node.sh(&containers[2], "ls /dev/shm"),
        "",
        "memory is a pod's own"
    );
    if node.is_podvmm() {
        let kernels = [0, 2].map(|at| node.sh(&containers[at], "uname -r"));
        assert_ne!(
            kernels[0], kernels[1],
            "a virtual machine has a kernel of its own"
        );
    }
}
