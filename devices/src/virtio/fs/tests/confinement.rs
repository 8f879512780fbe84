//! No way out of the share: by name, by link, by the host's changes or by kinds of files.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::*;

#[test]
fn names_that_are_paths_are_refused() {
    let mut client = Client::new();
    let (_outside, secret) = secret();
    let folder = client.mkdir(ROOT, "d").unwrap().nodeid;
    let file = client.create(ROOT, "f", OFlags::RDWR).unwrap().0.nodeid;
    let up = format!("../..{}", secret.display());
    for name in [
        "",
        ".",
        "..",
        "/",
        "d/..",
        "../x",
        "a/b",
        "/etc",
        &up,
        name_of(&secret),
    ] {
        let refused = Err(libc::EINVAL);
        assert_eq!(client.lookup(folder, name).map(drop), refused, "{name:?}");
        assert_eq!(client.create(folder, name, OFlags::RDWR).map(drop), refused);
        assert_eq!(client.mkdir(folder, name).map(drop), refused);
        assert_eq!(
            client.mknod(folder, name, libc::S_IFREG, 0).map(drop),
            refused
        );
        assert_eq!(client.symlink(folder, name, "t").map(drop), refused);
        assert_eq!(client.link(file, folder, name).map(drop), refused);
        assert_eq!(client.named(Op::Unlink, folder, name), refused);
        assert_eq!(client.named(Op::RmDir, folder, name), refused);
        assert_eq!(client.rename((ROOT, "f"), (folder, name), 0), refused);
        assert_eq!(client.rename((folder, name), (ROOT, "x"), 0), refused);
    }
    let long = "x".repeat(256);
    assert_eq!(
        client.lookup(ROOT, &long).map(drop),
        Err(libc::ENAMETOOLONG)
    );
    assert_eq!(
        client.call(Op::Lookup, ROOT, b"unterminated").map(drop),
        Err(libc::EINVAL)
    );
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

#[test]
fn links_are_given_to_the_guest_and_never_followed() {
    let mut client = Client::new();
    let (outside, secret) = secret();
    symlink(&secret, client.host("to-file")).unwrap();
    symlink(outside.as_path(), client.host("to-folder")).unwrap();
    let to_file = client.lookup(ROOT, "to-file").unwrap();
    assert_eq!(to_file.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    let target = client.call(Op::ReadLink, to_file.nodeid, b"").unwrap();
    assert_eq!(OsStr::from_bytes(&target), secret.as_os_str());
    assert_eq!(
        client.open(to_file.nodeid, OFlags::RDONLY),
        Err(libc::ELOOP)
    );
    let cut = SetAttrIn {
        valid: valid::SIZE,
        ..SetAttrIn::default()
    };
    client.set(to_file.nodeid, cut).unwrap_err();
    let mode = SetAttrIn {
        valid: valid::MODE,
        mode: 0,
        ..SetAttrIn::default()
    };
    client.set(to_file.nodeid, mode).unwrap_err();
    let to_folder = client.lookup(ROOT, "to-folder").unwrap().nodeid;
    let not_a_folder = Err(libc::ENOTDIR);
    assert_eq!(client.lookup(to_folder, "secret").map(drop), not_a_folder);
    assert_eq!(
        client.create(to_folder, "new", OFlags::RDWR).map(drop),
        not_a_folder
    );
    assert_eq!(
        client.create(ROOT, "to-file", OFlags::RDWR).map(drop),
        Err(libc::ELOOP)
    );
    let fresh = client.symlink(ROOT, "to-host", "/etc").unwrap().nodeid;
    assert_eq!(client.lookup(fresh, "passwd").map(drop), not_a_folder);
    let linked = client.link(to_file.nodeid, ROOT, "second").unwrap();
    assert_eq!(linked.nodeid, to_file.nodeid, "the link, not its target");
    // The owner of the link changes, not that of its target.
    let owner = SetAttrIn {
        valid: valid::UID,
        uid: 9,
        ..SetAttrIn::default()
    };
    assert_eq!(client.set(to_file.nodeid, owner).unwrap().uid, 9);
    assert_eq!(fs::metadata(&secret).unwrap().uid(), 0);
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

#[test]
fn magic_links_of_proc_lead_nowhere() {
    let mut client = Client::new();
    let (_outside, secret) = secret();
    let held = File::open(&secret).unwrap();
    use std::os::fd::AsRawFd;
    let magic = format!("/proc/self/fd/{}", held.as_raw_fd());
    let link = client.symlink(ROOT, "magic", &magic).unwrap().nodeid;
    assert_eq!(client.open(link, OFlags::RDONLY), Err(libc::ELOOP));
    assert_eq!(client.lookup(ROOT, &magic).map(drop), Err(libc::EINVAL));
}

#[test]
fn a_folder_swapped_for_a_link_again_and_again_is_never_followed() {
    let mut client = Client::new();
    let (outside, secret) = secret();
    fs::create_dir(client.host("d")).unwrap();
    fs::write(client.host("d/secret"), b"public").unwrap();
    symlink(outside.as_path(), client.host("link")).unwrap();
    let stop = AtomicBool::new(false);
    let (folder, link) = (client.host("d"), client.host("link"));
    thread::scope(|scope| {
        scope.spawn(|| {
            // Not in step with the client, as locks of the host's may make it.
            let pauses = (0_u32..).map(|turn| turn.wrapping_mul(7919) % 30_000);
            for pause in pauses.take_while(|_| !stop.load(Ordering::Relaxed)) {
                (0..pause).for_each(|_| std::hint::spin_loop());
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                let here = rustix::fs::CWD;
                rustix::fs::renameat_with(here, &folder, here, &link, exchange).unwrap();
            }
        });
        let stop = StopOnDrop(&stop);
        let mut read = 0;
        for _ in 0..2000 {
            let Ok(folder) = client.lookup(ROOT, "d") else {
                continue;
            };
            if let Ok(file) = client.lookup(folder.nodeid, "secret") {
                if let Ok(fh) = client.open(file.nodeid, OFlags::RDONLY) {
                    assert_eq!(client.read(fh, 0, 99), Ok(b"public".to_vec()));
                    client.release(fh).unwrap();
                    read += 1;
                }
                client.forget(file.nodeid, 1);
            }
            let _ = client
                .create(folder.nodeid, "new", OFlags::RDWR)
                .map(|(file, fh)| {
                    client.release(fh).unwrap();
                    client.forget(file.nodeid, 1);
                });
            client.forget(folder.nodeid, 1);
        }
        drop(stop);
        assert!(read > 0, "the right file is found now and then");
    });
    assert_eq!(fs::read_dir(outside.as_path()).unwrap().count(), 1);
    assert_eq!(fs::read(secret).unwrap(), b"secret");
}

#[test]
fn a_folder_the_host_moves_out_of_the_share_does_not_lead_out() {
    let mut client = Client::new();
    let (outside, _) = secret();
    fs::create_dir_all(client.host("d/e")).unwrap();
    let folder = client.lookup(ROOT, "d").unwrap().nodeid;
    let inner = client.lookup(folder, "e").unwrap().nodeid;
    fs::rename(client.host("d"), outside.as_path().join("d")).unwrap();
    for name in ["..", "../secret", "secret"] {
        client.lookup(inner, name).unwrap_err();
        client.lookup(folder, name).unwrap_err();
    }
    assert_eq!(client.lookup(ROOT, "d").map(drop), Err(libc::ENOENT));
}

#[test]
fn what_the_host_put_in_the_place_of_a_file_is_not_taken_for_it() {
    let mut client = Client::new();
    fs::create_dir(client.host("d")).unwrap();
    fs::write(client.host("d/f"), b"first").unwrap();
    let folder = client.lookup(ROOT, "d").unwrap().nodeid;
    let file = client.lookup(folder, "f").unwrap().nodeid;
    fs::rename(client.host("d"), client.host("old")).unwrap();
    fs::create_dir(client.host("d")).unwrap();
    fs::write(client.host("d/f"), b"second").unwrap();
    forget_places(&mut client);
    assert_eq!(client.open(file, OFlags::RDONLY), Err(libc::ESTALE));
    let folder = client.lookup(ROOT, "d").unwrap().nodeid;
    let second = client.lookup(folder, "f").unwrap().nodeid;
    assert_ne!(second, file);
    let fh = client.open(second, OFlags::RDONLY).unwrap();
    assert_eq!(client.read(fh, 0, 9), Ok(b"second".to_vec()));
    // Once it is seen under its new name it is the file it was.
    let old = client.lookup(ROOT, "old").unwrap().nodeid;
    assert_eq!(client.lookup(old, "f").unwrap().nodeid, file);
    client.open(file, OFlags::RDONLY).unwrap();
}

#[test]
fn pipes_sockets_and_whiteouts_are_made_but_never_opened() {
    let mut client = Client::new();
    let kinds = [
        ("pipe", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        // What an overlay in the guest puts where a file of a lower layer was.
        ("whiteout", libc::S_IFCHR),
    ];
    for (name, kind) in kinds {
        let entry = client.mknod(ROOT, name, kind | 0o666, 0).unwrap();
        assert_eq!(entry.attr.mode, kind | 0o666);
        assert_is_never_opened(&mut client, name, entry.nodeid);
    }
    assert_eq!(
        client.mknod(ROOT, "x", libc::S_IFDIR, 0).map(drop),
        Err(libc::EINVAL)
    );
    assert_eq!(
        client.mknod(ROOT, "x", libc::S_IFLNK, 0).map(drop),
        Err(libc::EINVAL)
    );
}

#[test]
fn devices_are_not_made_and_those_of_the_host_are_never_opened() {
    let mut client = Client::new();
    let devices = [
        // /dev/zero, the first disk, and what is no device but for the guest's kernel.
        ("char", libc::S_IFCHR, 1 << 8 | 5),
        ("block", libc::S_IFBLK, 254 << 8),
        ("none", libc::S_IFBLK, 0),
    ];
    for (name, kind, rdev) in devices {
        let made = client.mknod(ROOT, name, kind | 0o666, rdev);
        assert_eq!(made.map(drop), Err(libc::EPERM), "{name}");
        assert!(!client.host(name).exists(), "{name}");
        // One that came with an image.
        let kind = rustix::fs::FileType::from_raw_mode(kind);
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let path = client.host(name);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, rdev.into()).unwrap();
        let entry = client.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.rdev, rdev, "{name}");
        assert_is_never_opened(&mut client, name, entry.nodeid);
    }
}

fn assert_is_never_opened(client: &mut Client, name: &str, nodeid: u64) {
    for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR] {
        assert_eq!(client.open(nodeid, flags), Err(libc::ENXIO), "{name}");
        assert_eq!(client.create(ROOT, name, flags).map(drop), Err(libc::ENXIO));
    }
    let cut = SetAttrIn {
        valid: valid::SIZE,
        ..SetAttrIn::default()
    };
    assert_eq!(client.set(nodeid, cut).map(drop), Err(libc::EINVAL));
}

#[test]
fn a_mount_swapped_below_the_share_is_another_file() {
    with_own_mounts(|| {
        let mut client = Client::new();
        let point = client.host("mnt");
        fs::create_dir(&point).unwrap();
        fs::write(point.join("f"), b"below").unwrap();
        let below = client.lookup(ROOT, "mnt").unwrap();
        let hidden = client.lookup(below.nodeid, "f").unwrap().nodeid;
        rustix::mount::mount("none", &point, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(point.join("f"), b"above").unwrap();
        let above = client.lookup(ROOT, "mnt").unwrap();
        assert_ne!(above.nodeid, below.nodeid);
        assert_eq!((below.attr.flags, above.attr.flags), (0, ATTR_SUBMOUNT));
        let shown = client.lookup(above.nodeid, "f").unwrap().nodeid;
        assert_ne!(shown, hidden);
        let fh = client.open(shown, OFlags::RDONLY).unwrap();
        assert_eq!(client.read(fh, 0, 9), Ok(b"above".to_vec()));
        client.release(fh).unwrap();
        rustix::mount::unmount(&point, UnmountFlags::DETACH).unwrap();
        assert_eq!(client.lookup(ROOT, "mnt").unwrap().nodeid, below.nodeid);
        // The host's own files do not become data by being mounted there.
        rustix::mount::mount("none", &point, "proc", MountFlags::empty(), None).unwrap();
        assert_eq!(client.lookup(ROOT, "mnt").map(drop), Err(libc::EACCES));
        rustix::mount::unmount(&point, UnmountFlags::DETACH).unwrap();
    });
}

/// Mounts an overlay of the folders below `layers` as `root` in the share.
pub(super) fn mount_overlay(client: &Client, layers: &TempDir) -> PathBuf {
    for name in ["lower", "upper", "work"] {
        fs::create_dir_all(layers.as_path().join(name)).unwrap();
    }
    let root = client.host("root");
    fs::create_dir(&root).unwrap();
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
        layers.as_path().display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    let flags = MountFlags::empty();
    rustix::mount::mount("overlay", &root, "overlay", flags, Some(&*options)).unwrap();
    root
}

/// Makes and removes files while there is no room for files without names, until a new file gets the
/// inode number of a removed one. It must not get the removed one's node with it.
fn reuse_inodes(client: &mut Client, folder: u64) {
    for index in 0..DESCRIPTORS {
        let name = format!("orphan-{index}");
        let (_, fh) = client.create(folder, &name, OFlags::RDWR).unwrap();
        client.release(fh).unwrap();
        client.named(Op::Unlink, folder, &name).unwrap();
    }
    for kind in [libc::S_IFIFO, libc::S_IFREG, libc::S_IFSOCK] {
        for _ in 0..20 {
            let (file, fh) = client.create(folder, "f", OFlags::RDWR).unwrap();
            client.release(fh).unwrap();
            client.named(Op::Unlink, folder, "f").unwrap();
            let other = client.mknod(folder, "g", kind | 0o666, 0).unwrap();
            assert_ne!(other.nodeid, file.nodeid, "kind {kind:o}");
            assert_eq!(client.attr(file.nodeid).map(drop), Err(libc::ESTALE));
            let opened = client.open(other.nodeid, OFlags::RDWR);
            assert_eq!(opened.is_ok(), kind == libc::S_IFREG, "kind {kind:o}");
            client.named(Op::Unlink, folder, "g").unwrap();
            if let Ok(fh) = opened {
                client.release(fh).unwrap();
            }
        }
    }
}

#[test]
fn the_inode_number_of_a_removed_file_does_not_bring_back_its_node() {
    let mut client = Client::new();
    reuse_inodes(&mut client, ROOT);
    with_own_mounts(|| {
        let mut client = Client::new();
        let layers = TempDir::new().unwrap();
        let root = mount_overlay(&client, &layers);
        let folder = client.lookup(ROOT, "root").unwrap().nodeid;
        reuse_inodes(&mut client, folder);
        rustix::mount::unmount(&root, UnmountFlags::DETACH).unwrap();
    });
}

/// Two mounts of one folder are two folders for the guest. What it removes in one of them it still
/// knows in the other.
#[test]
fn a_name_in_a_second_mount_of_a_folder_is_no_way_to_open_another_kind() {
    with_own_mounts(|| {
        let mut client = Client::new();
        let layers = TempDir::new().unwrap();
        let root = mount_overlay(&client, &layers);
        let second = client.host("second");
        fs::create_dir(&second).unwrap();
        rustix::mount::mount_bind(&root, &second).unwrap();
        let first = client.lookup(ROOT, "root").unwrap().nodeid;
        let again = client.lookup(ROOT, "second").unwrap().nodeid;
        for _ in 0..20 {
            let (_, fh) = client.create(first, "f", OFlags::RDWR).unwrap();
            client.release(fh).unwrap();
            let seen = client.lookup(again, "f").unwrap().nodeid;
            client.named(Op::Unlink, first, "f").unwrap();
            client.mknod(first, "f", libc::S_IFIFO | 0o666, 0).unwrap();
            let opened = client.open(seen, OFlags::RDWR);
            assert_eq!(opened, Err(libc::ESTALE));
            let other = client.lookup(again, "f").unwrap().nodeid;
            assert_ne!(other, seen);
            assert_eq!(client.open(other, OFlags::RDWR), Err(libc::ENXIO));
            client.named(Op::Unlink, first, "f").unwrap();
        }
        rustix::mount::unmount(&second, UnmountFlags::DETACH).unwrap();
        rustix::mount::unmount(&root, UnmountFlags::DETACH).unwrap();
    });
}

/// As containers' root file systems are: writing to a layer's file, or making one in a layer's folder,
/// first copies it. A guest that took that for another file would undo what is mounted on it.
#[test]
fn what_an_overlay_copies_up_stays_the_file_it_is() {
    with_own_mounts(|| {
        let mut client = Client::new();
        let layers = TempDir::new().unwrap();
        let lower = layers.as_path().join("lower/etc");
        fs::create_dir_all(&lower).unwrap();
        fs::write(lower.join("passwd"), "root").unwrap();
        let root = mount_overlay(&client, &layers);
        let folder = client.lookup(ROOT, "root").unwrap().nodeid;
        let etc = client.lookup(folder, "etc").unwrap().nodeid;
        let passwd = client.lookup(etc, "passwd").unwrap().nodeid;
        let fh = client.open(passwd, OFlags::RDWR).unwrap();
        client.write(fh, 4, b":x", OFlags::empty()).unwrap();
        client.release(fh).unwrap();
        client.create(etc, "hosts", OFlags::RDWR).unwrap();
        assert!(layers.as_path().join("upper/etc/hosts").exists());
        assert_eq!(client.lookup(folder, "etc").unwrap().nodeid, etc);
        assert_eq!(client.lookup(etc, "passwd").unwrap().nodeid, passwd);
        rustix::mount::unmount(&root, UnmountFlags::DETACH).unwrap();
    });
}

/// Runs `test` on a thread with a mount namespace of its own: no thread outside the test sees what
/// it mounts. Needs root.
pub(super) fn with_own_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        #[expect(
            deprecated,
            reason = "its successor is unsafe because of flags not used here"
        )]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        test();
    });
    thread.join().unwrap();
}

#[test]
fn descriptors_are_bounded_however_many_files_the_guest_knows() {
    let mut client = Client::new();
    let count = 10 * DESCRIPTORS;
    for index in 0..count {
        let folder = client.host(&format!("d{index}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("f"), b"x").unwrap();
    }
    let mut files = Vec::new();
    for index in 0..count {
        let folder = client.lookup(ROOT, &format!("d{index}")).unwrap().nodeid;
        let file = client.lookup(folder, "f").unwrap().nodeid;
        client.attr(file).unwrap();
        files.push(file);
    }
    assert!(descriptors_below(client.folder.as_path()) <= DESCRIPTORS / 4 + 1);
    let mut open = 0;
    let refused = loop {
        match client.open(files[open], OFlags::RDONLY) {
            Ok(_) => open += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((refused, open), (libc::ENFILE, DESCRIPTORS / 2));
    // Names go, files stay: as many as there is room for.
    for index in 0..count {
        let folder = client.lookup(ROOT, &format!("d{index}")).unwrap().nodeid;
        client.named(Op::Unlink, folder, "f").unwrap();
    }
    assert!(descriptors_below(client.folder.as_path()) <= DESCRIPTORS + 1);
    let alive = files
        .iter()
        .filter(|file| client.attr(**file).is_ok())
        .count();
    assert_eq!(alive, DESCRIPTORS / 4);
    // All of it goes with the guest.
    client.init();
    assert_eq!(descriptors_below(client.folder.as_path()), 1);
}

#[test]
fn folders_as_deep_as_the_guest_likes_can_be_reached() {
    let mut client = Client::new();
    let mut folder = ROOT;
    for _ in 0..500 {
        folder = client.mkdir(folder, "deeper-and-deeper").unwrap().nodeid;
    }
    let (file, fh) = client.create(folder, "f", OFlags::RDWR).unwrap();
    client.write(fh, 0, b"x", OFlags::empty()).unwrap();
    forget_places(&mut client);
    assert_eq!(client.attr(file.nodeid).unwrap().size, 1);
    let mut at = folder;
    client.named(Op::Unlink, at, "f").unwrap();
    assert!(descriptors_below(client.folder.as_path()) <= DESCRIPTORS + 1);
    client.forget(at, 1);
    at = ROOT;
    assert!(client.lookup(at, "deeper-and-deeper").is_ok());
}

/// Has the guest look at so many other files that no place is kept of those before.
fn forget_places(client: &mut Client) {
    for index in 0..DESCRIPTORS {
        let other = client.mkdir(ROOT, &format!("other-{index}")).unwrap();
        client.attr(other.nodeid).unwrap();
    }
}

/// Ends a thread, also when the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
