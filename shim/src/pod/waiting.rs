//! A VM without a pod: it was restored from a template, or is to become one. With an agent that has
//! answered it stands still, until a pod takes it.

use std::path::PathBuf;
use std::time::Duration;

use crate::agent::{self, Agent, ReachError};
use crate::config::Config;
use crate::host::labels::Labels;
use crate::host::place::{Place, make_private};
use crate::host::record::Record;
use crate::host::turn::Turn;
use crate::pod::error::{Error, asked};
use crate::pod::mounts::Shared;
use crate::pod::{size, teardown};
use crate::vm::template::Template;
use crate::vm::{self, Plan, Start, Vm};

/// How long a guest restored from a template may take to answer.
pub(crate) const CLONE_PATIENCE: Duration = Duration::from_secs(20);

/// How long a guest that no pod waits for is left idle before its snapshot.
const SETTLING: Duration = Duration::from_secs(5);

/// A VM that waits for its pod. Dropping it does not end it.
pub(crate) struct Waiting {
    pub(crate) template: Template,
    pub(crate) vm: Vm,
    pub(crate) agent: Agent,
    pub(crate) shared: Shared,
}

impl Waiting {
    /// Makes it in the folder `place`. Where there is no template it boots, and becomes one.
    pub(crate) fn make(config: &Config, template: Template, place: &Place) -> Result<Self, Error> {
        let shared = Shared::make(place.shared())?;
        let plan = Plan {
            config,
            place,
            size: template.size,
            template: Some(&template),
            network: None,
            labels: Labels::default(),
        };
        let _turn = Turn::wait();
        let snapshot = template.snapshot();
        let (vm, _) = Vm::start(&plan, &mut Record::default()).inspect_err(|error| {
            if let (Some(snapshot), vm::Error::Api { .. }) = (snapshot, error) {
                template.failed(&snapshot, &api::chain(error).join(": "));
            }
        })?;
        let shown = shared.show_to(vm.pid()).map_err(Error::from);
        let made = shown.and_then(|()| ready(&vm, place, config));
        let made = made.inspect_err(|error| {
            // A VM that was killed says nothing about its template.
            if let (false, Start::Clone(snapshot)) = (vm.fail(), &vm.start) {
                template.failed(snapshot, &api::chain(error).join(": "));
            }
        });
        let agent = made?;
        if matches!(vm.start, Start::Clone(_)) {
            template.worked();
        }
        Ok(Self {
            agent,
            template,
            vm,
            shared,
        })
    }

    /// Ends it, and takes away what `place` has of it.
    fn end(self, place: &Place) {
        self.vm.kill();
        teardown::pod(place);
    }

    /// Notes that the VM's folder is `place` from now on.
    pub(crate) fn moved(&mut self, place: &Place) {
        self.vm.moved(place);
        self.shared.moved(place.shared());
    }
}

/// The template of pods without limits, made if it is not there.
pub(crate) fn template(config: &Config) -> Result<Template, Error> {
    let size = size::size(config, size::Limits::default(), std::iter::empty());
    let of = || Template::of(config, size, 1).ok_or(Error::NoTemplate);
    let template = of()?;
    template.start_over();
    if template.is_ready() {
        return Ok(template);
    }
    let folder = PathBuf::from(format!("/run/podvmm/template-{}", std::process::id()));
    make_private(&folder).map_err(Error::Folder)?;
    let place = Place::at(&folder);
    match Waiting::make(config, template, &place) {
        Ok(waiting) => waiting.end(&place),
        Err(error) => {
            teardown::pod(&place);
            return Err(error);
        }
    }
    of()
}

/// Waits for the agent of a VM without a pod, takes the VM's snapshot if it is to become a template, and
/// pauses it.
fn ready(vm: &Vm, place: &Place, config: &Config) -> Result<Agent, Error> {
    let mut agent = meet(vm, place, config)?;
    if let Start::Model(claim) = &vm.start {
        drop(agent);
        claim.make(vm, SETTLING)?;
        agent = meet(vm, place, config)?;
    }
    // The pod's shim does this once more when it takes the VM. Doing it here too gives the guest copies of
    // the template's pages that it writes to, so that the pod does not wait for them.
    renew(&agent)?;
    vm.pause()?;
    Ok(agent)
}

/// Waits for the agent of a VM in the folder `place`.
pub(crate) fn meet(vm: &Vm, place: &Place, config: &Config) -> Result<Agent, ReachError> {
    let patience = match vm.start {
        Start::Clone(_) => config.agent_timeout().min(CLONE_PATIENCE),
        Start::Booted | Start::Model(_) => config.agent_timeout(),
    };
    Agent::reach(&place.vsock(), patience, &|| !vm.life.has_ended())
}

/// Gives a guest that shares its snapshot with others random numbers of its own, and the time of day.
pub(crate) fn renew(agent: &Agent) -> Result<(), Error> {
    let seed = agent::seed().map_err(Error::Random)?;
    agent.renew(seed).map_err(asked("become another guest"))
}
