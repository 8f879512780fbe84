//! Requests that make no sense: none may stop the server or reach what is not shared.

use proptest::prelude::*;

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
        crate::virtio::testing::survive(Fs::new(config(folder.as_path())).unwrap(), steps);
    }
}
