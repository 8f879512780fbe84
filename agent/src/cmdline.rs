//! The kernel command line, as far as it concerns the agent.

use protocol::contract::POD_PARAMETER;

/// What the command line asks of the agent.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct BootArgs {
    /// `root=` and what belongs to it; without it the initramfs stays the root.
    pub(crate) root: Option<Root>,
    /// `podvmm.pod`: serve a pod's containers rather than run a command.
    pub(crate) pod: bool,
}

/// The root file system asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Root {
    /// A block device's path, or the tag of a virtio-fs share.
    pub(crate) source: String,
    /// `rootfstype=`; without it the superblock tells.
    pub(crate) fstype: Option<String>,
    /// `rootflags=`: mount options for the file system.
    pub(crate) options: Option<String>,
    /// `rw` came last of `ro` and `rw`. As for the kernel, read-only is the default.
    pub(crate) writable: bool,
    /// `podvmm.overlay`: mount it read-only and lay a tmpfs over it.
    pub(crate) overlay: bool,
}

impl BootArgs {
    /// Reads the text of /proc/cmdline. As for the kernel, the last of several wins, and what
    /// follows `--` is init's.
    pub(crate) fn parse(line: &str) -> Self {
        let mut root = Root::default();
        let mut pod = false;
        for argument in arguments(line).take_while(|argument| argument != "--") {
            match argument.split_once('=') {
                Some(("root", value)) => value.clone_into(&mut root.source),
                Some(("rootfstype", value)) => root.fstype = Some(value.to_owned()),
                Some(("rootflags", value)) => root.options = Some(value.to_owned()),
                Some(_) => (),
                None => match argument.as_str() {
                    "ro" => root.writable = false,
                    "rw" => root.writable = true,
                    "podvmm.overlay" => root.overlay = true,
                    POD_PARAMETER => pod = true,
                    _ => (),
                },
            }
        }
        Self {
            root: (!root.source.is_empty()).then_some(root),
            pod,
        }
    }
}

/// The line's arguments: separated by white space, except within double quotes, which go.
fn arguments(line: &str) -> impl Iterator<Item = String> {
    let mut quoted = false;
    line.split(move |c: char| {
        quoted ^= c == '"';
        c.is_ascii_whitespace() && !quoted
    })
    .filter(|argument| !argument.is_empty())
    .map(|argument| argument.replace('"', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(line: &str) -> Root {
        BootArgs::parse(line).root.expect("the line has root=")
    }

    #[test]
    fn without_root_the_initramfs_stays() {
        assert_eq!(
            BootArgs::parse("console=ttyS0 quiet ro rootfstype=ext4\n").root,
            None
        );
        assert_eq!(BootArgs::parse("root=").root, None);
        assert_eq!(BootArgs::parse("").root, None);
    }

    #[test]
    fn a_root_is_read_only_unless_told_otherwise() {
        let expected = Root {
            source: "/dev/vda".to_owned(),
            ..Root::default()
        };
        assert_eq!(root("quiet root=/dev/vda console=ttyS0\n"), expected);
    }

    #[test]
    fn everything_about_the_root_is_read() {
        let line = "root=/dev/vdb rw rootfstype=ext4 rootflags=noatime,data=ordered podvmm.overlay";
        let expected = Root {
            source: "/dev/vdb".to_owned(),
            fstype: Some("ext4".to_owned()),
            options: Some("noatime,data=ordered".to_owned()),
            writable: true,
            overlay: true,
        };
        assert_eq!(root(line), expected);
    }

    #[test]
    fn the_last_of_several_wins() {
        let root = root("root=/dev/vda rw root=/dev/vdb ro");
        assert_eq!((root.source.as_str(), root.writable), ("/dev/vdb", false));
    }

    #[test]
    fn quotes_keep_spaces_within_an_argument() {
        let root = root("root=\"/dev/vda\" \"rw\" dyndbg=\"file x.c +p ; root=/dev/no ro\"");
        assert_eq!((root.source.as_str(), root.writable), ("/dev/vda", true));
    }

    #[test]
    fn what_follows_two_dashes_is_not_read() {
        assert_eq!(root("root=/dev/vda -- root=/dev/no rw").source, "/dev/vda");
        assert!(!root("root=/dev/vda -- rw").writable);
    }
}
