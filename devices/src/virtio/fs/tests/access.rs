//! Access control lists: the guest's kernel asks for them, the host's keeps them.

use super::*;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Tags of an entry (<linux/posix_acl.h>): the owner, one user, the owning group, the most that users and
/// groups get, all others.
const OWNER: u16 = 1;
const USER: u16 = 2;
const GROUP: u16 = 4;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// A list as <linux/posix_acl_xattr.h> has it, of tags and permissions. Users are all 1000.
fn list(entries: [(u16, u16); 5]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions) in entries {
        let id = if tag == USER { 1000 } else { u32::MAX };
        bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// All for the owner and one user, nothing for the rest.
fn one_user() -> Vec<u8> {
    list([(OWNER, 7), (USER, 7), (GROUP, 0), (MASK, 7), (OTHER, 0)])
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn an_access_list_and_the_mode_are_one() {
    let mut client = Client::new();
    let file = client.create(ROOT, "f", OFlags::RDWR).unwrap().0.nodeid;
    let path = client.host("f");
    assert_eq!(client.get_xattr(file, ACCESS, 99), Err(libc::ENODATA));
    client.set_xattr(file, ACCESS, &one_user()).unwrap();
    assert_eq!(client.get_xattr(file, ACCESS, 99), Ok(one_user()));
    assert_eq!(client.list_xattrs(file), b"system.posix_acl_access\0");
    assert_eq!(mode(&path), 0o770, "the mask shows as the group's bits");
    let asked = SetAttrIn {
        valid: valid::MODE,
        mode: 0o640,
        ..SetAttrIn::default()
    };
    client.set(file, asked).unwrap();
    let masked = list([(OWNER, 6), (USER, 7), (GROUP, 0), (MASK, 4), (OTHER, 0)]);
    assert_eq!(client.get_xattr(file, ACCESS, 99), Ok(masked));
    client.named(Op::RemoveXattr, file, ACCESS).unwrap();
    assert_eq!(client.get_xattr(file, ACCESS, 99), Err(libc::ENODATA));
    client.set_xattr(file, ACCESS, b"list").unwrap_err();
    fs::set_permissions(&path, Permissions::from_mode(0o2770)).unwrap();
    let kill = SETXATTR_ACL_KILL_SGID;
    client
        .set_xattr_with(file, ACCESS, &one_user(), kill)
        .unwrap();
    assert_eq!(mode(&path), 0o770, "set by one who is not of the group");
}

/// What podvmm makes for another user, and then gives to that user, keeps its list, too.
#[test]
fn a_folders_default_list_decides_and_otherwise_the_umask() {
    for owner in [(0, 0), (1000, 1000)] {
        let mut client = Client::new();
        let folder = client.mkdir(ROOT, "listed").unwrap().nodeid;
        client.set_xattr(folder, DEFAULT, &one_user()).unwrap();
        client.owner = owner;
        let mut made = |parent: u64| {
            let umask = 0o077;
            let asked = CreateIn {
                flags: OFlags::RDWR.bits(),
                mode: 0o4666,
                umask,
                open_flags: 0,
            };
            let body = [asked.as_bytes(), &text(&["file"])].concat();
            client.call(Op::Create, parent, &body).unwrap();
            let asked = MkDirIn { mode: 0o777, umask };
            let body = [asked.as_bytes(), &text(&["folder"])].concat();
            client.call(Op::MkDir, parent, &body).unwrap();
            let asked = MkNodIn {
                mode: libc::S_IFIFO | 0o666,
                umask,
                ..MkNodIn::default()
            };
            let body = [asked.as_bytes(), &text(&["pipe"])].concat();
            client.call(Op::MkNod, parent, &body).unwrap();
            let names = ["file", "folder", "pipe"];
            let mut modes =
                names.map(|name| client.lookup(parent, name).unwrap().attr.mode & 0o7777);
            modes.sort();
            modes
        };
        let with_umask = [0o600, 0o700, 0o4600];
        assert_eq!(made(ROOT), with_umask, "made by {owner:?}");
        let with_list = [0o660, 0o770, 0o4660];
        assert_eq!(made(folder), with_list, "made by {owner:?}");
        let path = client.host("listed/file");
        let mut value = [0; 99];
        let len = rustix::fs::getxattr(&path, ACCESS, &mut value).unwrap();
        let list = list([(OWNER, 6), (USER, 7), (GROUP, 0), (MASK, 6), (OTHER, 0)]);
        assert_eq!(&value[..len], list);
    }
}

/// An older guest has applied a program's umask itself.
#[test]
fn a_guest_without_access_lists_applies_the_umask_itself() {
    let mut client = Client::new();
    client.init_with(!u32::try_from(init::DONT_MASK).unwrap());
    let asked = MkDirIn {
        mode: 0o755,
        umask: 0o077,
    };
    let body = [asked.as_bytes(), &text(&["d"])].concat();
    client.call(Op::MkDir, ROOT, &body).unwrap();
    assert_eq!(mode(&client.host("d")), 0o755);
}
