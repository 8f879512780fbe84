//! Servers and who asks them: of the pod, of the node, and of other pods.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::cri::config::Int64Value;
use tests::host::Size;
use tests::node::{Node, eventually, mount, security, step, within};

use crate::{Bench, compare, container, on_a_node, same_as_runc, waiting};

/// Transactions of each of pgbench's clients.
const TRANSACTIONS: Size = Size {
    real: 2000,
    emulated: 20,
};

/// Bytes that iperf3 sends each way.
const MEBIBYTES: Size = Size {
    real: 1000,
    emulated: 10,
};

/// A database as its own user serves a sidecar by a socket on a volume, is killed, and recovers.
#[test]
fn postgresql_serves_a_sidecar_by_a_socket() {
    same_as_runc("pgbench", |bench| {
        let first = database(bench, "first");
        let mut sidecar = waiting("sidecar");
        bench.mount(&mut sidecar, &["sockets"]);
        security(&mut sidecar).run_as_username = "postgres".into();
        let sidecar = bench.run(&sidecar);
        let tool = |what: &str, script: &str| {
            // Before /usr/bin, where Debian has a wrapper in Perl for each, which has far more to do.
            let script =
                format!("export PATH=/usr/lib/postgresql/17/bin:$PATH PGHOST=/sockets\n{script}");
            bench.sh(what, &sidecar, &script)
        };
        step("it starts", || serves(bench, "first"));
        let ready = tool("it is ready", "pg_isready");
        let count = TRANSACTIONS.here();
        let script = format!(
            "pgbench -q -i -s 1 postgres 2>/dev/null
             pgbench -n -c 4 -j 2 -t {count} postgres | grep -E '^number of (transactions|failed)'"
        );
        let ran = tool("pgbench", &script);
        let sums = "psql -AtX postgres -c 'select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts),
            sum(delta) = (select sum(tbalance) from pgbench_tellers) from pgbench_history'";
        let before = tool("its sums", sums);
        assert_eq!(before, format!("{}|t|t", 4 * count));
        bench.ran(&first, "kill -QUIT $(head -n 1 /db/data/postmaster.pid)");
        let end = bench.node.ended(&first).exit_code;
        let second = database(bench, "second");
        step("it recovers", || serves(bench, "second"));
        let after = tool("its sums again", sums);
        assert_eq!(before, after);
        step("it stops", || bench.node.cri.stop(&second, 120).unwrap());
        let stopped = bench.node.ended(&second).exit_code;
        let mut check = container(
            "check",
            &[
                "/usr/lib/postgresql/17/bin/pg_checksums",
                "--check",
                "-D",
                "/db/data",
            ],
        );
        bench.mount(&mut check, &["db"]);
        security(&mut check).run_as_username = "postgres".into();
        let checked = bench.node.ended(&bench.run(&check)).exit_code;
        vec![ready, ran, format!("ends: {end} {stopped} {checked}")]
    });
}

/// Starts PostgreSQL with its files and its socket on volumes, made anew if there are none. Their file system
/// is synced as a whole: to sync a thousand files one by one takes minutes in a guest of a virtual node.
fn database(bench: &Bench, name: &str) -> String {
    let serve = "export PATH=$PATH:/usr/lib/postgresql/17/bin
        [ -d /db/data ] || initdb -D /db/data -A trust --locale C --data-checksums --sync-method syncfs --no-instructions || exit
        exec postgres -D /db/data -k /sockets -c listen_addresses= -c shared_buffers=32MB -c recovery_init_sync_method=syncfs";
    let mut config = container(name, &["sh", "-c", serve]);
    bench.mount(&mut config, &["db", "sockets"]);
    security(&mut config).run_as_username = "postgres".into();
    bench.run(&config)
}

/// Waits for a database by its log: a client in the pod that asks again and again would hold it up.
fn serves(bench: &Bench, name: &str) {
    within(Duration::from_secs(600), &format!("{name} serves"), || {
        bench.log(name).contains("ready to accept connections")
    });
}

/// A web server as user 101 with a read-only root writes its log to its standard streams, and serves files
/// large and small.
#[test]
fn nginx_serves_as_a_user_with_a_read_only_root() {
    same_as_runc("nginx", |bench| {
        let [settings, pages] = ["settings", "pages"].map(|name| bench.folder(name));
        fs::write(settings.join("nginx.conf"), NGINX).unwrap();
        fs::write(pages.join("index.html"), "hello\n").unwrap();
        let large: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
        fs::write(pages.join("large"), &large).unwrap();
        fs::write(pages.join("secret"), "x").unwrap();
        fs::set_permissions(pages.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        let mut config = container(
            "nginx",
            &["nginx", "-c", "/etc/nginx/nginx.conf", "-g", "daemon off;"],
        );
        bench.mount(&mut config, &["pages"]);
        let settings = mount(&settings.join("nginx.conf"), "/etc/nginx/nginx.conf");
        config.mounts.push(settings);
        config.mounts.iter_mut().for_each(|it| it.readonly = true);
        bench.mount(&mut config, &["tmp"]);
        let context = security(&mut config);
        context.run_as_user = Some(Int64Value { value: 101 });
        context.readonly_rootfs = true;
        let id = bench.run(&config);
        let address = bench.node.address(&bench.pod);
        let ask = |request: &str| request_of(&address, request.as_bytes());
        eventually("it serves", || ask("GET / HTTP/1.0\r\n\r\n").is_some());
        let status = |request: &str| {
            let answer = ask(request).unwrap();
            let end = answer.windows(4).position(|it| it == b"\r\n\r\n").unwrap();
            let line = answer.split(|&byte| byte == b'\r').next().unwrap();
            (
                String::from_utf8_lossy(line).into_owned(),
                answer[end + 4..].to_vec(),
            )
        };
        let (line, body) = status("GET /large HTTP/1.0\r\n\r\n");
        assert!(
            body == large,
            "{line}: {} bytes of {}",
            body.len(),
            large.len()
        );
        let (part_line, part) = status("GET /large HTTP/1.0\r\nRange: bytes=400000-400099\r\n\r\n");
        assert_eq!(part, large[400_000..400_100]);
        let sent = "x".repeat(300_000);
        let (put_line, _) = status(&format!(
            "PUT /uploads/file HTTP/1.0\r\nContent-Length: 300000\r\n\r\n{sent}"
        ));
        let lines = ["index.html", "secret", "missing"]
            .map(|name| status(&format!("GET /{name} HTTP/1.0\r\n\r\n")).0);
        let root = bench.ran(&id, "id -u; echo x >/x");
        bench.node.cri.stop(&id, 30).unwrap();
        let ended = bench.node.ended(&id).exit_code;
        let log = bench.log("nginx");
        let log = log
            .lines()
            .filter_map(|line| line.split_once(" F "))
            .map(|(_, text)| text);
        let log: Vec<_> = log
            .filter(|text| text.starts_with("said: ") && !text.starts_with("said: GET / "))
            .collect();
        vec![
            line,
            part_line,
            put_line,
            lines.join("\n"),
            format!("{root:?}"),
            log.join("\n"),
            format!("ended: {ended}"),
        ]
    });
}

const NGINX: &str = "pid /tmp/nginx.pid; error_log /dev/stderr; worker_processes 2;
events {}
http {
    log_format said 'said: $request $status $body_bytes_sent';
    access_log /dev/stdout said; sendfile on; tcp_nopush on;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
    server { listen 8080; root /pages;
        location /uploads/ { root /tmp; dav_methods PUT; create_full_put_path on; client_max_body_size 1m; } }
}
";

/// What a web server answers, until it closes the connection.
fn request_of(address: &str, request: &[u8]) -> Option<Vec<u8>> {
    let to = format!("{address}:8080").parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10)).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.write_all(request).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    Some(answer)
}

/// All that iperf3 sends arrives, to and from another pod, in small and in large packets.
#[test]
fn iperf3_sends_both_ways_at_each_mtu() {
    on_a_node(|node| {
        for mtu in [1400, 9000] {
            set_mtu(node, mtu);
            compare(
                node,
                &format!("iperf-{mtu}"),
                |_| (),
                |bench| iperf(bench, mtu),
            );
        }
    });
}

/// Has the network plugin give the next pods interfaces of an MTU.
fn set_mtu(node: &Node, mtu: u32) {
    let folder = node.containerd.folder().join("cni");
    let file = folder.join("10-podvmm.conflist");
    let mut settings: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    settings["plugins"][0]["mtu"] = mtu.into();
    let new = folder.join("new");
    fs::write(&new, settings.to_string()).unwrap();
    fs::rename(new, file).unwrap();
    // containerd reads it when it is told of the change.
    thread::sleep(Duration::from_secs(2));
}

fn iperf(bench: &Bench, mtu: u32) -> Vec<String> {
    let node = bench.node;
    let peer = node.run_pod_of(node.pod_config("peer"), "runc").unwrap();
    node.run(&peer, &container("server", &["iperf3", "--server"]));
    let address = node.address(&peer);
    let id = bench.waiting("client", &[]);
    let shown = bench.sh("its MTU", &id, "cat /sys/class/net/eth0/mtu");
    assert_eq!(shown, mtu.to_string());
    let ways = ["", "--reverse"].map(|way| {
        [
            tcp(bench, &id, &address, way),
            udp(bench, &id, &address, way, mtu - 28),
        ]
    });
    let fits = format!(
        "for size in {} {}; do
             ping -c 1 -W 5 -M do -s $size {address} >/tmp/ping 2>&1 && echo fits || echo does not fit
         done",
        mtu - 28,
        mtu - 27
    );
    let fits = bench.sh("a packet that just fits", &id, &fits);
    node.remove_pod(&peer);
    [ways.concat(), vec![fits]].concat()
}

/// Sends bytes by TCP, and gives how many came, if that is not all but what was on its way at the end.
fn tcp(bench: &Bench, id: &str, address: &str, way: &str) -> String {
    let bytes = MEBIBYTES.here() << 20;
    let script = format!(
        r#"for i in 1 2 3 4 5; do iperf3 -c {address} {way} -n {bytes} -J >/tmp/tcp && break; sleep 1; done
        perl -0ne '/"sum_received":\s*\{{.*?"bytes":\s*(\d+)/s;
            print $1 > {bytes} * 0.9 ? "all" : "$1 bytes of {bytes}"' /tmp/tcp"#
    );
    bench.sh(&format!("TCP {way}"), id, &script)
}

/// Sends datagrams of some bytes for some seconds; few are lost.
fn udp(bench: &Bench, id: &str, address: &str, way: &str, len: u32) -> String {
    let script = format!(
        r#"iperf3 -c {address} {way} --udp --bitrate 2M --length {len} --time 3 -J >/tmp/udp
        perl -0ne '/"sum":\s*\{{.*?"lost_percent":\s*([\d.]+)/s;
            print $1 < 20 ? "few are lost" : "$1 percent are lost"' /tmp/udp"#
    );
    bench.sh(&format!("UDP {way}"), id, &script)
}
