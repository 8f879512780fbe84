use proptest::prelude::*;

use super::*;
use crate::pci::Identity;
use crate::pci::testing::Recorder;

const ON: u32 = 1 << 31;
const ALL_MASKED: u32 = 1 << 30;
const REGISTER: usize = 16;

struct Bench {
    config: ConfigSpace,
    msix: Msix,
    events: Arc<[EventFd]>,
    host: Arc<Recorder>,
}

fn bench(vectors: usize) -> Bench {
    let identity = Identity {
        vendor: 1,
        device: 2,
        revision: 1,
        class: 0,
        subsystem_vendor: 0,
        subsystem: 0,
    };
    let mut config = ConfigSpace::new(identity);
    let event = |_| EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let events: Arc<[_]> = (0..vectors).map(event).collect::<Vec<_>>().into();
    let host = Arc::new(Recorder::default());
    let msix = Msix::new(&mut config, events.clone(), (0x4000, 0x5000), host.clone());
    Bench {
        config,
        msix,
        events,
        host,
    }
}

impl Bench {
    fn control(&mut self, bits: u32) {
        self.config.write(REGISTER, bits, 0xffff_0000);
        self.msix.configured(&self.config, REGISTER);
    }

    fn word(&mut self, vector: u64, word: u64, value: u32) {
        let at = vector * 16 + word * 4;
        assert!(self.msix.write_table(at, &value.to_le_bytes()));
    }

    fn open(&mut self, vector: u64, data: u32) {
        for (word, value) in [(0, 0xfee0_1000), (1, 0), (2, data), (3, 0)] {
            self.word(vector, word, value);
        }
    }

    fn pending(&self) -> u64 {
        let mut bits = [0; 8];
        assert!(self.msix.read_pending(0, &mut bits));
        u64::from_le_bytes(bits)
    }

    fn messages(&self) -> Vec<(u16, u32)> {
        let record = self.host.record();
        record
            .messages
            .iter()
            .map(|(vector, message)| (*vector, message.data))
            .collect()
    }
}

#[test]
fn the_capability_says_how_many_vectors_there_are_and_where() {
    let bench = bench(3);
    let words = [0, 1, 2].map(|at| bench.config.read(REGISTER + at));
    assert_eq!(words, [0x0002_0011, 0x4000, 0x5000]);
}

#[test]
fn a_vector_is_open_while_nothing_masks_it() {
    let mut bench = bench(2);
    bench.open(1, 0x21);
    assert_eq!(bench.messages(), [], "there are no messages yet");
    bench.control(ON | ALL_MASKED);
    assert_eq!(bench.messages(), []);
    bench.control(ON);
    assert_eq!(bench.messages(), [(1, 0x21)], "the other one is masked");
    bench.word(1, 3, 1);
    assert_eq!(bench.messages(), []);
    bench.word(1, 3, 0);
    assert_eq!(bench.messages(), [(1, 0x21)]);
    bench.control(0);
    assert_eq!(bench.messages(), []);
}

#[test]
fn a_message_that_is_rewritten_is_the_new_one() {
    let mut bench = bench(1);
    bench.control(ON);
    bench.open(0, 0x21);
    bench.word(0, 2, 0x22);
    assert_eq!(bench.messages(), [(0, 0x22)]);
    bench.word(0, 0, 0xfee0_2003);
    let message = bench.host.record().messages[&0];
    assert_eq!(message.address, 0xfee0_2000, "its lowest bits are zero");
    bench.word(0, 1, 7);
    let message = bench.host.record().messages[&0];
    assert_eq!(message.address, 0x7_fee0_2000);
}

#[test]
fn what_comes_while_a_vector_is_masked_is_pending() {
    let mut bench = bench(2);
    bench.control(ON);
    bench.open(0, 0x21);
    bench.open(1, 0x22);
    bench.word(1, 3, 1);
    bench.events[1].write(3).unwrap();
    assert_eq!(bench.pending(), 0b10);
    assert_eq!(bench.pending(), 0b10, "it stays so when it is read");
    bench.word(1, 3, 0);
    assert_eq!(bench.pending(), 0, "it is the host's to send now");
    assert_eq!(bench.events[1].read().unwrap(), 3);
}

#[test]
fn what_came_before_there_were_messages_is_forgotten() {
    let mut bench = bench(1);
    bench.events[0].write(1).unwrap();
    bench.control(ON | ALL_MASKED);
    assert_eq!(bench.pending(), 0);
    bench.events[0].write(1).unwrap();
    bench.control(ON);
    assert_eq!(bench.pending(), 1, "its entry is masked");
}

#[test]
fn the_table_takes_words_and_pairs_of_them() {
    let mut bench = bench(2);
    assert!(bench.msix.write_table(16, &[4, 3, 2, 1, 8, 7, 6, 5]));
    let mut pair = [0; 8];
    assert!(bench.msix.read_table(16, &mut pair));
    assert_eq!(pair, [4, 3, 2, 1, 8, 7, 6, 5]);
    let mut pair = [0; 8];
    assert!(bench.msix.read_table(24, &mut pair));
    assert_eq!(pair, [0, 0, 0, 0, 1, 0, 0, 0], "it is masked at first");
    let sizes = [
        (0, 1),
        (2, 2),
        (2, 4),
        (4, 8),
        (0, 16),
        (32, 4),
        (u64::MAX - 3, 4),
    ];
    for (offset, len) in sizes {
        assert!(
            !bench.msix.write_table(offset, &vec![0xff; len]),
            "{offset}"
        );
        assert!(
            !bench.msix.read_table(offset, &mut vec![0; len]),
            "{offset}"
        );
    }
    assert!(
        !bench.msix.read_pending(8, &mut [0; 8]),
        "there are 64 bits"
    );
    assert!(!bench.msix.read_pending(u64::MAX - 7, &mut [0; 8]));
}

#[test]
fn vectors_go_on_in_another_table() {
    let mut first = bench(3);
    first.control(ON);
    first.open(0, 0x21);
    first.open(2, 0x23);
    first.word(2, 3, 1);
    first.events[2].write(1).unwrap();
    let state = first.msix.state();
    let mut second = bench(3);
    assert!(second.config.restore(&first.config.state()));
    assert!(second.msix.restore(&second.config.clone(), &state));
    assert_eq!(second.messages(), first.messages());
    assert_eq!(
        (second.pending(), second.msix.state()),
        (0b100, state.clone())
    );
    assert!(!bench(2).msix.restore(&second.config, &state));
}

proptest! {
    /// The recorder fails if a vector is opened or closed twice.
    #[test]
    fn any_order_of_writes_leaves_open_what_is_not_masked(
        writes in prop::collection::vec((0..6_u64, 0..4_u64, any::<u32>(), 0..8_u32), 0..80)
    ) {
        let mut bench = bench(4);
        for (vector, word, value, control) in writes {
            let at = vector * 16 + word * 4;
            let there = bench.msix.write_table(at, &value.to_le_bytes());
            prop_assert_eq!(there, vector < 4);
            bench.control(control << 29);
        }
        bench.control(ON);
        let masked = |vector: u64| {
            let mut word = [0; 4];
            assert!(bench.msix.read_table(vector * 16 + 12, &mut word));
            word != [0; 4]
        };
        let open: Vec<_> = (0..4_u16).filter(|vector| !masked((*vector).into())).collect();
        let messages: Vec<_> = bench.messages().iter().map(|(vector, _)| *vector).collect();
        prop_assert_eq!(messages, open);
    }
}
