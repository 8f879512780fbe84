//! How a VM's life ends, and what that means as an exit code.

use std::fmt;

use super::Site;

/// Why the VM is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The agent reported the exit status of the command.
    Command(u8),
    /// The agent could not run the command.
    Agent(String),
    /// The guest asked for a reset: an orderly reboot or poweroff.
    Reset,
    /// Every vCPU halted with interrupts off.
    Halted,
    /// The guest kernel panicked; this is what it said.
    Panic(String),
    /// A fault while delivering a double fault.
    TripleFault(Option<Site>),
    /// KVM could not go on with the guest.
    Kvm(String),
    /// RAM does not come any more.
    Memory(String),
    /// podvmm was asked to end by this signal.
    Signal(i32),
    /// A client told podvmm to end.
    Dismissed,
}

/// podvmm itself failed: bad arguments, a missing file, a host that refuses.
pub const EXIT_FAILURE: u8 = 125;

impl Ending {
    /// podvmm's exit code. With a command to run, any end but the command's own or
    /// a client's is a failure.
    pub fn exit_code(&self, had_command: bool) -> u8 {
        match self {
            Self::Command(status) => *status,
            Self::Agent(_) => 124,
            Self::Reset | Self::Halted if had_command => 123,
            Self::Reset | Self::Halted | Self::Dismissed => 0,
            Self::Panic(_) => 122,
            Self::TripleFault(_) => 121,
            Self::Kvm(_) => 120,
            Self::Memory(_) => 119,
            Self::Signal(signal) => 128_u8.saturating_add(u8::try_from(*signal).unwrap_or(127)),
        }
    }

    /// The reason in a word, for programs.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Command(_) => "command",
            Self::Agent(_) => "agent",
            Self::Reset => "reset",
            Self::Halted => "halted",
            Self::Panic(line)
                if line.contains("Out of memory") || line.contains("deadlocked on memory") =>
            {
                "oom"
            }
            Self::Panic(_) => "panic",
            Self::TripleFault(_) => "triple-fault",
            Self::Kvm(_) => "kvm",
            Self::Memory(_) => "memory",
            Self::Signal(_) => "signal",
            Self::Dismissed => "api",
        }
    }

    /// Whether this is what the user asked for.
    pub fn is_orderly(&self, had_command: bool) -> bool {
        match self {
            Self::Command(_) | Self::Signal(_) | Self::Dismissed => true,
            Self::Reset | Self::Halted => !had_command,
            Self::Agent(_)
            | Self::Panic(_)
            | Self::TripleFault(_)
            | Self::Kvm(_)
            | Self::Memory(_) => false,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command(status) => write!(f, "the command ended with status {status}"),
            Self::Agent(why) => write!(f, "the agent in the guest failed: {why}"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::Halted => f.write_str("the guest halted"),
            Self::Panic(line) => write!(f, "the guest kernel panicked: {line}"),
            Self::TripleFault(Some(site)) => write!(f, "the guest triple-faulted {site}"),
            Self::TripleFault(None) => f.write_str(
                "the guest triple-faulted; where is not known, for KVM has reset the vCPU",
            ),
            Self::Kvm(why) => f.write_str(why),
            Self::Memory(why) => write!(f, "the VM cannot go on: {why}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}"),
            Self::Dismissed => f.write_str("a client ended it"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_status_is_passed_on() {
        assert_eq!(Ending::Command(7).exit_code(true), 7);
    }

    #[test]
    fn a_reboot_is_success_unless_a_command_was_still_to_end() {
        let codes = [false, true].map(|had_command| Ending::Reset.exit_code(had_command));
        assert_eq!(codes, [0, 123]);
    }

    #[test]
    fn a_guest_out_of_memory_says_so() {
        let reason = |line: &str| Ending::Panic(line.into()).reason();
        assert_eq!(reason("Fatal exception"), "panic");
        assert_eq!(
            reason("Out of memory: system-wide panic_on_oom is enabled"),
            "oom"
        );
        assert_eq!(reason("System is deadlocked on memory"), "oom");
    }

    #[test]
    fn signals_count_from_128_as_in_shells() {
        assert_eq!(Ending::Signal(15).exit_code(false), 143);
    }
}
