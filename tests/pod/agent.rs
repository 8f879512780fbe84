//! The agent itself: whether it serves, what it can do and how large it is.

use protocol::agent::messages::{
    CheckRequest, Empty, GuestDetailsRequest, GuestDetailsResponse, HealthCheckResponse,
    OnlineCpuMemRequest,
};
use protocol::agent::{FOLLOWS_THE_CLOCK, HEALTH_SERVICE, PIDS_OF_ANOTHER};
use tests::pod::Agent;

const RESIDENT_MIB: u64 = 6;

pub(crate) fn it_serves(agent: &Agent) {
    let health: HealthCheckResponse = agent
        .0
        .call(HEALTH_SERVICE, "Check", &CheckRequest::default(), None)
        .unwrap();
    assert_eq!(health.status, 1);
}

pub(crate) fn it_says_what_it_can_do(agent: &Agent) {
    let blocks = GuestDetailsRequest {
        mem_block_size: true,
        mem_hotplug_probe: true,
    };
    let details: GuestDetailsResponse = agent.ask("GetGuestDetails", &blocks).unwrap();
    // x86's memory is added by so much at a time.
    assert_eq!(details.mem_block_size_bytes, 128 << 20);
    let details = details.agent_details.unwrap();
    assert!(details.init_daemon && details.supports_seccomp);
    assert_eq!(details.extra_features, [PIDS_OF_ANOTHER, FOLLOWS_THE_CLOCK]);
}

/// The VM has one more by now. To be asked twice changes nothing.
pub(crate) fn it_turns_new_cpus_on(agent: &Agent) {
    let cpus = OnlineCpuMemRequest {
        wait: true,
        // In all, as Kata has it.
        nb_cpus: 2,
        cpu_only: true,
    };
    for _ in 0..2 {
        let _: Empty = agent.ask("OnlineCPUMem", &cpus).unwrap();
    }
}

/// All containers of the checks before are gone by now.
pub(crate) fn it_is_small_and_holds_no_container(agent: &Agent) {
    let resident = agent.figure("podvmm_agent_resident_memory_bytes");
    let threads = agent.figure("podvmm_agent_threads");
    eprintln!("agent: {} KiB resident, {threads} threads", resident >> 10);
    assert!(resident <= RESIDENT_MIB << 20, "{resident}");
    assert_eq!(agent.figure("podvmm_containers"), 0);
}
