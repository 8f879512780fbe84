//! The program that a process of a container is to become.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use protocol::agent::oci::Process;

use crate::sys;

type Error = Box<dyn std::error::Error>;

/// The program with its arguments and environment; a name without a slash is looked for in its PATH.
pub(super) fn command(process: &Process) -> Result<Command, Error> {
    let (name, arguments) = process
        .args
        .split_first()
        .ok_or("there is nothing to run")?;
    let path = match name.contains('/') {
        true => name.into(),
        false => search(name, variable(process, "PATH").unwrap_or_default()),
    };
    let mut command = Command::new(path);
    command.arg0(name).args(arguments).env_clear();
    if let Some(tunables) = std::env::var_os(sys::C_LIBRARY) {
        command.env(sys::C_LIBRARY, tunables);
    }
    if variable(process, "HOME").is_none() {
        let uid = process.user.as_ref().map_or(0, |user| user.uid);
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        command.env("HOME", home(&passwd, uid));
    }
    for text in &process.env {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        // std takes no such names, and neither do shells.
        if !key.is_empty() && CString::new(text.as_bytes()).is_ok() {
            command.env(key, OsStr::from_bytes(value.as_bytes()));
        }
    }
    Ok(command)
}

/// The value of a variable of its environment. Of several of a name the last counts.
fn variable<'a>(process: &'a Process, wanted: &str) -> Option<&'a str> {
    let variables = process.env.iter().filter_map(|text| text.split_once('='));
    let mut variables = variables.rev().filter(|(key, _)| *key == wanted);
    variables.next().map(|(_, value)| value)
}

/// An error if there is no such program.
pub(super) fn find(process: &Process) -> Result<(), Error> {
    let name = process.args.first().ok_or("there is nothing to run")?;
    // Those that are told by a path are where they are told to be from their folder.
    let path = match name.contains('/') {
        true => std::path::Path::new("/").join(&process.cwd).join(name),
        false => search(name, variable(process, "PATH").unwrap_or_default()).into(),
    };
    match is_program(&path) {
        true => Ok(()),
        false => Err(format!("{name}: there is no such program").into()),
    }
}

fn is_program(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Where in `path` there is a program of this name; the name itself if nowhere.
fn search(name: &str, path: &str) -> String {
    let places = path.split(':').filter(|folder| !folder.is_empty());
    let mut places = places.map(|folder| format!("{folder}/{name}"));
    // With a slash, or it would be looked for in the agent's own PATH.
    places
        .find(|place| is_program(place.as_ref()))
        .unwrap_or_else(|| format!("./{name}"))
}

/// The home of a user by the text of /etc/passwd.
fn home(passwd: &str, uid: u32) -> String {
    let uid = uid.to_string();
    let fields = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let mut users =
        fields.filter(|fields| fields.len() == 7 && fields[2] == uid && !fields[5].is_empty());
    users
        .next()
        .map_or_else(|| "/".into(), |fields| fields[5].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken:1\nme:x:1000:1000::/home/me:/bin/sh\n";
        assert_eq!(
            [0, 1000, 7].map(|uid| home(passwd, uid)),
            ["/root", "/home/me", "/"]
        );
    }

    #[test]
    fn a_program_that_is_missing_is_found_out_before_it_is_started() {
        let find = |name: &str, cwd: &str| {
            let process = Process {
                args: vec![name.into()],
                env: vec!["PATH=/nowhere".into(), "PATH=/bin".into()],
                cwd: cwd.into(),
                ..Process::default()
            };
            super::find(&process).map_err(|error| error.to_string())
        };
        for (name, cwd) in [
            ("sh", "/"),
            ("/bin/sh", "/x"),
            ("./sh", "/bin"),
            ("bin/sh", ""),
        ] {
            assert_eq!(find(name, cwd), Ok(()), "{name} in {cwd}");
        }
        let missing = "/nosuch: there is no such program";
        assert_eq!(find("/nosuch", "/"), Err(missing.into()));
        for (name, cwd) in [
            ("nosuch", "/bin"),
            ("./sh", "/"),
            ("/etc/passwd", "/"),
            ("/bin", "/"),
        ] {
            assert!(find(name, cwd).is_err(), "{name} in {cwd}");
        }
    }

    #[test]
    fn programs_are_looked_for_where_the_container_says() {
        assert_eq!(search("sh", "/nowhere:/bin"), "/bin/sh");
        assert_eq!(search("no-such-program", "/bin"), "./no-such-program");
    }
}
