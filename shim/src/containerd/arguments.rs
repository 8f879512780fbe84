//! The command line, as containerd writes it: words with one dash.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::config::DEFAULT_PATH;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Say where the container's shim answers.
    Start,
    /// Clean up after a shim that is gone.
    Delete,
    /// Say what the runtime can do.
    Info,
    /// Be the shim.
    Serve,
    /// For people: print the RuntimeClass for this node's configuration.
    RuntimeClass,
    /// For people: make a template.
    Template,
    /// For people: fill the pool, or empty it.
    Pool,
    /// Wait for a pod, in the pool.
    Wait,
    /// For people: check the configuration.
    Check,
    Help,
    Version,
}

/// The command line of the shim, told apart.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    /// The path of containerd's socket.
    pub(crate) address: String,
    /// containerd's socket for events, if that is said elsewhere than in the environment.
    pub(crate) events: Option<PathBuf>,
    pub(crate) id: String,
    pub(crate) debug: bool,
    pub(crate) bundle: Option<PathBuf>,
    /// The path of the configuration, for people to say.
    pub(crate) config: Option<PathBuf>,
    /// Memory of the VM that is to wait, in MiB.
    pub(crate) memory_mib: u64,
}

impl Arguments {
    /// Reads the words after the program's name.
    pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, String> {
        let mut arguments = Self {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            events: None,
            id: String::new(),
            debug: false,
            bundle: None,
            config: None,
            memory_mib: 0,
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let word = word.to_string_lossy().into_owned();
            let (name, attached) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            let mut value = || {
                let next = || {
                    words
                        .next()
                        .map(|value| value.to_string_lossy().into_owned())
                };
                let given = attached.clone().or_else(next);
                given.ok_or_else(|| format!("{name} wants a value"))
            };
            match name.strip_prefix("--").or_else(|| name.strip_prefix('-')) {
                Some("namespace") => arguments.namespace = value()?,
                Some("address") => arguments.address = value()?,
                Some("id") => arguments.id = value()?,
                Some("bundle") => arguments.bundle = Some(value()?.into()),
                Some("config") => arguments.config = Some(value()?.into()),
                Some("memory") => {
                    let text = value()?;
                    let mib = text
                        .parse()
                        .map_err(|_| format!("-memory {text}: no MiB"))?;
                    arguments.memory_mib = mib;
                }
                // Events go over ttrpc instead.
                Some("publish-binary" | "socket") => drop(value()?),
                Some("debug") => arguments.debug = true,
                Some("h" | "help") => arguments.action = Action::Help,
                Some("info") => arguments.action = Action::Info,
                Some("v" | "version") => arguments.action = Action::Version,
                _ => {
                    arguments.action = match name {
                        "start" => Action::Start,
                        "delete" => Action::Delete,
                        "runtime-class" => Action::RuntimeClass,
                        "template" => Action::Template,
                        "pool" => Action::Pool,
                        "wait" => Action::Wait,
                        "check" => Action::Check,
                        _ => return Err(format!("there is no argument {word}")),
                    }
                }
            }
        }
        let needs_id = [Action::Start, Action::Delete, Action::Serve];
        if needs_id.contains(&arguments.action) && !is_id(&arguments.id) {
            return Err(format!("-id {:?} is no container's", arguments.id));
        }
        Ok(arguments)
    }

    /// Where the configuration is.
    pub(crate) fn config_path(&self) -> PathBuf {
        let path = self.config.clone();
        let path = path.unwrap_or_else(|| DEFAULT_PATH.into());
        // Others are told of it, who are in other folders.
        std::path::absolute(&path).unwrap_or(path)
    }

    /// The arguments of the shim that is to serve.
    pub(crate) fn to_serve(&self) -> Vec<OsString> {
        let words = [
            "-namespace",
            &self.namespace,
            "-address",
            &self.address,
            "-id",
            &self.id,
        ];
        let mut words: Vec<_> = words.iter().map(OsString::from).collect();
        if self.debug {
            words.push("-debug".into());
        }
        words
    }
}

/// containerd's names are letters, digits and `-._`, and begin with neither of these. It becomes the
/// name of a folder.
pub(crate) fn is_id(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    text.len() <= 76
        && text.bytes().all(is_plain)
        && text
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn containerds_words_are_understood() {
        let line = "-namespace default -address /a.sock -publish-binary /b -id demo -debug start";
        let arguments = parse(line).unwrap();
        assert_eq!(arguments.action, Action::Start);
        assert_eq!((&*arguments.namespace, &*arguments.id), ("default", "demo"));
        let served = Arguments::parse(arguments.to_serve()).unwrap();
        assert_eq!((served.action, served.debug), (Action::Serve, true));
        assert_eq!(
            parse("-id=demo -bundle=/b delete").unwrap().action,
            Action::Delete
        );
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn a_name_cannot_lead_out_of_its_folder() {
        for id in ["..", "a/b", "", "-x", &"a".repeat(77)] {
            assert!(parse(&format!("-id {id} start")).is_err(), "{id}");
        }
        assert_eq!(parse("fly").unwrap_err(), "there is no argument fly");
    }
}
