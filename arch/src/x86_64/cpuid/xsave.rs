//! Leaf 0xD, which says what state XSAVE knows and how much memory that takes (Intel SDM volume 1,
//! 13.2): here without the state of the features that podvmm hides.

use kvm_bindings::kvm_cpuid_entry2;

const XSAVE: u32 = 0xd;
/// State components, by their bits in XCR0 and, of CET, in IA32_XSS.
const CET_USER: u32 = 11;
const CET_SUPERVISOR: u32 = 12;
const TILE_CONFIG: u32 = 17;
const TILE_DATA: u32 = 18;
const TILES: u32 = 1 << TILE_CONFIG | 1 << TILE_DATA;
/// Subleaf 1, EAX: a component can be disabled until it is used (XFD), which is for tiles alone.
const EAX_XFD: u32 = 1 << 4;
/// What the x87 FPU, SSE and the header take, in bytes. All else lies behind.
const LEGACY_BYTES: u32 = 576;

/// Takes the state of AMX and CET out of `entries`.
pub(super) fn hide(entries: &mut Vec<kvm_cpuid_entry2>) {
    let hidden = [CET_USER, CET_SUPERVISOR, TILE_CONFIG, TILE_DATA];
    entries.retain(|entry| entry.function != XSAVE || !hidden.contains(&entry.index));
    let bytes = bytes(entries);
    for entry in entries.iter_mut().filter(|entry| entry.function == XSAVE) {
        match entry.index {
            0 if entry.eax & TILES != 0 => {
                entry.eax &= !TILES;
                entry.ecx = bytes;
            }
            1 => {
                entry.eax &= !EAX_XFD;
                entry.ecx &= !(1 << CET_USER | 1 << CET_SUPERVISOR);
            }
            _ => {}
        }
    }
}

/// How much memory all of a user's state takes, if it is not compacted.
fn bytes(entries: &[kvm_cpuid_entry2]) -> u32 {
    let components = entries.iter().filter(|entry| {
        // Bit 0 of ECX is of a supervisor's state, which has no place of its own.
        entry.function == XSAVE && entry.index >= 2 && entry.ecx & 1 == 0
    });
    let ends = components.map(|component| component.ebx.saturating_add(component.eax));
    ends.fold(LEGACY_BYTES, u32::max)
}
