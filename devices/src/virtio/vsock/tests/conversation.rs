//! Any conversation ends when neither side has anything new to say.

use super::*;

/// What one side of a connection does.
#[derive(Clone, Debug)]
enum Act {
    HostWrites(usize),
    HostReads,
    /// The guest's program reads so many bytes, of which its kernel tells.
    GuestReads(u32),
    GuestSends(usize),
    GuestSays(Op),
    /// The guest's kernel has room for so much, from now on.
    GuestHasRoom(u32),
}

fn act() -> impl Strategy<Value = Act> {
    let words = vec![
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Shutdown,
        Op::Response,
    ];
    prop_oneof![
        4 => (1..40usize).prop_map(Act::HostWrites),
        1 => Just(Act::HostReads),
        4 => (1..40u32).prop_map(Act::GuestReads),
        2 => (1..40usize).prop_map(Act::GuestSends),
        2 => prop::sample::select(words).prop_map(Act::GuestSays),
        1 => prop_oneof![0..20u32, Just(u32::MAX)].prop_map(Act::GuestHasRoom),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// The guest answers at once what it is asked, as Linux does. The device says no more than it has
    /// reasons to: for each byte a packet and a question, for each packet of the guest an answer.
    #[test]
    fn a_conversation_ends_when_nothing_is_new(acts in prop::collection::vec(act(), 1..40)) {
        let mut bench = Bench::new();
        let (mut stream, mut header) = bench.connected();
        stream.set_nonblocking(true).unwrap();
        let (mut reasons, mut heard) = (4, 0);
        let mut unread = 0;
        for act in acts {
            reasons += 2;
            match act {
                Act::HostWrites(len) => {
                    // Fails when the guest has ended the connection.
                    reasons += 2 * stream.write(&vec![7; len]).unwrap_or(0);
                }
                Act::HostReads => drop(stream.read(&mut [0; 64])),
                Act::GuestReads(len) => {
                    let len = len.min(unread);
                    unread -= len;
                    header.fwd_cnt = header.fwd_cnt.wrapping_add(len);
                    bench.say(with(header, Op::CreditUpdate), &[]);
                }
                Act::GuestSends(len) => bench.say(with(header, Op::Data), &vec![7; len]),
                Act::GuestSays(op) => bench.say(with(header, op), &[]),
                Act::GuestHasRoom(room) => header.buf_alloc = room,
            }
            while let Some((packet, payload)) = bench.hear() {
                heard += 1;
                prop_assert!(heard <= reasons, "{packet:?}");
                unread += u32::try_from(payload.len()).unwrap();
                if packet.op == Op::CreditRequest as u16 {
                    bench.say(with(header, Op::CreditUpdate), &[]);
                }
            }
            prop_assert!(bench.guest.is_to_kick(TX));
        }
    }
}
