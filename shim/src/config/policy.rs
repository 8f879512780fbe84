//! The policy that the guest's agent is to obey: a file of the administrator's, which is checked before a pod's
//! VM starts.

use std::path::Path;

use protocol::policy::{CallRule, DeviceRule, MAX_LEN, MountRule, NEEDED, Policy};
use serde::Deserialize;

use super::file::{self, FileError};

/// The file, TOML. A key that is left out allows all.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    /// The calls that the agent answers.
    calls: Option<Vec<CallRule>>,
    /// Instead of `calls`, those that it does not answer.
    refused_calls: Option<Vec<CallRule>>,
    /// The devices that containers may have, besides those that every container has.
    devices: Option<Vec<DeviceRule>>,
    /// What is mounted for containers.
    mounts: Option<Vec<MountRule>>,
}

/// Reads the policy at `path`. If it cannot be used there is no pod.
pub(super) fn read(path: &Path) -> Result<Policy, FileError> {
    let text: Text = file::read(path)?;
    let policy = text.policy().map_err(file::unfit(path))?;
    // With its parts named it may be longer than it is here.
    match policy.to_string().len() {
        ..=MAX_LEN => Ok(policy),
        len => Err(file::unfit(path)(format!(
            "a policy has {MAX_LEN} bytes at most; for the guest this one has {len}"
        ))),
    }
}

impl Text {
    fn policy(self) -> Result<Policy, String> {
        let calls = match (self.calls, self.refused_calls) {
            (Some(_), Some(_)) => return Err("give calls or refused_calls, one of them".into()),
            (calls, None) => calls,
            (None, Some(refused)) => Some(CallRule::all_but(&refused)),
        };
        let policy = Policy {
            calls,
            devices: self.devices,
            mounts: self.mounts,
        };
        let mut needed = NEEDED.into_iter();
        match needed.find(|call| policy.allow_call(call).is_err()) {
            Some(call) => Err(format!("calls: no pod can be without {call}")),
            None => Ok(policy),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &[u8]) -> Result<Policy, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("policy.toml");
        std::fs::write(&path, text).unwrap();
        read(&path).map_err(|error| api::chain(&error).join(": "))
    }

    fn refused(text: &str) -> String {
        let said = read_text(text.as_bytes()).unwrap_err();
        assert!(said.contains("policy.toml"), "{said}");
        said
    }

    #[test]
    fn what_is_refused_is_all_that_is() {
        assert_eq!(read_text(b"").unwrap(), Policy::default());
        let policy = read_text(b"refused_calls = ['ExecProcess']\ndevices = []").unwrap();
        policy.allow_call("CopyFile").unwrap();
        assert!(policy.allow_call("ExecProcess").is_err());
        assert_eq!(policy.devices, Some(Vec::new()));
        assert_eq!(policy.mounts, None);
        // The agent reads the same.
        assert_eq!(policy.to_string().parse(), Ok(policy));
    }

    /// What the shim itself asks an agent for, by its source, is what the policy allows that is installed as an
    /// example, and no more.
    #[test]
    fn the_example_allows_all_that_the_shim_uses() {
        let example = include_bytes!("../../../resources/kubernetes/policy.toml");
        let policy = read_text(example).unwrap();
        let code = include_str!("../agent.rs");
        for call in protocol::policy::CALLS {
            let is_used = code.contains(&format!("\"{call}\""));
            assert_eq!(policy.allow_call(call).is_ok(), is_used, "{call}");
        }
    }

    #[test]
    fn nonsense_is_told_with_its_file_and_line() {
        let said = refused("# none\ncals = []");
        assert!(
            said.contains("line 2") && said.contains("unknown field `cals`"),
            "{said}"
        );
        let said = refused("devices = [\n  'c 1:3',\n  'c 1',\n]");
        assert!(
            said.contains("devices = [") && said.contains("\"c 1\" is no rule for devices"),
            "{said}"
        );
        let said = refused("calls = ['Exec']");
        assert!(
            said.contains("\"Exec\" is no call of the agent's"),
            "{said}"
        );
        assert!(refused("mounts = ['']").contains("is no rule for mounts"));
        assert!(refused("mounts = 'proc'").contains("mounts = 'proc'"));
        assert!(refused("calls = []\nrefused_calls = []").contains("one of them"));
        let said = refused("refused_calls = ['WaitProcess']");
        assert!(
            said.ends_with("no pod can be without WaitProcess"),
            "{said}"
        );
        let long = format!("mounts = ['{}']", "x".repeat(MAX_LEN));
        assert!(refused(&long).ends_with("it has more than 65536 bytes"));
        let said = read_text(b"\xff").unwrap_err();
        assert!(said.ends_with("valid UTF-8"), "{said}");
        let missing = read(Path::new("/nowhere")).unwrap_err();
        assert_eq!(missing.to_string(), "read /nowhere");
    }
}
