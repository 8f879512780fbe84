//! Scopes: units of systemd's for processes that it did not start (systemd.scope(5)), asked for over
//! D-Bus (org.freedesktop.systemd1(5)). A pod on a host of systemd's is one, as a container of runc's
//! is: a cgroup below a slice of systemd's that systemd does not know of loses its controllers
//! whenever systemd looks at the slice again.

mod bus;
mod wire;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

pub(crate) use bus::Error;
use bus::Manager;
use wire::Argument;
pub(crate) use wire::{Property, Value};

/// How long systemd may take to make a scope, or to change it. It may be busy with the node's start.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to take one away: containerd gives all of `delete` five seconds. An empty one
/// goes without being told.
const STOP_PATIENCE: Duration = Duration::from_secs(2);
/// How long a scope of the same name may take to be gone.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);

/// Whether systemd runs this host (`sd_booted(3)`).
pub(crate) fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Starts the scope `unit`, with the processes that its properties name in it.
pub(crate) fn start(unit: &str, properties: &[Property]) -> Result<(), Error> {
    let mut manager = Manager::connect(PATIENCE)?;
    let arguments = [
        Argument::Text(unit),
        // A job that waits for the same unit is none of this pod's.
        Argument::Text("replace"),
        Argument::Properties(properties),
        Argument::NoUnits,
    ];
    let since = Instant::now();
    let job = loop {
        match manager.job("StartTransientUnit", &arguments) {
            Err(error) if error.is("UnitExists") && since.elapsed() < PREDECESSOR_PATIENCE => {
                // Of a pod of the same name it goes by itself; that of a failed one does not.
                reset(&mut manager, unit);
                thread::sleep(PAUSE);
            }
            started => break started?,
        }
    };
    manager
        .finish(&format!("start {unit}"), &job)
        .inspect_err(|_| reset(&mut manager, unit))
}

/// Changes properties of `unit`, as long as this host runs.
pub(crate) fn change(unit: &str, properties: &[Property]) -> Result<(), Error> {
    let mut manager = Manager::connect(PATIENCE)?;
    let arguments = [
        Argument::Text(unit),
        // Not in the files of units that last.
        Argument::Flag(true),
        Argument::Properties(properties),
    ];
    manager.call("SetUnitProperties", &arguments).map(drop)
}

/// Takes `unit` away, with whatever runs in it. One that is not there is no error.
pub(crate) fn stop(unit: &str) -> Result<(), Error> {
    let mut manager = Manager::connect(STOP_PATIENCE)?;
    let stopped = manager
        .job(
            "StopUnit",
            &[Argument::Text(unit), Argument::Text("replace")],
        )
        .and_then(|job| manager.finish(&format!("stop {unit}"), &job));
    match stopped {
        // An empty scope ends by itself.
        Err(error) if error.is("NoSuchUnit") => return Ok(()),
        stopped => stopped?,
    }
    reset(&mut manager, unit);
    Ok(())
}

/// Has systemd forget that `unit` failed, if it did.
fn reset(manager: &mut Manager, unit: &str) {
    if let Err(error) = manager.call("ResetFailedUnit", &[Argument::Text(unit)]) {
        // Most often there is no such unit, which is what is wanted.
        log::debug!("{}", api::chain(&error).join(": "));
    }
}
