//! Programs that need much of their kernel: package managers, compilers, systemd, a container engine, stress-ng.

use tests::cri::config::LinuxContainerResources;
use tests::host::Size;

use crate::{Bench, container, privileged, privileged_pod, same_as_runc, same_in_pods, waiting};

/// Packages that apt installs.
const PACKAGES: Size = Size {
    real: 50,
    emulated: 4,
};

/// Times that a program is built.
const BUILDS: Size = Size {
    real: 10,
    emulated: 1,
};

/// Programs of each of stress-ng's classes.
const STRESSORS: Size = Size {
    real: 100,
    emulated: 4,
};

/// All packages are installed as their maintainers made them, and removed again.
#[test]
fn apt_installs_packages_that_dpkg_verifies() {
    same_as_runc("apt", |bench| {
        let id = bench.waiting("apt", &[]);
        let count = PACKAGES.here();
        let install = format!(
            "export DEBIAN_FRONTEND=noninteractive
             apt-get -qq update
             apt-get -qq install podvmm-test-{count} >/tmp/log 2>&1 || {{ cat /tmp/log; exit 1; }}
             dpkg --verify $(dpkg-query -W -f '${{Package}} ' 'podvmm-test-*') && wc -l </var/lib/podvmm-test"
        );
        let installed = bench.sh(&format!("{count} packages"), &id, &install);
        assert_eq!(installed, count.to_string());
        let files = "cd / && find etc/podvmm-test usr/lib/podvmm-test-* usr/bin/podvmm-test-* -type f -printf '%m %n %u %s %p\\n' |
                sort | sha256sum
            cat /usr/lib/podvmm-test-*/* /etc/podvmm-test/* /usr/bin/podvmm-test-* | sha256sum
            setpriv --reuid 1000 --clear-groups stat -Lc '%u %a' /usr/bin/podvmm-test-1-as-owner";
        let files = bench.sh("their files", &id, files);
        let again = "export DEBIAN_FRONTEND=noninteractive
            echo changed >>/etc/podvmm-test/podvmm-test-1; rm /usr/lib/podvmm-test-1/3
            dpkg --verify podvmm-test-1 || true
            apt-get -qq --reinstall install podvmm-test-1 >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
            dpkg --verify podvmm-test-1 || true
            apt-get -qq purge 'podvmm-test-*' >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
            ls -d /etc/podvmm-test /usr/lib/podvmm-test-* 2>&1 || true; dpkg --audit";
        vec![files, bench.sh("changed, mended, removed", &id, again)]
    });
}

/// A program is built by a linker that maps what it writes, on a volume, and passes its own test.
#[test]
fn gcc_and_a_linker_that_maps_its_output_build_a_program() {
    same_as_runc("gcc", |bench| {
        let id = bench.waiting("gcc", &["data"]);
        let round = |number: usize| {
            let place = ["/data/built", "/root/built"][number % 2];
            let build = format!(
                "cp -r /srv/bzip2 {place} && cd {place}
                 all() {{ make CC='gcc -fuse-ld=mold' CFLAGS=\"-O{level} -g -fpic -D_FILE_OFFSET_BITS=64\" \"$@\" >/tmp/log 2>&1 ||
                     {{ cat /tmp/log; exit 1; }}; }}
                 all bzip2 bzip2recover; all --file Makefile-libbz2_so
                 make test 2>&1 | tail -n 3
                 ./bzip2-shared -k <words0 | ./bzip2 -d | cmp - words0
                 sha256sum bzip2 bzip2recover libbz2.so.1.0.8 bzip2-shared *.o | sha256sum
                 rm -r {place}",
                level = number % 3,
            );
            bench.sh(&format!("build {number}"), &id, &build)
        };
        (0..BUILDS.here()).map(round).collect()
    });
}

/// systemd comes up as a container's first process, runs services, and ends with its container.
#[test]
fn systemd_is_the_first_process_of_a_privileged_container() {
    same_in_pods("systemd", privileged_pod, |bench| {
        let mut config = container("systemd", &["/sbin/init"]);
        config.envs.push(tests::cri::config::KeyValue {
            key: "container".into(),
            value: "containerd".into(),
        });
        privileged(&mut config);
        let id = bench.run(&config);
        let up = "for i in $(seq 300); do [ ! -S /run/systemd/private ] || break; sleep 0.2; done
            systemctl is-system-running --wait || true
            systemctl list-units --failed --plain --no-legend | cut -d ' ' -f 1";
        let up = bench.sh("systemd is up", &id, up);
        let service = "systemd-run --quiet --wait --pipe -p MemoryMax=64M -p TasksMax=10 -p DynamicUser=yes -p PrivateTmp=yes \
                sh -c 'echo of a service; id -u | grep -qv ^0'
            systemd-run --quiet --wait sh -c 'exit 5' || echo status $?
            systemctl start nginx && systemctl is-active nginx
            busybox wget -q -O - http://127.0.0.1/ | grep -c 'Welcome to nginx'
            systemctl stop nginx; systemctl is-active nginx || true
            systemd-cat -t workload echo in the journal; journalctl --sync; journalctl -q -o cat -t workload";
        let service = bench.sh("services", &id, service);
        bench.ran(&id, "systemctl poweroff --no-block");
        let ended = bench.node.ended(&id);
        vec![up, service, format!("ended: {}", ended.exit_code)]
    });
}

/// Podman runs, builds and stops containers of its own.
#[test]
fn podman_runs_containers_in_a_privileged_container() {
    same_in_pods("podman", privileged_pod, |bench| {
        let mut config = waiting("podman");
        bench.mount(&mut config, &["store"]);
        privileged(&mut config);
        let id = bench.run(&config);
        let prepare = "printf '[storage]\\ndriver = \"overlay\"\\ngraphroot = \"/store/graph\"\\nrunroot = \"/run/containers/storage\"\\n' >/etc/containers/storage.conf
            mkdir -p /etc/containers/containers.conf.d
            printf '[engine]\\ncgroup_manager=\"cgroupfs\"\\nevents_logger=\"file\"\\n' >/etc/containers/containers.conf.d/x.conf
            mkdir -p /tmp/inner/bin && cp /usr/bin/busybox /tmp/inner/bin && ln -s busybox /tmp/inner/bin/sh
            tar -C /tmp/inner -c . | podman import --quiet - localhost/inner >/dev/null
            podman info --format '{{.Store.GraphDriverName}} {{.Host.CgroupsVersion}} {{.Host.OCIRuntime.Name}}'";
        let prepared = bench.sh("an image", &id, prepare);
        let run = "podman run --rm --network none localhost/inner sh -c 'echo inside; busybox id -u; exit 7' || echo status $?";
        let run = bench.sh("run", &id, run);
        assert_eq!(run, "inside\n0\nstatus 7");
        let more = "podman run --detach --name web --memory 64m --pids-limit 20 localhost/inner busybox sleep 1000 >/dev/null
            podman exec web sh -c 'echo by exec; busybox cat /sys/fs/cgroup/memory.max; busybox ip -o -4 address show eth0 | busybox wc -l'
            podman ps --format '{{.Names}} {{.State}}'
            podman stop --time 1 web >/dev/null; podman inspect --format '{{.State.ExitCode}}' web; podman rm web >/dev/null";
        let more = bench.sh("detached, with a network and limits", &id, more);
        let build = "printf 'FROM localhost/inner\\nRUN busybox mkdir /made && busybox rm /bin/sh && echo built >/made/file\\n' >/tmp/Containerfile
            podman build --quiet --network none --tag localhost/built /tmp >/dev/null
            podman run --rm --network none localhost/built busybox cat /made/file
            podman run --rm --network none localhost/built busybox ls /bin; podman rmi --all --force >/dev/null; podman images --quiet
            rmdir /sys/fs/cgroup/libpod_parent/conmon /sys/fs/cgroup/libpod_parent";
        vec![prepared, run, more, bench.sh("build", &id, build)]
    });
}

/// The kernel's calls for files, memory and processors do what stress-ng expects of them.
#[test]
fn stress_ng_finds_the_same_faults() {
    same_as_runc("stress", |bench| {
        let mut config = waiting("stress");
        bench.mount(&mut config, &["data"]);
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: 768 << 20,
            ..LinuxContainerResources::default()
        });
        let id = bench.run(&config);
        let each = |class: &str| stress(bench, &id, class);
        ["filesystem", "vm", "cpu"].map(each).to_vec()
    });
}

/// Runs programs of a class, evenly chosen from all of them, one after the other, and gives the status of each.
fn stress(bench: &Bench, id: &str, class: &str) -> String {
    let script = format!(
        r#"cd /data; all=$(stress-ng --class {class}? 2>&1 | sed -n 's/^class.*: //p')
        for one in $(echo $all | tr ' ' '\n' | awk '{{ of[NR] = $0 }}
                END {{ n = {count} < NR ? {count} : NR; for (i = 0; i < n; i++) print of[1 + int(i * NR / n)] }}'); do
            stress-ng --oom-avoid --$one 1 --$one-ops 20 --timeout 5 --verify >/tmp/log 2>&1 && status=0 || status=$?
            echo "$one: $status"; [ $status = 0 ] || tail -n 5 /tmp/log >&2
        done"#,
        count = STRESSORS.here()
    );
    bench.sh(class, id, &script)
}
