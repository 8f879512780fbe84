//! The pod's network: localhost within it, its address from the host, the host's from it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use tests::network::one_caller;
use tests::node::{self, Node, Pod, eventually, step};

/// Serves a folder by HTTP in a container.
fn serve(node: &Node, container: &str, port: u16, text: &str) {
    let script = format!("echo {text} > /tmp/index.html; httpd -p {port} -h /tmp");
    node.sh(container, &script);
}

/// Prints what a web server answers.
fn fetch(address: &str) -> String {
    let request = "GET /index.html HTTP/1.0\\r\\n\\r\\n";
    format!("printf '{request}' | nc -w 20 {address} 80")
}

/// Panics unless a web server answered with the name of its pod.
fn is_from(pod: &Pod, answer: &str) {
    let (_, text) = answer.split_once("\r\n\r\n").expect("it answers");
    assert_eq!(text, pod.config.hostname);
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
    let address = node.address(pod);
    let [got, shown, routes] = node.sh_each(
        two,
        [
            "wget -q -O - http://127.0.0.1:8080/index.html",
            "ip -o address show dev eth0",
            "ip route",
        ],
    );
    assert_eq!(got, "hello");
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
    assert!(
        routes.contains(&format!("default via {gateway} dev eth0")),
        "{routes}"
    );
    step("the pod reaches the host", || {
        reaches_the_host(node, two, &gateway)
    });
}

/// The bridge's address is the first of its network.
fn gateway(address: &str) -> String {
    let (network, _) = address.rsplit_once('.').unwrap();
    format!("{network}.1")
}

fn reaches_the_host(node: &Node, container: &str, gateway: &str) {
    let (port, server) = one_caller(gateway);
    let answer = node.sh(container, &format!("echo knock | nc {gateway} {port}"));
    let text = server.join().unwrap();
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
    const NOTE: &str = "echo mine > /dev/shm/note; hostname";
    let [to_second, to_plain, name, kernel] = node.sh_each(
        &containers[0],
        [
            &fetch(&addresses[1]),
            &fetch(&addresses[2]),
            NOTE,
            "uname -r",
        ],
    );
    is_from(second, &to_second);
    is_from(plain, &to_plain);
    assert_eq!(name, "first");
    let [to_first, name] = node.sh_each(&containers[1], [&fetch(&addresses[0]), NOTE]);
    is_from(first, &to_first);
    assert_eq!(name, "second");
    let [to_second, notes, of_the_host] = node.sh_each(
        &containers[2],
        [&fetch(&addresses[1]), "ls /dev/shm", "uname -r"],
    );
    is_from(second, &to_second);
    assert_eq!(notes, "", "memory is a pod's own");
    if node.is_podvmm() {
        assert_ne!(
            kernel, of_the_host,
            "a virtual machine has a kernel of its own"
        );
    }
}
