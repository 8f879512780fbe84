//! Any guest at a console of two ports, one of which has input waiting.
#![no_main]

use std::io::{self, Write};
use std::os::fd::OwnedFd;

use devices::host::{Input, Output};
use devices::virtio::console::{Console, Port};
use devices::virtio::testing::{Step, survive};
use libfuzzer_sys::fuzz_target;

fn port(input: Option<OwnedFd>) -> Port {
    Port {
        name: "port".into(),
        console: input.is_some(),
        input: input.map(|fd| Input::new(fd).unwrap()),
        output: Some(Output::sink(Box::new(io::sink()))),
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let (stdin, mut host) = io::pipe().unwrap();
    host.write_all(&[b'x'; 4096]).unwrap();
    let console = Console::new(vec![port(Some(stdin.into())), port(None)]).unwrap();
    console.handle().resize(80, 25);
    survive(console, &[1, 3, 5], steps);
});
