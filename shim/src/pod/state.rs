//! Where a process is in its life, as containerd sees it, and the steps from one state to the next.
//!
//! ```text
//!              begin              started            paused
//!   Created ──────────▶ Starting ─────────▶ Running ─────────▶ Paused
//!    │  ▲                │   │                │ ▲                │ │
//!    │  └── not_started ─┘   │                │ └──── resumed ───┘ │
//!    │                       │                │                    │
//!    ├───────────────────────┴───── ended ────┴────────────────────┘
//!    │                                │
//!    │ deleted_exec                   ▼  deleted
//!    └────────────▶ Deleted ◀──── Stopped
//! ```
//!
//! A `Process` has one under its lock and takes each step there, so of two callers that want the same step one
//! is refused.

use std::time::SystemTime;

use protocol::containerd::task::Status;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum State {
    /// It can be started. A container's first process is in the guest already, and waits there.
    Created,
    /// The agent was asked to start it and has not answered yet.
    Starting,
    Running,
    Paused,
    Stopped(Exit),
    /// It has ended, or never ran, and its container or the pod is about to drop it.
    Deleted(Exit),
}

/// Why a step is refused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Refused {
    /// The process is in another state than the step is from.
    State {
        is: &'static str,
        wanted: &'static str,
    },
    /// It was deleted a moment ago: for clients there is no such process.
    Deleted,
}

impl State {
    /// The agent is about to be asked to start it.
    pub(crate) fn begin(self) -> Result<Self, Refused> {
        self.expect(Self::Created).map(|()| Self::Starting)
    }

    /// The agent has started it. Refused if it ended meanwhile, with its VM or because it was killed.
    pub(crate) fn started(self) -> Result<Self, Refused> {
        self.expect(Self::Starting).map(|()| Self::Running)
    }

    /// The agent refused to start it, which may be tried again.
    pub(crate) fn not_started(self) -> Result<Self, Refused> {
        self.expect(Self::Starting).map(|()| Self::Created)
    }

    pub(crate) fn paused(self) -> Result<Self, Refused> {
        self.expect(Self::Running).map(|()| Self::Paused)
    }

    pub(crate) fn resumed(self) -> Result<Self, Refused> {
        self.expect(Self::Paused).map(|()| Self::Running)
    }

    /// It has ended. The first to say so is right; a process ends once.
    pub(crate) fn ended(self, exit: Exit) -> Result<Self, Refused> {
        match self {
            Self::Created | Self::Starting | Self::Running | Self::Paused => {
                Ok(Self::Stopped(exit))
            }
            Self::Stopped(_) | Self::Deleted(_) => Err(self.is_not(Self::Running)),
        }
    }

    /// Containerd deletes it, once, after its end.
    pub(crate) fn deleted(self) -> Result<Self, Refused> {
        match self {
            Self::Stopped(exit) => Ok(Self::Deleted(exit)),
            Self::Created | Self::Starting | Self::Running | Self::Paused => Err(Refused::State {
                is: self.word(),
                wanted: "stopped",
            }),
            Self::Deleted(_) => Err(Refused::Deleted),
        }
    }

    /// Containerd deletes one that is not its container's first. If it was never started, there is no
    /// end to wait for.
    pub(crate) fn deleted_exec(self) -> Result<Self, Refused> {
        match self {
            Self::Created => Ok(Self::Deleted(Exit::now(0))),
            other => other.deleted(),
        }
    }

    /// Refuses any other state than `wanted`.
    pub(crate) fn expect(self, wanted: Self) -> Result<(), Refused> {
        if self == wanted {
            return Ok(());
        }
        Err(self.is_not(wanted))
    }

    fn is_not(self, wanted: Self) -> Refused {
        match self {
            Self::Deleted(_) => Refused::Deleted,
            is => Refused::State {
                is: is.word(),
                wanted: wanted.word(),
            },
        }
    }

    /// Whether it is still to be started, so that there may be no such process in the guest yet.
    pub(crate) fn is_to_start(self) -> bool {
        matches!(self, Self::Created | Self::Starting)
    }

    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) | Self::Deleted(exit) => Some(exit),
            Self::Created | Self::Starting | Self::Running | Self::Paused => None,
        }
    }

    /// The state as containerd's number, which knows no more than these four.
    pub(crate) fn number(self) -> i32 {
        let status = match self {
            Self::Created | Self::Starting => Status::Created,
            Self::Running => Status::Running,
            Self::Paused => Status::Paused,
            Self::Stopped(_) | Self::Deleted(_) => Status::Stopped,
        };
        status.into()
    }

    fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
            Self::Deleted(_) => "deleted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Step = fn(State) -> Result<State, Refused>;

    const EXIT: Exit = Exit {
        status: 7,
        at: SystemTime::UNIX_EPOCH,
    };
    const OTHER_EXIT: Exit = Exit {
        status: 137,
        at: SystemTime::UNIX_EPOCH,
    };
    const ALL: [State; 6] = [
        State::Created,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopped(EXIT),
        State::Deleted(EXIT),
    ];

    /// What becomes of each state by a step, in the order of [`ALL`]: a state, or why it is refused.
    fn by(step: Step) -> [String; 6] {
        ALL.map(|state| match step(state) {
            Ok(next) => next.word().into(),
            Err(Refused::State { is, wanted }) => format!("{is}, not {wanted}"),
            Err(Refused::Deleted) => "gone".into(),
        })
    }

    fn from_one_state(step: Step, from: State, to: State) {
        for state in ALL {
            let next = step(state);
            if state == from {
                assert_eq!(next, Ok(to));
            } else if state == State::Deleted(EXIT) {
                assert_eq!(next, Err(Refused::Deleted));
            } else {
                let (is, wanted) = (state.word(), from.word());
                assert_eq!(next, Err(Refused::State { is, wanted }));
            }
        }
    }

    #[test]
    fn a_process_is_started_paused_and_resumed_from_one_state_each() {
        use State::{Created, Paused, Running, Starting};
        from_one_state(State::begin, Created, Starting);
        from_one_state(State::started, Starting, Running);
        from_one_state(State::not_started, Starting, Created);
        from_one_state(State::paused, Running, Paused);
        from_one_state(State::resumed, Paused, Running);
    }

    #[test]
    fn a_process_ends_from_each_state_once_and_the_first_end_stays() {
        let ended = |state: State| state.ended(OTHER_EXIT);
        for state in &ALL[..4] {
            assert_eq!(ended(*state), Ok(State::Stopped(OTHER_EXIT)));
        }
        assert_eq!(by(ended)[4..], ["stopped, not running", "gone"]);
        assert_eq!(State::Stopped(EXIT).deleted(), Ok(State::Deleted(EXIT)));
    }

    #[test]
    fn only_what_has_ended_is_deleted_and_an_exec_that_never_ran() {
        let refused = [
            "created, not stopped",
            "starting, not stopped",
            "running, not stopped",
            "paused, not stopped",
            "deleted",
            "gone",
        ];
        assert_eq!(by(State::deleted), refused);
        let of_execs = by(State::deleted_exec);
        assert_eq!(of_execs[0], "deleted");
        assert_eq!(of_execs[1..], refused[1..]);
        let exit = State::Created.deleted_exec().unwrap().exit().unwrap();
        assert_eq!(exit.status, 0);
    }

    #[test]
    fn containerd_knows_four_states_and_ends_of_the_last() {
        let status = |state: State| Status::try_from(state.number()).unwrap();
        let seen = ALL.map(|state| (status(state), state.exit().map(|exit| exit.status)));
        let expected = [
            (Status::Created, None),
            (Status::Created, None),
            (Status::Running, None),
            (Status::Paused, None),
            (Status::Stopped, Some(7)),
            (Status::Stopped, Some(7)),
        ];
        assert_eq!(seen, expected);
        assert_eq!(
            ALL.map(State::is_to_start),
            [true, true, false, false, false, false]
        );
    }
}
