//! Containers in a guest: the agent asked over vsock, as a shim does. The guest is restored from the kept
//! template: none of it is about booting.
//!
//! It is one test, of many checks in one guest: a guest for each would take far longer than the checks, and what
//! the guest leaves at its end is looked at too, once. Each check is a function in a file by what it is about,
//! and leaves no container behind; its path is printed when it has passed. They run in the order of [`pod`].

#![expect(clippy::unwrap_used, reason = "its checks are functions of their own")]

#[path = "pod/agent.rs"]
mod agent;
#[path = "pod/apart.rs"]
mod apart;
#[path = "pod/cgroups.rs"]
mod cgroups;
#[path = "pod/contents.rs"]
mod contents;
#[path = "pod/disks.rs"]
mod disks;
#[path = "pod/limits.rs"]
mod limits;
#[path = "pod/places.rs"]
mod places;
#[path = "pod/refusals.rs"]
mod refusals;
#[path = "pod/rights.rs"]
mod rights;
#[path = "pod/seccomp.rs"]
mod seccomp;
#[path = "pod/sharing.rs"]
mod sharing;
#[path = "pod/streams.rs"]
mod streams;

use std::any::type_name;
use std::fs;
use std::path::Path;

use protocol::agent::messages::{CreateSandboxRequest, DestroySandboxRequest, Empty, Storage};
use serde_json::json;
use tempfile::TempDir;
use tests::guest;
use tests::network::{alone, set_up};
use tests::node::step;
use tests::pod::{Agent, SHARED, strings};
use tests::podvmm::kvm_is_here;
use tests::template::{Template, Vm};

#[test]
fn containers_are_what_their_specification_says() {
    if !kvm_is_here() {
        return;
    }
    let turn = guest::one_at_a_time();
    let template = Template::kept(&turn);
    alone(move || pod(template.as_ref()));
}

fn pod(template: Option<&Template>) {
    let host = TempDir::new().unwrap();
    share(host.path());
    let places = TempDir::new().unwrap();
    let net = json!({"tap": "pod0", "mac": sharing::HARDWARE});
    let mut vm = Vm::start(template, places.path(), host.path(), &net);
    set_up("pod0", "10.77.0.1/24");
    let agent = step("the agent answers", || vm.agent());
    before_the_sandbox(&agent, &mut vm);
    let _: Empty = agent.ask("CreateSandbox", &sandbox()).unwrap();
    in_the_sandbox(&agent, host.path());
    step("disks_come_and_go_with_containers", || {
        disks::disks_come_and_go_with_containers(&agent, &mut vm, places.path());
    });
    let _: Empty = agent
        .ask("DestroySandbox", &DestroySandboxRequest {})
        .unwrap();
    drop(agent);
    vm.ended();
}

fn before_the_sandbox(agent: &Agent, vm: &mut Vm) {
    check(agent, agent::it_serves);
    check(agent, sharing::the_network_is_set_up_without_a_sandbox);
    check(agent, agent::it_says_what_it_can_do);
    vm.grow();
    check(agent, agent::it_turns_new_cpus_on);
}

fn in_the_sandbox(agent: &Agent, host: &Path) {
    // It stays until its pids have been shared.
    check(agent, sharing::the_first_container_starts);
    check_on(
        host,
        agent,
        contents::a_container_sees_what_its_specification_says,
    );
    check(agent, rights::a_user_has_the_rights_it_is_given);
    check(agent, seccomp::a_process_may_call_what_its_filter_allows);
    check(agent, rights::the_agent_does_not_hear_a_container);
    check(agent, apart::a_container_reaches_nothing_but_itself);
    check(agent, apart::a_process_on_its_way_is_out_of_reach);
    check(agent, apart::the_agents_program_is_not_written_to);
    check(
        agent,
        apart::a_program_has_its_streams_and_no_other_descriptor,
    );
    check(agent, streams::a_user_opens_its_streams_by_their_names);
    check(agent, limits::a_container_without_limits_has_containerds);
    check(agent, rights::ambient_capabilities_must_be_inheritable);
    check(agent, rights::a_container_has_a_keyring_of_its_own);
    check(agent, rights::devices_are_used_as_the_rules_say);
    check(agent, rights::a_container_without_proc_starts);
    check_on(
        host,
        agent,
        places::working_directories_are_made_and_entered,
    );
    check_on(host, agent, places::dangling_links_lead_nowhere_outside);
    check(agent, places::a_false_null_device_is_refused);
    check(agent, cgroups::a_new_process_joins_a_divided_cgroup);
    check(agent, streams::streams_and_signals_reach_their_process);
    check(agent, limits::limits_hold_and_are_changed);
    // Its processes are killed one by one, and each may be told of.
    check(agent, cgroups::a_cgroup_is_killed_as_one);
    check(agent, limits::a_disk_has_a_rate_and_is_counted);
    check_on(
        host,
        agent,
        contents::what_a_killed_container_mapped_is_on_the_host,
    );
    check(agent, refusals::what_cannot_be_done_is_refused);
    check(agent, sharing::the_guest_is_reached_and_reaches_its_host);
    check(agent, sharing::copied_files_stay_in_their_folder);
    check(agent, sharing::memory_has_the_size_that_it_is_given);
    check(agent, sharing::containers_share_the_pids_of_the_first);
    check(agent, sharing::a_container_sees_the_pids_of_another);
    check(agent, agent::it_is_small_and_holds_no_container);
}

/// Does a check, and prints its path and how long it took.
fn check<C: FnOnce(&Agent)>(agent: &Agent, check: C) {
    step(type_name::<C>(), || check(agent));
}

/// The same for a check that also looks at the files of the host that the guest sees.
fn check_on<C: FnOnce(&Agent, &Path)>(host: &Path, agent: &Agent, check: C) {
    step(type_name::<C>(), || check(agent, host));
}

/// Fills the folder that the guest sees: the containers' root file system, and a file.
fn share(host: &Path) {
    let applets = [
        "sh", "cat", "ls", "hostname", "id", "sleep", "grep", "stty", "dd", "tail", "touch",
        "kill", "cut", "readlink", "wc", "mkdir", "chmod", "ping", "tr", "mknod", "rm",
    ];
    fs::create_dir(host.join("one")).unwrap();
    let root = guest::root(&applets);
    fs::rename(root.path(), host.join("one/rootfs")).unwrap();
    fs::write(host.join("greeting"), "hello\n").unwrap();
}

fn sandbox() -> CreateSandboxRequest {
    CreateSandboxRequest {
        hostname: "a-pod".into(),
        dns: strings(&["search pod.local", "nameserver 10.0.0.10"]),
        sandbox_id: "sandbox".into(),
        storages: vec![
            Storage {
                driver: "virtio-fs".into(),
                source: "kataShared".into(),
                fstype: "virtiofs".into(),
                mount_point: format!("{SHARED}/"),
                ..Storage::default()
            },
            Storage {
                driver: "ephemeral".into(),
                source: "shm".into(),
                fstype: "tmpfs".into(),
                mount_point: sharing::SHM.into(),
                options: strings(&["noexec", "nosuid", "nodev", "mode=1777", "size=65536"]),
                ..Storage::default()
            },
        ],
        ..CreateSandboxRequest::default()
    }
}
