//! Requests that make no sense: none may stop the server or reach what is not shared.

use proptest::prelude::*;
use rustix::mount::UnmountFlags;

use super::confinement::{mount_overlay, with_own_mounts};
use super::*;

/// Numbers as they occur, and as they do not.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..8u64, 1 => Just(u64::MAX), 1 => any::<u64>(), 1 => 0..0x1_0000u64]
}

fn piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => number().prop_map(|number| number.to_le_bytes().to_vec()),
        2 => any::<u32>().prop_map(|number| (number & 0x1ff).to_le_bytes().to_vec()),
        3 => prop::sample::select(vec!["f", "d", "l", "n", "..", "../secret", "a/b", ".", "user.x"])
            .prop_map(|name| text(&[name])),
        1 => prop::collection::vec(any::<u8>(), 0..50),
    ]
}

#[derive(Clone, Debug)]
struct Nonsense {
    opcode: u32,
    nodeid: u64,
    body: Vec<u8>,
    /// How far the header's length is from the truth.
    lie: i32,
    room: u32,
}

fn nonsense() -> impl Strategy<Value = Nonsense> {
    let body = prop::collection::vec(piece(), 0..8).prop_map(|pieces| pieces.concat());
    let lie = prop_oneof![8 => Just(0), 1 => -60..60i32, 1 => any::<i32>()];
    let room = prop_oneof![6 => Just(4096u32), 1 => 0..40u32, 1 => 0..200u32];
    (0..60u32, number(), body, lie, room).prop_map(|(opcode, nodeid, body, lie, room)| Nonsense {
        opcode,
        nodeid,
        body,
        lie,
        room,
    })
}

/// What a guest does with a few names in two mounts of one folder. Nodes are those it was told of, by
/// when.
#[derive(Clone, Debug)]
enum Act {
    Create(Named),
    Make(Named, u32),
    Look(Named),
    Remove(Named),
    Move(Named, Named, u32),
    Link(usize, Named),
    Forget(usize),
    Open(usize),
}

/// The number of a folder, and a name there.
type Named = (usize, &'static str);

fn act() -> impl Strategy<Value = Act> {
    let named = || (0..2usize, prop::sample::select(vec!["a", "b"]));
    let kinds = vec![libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFREG];
    let node = || 0..30usize;
    prop_oneof![
        2 => named().prop_map(Act::Create),
        6 => (named(), prop::sample::select(kinds)).prop_map(|(named, kind)| Act::Make(named, kind)),
        4 => named().prop_map(Act::Look),
        6 => named().prop_map(Act::Remove),
        1 => (named(), named(), 0..3u32).prop_map(|(from, to, flags)| Act::Move(from, to, flags)),
        1 => (node(), named()).prop_map(|(node, named)| Act::Link(node, named)),
        1 => node().prop_map(Act::Forget),
        8 => node().prop_map(Act::Open),
    ]
}

/// Does it all, with room for one file without a name. Whatever is opened is a regular file or a
/// folder.
fn live_with(acts: Vec<Act>) {
    let mut client = Client::with(|config| config.descriptors = 1);
    let layers = TempDir::new().unwrap();
    let root = mount_overlay(&client, &layers);
    let second = client.host("second");
    fs::create_dir(&second).unwrap();
    rustix::mount::mount_bind(&root, &second).unwrap();
    let folders = ["root", "second"].map(|name| client.lookup(ROOT, name).unwrap().nodeid);
    let at = |(folder, name): Named| (folders[folder], name);
    let mut nodes: Vec<u64> = Vec::new();
    for act in acts {
        let mut opened = None;
        let told = match act.clone() {
            Act::Create(named) => {
                let (folder, name) = at(named);
                let made = client.create(folder, name, OFlags::RDWR);
                opened = made.as_ref().ok().map(|(_, fh)| *fh);
                made.map(|(entry, _)| entry).ok()
            }
            Act::Make(named, kind) => {
                let (folder, name) = at(named);
                client.mknod(folder, name, kind | 0o666, 0).ok()
            }
            Act::Look(named) => {
                let (folder, name) = at(named);
                client.lookup(folder, name).ok()
            }
            Act::Remove(named) => {
                let (folder, name) = at(named);
                let _ = client.named(Op::Unlink, folder, name);
                None
            }
            Act::Move(from, to, flags) => {
                let _ = client.rename(at(from), at(to), flags);
                None
            }
            Act::Link(node, named) => {
                let (folder, name) = at(named);
                let node = nodes.get(node).copied();
                node.and_then(|node| client.link(node, folder, name).ok())
            }
            Act::Forget(node) => {
                if let Some(node) = nodes.get(node) {
                    client.forget(*node, 1);
                }
                None
            }
            Act::Open(node) => {
                let node = nodes.get(node).copied();
                opened = node.and_then(|node| client.open(node, OFlags::RDWR).ok());
                None
            }
        };
        nodes.extend(told.map(|entry| entry.nodeid));
        if let Some(fh) = opened {
            let kind = kind_of(&mut client, fh);
            let is_data = kind == libc::S_IFREG || kind == libc::S_IFDIR;
            assert!(is_data, "{act:?} opened a file of kind {kind:o}");
            client.release(fh).unwrap();
        }
    }
    client.init();
    for path in [&second, &root] {
        rustix::mount::unmount(path, UnmountFlags::DETACH).unwrap();
    }
}

/// The type of an open file, asked of its descriptor.
fn kind_of(client: &mut Client, fh: u64) -> u32 {
    let asked = GetAttrIn {
        flags: GETATTR_FH,
        fh,
        ..GetAttrIn::default()
    };
    let answer: AttrOut = client.ask(Op::GetAttr, ROOT, asked.as_bytes()).unwrap();
    answer.attr.mode & libc::S_IFMT
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_is_open_is_a_file_or_a_folder(acts in prop::collection::vec(act(), 1..120)) {
        with_own_mounts(|| live_with(acts));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_requests_are_survived_and_stay_inside(all in prop::collection::vec(nonsense(), 1..60)) {
        let outside = TempDir::new().unwrap();
        let folder = outside.as_path().join("share");
        fs::create_dir_all(folder.join("d")).unwrap();
        fs::write(folder.join("f"), b"x").unwrap();
        fs::write(outside.as_path().join("secret"), b"secret").unwrap();
        symlink("../secret", folder.join("l")).unwrap();
        let mut guest = Guest::live(Fs::new(config(&folder)).unwrap());
        for Nonsense { opcode, nodeid, body, lie, room } in all {
            let len = u32::try_from(40 + body.len()).unwrap();
            let header = InHeader {
                len: len.wrapping_add_signed(lie),
                opcode,
                unique: 1,
                nodeid,
                ..InHeader::default()
            };
            let request = Buffer::Out([header.as_bytes(), &body].concat());
            let answer = guest.request(QUEUE, &[request, Buffer::In(room)]);
            let answer = answer.expect("every request comes back");
            prop_assert!(answer.is_empty() || answer.len() >= 16);
        }
        prop_assert_eq!(fs::read(outside.as_path().join("secret")).unwrap(), b"secret");
        prop_assert_eq!(fs::metadata(outside.as_path().join("secret")).unwrap().nlink(), 1);
        prop_assert_eq!(fs::read_dir(outside.as_path()).unwrap().count(), 2);
        prop_assert!(descriptors_below(&folder) <= DESCRIPTORS + 1);
    }

    #[test]
    fn any_guest_is_survived(steps in crate::virtio::hostile::steps()) {
        let folder = TempDir::new().unwrap();
        crate::virtio::testing::survive(Fs::new(config(folder.as_path())).unwrap(), &[0, 1], steps);
    }
}
