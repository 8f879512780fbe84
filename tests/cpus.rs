//! What guests of a few instructions find of their CPUs, interrupts and clocks.

use tempfile::TempDir;
use tests::podvmm::kvm_is_here;
use tests::probe::{ClockFlags, Probe};

#[test]
fn a_vcpu_started_after_a_restore_has_the_time_of_the_first() {
    if !kvm_is_here() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut original = Probe::boot(2);
    let stable = original.clock_flags().is_stable;
    original.snapshot(folder.path());
    // The snapshot's vCPU 1 has not been started: it has no time of its own.
    assert_eq!(original.start_next_cpu(), '=');
    original.end();

    let mut clone = Probe::restore(folder.path());
    let expected = ClockFlags {
        is_stable: stable,
        was_stopped: true,
    };
    assert_eq!(clone.clock_flags(), expected);
    assert_eq!(clone.start_next_cpu(), '=');
    clone.end();
}
