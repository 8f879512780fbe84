//! Containers by ctr with a real containerd: each a pod of its own.
//!
//! `PODVMM_TEST_HANDLER=runc` holds the tests themselves to what runc does. Needs root.

#![expect(clippy::unwrap_used, reason = "its steps are functions of their own")]

mod apart;
mod clock;
mod jail;
mod policy;
mod programs;
mod templates;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::containerd::{self, Containerd, Ran, has_templates};
use tests::ctr::{Container, Events, run_has};
use tests::guest;
use tests::network::{PodNetwork, one_caller};
use tests::node::{Node, eventually, step};

/// Runs `cases` on a node, which has to be clean afterwards.
fn on_a_node(cases: impl FnOnce(&Node)) {
    run_on(Node::shared, |node| cases(node));
}

/// The same with a containerd that no other test has.
fn on_a_node_of_its_own(cases: impl FnOnce(&mut Node)) {
    run_on(Node::start, cases);
}

fn run_on(start: fn() -> Node, cases: impl FnOnce(&mut Node)) {
    if tests::containerd::handler() == "podvmm" && !tests::podvmm::kvm_is_here() {
        return;
    }
    let _one = guest::one_at_a_time();
    let mut node = step("containerd", start);
    cases(&mut node);
    step("end of the node, the host compared", || node.end());
}

/// A command that ends by itself: streams, environment, folder, limits, kernel and status.
#[test]
fn a_command_has_its_streams_and_its_status() {
    on_a_node(|node| {
        let events = Events::of(&node.containerd);
        let container = Container::new(node, "command");
        let script = "uname -r; echo $COLOUR; pwd; hostname; head -n 1; echo oops >&2; exit 7";
        // This ctr does not tell containerd that the input has ended.
        let mut command = container.run(
            &node.containerd,
            &["--rm", "--env", "COLOUR=green paint", "--cwd", "/tmp"],
            &["sh", "-c", script],
        );
        let ran = step("ctr run", || with_input(&mut command, b"from the host\n"));
        let lines: Vec<_> = ran.stdout.lines().collect();
        assert_eq!(ran.code, Some(7), "{ran:?}");
        assert_eq!(lines[1..3], ["green paint", "/tmp"], "{ran:?}");
        assert_eq!(lines[4..], ["from the host"], "{ran:?}");
        assert_eq!(ran.stderr, "oops\n", "{ran:?}");
        let own = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(
            lines[0] != own.trim(),
            node.is_podvmm(),
            "its kernel is {}",
            lines[0]
        );
        events.in_order(container.id(), &["create", "start", "exit", "delete"]);
        assert!(
            events
                .data(container.id(), "exit")
                .contains("\"exit_status\":7"),
            "{}",
            events.text()
        );
    });
}

/// A user's streams by their names in /dev, and a working directory that the image has not.
#[test]
fn a_user_has_its_streams_and_its_folder() {
    on_a_node(|node| {
        if !run_has(&node.containerd, "--user") {
            return;
        }
        let container = Container::new(node, "user");
        let script =
            "id -u; pwd; echo out >/dev/stdout; echo err >/dev/stderr; ls -ldn . | cut -c -10";
        let mut command = container.run(
            &node.containerd,
            &["--rm", "--user", "1000", "--cwd", "/not/there"],
            &["sh", "-c", script],
        );
        let ran: Ran = step("ctr run", || command.output().unwrap().into());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(ran.stdout, "1000\n/not/there\nout\ndrwxr-xr-x\n", "{ran:?}");
        assert_eq!(ran.stderr, "err\n", "{ran:?}");
    });
}

/// Starts a command, gives it all of its standard input, and waits for its end.
fn with_input(command: &mut Command, input: &[u8]) -> Ran {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap().into()
}

/// A read-only volume, and what is mounted below it, which is as read-only if that is asked for.
#[test]
fn what_is_below_a_read_only_volume_is_so_if_that_is_asked_for() {
    on_a_node(|node| {
        let outer = node.folder().join("outer");
        let inner = outer.join("inner");
        fs::create_dir_all(&inner).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "podvmm-test"])
            .arg(&inner)
            .status();
        assert!(mounted.unwrap().success());
        let mount = |place: &str, option: &str| {
            let source = outer.display();
            format!("type=bind,src={source},dst={place},options=rbind:{option}")
        };
        let (plain, all) = (mount("/ro", "ro"), mount("/rro", "rro"));
        let container = Container::new(node, "volumes");
        let script = "for file in /ro/a /ro/inner/b /rro/c /rro/inner/d; do
            touch $file 2>/dev/null && echo $file; done; true";
        let options = ["--rm", "--mount", &plain, "--mount", &all];
        let mut command = container.run(&node.containerd, &options, &["sh", "-c", script]);
        let ran: Ran = step("ctr run", || command.output().unwrap()).into();
        assert_eq!(ran.stdout, "/ro/inner/b\n", "{ran:?}");
        assert!(inner.join("b").exists());
        let unmounted = Command::new("umount").arg(&inner).status();
        assert!(unmounted.unwrap().success());
    });
}

/// A program that is missing, or that cannot be started: an error that names it, and the network namespace
/// is the next container's.
#[test]
fn a_program_that_cannot_be_started_leaves_its_network_to_the_next() {
    on_a_node(|node| {
        let network = PodNetwork::new(1);
        let namespace = format!("network:{}", network.path());
        let bad = node.folder().join("bad");
        fs::write(&bad, "#!/no/such/interpreter\n").unwrap();
        fs::set_permissions(&bad, fs::Permissions::from_mode(0o755)).unwrap();
        let bad = format!("type=bind,src={},dst=/bad,options=rbind:ro", bad.display());
        let options = ["--with-ns", &namespace, "--mount", &bad];
        for (name, program) in [("missing", "/nosuch"), ("unfit", "/bad")] {
            let container = Container::new(node, name);
            let mut command = container.run(&node.containerd, &options, &[program]);
            let ran: Ran = step(name, || command.output().unwrap()).into();
            assert_ne!(ran.code, Some(0), "{ran:?}");
            assert!(ran.stderr.contains(program), "it says what: {ran:?}");
            assert_eq!(container.vmms(), Vec::<i32>::new());
            let next = Container::new(node, &format!("after-{name}"));
            let mut command = next.run(
                &node.containerd,
                &["--rm", "--with-ns", &namespace],
                &["cat", "/sys/class/net/eth0/address"],
            );
            let ran: Ran = step("the next", || command.output().unwrap()).into();
            assert_eq!(ran.stdout.trim(), PodNetwork::hardware(0), "{ran:?}");
            // What ctr leaves of one that it could not start.
            let _ = node
                .containerd
                .ctr(&["tasks", "delete", "--force", container.id()]);
            let _ = node
                .containerd
                .ctr(&["containers", "delete", container.id()]);
        }
    });
}

/// Interfaces that lead nowhere are not the container's. Routes are, with their metrics, tables and rules.
#[test]
fn networks_of_more_than_a_pods() {
    on_a_node(|node| {
        let network = PodNetwork::new(1);
        let pod = network.path();
        let pod = pod.rsplit('/').next().unwrap();
        for line in [
            "link add gretap0 type bridge",
            "route add default via 10.9.0.1 metric 100",
            "route add default via 10.9.0.7 metric 50",
            "route add default via 10.9.0.8 table 100",
            "route add 192.0.2.64/26 nexthop via 10.9.0.3 nexthop via 10.9.0.3 weight 3",
            "route add prohibit 192.0.2.128/26",
            "rule add fwmark 0x7 table 100",
            "rule add to 203.0.113.0/24 table 100 pref 99",
        ] {
            tests::network::ip(&format!("-n {pod} {line}"));
        }
        let namespace = format!("network:{}", network.path());
        let container = Container::new(node, "routes");
        let options = ["--rm", "--with-ns", &namespace];
        let script = "ls /sys/class/net; ip rule; ip route show table 100; \
            for to in 192.0.2.1 192.0.2.65 203.0.113.1; do ip route get $to; done; \
            ip route get 192.0.2.129 2>&1";
        let mut command = container.run(&node.containerd, &options, &["sh", "-c", script]);
        let ran = Ran::from(step("its network told", || command.output().unwrap()));
        for said in [
            "from all fwmark 0x7 lookup 100",
            "99:\tfrom all to 203.0.113.0/24 lookup 100",
            "default via 10.9.0.8 dev eth0",
            "192.0.2.1 via 10.9.0.7 dev eth0",
            "192.0.2.65 via 10.9.0.3 dev eth0",
            "203.0.113.1 via 10.9.0.8 dev eth0",
            "RTNETLINK answers: Permission denied",
        ] {
            assert!(ran.stdout.contains(said), "{said}: {ran:?}");
        }
        assert_eq!(ran.stdout.contains("gretap0"), !node.is_podvmm(), "{ran:?}");
    });
}

/// Huge pages of the host's would be lost in a VM, so they are refused by name.
#[test]
fn a_volume_of_huge_pages_is_refused() {
    on_a_node(|node| {
        if !node.is_podvmm() {
            return;
        }
        let pages = node.folder().join("pages");
        fs::create_dir(&pages).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "hugetlbfs", "podvmm-test"])
            .arg(&pages)
            .status();
        assert!(mounted.unwrap().success());
        let container = Container::new(node, "pages");
        let volume = format!("type=bind,src={},dst=/pages,options=rbind", pages.display());
        let options = ["--rm", "--mount", &volume];
        let mut command = container.run(&node.containerd, &options, &["true"]);
        let ran: Ran = step("ctr run", || command.output().unwrap()).into();
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(
            ran.stderr
                .contains("a volume of huge pages is not possible"),
            "{ran:?}"
        );
        let unmounted = Command::new("umount").arg(&pages).status();
        assert!(unmounted.unwrap().success());
    });
}

/// A terminal, and the end by a signal that nothing can be done about.
#[test]
fn a_terminal_is_one() {
    on_a_node(|node| {
        let container = Container::new(node, "terminal");
        let script =
            "test -t 0 && test -t 1 && test -t 2 && echo terminal; echo oops >&2; kill -9 $$";
        // Process 1 cannot be killed from within.
        let script = format!("sh -c '{script}'; exit $?");
        let command = container.run(&node.containerd, &["--rm", "--tty"], &["sh", "-c", &script]);
        let ran = step("ctr run --tty", || on_a_terminal(&command));
        assert_eq!(ran.code, Some(137), "{ran:?}");
        assert!(
            ran.stdout.replace('\r', "").contains("terminal\noops\n"),
            "{ran:?}"
        );
    });
}

/// Runs a command with a terminal for its streams.
fn on_a_terminal(command: &Command) -> Ran {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words = words.map(|word| format!("'{}'", word.to_str().unwrap().replace('\'', "'\\''")));
    let line = words.collect::<Vec<_>>().join(" ");
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::null())
        .output();
    output.expect("bsdutils is installed").into()
}

/// One that runs on, and all that can be done to it.
#[test]
fn a_container_that_runs_on() {
    on_a_node_of_its_own(|node| {
        let container = Container::new(node, "service");
        let events = Events::of(&node.containerd);
        // It waits without a program of its own: to start one takes an interpreted guest a second.
        let script = "n=0; trap 'exit 9' TERM; mkfifo /tmp/never; exec 3<>/tmp/never; \
             while :; do n=$((n + 1)); echo $n > /tmp/m; mv /tmp/m /tmp/n; read -t 1 <&3; done";
        let cgroup = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev";
        let limits = [
            "--memory-limit",
            // As much as pods have by default, for which there is a template.
            "536870912",
            "--cpus",
            "0.9",
            "--mount",
            cgroup,
        ];
        step("ctr run --detach", || {
            container.start(&node.containerd, &limits, &["sh", "-c", script]);
        });
        exec(&node.containerd, &container);
        limits_inside(&node.containerd, &container);
        seen_from_outside(&node.containerd, &container);
        if node.is_podvmm() {
            jail::a_podvmm_is_in_one(&container);
        }
        paused(&node.containerd, &container);
        events.in_order(container.id(), &["create", "start", "paused", "resumed"]);
        refused_on_a_running_one(node, &container);
        drop(events);
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            step(
                &format!("containerd restarts after signal {signal}"),
                || {
                    node.containerd.restart(signal);
                },
            );
            let ran = container.exec(&node.containerd, &[], &["sh", "-c", "cat /tmp/n; exit 3"]);
            assert_eq!(ran.code, Some(3), "it runs on: {ran:?}");
        }
        let events = Events::of(&node.containerd);
        killed(&node.containerd, &container);
        events.in_order(container.id(), &["exit", "delete"]);
        let exit = events.data(container.id(), "exit");
        assert!(
            exit.contains("\"exit_status\":9"),
            "what its handler says: {exit}"
        );
    });
}

fn exec(containerd: &Containerd, container: &Container) {
    let ran = container.exec(
        containerd,
        &[],
        &["sh", "-c", "echo out; echo err >&2; exit 11"],
    );
    let expected = Ran {
        code: Some(11),
        stdout: "out\n".into(),
        stderr: "err\n".into(),
    };
    assert_eq!(ran, expected);
    let as_other = ["--user", "1234:2345", "--cwd", "/tmp"];
    let ran = container.exec(containerd, &as_other, &["sh", "-c", "id -u; id -g; pwd"]);
    assert_eq!(ran.stdout, "1234\n2345\n/tmp\n", "{ran:?}");
    let ran = container.exec(containerd, &[], &["/no/such/program"]);
    assert_ne!(ran.code, Some(0));
    assert!(
        ran.stderr.contains("/no/such/program"),
        "it says what is missing: {ran:?}"
    );
    let mut command = container.exec_command(
        containerd,
        &[],
        &["sh", "-c", "head -c 1048576 | wc -c; exit 4"],
    );
    let ran = step("exec with 1 MiB of input", || {
        with_input(&mut command, &[b'x'; 1 << 20])
    });
    assert_eq!(
        (ran.code, ran.stdout.trim()),
        (Some(4), "1048576"),
        "{ran:?}"
    );
    let command = container.exec_command(containerd, &["--tty"], &["sh", "-c", "tty >&2; exit 5"]);
    let ran = step("exec with a terminal", || on_a_terminal(&command));
    assert_eq!(ran.code, Some(5), "{ran:?}");
    assert!(
        ran.stdout.contains("/dev/pts/") || ran.stdout.contains("/dev/console"),
        "{ran:?}"
    );
}

fn limits_inside(containerd: &Containerd, container: &Container) {
    let script = "cd /sys/fs/cgroup; \
         if [ -e memory.max ]; then cat memory.max cpu.max; \
         else cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us; fi";
    let ran = container.exec(containerd, &[], &["sh", "-c", script]);
    let numbers: Vec<_> = ran.stdout.split_whitespace().collect();
    assert_eq!(numbers, ["536870912", "90000", "100000"], "{ran:?}");
}

fn seen_from_outside(containerd: &Containerd, container: &Container) {
    assert_eq!(container.state(containerd), "RUNNING");
    let listed = containerd.ctr_must(&["tasks", "ps", container.id()]);
    assert!(
        listed.lines().count() >= 2,
        "a title and its first process: {listed}"
    );
    let metrics = containerd.ctr_must(&["tasks", "metrics", "--format", "json", container.id()]);
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    let usage = &metrics["memory"]["usage"];
    // The kernel's two kinds of cgroups have metrics of their own.
    let usage = usage["usage"].as_u64().or_else(|| usage.as_u64());
    assert!(usage.is_some_and(|bytes| bytes > 0), "{metrics}");
    let id = container.id();
    let names = containerd.ctr_must(&["containers", "ls", "--quiet"]);
    assert!(names.lines().any(|name| name == id), "{names}");
}

fn paused(containerd: &Containerd, container: &Container) {
    let count = || -> u32 {
        let ran = container.exec(containerd, &[], &["cat", "/tmp/n"]);
        ran.stdout.trim().parse().unwrap()
    };
    let start = Instant::now();
    let before = count();
    containerd.ctr_must(&["tasks", "pause", container.id()]);
    assert_eq!(container.state(containerd), "PAUSED");
    step("paused", || thread::sleep(Duration::from_secs(10)));
    containerd.ctr_must(&["tasks", "resume", container.id()]);
    assert_eq!(container.state(containerd), "RUNNING");
    let counted = count() - before;
    let seconds = start.elapsed().as_secs();
    assert!(
        u64::from(counted) + 9 <= seconds,
        "it counts each second, but not those 10: {counted} in {seconds} s"
    );
    eventually("it counts on", || count() > before + counted);
}

fn refused_on_a_running_one(node: &Node, container: &Container) {
    if !node.is_podvmm() {
        return;
    }
    let ran = node
        .containerd
        .ctr(&["tasks", "checkpoint", container.id()]);
    assert_ne!(ran.code, Some(0));
    assert!(
        ran.stderr.to_lowercase().contains("checkpoint"),
        "it says what: {ran:?}"
    );
}

fn killed(containerd: &Containerd, container: &Container) {
    let id = container.id();
    let id_of_exec = "to-be-killed";
    let mut command = containerd.ctr_command(&["tasks", "exec", "--exec-id", id_of_exec, id]);
    let mut exec = command.args(["sleep", "1000"]).spawn().unwrap();
    eventually("the exec is killed", || {
        let kill = [
            "tasks",
            "kill",
            "--signal",
            "KILL",
            "--exec-id",
            id_of_exec,
            id,
        ];
        // It may not have started yet, or have ended since.
        let _ = containerd.ctr(&kill);
        exec.try_wait().unwrap().is_some()
    });
    assert_eq!(exec.wait().unwrap().code(), Some(137));
    step("kill --signal TERM", || {
        containerd.ctr_must(&["tasks", "kill", "--signal", "TERM", id]);
        eventually("it ends", || container.state(containerd) == "STOPPED");
    });
    container.delete(containerd);
}

/// What a virtual machine cannot give is refused, and before it boots.
#[test]
fn the_hosts_network_is_refused() {
    on_a_node(|node| {
        if !node.is_podvmm() {
            return;
        }
        let container = Container::new(node, "on-the-host");
        let mut command = container.run(&node.containerd, &["--rm", "--net-host"], &["true"]);
        let ran: Ran = step("ctr run --net-host", || command.output().unwrap()).into();
        assert_ne!(ran.code, Some(0));
        let message = ran.stderr.to_lowercase();
        assert!(
            message.contains("host") && message.contains("network"),
            "it says why: {ran:?}"
        );
    });
}

/// An interface that comes between a container's creation and its start is the guest's.
#[test]
fn a_network_that_comes_late() {
    on_a_node(|node| {
        let from_template = node.is_podvmm() && has_templates();
        if from_template {
            step("there is a template", || make_template(node));
        }
        let networks = node.containerd.folder().join("cni");
        let text = fs::read_to_string(networks.join("10-podvmm.conflist")).unwrap();
        let network: Value = serde_json::from_str(&text).unwrap();
        let range = &network["plugins"][0]["ipam"]["ranges"][0][0];
        let gateway = range["gateway"].as_str().unwrap();
        let (port, server) = one_caller(gateway);
        let script = format!(
            "ip -o -4 address show dev eth0; ip route; echo knock | nc -w 20 {gateway} {port}"
        );
        let container = Container::new(node, "late");
        let command = container.run(&node.containerd, &["--rm", "--cni"], &["sh", "-c", &script]);
        let place = node.folder().join("cni");
        fs::create_dir(&place).unwrap();
        let mut command = with_networks(&command, &place, &networks);
        let ran: Ran = step("ctr run --cni", || command.output().unwrap().into());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let (own, _) = gateway.rsplit_once('.').unwrap();
        assert!(ran.stdout.contains(&format!("inet {own}.")), "{ran:?}");
        let route = format!("default via {gateway} dev eth0");
        assert!(ran.stdout.contains(&route), "{ran:?}");
        assert!(ran.stdout.ends_with("well received\n"), "{ran:?}");
        assert_eq!(server.join().unwrap(), "knock");
        let went_on = node.containerd.log().contains(&phase("renewal"));
        assert_eq!(went_on, from_template);
    });
}

/// What containerd's log has of a pod whose start had this phase.
fn phase(name: &str) -> String {
    format!("\\\"{name}\\\":")
}

/// As an administrator makes one ahead of the pods, unless there is one.
fn make_template(node: &Node) {
    let config = node.containerd.runtime_config().unwrap();
    let mut make = Command::new(containerd::shim());
    let made = make.args(["template", "-config"]).arg(config).output();
    let made: Ran = made.unwrap().into();
    assert_eq!(made.code, Some(0), "{made:?}");
}

/// ctr looks for networks and plugins in places of its own: a command that sees them there.
fn with_networks(command: &Command, place: &Path, networks: &Path) -> Command {
    const SCRIPT: &str = r#"
        mount -t tmpfs none "$0" && mkdir -p "$0/etc/cni" "$0/opt/cni" &&
        ln -s "$1" "$0/etc/cni/net.d" && ln -s /usr/lib/cni "$0/opt/cni/bin" &&
        mount -t overlay -o "lowerdir=$0/etc:/etc" none /etc &&
        mount -t overlay -o "lowerdir=$0/opt:/opt" none /opt &&
        shift && exec "$@""#;
    let mut sees = Command::new("unshare");
    sees.args(["--mount", "sh", "-c", SCRIPT])
        .arg(place)
        .arg(networks);
    sees.arg(command.get_program()).args(command.get_args());
    sees.stdin(Stdio::null());
    sees
}
