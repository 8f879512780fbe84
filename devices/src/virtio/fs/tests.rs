//! A guest's kernel, as far as its requests go, over a folder of the host's.

mod access;
mod client;
mod confinement;
mod hostile;
mod rates;
mod vhost_user;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use vmm_sys_util::tempdir::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use self::client::{Client, text};
use super::abi::*;
use super::*;
use crate::virtio::Limits;
use crate::virtio::testing::{Buffer, Guest, lifecycle};

/// The first request queue; 0 is that of high priority.
const QUEUE: usize = 1;
/// Descriptors that shares have here: few, so that they run out.
const DESCRIPTORS: usize = 64;

fn config(folder: &Path) -> FsConfig {
    FsConfig {
        tag: "share".into(),
        folder: folder.into(),
        readonly: false,
        cache: Cache::Auto,
        writeback: false,
        queues: 1,
        queue_size: 128,
        descriptors: DESCRIPTORS,
        rates: Limits::default(),
        name: "fs0".into(),
    }
}

/// How many descriptors of this process are of files below `folder`.
fn descriptors_below(folder: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(folder)).count()
}

#[test]
fn what_the_guest_writes_is_in_the_hosts_folder() {
    let mut client = Client::new();
    let folder = client.mkdir(ROOT, "d").unwrap().nodeid;
    let (entry, fh) = client.create(folder, "f", OFlags::RDWR).unwrap();
    assert_eq!(client.write(fh, 3, b"hello", OFlags::empty()), Ok(5));
    assert_eq!(client.read(fh, 0, 100), Ok(b"\0\0\0hello".to_vec()));
    client.release(fh).unwrap();
    assert_eq!(client.read(fh, 0, 100), Err(libc::EBADF));
    assert_eq!(fs::read(client.host("d/f")).unwrap(), b"\0\0\0hello");
    let mode = fs::metadata(client.host("d/f")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o640, "whatever this process's umask is");
    assert_eq!(client.attr(entry.nodeid).unwrap().size, 8);
    assert_eq!(client.guest.counters().bytes_out.get(), 5);
    assert_eq!(client.guest.counters().bytes_in.get(), 8);
}

/// The guest keeps what it caches of a file until the file changes: a program that starts again is
/// not read again.
#[test]
fn what_is_cached_is_kept_while_the_file_stays_as_it_was() {
    let mut client = Client::new();
    let path = client.host("f");
    fs::write(&path, "content").unwrap();
    let file = client.lookup(ROOT, "f").unwrap().nodeid;
    let mut keeps = || {
        let asked = OpenIn::default();
        let open: OpenOut = client.ask(Op::Open, file, asked.as_bytes()).unwrap();
        open.open_flags & fopen::KEEP_CACHE != 0
    };
    let new = [keeps(), keeps()];
    assert_eq!(new, [false; 2], "it may change and have the same time");
    let settle = || std::thread::sleep(std::time::Duration::from_secs(4));
    settle();
    assert_eq!([keeps(), keeps(), keeps()], [false, true, true]);
    fs::write(path, "changed").unwrap();
    settle();
    assert_eq!([keeps(), keeps()], [false, true]);
}

#[test]
fn appending_writes_to_the_end_and_the_guests_cache_where_it_belongs() {
    let mut client = Client::new();
    let (_, fh) = client
        .create(ROOT, "f", OFlags::WRONLY | OFlags::APPEND)
        .unwrap();
    client.write(fh, 0, b"one", OFlags::APPEND).unwrap();
    client.write(fh, 0, b"two", OFlags::APPEND).unwrap();
    let asked = TransferIn {
        fh,
        offset: 1,
        size: 1,
        transfer_flags: WRITE_CACHE,
        flags: OFlags::APPEND.bits(),
        ..TransferIn::default()
    };
    let body = [asked.as_bytes(), b"N"].concat();
    client.call(Op::Write, 0, &body).unwrap();
    assert_eq!(fs::read(client.host("f")).unwrap(), b"oNetwo");
}

#[test]
fn creating_what_is_there_opens_it_unless_it_must_not_be() {
    let mut client = Client::new();
    fs::write(client.host("f"), b"old").unwrap();
    let (_, fh) = client.create(ROOT, "f", OFlags::RDONLY).unwrap();
    assert_eq!(client.read(fh, 0, 9), Ok(b"old".to_vec()));
    let refused = client.create(ROOT, "f", OFlags::RDWR | OFlags::EXCL);
    assert_eq!(refused.map(drop), Err(libc::EEXIST));
    client
        .create(ROOT, "f", OFlags::RDWR | OFlags::TRUNC)
        .unwrap();
    assert_eq!(fs::read(client.host("f")).unwrap(), b"");
}

#[test]
fn files_belong_to_who_makes_them_and_to_the_group_of_a_folder_that_says_so() {
    let mut client = Client::new();
    client.owner = (1000, 1001);
    client.create(ROOT, "f", OFlags::RDWR).unwrap();
    client.mkdir(ROOT, "d").unwrap();
    client.symlink(ROOT, "s", "f").unwrap();
    let mode = libc::S_IFREG | 0o4711;
    client.mknod(ROOT, "n", mode, 0).unwrap();
    for name in ["f", "d", "s", "n"] {
        let metadata = fs::symlink_metadata(client.host(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 1001), "{name}");
    }
    assert_eq!(fs::metadata(client.host("n")).unwrap().mode(), mode);

    fs::create_dir(client.host("g")).unwrap();
    std::os::unix::fs::chown(client.host("g"), None, Some(77)).unwrap();
    fs::set_permissions(client.host("g"), Permissions::from_mode(0o2777)).unwrap();
    let folder = client.lookup(ROOT, "g").unwrap().nodeid;
    client.create(folder, "f", OFlags::RDWR).unwrap();
    let metadata = fs::metadata(client.host("g/f")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1000, 77));
}

#[test]
fn names_are_moved_exchanged_and_removed_with_what_the_guest_knows_of_them() {
    let mut client = Client::new();
    let folder = client.mkdir(ROOT, "d").unwrap().nodeid;
    let (a, _) = client.create(ROOT, "a", OFlags::RDWR).unwrap();
    let (b, _) = client.create(folder, "b", OFlags::RDWR).unwrap();
    fs::write(client.host("a"), b"1").unwrap();
    const NOREPLACE: u32 = 1;
    const EXCHANGE: u32 = 2;
    let refused = client.rename((ROOT, "a"), (folder, "b"), NOREPLACE);
    assert_eq!(refused, Err(libc::EEXIST));
    client.rename((ROOT, "a"), (folder, "b"), EXCHANGE).unwrap();
    assert_eq!(client.lookup(folder, "b").unwrap().nodeid, a.nodeid);
    assert_eq!(client.lookup(ROOT, "a").unwrap().nodeid, b.nodeid);
    client.rename((ROOT, "d"), (ROOT, "e"), 0).unwrap();
    assert_eq!(client.attr(a.nodeid).unwrap().size, 1);
    client.rename((folder, "b"), (ROOT, "a"), 0).unwrap();
    assert_eq!(client.attr(b.nodeid).unwrap().nlink, 0, "it was replaced");
    assert_eq!(client.named(Op::RmDir, ROOT, "a"), Err(libc::ENOTDIR));
    assert_eq!(client.named(Op::Unlink, ROOT, "e"), Err(libc::EISDIR));
    client.named(Op::RmDir, ROOT, "e").unwrap();
    client.named(Op::Unlink, ROOT, "a").unwrap();
    assert_eq!(client.lookup(ROOT, "a").map(drop), Err(libc::ENOENT));
    assert_eq!(fs::read_dir(client.folder.as_path()).unwrap().count(), 0);
}

#[test]
fn links_are_two_names_of_one_file() {
    let mut client = Client::new();
    let (file, _) = client.create(ROOT, "a", OFlags::RDWR).unwrap();
    let linked = client.link(file.nodeid, ROOT, "b").unwrap();
    assert_eq!((linked.nodeid, linked.attr.nlink), (file.nodeid, 2));
    client.named(Op::Unlink, ROOT, "b").unwrap();
    assert_eq!(client.attr(file.nodeid).unwrap().nlink, 1);
    client.rename((ROOT, "a"), (ROOT, "c"), 0).unwrap();
    client.open(file.nodeid, OFlags::RDONLY).unwrap();
}

#[test]
fn a_file_without_a_name_lives_until_it_is_forgotten() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", OFlags::RDWR).unwrap();
    client.write(fh, 0, b"still here", OFlags::empty()).unwrap();
    client.release(fh).unwrap();
    client.named(Op::Unlink, ROOT, "f").unwrap();
    let fh = client.open(file.nodeid, OFlags::RDONLY).unwrap();
    assert_eq!(client.read(fh, 0, 99), Ok(b"still here".to_vec()));
    client.release(fh).unwrap();
    client.forget(file.nodeid, 1);
    assert_eq!(client.attr(file.nodeid).map(drop), Err(libc::ESTALE));
    assert_eq!(descriptors_below(client.folder.as_path()), 1, "the root's");
}

#[test]
fn a_nameless_file_can_be_given_a_name() {
    let mut client = Client::new();
    let asked = CreateIn {
        flags: OFlags::WRONLY.bits(),
        mode: libc::S_IFREG | 0o600,
        ..CreateIn::default()
    };
    let body = [asked.as_bytes(), &text(&["/"])].concat();
    let answer = client.call(Op::TmpFile, ROOT, &body).unwrap();
    let (entry, rest) = EntryOut::read_from_prefix(&answer).unwrap();
    let fh = OpenOut::read_from_bytes(rest).unwrap().fh;
    client.write(fh, 0, b"x", OFlags::empty()).unwrap();
    assert_eq!(fs::read_dir(client.folder.as_path()).unwrap().count(), 0);
    client.link(entry.nodeid, ROOT, "named").unwrap();
    assert_eq!(fs::read(client.host("named")).unwrap(), b"x");
    assert_eq!(client.lookup(ROOT, "named").unwrap().nodeid, entry.nodeid);
}

#[test]
fn folders_are_listed_in_parts_and_lookups_counted() {
    let mut client = Client::new();
    for index in 0..300 {
        File::create(client.host(&format!("file-{index:03}"))).unwrap();
    }
    let mut plain = client.list(ROOT, Op::ReadDir, 1000);
    plain.sort();
    assert_eq!(plain.len(), 302);
    assert_eq!(
        (plain[0].0.as_str(), plain[301].0.as_str()),
        (".", "file-299")
    );
    let listed = client.list(ROOT, Op::ReadDirPlus, 4096);
    assert_eq!(listed.len(), 302);
    for (name, nodeid) in listed {
        if name.starts_with('.') {
            assert_eq!(nodeid, 0);
        } else {
            client.forget(nodeid, 1);
            assert_eq!(client.attr(nodeid).map(drop), Err(libc::ESTALE), "{name}");
        }
    }
}

#[test]
fn attributes_are_set() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", OFlags::RDWR).unwrap();
    let asked = SetAttrIn {
        valid: valid::MODE | valid::UID | valid::SIZE | valid::MTIME,
        mode: 0o750,
        uid: 5,
        size: 9,
        mtime: 1_000_000_000,
        mtimensec: 7,
        ..SetAttrIn::default()
    };
    let attr = client.set(file.nodeid, asked).unwrap();
    assert_eq!((attr.mode & 0o7777, attr.uid, attr.size), (0o750, 5, 9));
    assert_eq!((attr.mtime, attr.mtimensec), (1_000_000_000, 7));
    let asked = SetAttrIn {
        valid: valid::SIZE | valid::FH,
        fh,
        size: 2,
        ..SetAttrIn::default()
    };
    assert_eq!(client.set(file.nodeid, asked).unwrap().size, 2);
    let asked = SetAttrIn {
        valid: valid::MTIME,
        mtimensec: 1_000_000_000,
        ..SetAttrIn::default()
    };
    assert_eq!(client.set(file.nodeid, asked).map(drop), Err(libc::EINVAL));
}

#[test]
fn privileges_go_where_the_guest_says_so() {
    let mut client = Client::new();
    let (file, fh) = client.create(ROOT, "f", OFlags::RDWR).unwrap();
    let path = client.host("f");
    let set_privileged = || fs::set_permissions(&path, Permissions::from_mode(0o6755)).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    set_privileged();
    client.write(fh, 0, b"x", OFlags::empty()).unwrap();
    assert_eq!(mode(), 0o6755, "written by one who may");
    let asked = TransferIn {
        fh,
        size: 1,
        transfer_flags: WRITE_KILL_SUIDGID,
        ..TransferIn::default()
    };
    client
        .call(Op::Write, 0, &[asked.as_bytes(), b"x"].concat())
        .unwrap();
    assert_eq!(mode(), 0o755);
    set_privileged();
    let asked = SetAttrIn {
        valid: valid::SIZE | valid::KILL_SUIDGID,
        ..SetAttrIn::default()
    };
    client.set(file.nodeid, asked).unwrap();
    assert_eq!(mode(), 0o755);
    set_privileged();
    let asked = OpenIn {
        flags: (OFlags::WRONLY | OFlags::TRUNC).bits(),
        open_flags: OPEN_KILL_SUIDGID,
    };
    client
        .call(Op::Open, file.nodeid, asked.as_bytes())
        .unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn extended_attributes_are_set_read_listed_and_removed() {
    let mut client = Client::new();
    let file = client.create(ROOT, "f", OFlags::RDWR).unwrap().0.nodeid;
    let name = "trusted.overlay.opaque";
    client.set_xattr(file, name, b"value").unwrap();
    assert_eq!(client.get_xattr(file, name, 99), Ok(b"value".to_vec()));
    assert_eq!(client.get_xattr(file, name, 0).unwrap()[0], 5);
    assert_eq!(client.get_xattr(file, name, 2), Err(libc::ERANGE));
    assert_eq!(client.list_xattrs(file), b"trusted.overlay.opaque\0");
    client.named(Op::RemoveXattr, file, name).unwrap();
    assert_eq!(client.get_xattr(file, name, 9), Err(libc::ENODATA));
}

/// The table of docs/pods.md.
#[test]
fn attributes_of_the_host_are_neither_set_nor_seen() {
    // What setting and removing says, and what reading says.
    let names = [
        ("trusted.gfid", libc::EPERM, libc::ENODATA),
        ("trusted.overlayish", libc::EPERM, libc::ENODATA),
        ("security.selinux", libc::EOPNOTSUPP, libc::EOPNOTSUPP),
        ("security.ima", libc::EOPNOTSUPP, libc::EOPNOTSUPP),
        ("security.capability2", libc::EOPNOTSUPP, libc::EOPNOTSUPP),
        ("userish", libc::EOPNOTSUPP, libc::EOPNOTSUPP),
    ];
    let mut client = Client::new();
    let file = client.create(ROOT, "f", OFlags::RDWR).unwrap().0.nodeid;
    let path = client.host("f");
    for (name, change, read) in names {
        // Some cannot be there.
        let there = rustix::fs::setxattr(&path, name, b"host", rustix::fs::XattrFlags::empty());
        let set = client.set_xattr(file, name, b"guest");
        assert_eq!(set, Err(change), "{name}");
        let got = client.get_xattr(file, name, 99);
        assert_eq!(got, Err(read), "{name}");
        let removed = client.named(Op::RemoveXattr, file, name);
        assert_eq!(removed, Err(change), "{name}");
        if there.is_ok() {
            let mut value = [0; 8];
            let len = rustix::fs::getxattr(&path, name, &mut value).unwrap();
            assert_eq!(&value[..len], b"host", "{name}");
        }
    }
    // VFS_CAP_REVISION_2, with the lowest of all capabilities.
    let capability = [&[0, 0, 0, 2, 1][..], &[0; 15]].concat();
    client.set_xattr(file, "user.x", b"").unwrap();
    client
        .set_xattr(file, "security.capability", &capability)
        .unwrap();
    let listed = client.list_xattrs(file);
    let mut listed: Vec<_> = listed.split(|byte| *byte == 0).collect();
    listed.sort();
    let shown: [&[u8]; 3] = [b"", b"security.capability", b"user.x"];
    assert_eq!(listed, shown);
}

#[test]
fn holes_are_made_found_and_copied_around() {
    let mut client = Client::new();
    let (_, fh) = client.create(ROOT, "f", OFlags::RDWR).unwrap();
    client.write(fh, 0, &[1; 0x2000], OFlags::empty()).unwrap();
    let asked = FAllocateIn {
        fh,
        offset: 0,
        length: 0x1000,
        // FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE.
        mode: 3,
        padding: 0,
    };
    client.call(Op::FAllocate, 0, asked.as_bytes()).unwrap();
    let asked = LSeekIn {
        fh,
        offset: 0,
        whence: libc::SEEK_DATA.cast_unsigned(),
        padding: 0,
    };
    let found: LSeekOut = client.ask(Op::LSeek, 0, asked.as_bytes()).unwrap();
    assert_eq!(found.offset, 0x1000);
    let (_, copy) = client.create(ROOT, "copy", OFlags::RDWR).unwrap();
    let asked = CopyFileRangeIn {
        fh_in: fh,
        off_in: 0x800,
        fh_out: copy,
        len: 0x1000,
        ..CopyFileRangeIn::default()
    };
    let copied: WriteOut = client.ask(Op::CopyFileRange, 0, asked.as_bytes()).unwrap();
    assert_eq!(copied.size, 0x1000);
    let bytes = fs::read(client.host("copy")).unwrap();
    assert_eq!((bytes[0x7ff], bytes[0x800]), (0, 1));
}

#[test]
fn a_readonly_share_is_never_written() {
    let mut client = Client::with(|config| {
        fs::write(config.folder.join("f"), b"kept").unwrap();
        config.readonly = true;
    });
    let file = client.lookup(ROOT, "f").unwrap().nodeid;
    let readonly = Err(libc::EROFS);
    assert_eq!(client.open(file, OFlags::RDWR).map(drop), readonly);
    assert_eq!(client.open(file, OFlags::TRUNC).map(drop), readonly);
    assert_eq!(client.create(ROOT, "g", OFlags::RDWR).map(drop), readonly);
    assert_eq!(client.mkdir(ROOT, "d").map(drop), readonly);
    assert_eq!(client.named(Op::Unlink, ROOT, "f"), readonly);
    assert_eq!(client.set(file, SetAttrIn::default()).map(drop), readonly);
    let fh = client.open(file, OFlags::RDONLY).unwrap();
    assert_eq!(client.write(fh, 0, b"x", OFlags::empty()), Err(libc::EROFS));
    assert_eq!(client.read(fh, 0, 9), Ok(b"kept".to_vec()));
}

#[test]
fn direct_requests_go_at_once_and_reading_ahead_only_where_no_file_system_goes_away() {
    let agreed = |cache| {
        let mut client = Client::with(|config| config.cache = cache);
        u64::from(client.init().flags) & (init::ASYNC_DIO | init::ASYNC_READ)
    };
    assert_eq!(agreed(Cache::None), init::ASYNC_DIO);
    assert_eq!(agreed(Cache::Auto), init::ASYNC_DIO);
    assert_eq!(agreed(Cache::Always), init::ASYNC_DIO | init::ASYNC_READ);
}

#[test]
fn cache_modes_say_what_the_guest_may_keep() {
    let opened = |cache| {
        let mut client = Client::with(|config| {
            fs::write(config.folder.join("f"), b"").unwrap();
            config.cache = cache;
            config.writeback = cache == Cache::Always;
        });
        let agreed = client.init().flags;
        let entry = client.lookup(ROOT, "f").unwrap();
        let asked = OpenIn::default();
        let open: OpenOut = client
            .ask(Op::Open, entry.nodeid, asked.as_bytes())
            .unwrap();
        let writeback = u64::from(agreed) & init::WRITEBACK_CACHE != 0;
        (entry.entry_valid, open.open_flags, writeback)
    };
    assert_eq!(opened(Cache::None), (0, fopen::DIRECT_IO, false));
    assert_eq!(opened(Cache::Auto), (1, 0, false));
    assert_eq!(opened(Cache::Always), (86400, fopen::KEEP_CACHE, true));
}

#[test]
fn the_device_says_its_tag_and_its_queues() {
    let folder = TempDir::new().unwrap();
    let mut config = config(folder.as_path());
    config.queues = 3;
    let mut guest = Guest::new(Fs::new(config.clone()).unwrap());
    let space: [u8; 44] = guest.config(0);
    assert_eq!(&space[..6], b"share\0");
    assert_eq!(space[36..], [3, 0, 0, 0, 0, 0, 0, 0]);
    for tag in ["", "a\0b", &"x".repeat(37)] {
        config.tag = tag.into();
        let error = Fs::new(config.clone()).unwrap_err().to_string();
        assert!(error.starts_with("a share's tag is"), "{error}");
    }
}

#[test]
fn what_cannot_be_shared_is_named() {
    let refusal = |folder: &str| {
        let config = config(Path::new(folder));
        Fs::new(config).unwrap_err().to_string()
    };
    assert_eq!(refusal("/nonexistent"), "open shared folder /nonexistent");
    assert_eq!(refusal("/dev/null"), "open shared folder /dev/null");
    assert!(refusal("/proc").starts_with("/proc is a proc file system"));
}

#[test]
fn the_device_lives_through_pause_restore_and_reset() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.as_path().join("d")).unwrap();
    fs::write(folder.as_path().join("d/f"), b"content").unwrap();
    let make = || Fs::new(config(folder.as_path())).unwrap();
    lifecycle(make, |guest| {
        let lookup = |guest: &mut Guest, parent: u64, name: &str| {
            let header = InHeader {
                len: u32::try_from(41 + name.len()).unwrap(),
                opcode: 1,
                nodeid: parent,
                ..InHeader::default()
            };
            let request = [header.as_bytes(), name.as_bytes(), b"\0"].concat();
            let answer = guest.request(QUEUE, &[Buffer::Out(request), Buffer::In(200)]);
            EntryOut::read_from_prefix(&answer.unwrap()[16..])
                .unwrap()
                .0
        };
        let folder = lookup(guest, ROOT, "d");
        assert_eq!(lookup(guest, folder.nodeid, "f").attr.size, 7);
    });
}

#[test]
fn what_is_open_stays_open_over_a_snapshot_also_in_another_folder() {
    let mut client = Client::new();
    let folder = client.mkdir(ROOT, "d").unwrap().nodeid;
    let (file, _) = client.create(folder, "f", OFlags::RDWR).unwrap();
    let (gone, lost) = client.create(folder, "gone", OFlags::RDWR).unwrap();
    let (_, fh) = client
        .create(folder, "f", OFlags::RDWR | OFlags::TRUNC)
        .unwrap();
    let other = TempDir::new().unwrap();
    fs::create_dir(other.as_path().join("d")).unwrap();
    fs::write(other.as_path().join("d/f"), b"another life").unwrap();
    // A life after that changes nothing.
    for _ in 0..2 {
        client.guest.transport.pause().unwrap();
        client.guest = client
            .guest
            .carry_to(|| Fs::new(config(other.as_path())).unwrap());
        client.guest.transport.resume().unwrap();
    }
    assert_eq!(client.read(fh, 0, 99), Ok(b"another life".to_vec()));
    assert_eq!(client.lookup(folder, "f").unwrap().nodeid, file.nodeid);
    // What comes later is not taken for what is lost.
    let (_, new) = client.create(folder, "new", OFlags::RDWR).unwrap();
    assert_ne!(new, lost);
    assert_eq!(client.read(lost, 0, 99), Err(libc::ESTALE));
    client.release(lost).unwrap();
    assert_eq!(client.read(lost, 0, 99), Err(libc::EBADF));
    assert_eq!(client.attr(gone.nodeid).map(drop), Err(libc::ESTALE));
}

#[test]
fn a_file_that_was_replaced_during_a_snapshot_is_stale_and_not_the_new_one() {
    let mut client = Client::new();
    let (old, fh) = client.create(ROOT, "old", OFlags::RDWR).unwrap();
    let (same, open) = client.create(ROOT, "same", OFlags::RDWR).unwrap();
    client.write(fh, 0, b"old", OFlags::empty()).unwrap();
    client.guest.transport.pause().unwrap();
    fs::write(client.host("new"), b"new").unwrap();
    fs::rename(client.host("new"), client.host("old")).unwrap();
    fs::write(client.host("same"), b"changed").unwrap();
    client.guest = client
        .guest
        .carry_to(|| Fs::new(config(client.folder.as_path())).unwrap());
    client.guest.transport.resume().unwrap();
    assert_eq!(client.read(fh, 0, 9), Err(libc::ESTALE));
    assert_eq!(client.attr(old.nodeid).map(drop), Err(libc::ESTALE));
    // The name leads to the new file, as another node.
    let new = client.lookup(ROOT, "old").unwrap();
    assert_ne!(new.nodeid, old.nodeid);
    let fh = client.open(new.nodeid, OFlags::RDONLY).unwrap();
    assert_eq!(client.read(fh, 0, 9), Ok(b"new".to_vec()));
    // What was only changed is the same file.
    assert_eq!(client.read(open, 0, 9), Ok(b"changed".to_vec()));
    assert_eq!(client.lookup(ROOT, "same").unwrap().nodeid, same.nodeid);
}

/// A name the guest cannot know of, for what must not be found.
fn secret() -> (TempDir, PathBuf) {
    let outside = TempDir::new().unwrap();
    let path = outside.as_path().join("secret");
    fs::write(&path, b"secret").unwrap();
    (outside, path)
}

fn name_of(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}
