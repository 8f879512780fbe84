//! Kernel modules. The kernel of a distribution finds some of its devices and file systems by modules, which its
//! initramfs has beside the agent. Our own kernel has all built in, and its initramfs has no list.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::sys;

/// Where the modules and their list are.
const FOLDER: &str = "/lib/modules";

/// A line for each module, in the order they are loaded, so that what a module depends on comes before it: its file
/// in the folder, and after a space its parameters.
const LIST: &str = "podvmm.list";

/// Writing 1 there keeps all further modules out, until the end of the guest (kernel/sysctl: modules_disabled).
const DISABLED: &str = "/proc/sys/kernel/modules_disabled";

/// File systems whose files take the guest's memory (linux/magic.h).
const IN_MEMORY: [i64; 2] = [0x8584_58f6, 0x0102_1994];

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read {FOLDER}/{LIST}")]
    List(#[source] io::Error),
    #[error("load the module {file}")]
    Load { file: String, source: io::Error },
    #[error("keep further modules out")]
    Disable(#[source] io::Error),
}

/// Loads what is listed, and lets no process load anything more. What cannot be loaded is for the caller to say: the
/// guest may do without.
pub(crate) fn load() -> Vec<Error> {
    let folder = Path::new(FOLDER);
    let insert = |file: &File, parameters: &CStr| finit_module(file, parameters, 0);
    let Some(mut errors) = load_from(folder, insert) else {
        return Vec::new();
    };
    let disabled = fs::write(DISABLED, "1").map_err(Error::Disable);
    errors.extend(disabled.err());
    errors
}

/// What went wrong with those of a folder, or `None` if it has no list.
fn load_from(
    folder: &Path,
    mut insert: impl FnMut(&File, &CStr) -> Result<(), Errno>,
) -> Option<Vec<Error>> {
    let list = match sys::read_file(folder.join(LIST)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => return Some(vec![Error::List(error)]),
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
    };
    let mut load = |line: &str| {
        let (file, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let loaded = load_one(&folder.join(file), parameters, &mut insert);
        loaded.err().map(|source| Error::Load {
            file: file.into(),
            source,
        })
    };
    let lines = list.lines().filter(|line| !line.is_empty());
    Some(lines.filter_map(&mut load).collect())
}

fn load_one(
    path: &Path,
    parameters: &str,
    insert: &mut impl FnMut(&File, &CStr) -> Result<(), Errno>,
) -> io::Result<()> {
    let file = File::open(path)?;
    let inserted = insert(&file, &CString::new(parameters)?);
    // The kernel has its own copy by now.
    if fstatfs(&file).is_ok_and(|system| IN_MEMORY.contains(&system.f_type)) {
        fs::remove_file(path)?;
    }
    match inserted {
        // It is built in, or another one has brought it.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// What is said of a list's modules, and which were inserted, by what is in their files and their parameters.
    fn load(name: &str, list: &str, files: &[&str]) -> (Vec<String>, Vec<String>) {
        let folder = std::env::temp_dir().join(format!(
            "podvmm-agent-modules-{name}-{}",
            std::process::id()
        ));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(LIST), list).unwrap();
        for file in files {
            fs::write(folder.join(file), file).unwrap();
        }
        let mut inserted = Vec::new();
        let errors = load_from(&folder, |mut file, parameters| {
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            let result = match &*text {
                "there.ko" => Err(Errno::EXIST),
                "useless.ko" => Err(Errno::NODEV),
                _ => Ok(()),
            };
            inserted.push(format!("{text}({})", parameters.to_str().unwrap()));
            result
        });
        fs::remove_dir_all(&folder).unwrap();
        let errors = errors.expect("there is a list").into_iter();
        (errors.map(|error| error.to_string()).collect(), inserted)
    }

    #[test]
    fn modules_are_loaded_in_the_order_of_the_list_with_their_parameters() {
        let list = "b.ko\na.ko count=0 name=x\nthere.ko\n";
        let (errors, inserted) = load("order", list, &["a.ko", "b.ko", "there.ko"]);
        assert_eq!(inserted, ["b.ko()", "a.ko(count=0 name=x)", "there.ko()"]);
        assert!(errors.is_empty(), "{errors:?}");
    }

    #[test]
    fn a_module_that_cannot_be_loaded_does_not_stop_the_others() {
        let list = "missing.ko\nuseless.ko\n\na.ko\n";
        let (errors, inserted) = load("errors", list, &["useless.ko", "a.ko"]);
        assert_eq!(inserted, ["useless.ko()", "a.ko()"]);
        assert_eq!(
            errors,
            ["missing.ko", "useless.ko"].map(|file| format!("load the module {file}"))
        );
    }

    #[test]
    fn without_a_list_there_is_nothing_to_do() {
        let insert = |_: &File, _: &CStr| panic!("there is no list");
        assert!(load_from(Path::new("/nonexistent"), insert).is_none());
    }
}
