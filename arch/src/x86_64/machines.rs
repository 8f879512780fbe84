//! What KVM says on real machines (`arch/testdata`), through all that podvmm makes of it.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::{cpuid, msr};

/// A machine's name, what KVM supports there, and which model-specific registers it lists.
struct Machine {
    name: &'static str,
    supported: CpuId,
    msrs: Vec<u32>,
}

const FILES: [(&str, &str); 7] = [
    ("Skylake-SP", include_str!("../../testdata/skylake-sp.txt")),
    (
        "Ice Lake-SP",
        include_str!("../../testdata/ice-lake-sp.txt"),
    ),
    (
        "Sapphire Rapids, Linux 6.1",
        include_str!("../../testdata/sapphire-rapids-6.1.txt"),
    ),
    (
        "Sapphire Rapids, Linux 6.18",
        include_str!("../../testdata/sapphire-rapids-6.18.txt"),
    ),
    ("Zen 2", include_str!("../../testdata/zen2.txt")),
    ("Zen 3", include_str!("../../testdata/zen3.txt")),
    ("Zen 4", include_str!("../../testdata/zen4.txt")),
];

fn machines() -> impl Iterator<Item = Machine> {
    FILES
        .into_iter()
        .map(|(name, text)| Machine::parse(name, text))
}

fn machine(name: &str) -> Machine {
    machines().find(|machine| machine.name == name).unwrap()
}

impl Machine {
    fn parse(name: &'static str, text: &str) -> Self {
        let number = |word: &str| u32::from_str_radix(word, 16).unwrap();
        let rows = |kind: &'static str| {
            let rows = text.lines().filter_map(move |line| line.strip_prefix(kind));
            rows.map(move |row| row.split_whitespace().map(number).collect::<Vec<_>>())
        };
        let leaves = rows("cpuid ").map(|row| {
            let [function, index, eax, ebx, ecx, edx] = row[..] else {
                panic!("{name}: {row:x?}")
            };
            kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        });
        Self {
            name,
            supported: CpuId::from_entries(&leaves.collect::<Vec<_>>()).unwrap(),
            msrs: rows("msr ").flatten().collect(),
        }
    }

    fn guest(&self, count: u8) -> CpuId {
        cpuid::for_guest(&self.supported, count).unwrap()
    }
}

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let mut entries = cpuid.as_slice().iter();
    let entry = entries.find(|entry| (entry.function, entry.index) == (function, index));
    entry.map_or([0; 4], |it| [it.eax, it.ebx, it.ecx, it.edx])
}

/// Bits that no guest may have, by leaf, subleaf and register.
const HIDDEN: [(u32, u32, usize, u32); 14] = [
    // VMX, the debug store, PERF_CAPABILITIES; SVM, IBS and counters.
    (0x1, 0, 2, 1 << 5 | 1 << 2 | 1 << 15),
    (0x1, 0, 3, 1 << 21),
    (
        0x8000_0001,
        0,
        2,
        1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28,
    ),
    (0xa, 0, 0, u32::MAX),
    (0x8000_0022, 0, 0, u32::MAX),
    (0x8000_000a, 0, 0, u32::MAX),
    // AMX and CET.
    (0x7, 0, 3, 1 << 22 | 1 << 24 | 1 << 25 | 1 << 20),
    (0x7, 0, 2, 1 << 7),
    (0x7, 1, 0, 1 << 21),
    (0xd, 0, 0, 1 << 17 | 1 << 18),
    (0xd, 1, 0, 1 << 4),
    (0xd, 1, 2, 1 << 11 | 1 << 12),
    (0x1d, 0, 0, u32::MAX),
    (0x1e, 0, 1, u32::MAX),
];

#[test]
fn what_no_guest_gets_is_hidden_on_every_machine() {
    for machine in machines() {
        let guest = machine.guest(4);
        for (function, index, register, bits) in HIDDEN {
            let found = leaf(&guest, function, index)[register] & bits;
            assert_eq!(found, 0, "{}: {function:#x}.{index}", machine.name);
        }
    }
}

/// A kernel enables what XCR0 offers, and needs to know where each of it lies (XSETBV faults otherwise,
/// and Linux refuses to go on where the sizes do not agree).
#[test]
fn all_state_that_is_offered_has_a_place_and_nothing_else_has() {
    for machine in machines() {
        let guest = machine.guest(2);
        let [state, _, size, _] = leaf(&guest, 0xd, 0);
        let mut end = 576;
        for component in 2..32 {
            let [bytes, start, ..] = leaf(&guest, 0xd, component);
            let offered = state & (1 << component) != 0;
            assert_eq!(bytes != 0, offered, "{}: {component}", machine.name);
            end = end.max(start + bytes);
        }
        assert_eq!(size, end, "{}", machine.name);
    }
}

/// Bits 5 to 7 are AVX-512's, 3 and 4 MPX's: each set faults XSETBV if it is incomplete.
#[test]
fn sets_of_state_are_whole() {
    for machine in machines() {
        let [state, ..] = leaf(&machine.guest(2), 0xd, 0);
        for set in [0x3, 0x18, 0xe0, 0x6_0000] {
            assert!(
                [0, set].contains(&(state & set)),
                "{}: {state:#x}",
                machine.name
            );
        }
    }
}

#[test]
fn vcpus_differ_in_their_apic_ids_alone() {
    for machine in machines() {
        for count in [1, 2, 3, 64, 254] {
            let guest = machine.guest(count);
            assert!(guest.as_slice().len() <= KVM_MAX_CPUID_ENTRIES);
            for index in [0, count - 1] {
                let vcpu = cpuid::for_vcpu(&guest, index);
                assert_eq!(leaf(&vcpu, 1, 0)[1] >> 24, u32::from(index));
                assert_eq!(leaf(&vcpu, 0xb, 1)[1], u32::from(count));
                assert_eq!(leaf(&vcpu, 0xb, 1)[3], u32::from(index));
                assert_eq!(cpuid::for_vcpu(&vcpu, 0), guest, "{}", machine.name);
            }
        }
    }
}

#[test]
fn a_guest_goes_on_where_it_was_started() {
    for machine in machines() {
        for count in [1, 8] {
            let missing = cpuid::missing(&machine.guest(count), &machine.supported);
            assert_eq!(missing, None, "{}", machine.name);
        }
    }
}

#[test]
fn a_guest_goes_on_where_there_is_all_that_it_saw() {
    let cases = [
        ("Zen 2", "Zen 3", None),
        (
            "Zen 3",
            "Zen 2",
            Some("CPU features (CPUID leaf 0x1.0 ECX, bits 0x20000)"),
        ),
        ("Zen 3", "Zen 4", None),
        ("Zen 4", "Ice Lake-SP", Some("a CPU of AuthenticAMD")),
        // TSX and MPX.
        (
            "Skylake-SP",
            "Ice Lake-SP",
            Some("CPU features (CPUID leaf 0x7.0 EBX, bits 0x4810)"),
        ),
        // Neither AMX nor CET, nor counters, are the guest's.
        (
            "Sapphire Rapids, Linux 6.18",
            "Sapphire Rapids, Linux 6.1",
            None,
        ),
        (
            "Sapphire Rapids, Linux 6.1",
            "Sapphire Rapids, Linux 6.18",
            None,
        ),
    ];
    for (from, to, expected) in cases {
        let missing = cpuid::missing(&machine(from).guest(4), &machine(to).supported);
        assert_eq!(missing.as_deref(), expected, "{from} to {to}");
    }
}

#[test]
fn snapshots_keep_what_guests_use_of_every_machine() {
    for machine in machines() {
        let kept = msr::kept(&machine.msrs);
        let used = [
            0x10,
            0x11,
            0x12,
            0x3b,
            0x48,
            0x10a,
            0x174,
            0x1a0,
            0x277,
            0x2ff,
            0x6e0,
            0x4b56_4d00,
            0x4b56_4d01,
            0x4b56_4d02,
            0xc000_0081,
            0xc000_0082,
            0xc000_0102,
            0xc000_0103,
        ];
        for index in used {
            assert!(kept.contains(&index), "{}: {index:#x}", machine.name);
        }
        let unused = [
            0x345,
            0xc1,
            0x186,
            0x309,
            0x38f,
            0x480,
            0x4000_0000,
            0xc001_0200,
        ];
        for index in unused {
            assert!(!kept.contains(&index), "{}: {index:#x}", machine.name);
        }
    }
}
