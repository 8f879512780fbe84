//! A process's streams and terminals, and the signals to it.

use protocol::agent::messages::{
    Empty, TtyWinResizeRequest, WriteStreamRequest, WriteStreamResponse,
};
use protocol::agent::oci::Process;
use tests::pod::{Agent, refusal, shell, spec};

use crate::rights::by_user;

/// A user opens its standard streams by their names in /dev, as pipes and as terminals.
pub(crate) fn a_user_opens_its_streams_by_their_names(agent: &Agent) {
    let script = "echo out >/dev/stdout; echo err >/dev/stderr; : </dev/stdin && echo in";
    let mut own = spec(script);
    own.process = own.process.map(|process| by_user(1000, process));
    let (out, err, status) = agent.run("own-streams", own);
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("out\nin\n", "err\n", 0)
    );

    let console = "echo out >/dev/stdout; echo tty >/dev/tty; echo console >/dev/console";
    let mut terminal = spec(&format!("{console}; read line; exec sleep 1000"));
    terminal.process = terminal.process.map(|process| Process {
        terminal: true,
        ..by_user(1000, process)
    });
    agent.create("own-terminal", terminal).unwrap();
    agent.start("own-terminal").unwrap();
    for (name, terminal) in [("by-pipes", false), ("by-terminal", true)] {
        let process = Process {
            terminal,
            ..by_user(1234, shell("echo out >/dev/stdout; echo err >/dev/stderr"))
        };
        agent.exec("own-terminal", name, process).unwrap();
        let (err, out, status) = agent.outcome("own-terminal", name);
        let said = (out + &err).replace('\r', "");
        assert_eq!((said.as_str(), status), ("out\nerr\n", 0), "{name}");
    }
    let typed = WriteStreamRequest {
        container_id: "own-terminal".into(),
        exec_id: String::new(),
        data: b"\n".to_vec(),
    };
    let _: WriteStreamResponse = agent.ask("WriteStdin", &typed).unwrap();
    agent.signal("own-terminal", "", 9);
    let (_, out, _) = agent.outcome("own-terminal", "");
    let out = out.replace('\r', "");
    assert!(out.starts_with("out\ntty\nconsole\n"), "{out}");
    agent.remove("own-terminal");
}

/// Input, its end, a terminal's size and signals reach one process, and its output and status come back.
pub(crate) fn streams_and_signals_reach_their_process(agent: &Agent) {
    agent
        .create("streams", spec("cat; echo ended >&2; sleep 1000"))
        .unwrap();
    agent.start("streams").unwrap();
    let input = |data: &[u8]| {
        let request = WriteStreamRequest {
            container_id: "streams".into(),
            exec_id: String::new(),
            data: data.to_vec(),
        };
        let written: WriteStreamResponse = agent.ask("WriteStdin", &request).unwrap();
        written.len
    };
    assert_eq!(input(b"typed\n"), 6);
    input(b"");
    let mut tty = shell("stty size; kill -0 1 && echo $$; exit 9");
    tty.terminal = true;
    agent.exec("streams", "tty", tty).unwrap();
    let size = TtyWinResizeRequest {
        container_id: "streams".into(),
        exec_id: "tty".into(),
        row: 10,
        column: 20,
    };
    let _: Empty = agent.ask("TtyWinResize", &size).unwrap();
    let (_, out, status) = agent.outcome("streams", "tty");
    assert!(out.lines().count() == 2 && status == 9, "{out} {status}");
    // What it leaves behind has its streams, and is not waited for.
    let (out, status) = agent.exec_shell("streams", "sleep 1000 & echo hi");
    assert_eq!((out.as_str(), status), ("hi\n", 0));
    agent
        .exec("streams", "slept", shell("exec sleep 1000"))
        .unwrap();
    agent.signal("streams", "slept", 15);
    assert_eq!(agent.outcome("streams", "slept").2, 143);
    agent.signal("streams", "", 9);
    let (err, out, status) = agent.outcome("streams", "");
    assert_eq!(
        (out.as_str(), err.as_str(), status),
        ("typed\n", "ended\n", 137)
    );
    let late = agent.exec("streams", "late", shell("true"));
    assert_eq!(refusal(late).1, "the container has ended");
    agent.remove("streams");
}
