//! Overlays of many layers: mount(2) takes no more than a page of options, and cuts the rest off without
//! a word (kernel, filesystems/overlayfs). So the folder that all lower layers are in is left out of
//! them, as containerd does it, and the mount is made from there.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use super::from_folder;

/// The most bytes of options that mount(2) takes: a page with its NUL.
const MAX_OPTIONS_LEN: usize = 4095;

/// Mounts a file system with these options, which are joined by commas.
pub(super) fn mount(
    source: &str,
    place: &Path,
    kind: &str,
    flags: MountFlags,
    options: &[&str],
) -> io::Result<()> {
    let whole = options.join(",");
    let (folder, data) = match whole.len() <= MAX_OPTIONS_LEN {
        true => (None, whole),
        false => compact(options).unwrap_or((None, whole)),
    };
    if data.len() > MAX_OPTIONS_LEN {
        let len = data.len();
        return Err(io::Error::other(format!(
            "its options are {len} bytes, and mount takes {MAX_OPTIONS_LEN}"
        )));
    }
    let data = CString::new(data)?;
    let mount = || {
        Ok(rustix::mount::mount(
            source,
            place,
            kind,
            flags,
            Some(&*data),
        )?)
    };
    match folder {
        None => mount(),
        Some(folder) => from_folder(&folder, mount),
    }
}

/// The options of an overlay with lower layers by their places in a folder, and that folder. `None` if
/// there is none that all are in.
fn compact(options: &[&str]) -> Option<(Option<PathBuf>, String)> {
    let lower = options
        .iter()
        .position(|option| option.starts_with("lowerdir="))?;
    let layers: Vec<_> = options[lower]
        .strip_prefix("lowerdir=")?
        .split(':')
        .collect();
    // A colon in a name is escaped by a backslash: such a name is cut in two.
    if layers.iter().any(|layer| !layer.starts_with('/')) {
        return None;
    }
    let mut folder = Path::new(layers.first()?).parent()?;
    while !layers.iter().all(|layer| is_below(layer, folder)) {
        folder = folder.parent()?;
    }
    let layers = layers
        .iter()
        .map(|layer| Path::new(layer).strip_prefix(folder).ok()?.to_str());
    let layers: Option<Vec<_>> = layers.collect();
    let lowerdir = format!("lowerdir={}", layers?.join(":"));
    let mut options = options.to_vec();
    options[lower] = &lowerdir;
    Some((Some(folder.into()), options.join(",")))
}

fn is_below(layer: &str, folder: &Path) -> bool {
    layer != folder.as_os_str() && Path::new(layer).starts_with(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// An overlay of so many layers in `folder`, each with a file of its number.
    fn overlay(folder: &Path, count: usize) -> io::Result<PathBuf> {
        let layer = |number: usize| {
            let long = "a-name-as-long-as-those-of-io.containerd.snapshotter.v1.overlayfs";
            folder.join(long).join(number.to_string()).join("fs")
        };
        for number in 0..count {
            fs::create_dir_all(layer(number)).unwrap();
            fs::write(layer(number).join(number.to_string()), "x").unwrap();
        }
        let layers: Vec<_> = (0..count)
            .map(|number| layer(number).display().to_string())
            .collect();
        let [upper, work, place] = ["upper", "work", "place"].map(|name| folder.join(name));
        for folder in [&upper, &work, &place] {
            fs::create_dir_all(folder).unwrap();
        }
        let lowerdir = format!("lowerdir={}", layers.join(":"));
        let upperdir = format!("upperdir={}", upper.display());
        let workdir = format!("workdir={}", work.display());
        let options = [workdir.as_str(), &upperdir, &lowerdir];
        mount("overlay", &place, "overlay", MountFlags::empty(), &options)?;
        Ok(place)
    }

    #[test]
    fn a_hundred_layers_are_one_file_system() {
        let before = std::env::current_dir().unwrap();
        for count in [2, 120] {
            // Not on an overlay, on which there may be no other.
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            let place = overlay(folder.path(), count).expect("this test needs root");
            let seen = fs::read_dir(&place).unwrap().count();
            fs::write(place.join("new"), "x").unwrap();
            rustix::mount::unmount(&place, rustix::mount::UnmountFlags::DETACH).unwrap();
            assert_eq!(seen, count);
            assert!(folder.path().join("upper/new").exists());
        }
        assert_eq!(std::env::current_dir().unwrap(), before);
    }

    #[test]
    fn options_that_stay_too_long_are_refused() {
        let long = format!("workdir=/{}", "x".repeat(5000));
        let error = mount(
            "overlay",
            Path::new("/nowhere"),
            "overlay",
            MountFlags::empty(),
            &[&long],
        );
        let said = error.unwrap_err().to_string();
        assert_eq!(said, "its options are 5009 bytes, and mount takes 4095");
    }

    #[test]
    fn layers_are_told_by_their_places_in_the_folder_that_all_are_in() {
        let compacted = |lowerdir| compact(&["workdir=/w", lowerdir, "upperdir=/u"]);
        let folder = |path: &str| Some(PathBuf::from(path));
        assert_eq!(
            compacted("lowerdir=/s/10/fs:/s/2/fs"),
            Some((
                folder("/s"),
                "workdir=/w,lowerdir=10/fs:2/fs,upperdir=/u".into()
            ))
        );
        assert_eq!(
            compacted("lowerdir=/s/1:/s/1/fs"),
            Some((
                folder("/s"),
                "workdir=/w,lowerdir=1:1/fs,upperdir=/u".into()
            ))
        );
        assert_eq!(compacted("lowerdir=/s/a\\:b:/s/c"), None);
        assert_eq!(compacted("lowerdir=/a:relative"), None);
        assert_eq!(compact(&["ro"]), None);
    }
}
