//! What a guest was told of its CPU's weaknesses (IA32_ARCH_CAPABILITIES, Intel SDM volume 4,
//! table 2-2). It reads that once, when it boots, and does without the mitigations that it does not
//! need, so a host that it comes to later must not need them either.

/// Registers and instructions that take part in no mitigation, and what only a guest's own guests would
/// want to know (SKIP_L1DFL_VMENTRY).
const NEUTRAL: u64 = 1 << 3;
/// Bits that say there is a weakness, where the others say there is none: the prediction of returns
/// falls back on that of other branches (RSBA, and RRSBA where that is restricted).
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;

/// What a guest that was told `told` relies on and a host with `here` does not have, in words.
pub(super) fn missing(told: u64, here: u64) -> Option<String> {
    let lacking = told & !here & !NEUTRAL & !WEAKNESSES;
    let weaker = here & !told & WEAKNESSES;
    let bits = match (lacking, weaker) {
        (0, 0) => return None,
        (0, weaker) => format!("no bits {weaker:#x}"),
        (lacking, _) => format!("bits {lacking:#x}"),
    };
    Some(format!("other weaknesses (IA32_ARCH_CAPABILITIES, {bits})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_may_be_free_of_more_weaknesses_but_not_of_fewer() {
        // Meltdown; and Meltdown and MDS.
        assert_eq!(missing(0x1, 0x21), None);
        assert_eq!(
            missing(0x21, 0x1).unwrap(),
            "other weaknesses (IA32_ARCH_CAPABILITIES, bits 0x20)"
        );
        assert_eq!(missing(1 << 3, 0), None);
    }

    #[test]
    fn a_weakness_that_the_guest_does_not_know_of_is_refused() {
        assert_eq!(missing(1 << 19, 0), None);
        assert_eq!(
            missing(0, 1 << 19).unwrap(),
            "other weaknesses (IA32_ARCH_CAPABILITIES, no bits 0x80000)"
        );
    }
}
