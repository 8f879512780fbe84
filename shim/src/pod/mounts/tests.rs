use super::*;

fn mount(kind: &str, source: &str, destination: &str) -> Mount {
    Mount {
        destination: destination.into(),
        source: source.into(),
        r#type: kind.into(),
        options: vec!["rbind".into()],
    }
}

#[test]
fn each_mount_has_an_owner() {
    let of = |source, destination| {
        let mount = mount("bind", source, destination);
        format!("{:?}", volume(&mount, "pod"))
    };
    assert_eq!(of("/run/x/pod/shm", "/dev/shm"), "Shm");
    assert_eq!(of("/var/claim", "/dev/shm"), "Hosts");
    assert_eq!(of("/dev/null", "/x"), "Guests");
    assert_eq!(of("/etc/hosts", "/etc/hosts"), "Hosts");
    assert_eq!(of("/tmp/kubernetes.io~empty-dir/a", "/a"), "Hosts");
    let mut proc = mount("proc", "proc", "/proc");
    proc.options.clear();
    assert_eq!(volume(&proc, "pod"), Volume::Guests);
}

#[test]
fn a_guest_writes_only_to_what_is_mounted_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    let shared = Shared::make(folder.path().join("shared")).expect("this test needs root");
    shared.root("c", &[], &root).unwrap();
    let seen = folder.path().join("shared");
    for place in ["stray", "c/stray"] {
        let error = fs::write(seen.join(place), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
    }
    fs::write(seen.join("c/rootfs/file"), "x").unwrap();
    shared.clear("c").unwrap();
    assert!(root.join("file").exists() && !seen.join("c").exists());
    clear(&seen).unwrap();
    assert!(!seen.exists());
}

/// A folder with a root file system and a volume of the container `c`, mounted in `shared`.
fn mounted(folder: &Path) -> Shared {
    let shared = Shared::make(folder.join("shared")).expect("this test needs root");
    for name in ["root", "data"] {
        let place = folder.join(name);
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("file"), "x").unwrap();
    }
    let data = folder.join("data");
    let mut spec = Spec {
        mounts: vec![mount("bind", data.to_str().unwrap(), "/data")],
        ..Spec::default()
    };
    shared.root("c", &[], &folder.join("root")).unwrap();
    shared.volumes("c", &mut spec).unwrap();
    shared
}

fn is_seen(folder: &Path) -> bool {
    let places = ["shared/c/rootfs/file", "shared/.volumes/0-data/file"];
    let seen = places.map(|place| folder.join(place).exists());
    assert_eq!(seen[0], seen[1]);
    seen[0]
}

#[test]
fn what_is_mounted_for_a_pod_goes_with_the_value_that_owns_it() {
    let folder = tempfile::tempdir().unwrap();
    let shared = mounted(folder.path());
    assert!(is_seen(folder.path()));
    drop(shared);
    let text = fs::read("/proc/self/mountinfo").unwrap();
    let none: [PathBuf; 0] = [];
    assert_eq!(mounted_below(&text, folder.path()), none);
    assert!(!folder.path().join("shared").exists());
    for name in ["root/file", "data/file"] {
        assert!(folder.path().join(name).exists(), "{name}");
    }
}

#[test]
fn a_share_is_taken_down_once_and_leaves_the_next_one_at_its_path_alone() {
    let folder = tempfile::tempdir().unwrap();
    let first = mounted(folder.path());
    first.take_down();
    assert!(!is_seen(folder.path()));
    let next = mounted(folder.path());
    drop(first);
    assert!(is_seen(folder.path()));
    drop(next);
    assert!(!is_seen(folder.path()));
}

/// The host's devices are nothing to a guest, wherever nodes of them are.
#[test]
fn devices_of_the_host_are_not_opened_in_what_is_shared() {
    use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, makedev, mknodat};
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let below = root.join("below");
    fs::create_dir_all(&below).unwrap();
    let tmpfs = rustix::mount::mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None);
    tmpfs.expect("this test needs root");
    for node in [root.join("null"), below.join("null")] {
        mknodat(
            CWD,
            &node,
            FileType::CharacterDevice,
            Mode::RUSR,
            makedev(1, 3),
        )
        .unwrap();
    }
    fs::File::open(below.join("null")).unwrap();
    let seen = folder.path().join("shared");
    let shared = Shared::make(seen.clone()).unwrap();
    shared.root("c", &[], &root).unwrap();
    let mut spec = Spec {
        mounts: vec![mount("bind", root.to_str().unwrap(), "/data")],
        ..Spec::default()
    };
    shared.volumes("c", &mut spec).unwrap();
    for place in ["c/rootfs", ".volumes/0-data"] {
        for name in ["null", "below/null"] {
            let node = seen.join(place).join(name);
            let error = fs::File::open(&node).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{node:?}");
            let folder = node.parent().unwrap();
            let flags = rustix::fs::statvfs(folder).unwrap().f_flag;
            let harmless = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NOEXEC;
            assert!(flags.contains(harmless), "{folder:?}: {flags:?}");
        }
        // As an overlay in the guest makes them.
        let whiteout = seen.join(place).join("below").join(place.replace('/', "-"));
        mknodat(CWD, &whiteout, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    }
    fs::File::open(below.join("null")).expect("the host's own mount is as it was");
    clear(&seen).unwrap();
    rustix::mount::unmount(&below, UnmountFlags::DETACH).unwrap();
}

/// A volume with these options, in which another file system is mounted: whether it can be written
/// to, whether what is mounted in it can be, and its options in the guest.
fn written(option: &str) -> (bool, bool, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("kubelet");
    let inner = source.join("inner");
    fs::create_dir_all(&inner).unwrap();
    let tmpfs = rustix::mount::mount("tmpfs", &inner, "tmpfs", MountFlags::empty(), None);
    tmpfs.expect("this test needs root");
    let mut volume = mount("bind", source.to_str().unwrap(), "/data/x");
    volume.options.push(option.into());
    let mut spec = Spec {
        mounts: vec![volume],
        ..Spec::default()
    };
    let shared = Shared::make(folder.path().join("shared")).unwrap();
    let storages = shared.volumes("c", &mut spec).unwrap();
    assert_eq!(storages[0].source, format!("{SHARED}/.volumes/0-x"));
    assert_eq!(spec.mounts[0].source, storages[0].mount_point);
    let [top, below] =
        [".volumes/0-x/file", ".volumes/0-x/inner/file"].map(|place| {
            match fs::write(folder.path().join("shared").join(place), "x") {
                Ok(()) => true,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
                    false
                }
            }
        });
    clear(&folder.path().join("shared")).unwrap();
    fs::write(source.join("inner/file"), "x").unwrap();
    rustix::mount::unmount(inner, UnmountFlags::DETACH).unwrap();
    (top, below, spec.mounts.remove(0).options)
}

#[test]
fn a_read_only_volume_is_so_on_the_host_and_below_it_if_that_is_asked_for() {
    let words = |words: &[&str]| words.iter().map(|&word| word.into()).collect();
    assert_eq!(written("ro"), (false, true, words(&["rbind"])));
    assert_eq!(written("rro"), (false, false, words(&["rbind", "ro"])));
    assert_eq!(written("rw"), (true, true, words(&["rbind", "rw"])));
}

/// What containers `a` and `b` have of one folder, and whether the host lets it be written to.
#[test]
fn containers_share_one_mount_of_a_volume_and_it_goes_with_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("data");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("single"), "x").unwrap();
    let seen = folder.path().join("shared");
    let shared = Shared::make(seen.clone()).expect("this test needs root");
    let add = |id: &str, source: &Path, words: &[&str]| {
        let mut mount = mount("bind", source.to_str().unwrap(), "/data");
        mount.options = words.iter().map(|&word| word.into()).collect();
        let mut spec = Spec {
            mounts: vec![mount.clone(), mount],
            ..Spec::default()
        };
        let storages = shared.volumes(id, &mut spec).unwrap();
        assert_eq!(spec.mounts[0].source, spec.mounts[1].source);
        (spec.mounts.remove(0), storages.len())
    };
    let place = seen.join(".volumes/0-data");
    let (first, storages) = add("a", &source, &["rbind", "ro"]);
    assert_eq!(
        (storages, first.options),
        (2, vec!["rbind".into(), "ro".into()])
    );
    let refused = fs::write(place.join("file"), "x").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let (second, _) = add("b", &source, &["rbind", "rw"]);
    assert_eq!(second.source, first.source);
    fs::write(place.join("file"), "x").unwrap();
    let (file, storages) = add("b", &source.join("single"), &["rbind", "rw"]);
    assert_eq!(file.source, format!("{SHARED}/.volumes/1-data"));
    assert_eq!(storages, 0, "a file needs no mount of the guest's");
    shared.clear("a").unwrap();
    assert!(place.join("file").exists());
    shared.clear("b").unwrap();
    assert_eq!(fs::read_dir(seen.join(".volumes")).unwrap().count(), 0);
    clear(&seen).unwrap();
    assert!(!seen.exists() && source.join("file").exists());
}

#[test]
fn the_guest_has_a_plain_volume_read_only_too() {
    let mut volume = mount("bind", "/x", "/x");
    volume.options = vec!["rbind".into(), "ro".into()];
    let before = volume.options.clone();
    readonly_in_guest(&mut volume, true);
    assert_eq!(volume.options, before);
}

#[test]
fn only_empty_places_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    fs::create_dir_all(shared.join("c/rootfs")).unwrap();
    fs::File::create(shared.join("c/0-hosts")).unwrap();
    clear(&shared).unwrap();
    assert!(!shared.exists());
    fs::create_dir_all(shared.join("c/rootfs")).unwrap();
    fs::write(shared.join("c/rootfs/precious"), "data").unwrap();
    clear(&shared).unwrap_err();
    assert!(shared.join("c/rootfs/precious").exists());
}
