//! What the guest's agent is asked, and answers: the messages of the Kata agent's protocol, by the
//! field numbers of its versions 3.2 to 4.1. Fields not named here are passed over.

pub mod oci;

/// Requests of `grpc.AgentService` and `grpc.Health`, and their answers.
pub mod messages {
    include!(concat!(env!("OUT_DIR"), "/agent.messages.rs"));
}

/// What the requests for networks and volumes share (package `types` of the protocol).
pub mod types {
    include!(concat!(env!("OUT_DIR"), "/agent.types.rs"));
}

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;
/// Requests about the sandbox and its containers.
pub const AGENT_SERVICE: &str = "grpc.AgentService";
/// An extra feature of podvmm's agent: a container enters the pid namespace of another, whose id is the
/// path of its `pid` namespace.
pub const PIDS_OF_ANOTHER: &str = "podvmm.pids-of-another";
/// An extra feature of podvmm's agent: `SetGuestDateTime` may be called now and then. What the clock is
/// off by is slewed where it is little, so that time runs on.
pub const FOLLOWS_THE_CLOCK: &str = "podvmm.follows-the-clock";
/// Requests about the agent itself.
pub const HEALTH_SERVICE: &str = "grpc.Health";

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::messages::{CreateContainerRequest, FsGroup, SetGuestDateTimeRequest};
    use super::oci::{LinuxSyscall, Mount, Spec};

    #[test]
    fn fields_have_the_numbers_of_the_protocol() {
        let request = CreateContainerRequest {
            container_id: "c".into(),
            oci: Some(Spec {
                mounts: vec![Mount {
                    destination: "/d".into(),
                    ..Mount::default()
                }],
                ..Spec::default()
            }),
            sandbox_pidns: true,
            stdin_port: Some(0),
            ..CreateContainerRequest::default()
        };
        // Each: number and kind, length, bytes. A port of 0 is said, being optional.
        let bytes = b"\x0a\x01c\x32\x06\x2a\x04\x0a\x02/d\x38\x01\x48\x00";
        assert_eq!(request.encode_to_vec(), bytes);
        assert_eq!(CreateContainerRequest::decode(&bytes[..]), Ok(request));
        let group = FsGroup {
            group_id: 5,
            group_change_policy: 1,
        };
        assert_eq!(group.encode_to_vec(), b"\x10\x05\x18\x01");
        let syscall = LinuxSyscall {
            errno_ret: Some(1),
            ..LinuxSyscall::default()
        };
        assert_eq!(syscall.encode_to_vec(), b"\x18\x01");
    }

    #[test]
    fn what_is_not_known_is_passed_over_and_nonsense_refused() {
        let time = SetGuestDateTimeRequest::decode(&b"\x08\x07\xfa\x01\x02hi"[..]).unwrap();
        assert_eq!((time.sec, time.usec), (7, 0));
        SetGuestDateTimeRequest::decode(&b"\x0a\x07"[..]).unwrap_err();
    }
}
