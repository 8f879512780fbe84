//! What kind of KVM this host has, and what a guest kernel must be told to run
//! on it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

/// How the host's KVM runs guest kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvmKind {
    /// `kvm_intel` on VT-x.
    Intel,
    /// `kvm_amd` on AMD-V.
    Amd,
    /// `kvm_pvm`: guest user mode runs natively, guest kernel mode is
    /// interpreted, without hardware virtualization.
    Emulating,
    /// KVM is of no module that podvmm knows, perhaps built into the kernel.
    Unknown,
}

/// A module's folder below `/sys/module` and the kind it means. The emulating
/// module comes first: where it is loaded, it serves `/dev/kvm`.
const MODULES: [(&str, KvmKind); 3] = [
    ("kvm_pvm", KvmKind::Emulating),
    ("kvm_intel", KvmKind::Intel),
    ("kvm_amd", KvmKind::Amd),
];

/// Parameters for every guest: what a VM without ACPI and a keyboard
/// controller would otherwise spend time to find out, and an end that podvmm
/// sees.
const ALWAYS: &[&str] = &[
    "reboot=k",           // reset through port 0x64, the only way out there is
    "panic=1",            // a panicked guest ends instead of waiting for an operator
    "no_timer_check",     // KVM's timers work; do not measure it
    "noreplace-smp",      // keep lock prefixes: CPUs come and go
    "dummy.numdummies=0", // no dummy0 that the user did not ask for
    "ifb.numifbs=0",      // nor ifb0 and ifb1
    "fb_tunnels=none",    // nor tunl0, gre0 and the like, in any network namespace
    // IPsec brings the jitter random number generator, which measures the processor at each boot, for minutes
    // where KVM emulates. A guest's entropy is its host's.
    // And there is no clock of a PC to wait for, which kernels of distributions do for up to a second.
    "initcall_blacklist=jent_mod_init,cmos_init",
];

/// Parameters for guests on an emulating KVM (docs/guest-kernel.md).
const EMULATING: &[&str] = &[
    "kvm_emulated",    // our kernel patches, inert without it
    "mitigations=off", // verw is not emulated, and no CPU runs guest kernel code
    "rodata=off",      // changing page attributes takes a second and a half
    // The TSC is the host's and cannot be set: by it no time would stand still for a snapshot.
    "clocksource=kvm-clock",
    // Pages that are read are waited for in KVM, whatever else the guest could do; and each restore
    // has it look through all who might wait for one.
    "no-kvmapf",
    "nokaslr", // moving a bzImage's kernel takes long
    // The kernel makes it the first process's environment. AVX registers are not preserved when
    // tasks switch, so glibc is to copy without them (gnu.org/s/libc, Hardware Capability Tunables).
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512BW,-AVX512VL,\
     -AVX_Fast_Unaligned_Load",
];

impl KvmKind {
    /// Finds out from the modules that are loaded, once: in a jail they are not to be seen.
    pub(crate) fn of_this_host() -> Self {
        static KIND: OnceLock<KvmKind> = OnceLock::new();
        *KIND.get_or_init(|| Self::of(Path::new("/sys/module")))
    }

    fn of(modules: &Path) -> Self {
        MODULES
            .iter()
            .find(|(module, _)| modules.join(module).exists())
            .map_or(Self::Unknown, |(_, kind)| *kind)
    }

    /// The kind's name in a snapshot.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Intel => "intel",
            Self::Amd => "amd",
            Self::Emulating => "emulating",
            Self::Unknown => "unknown",
        }
    }

    /// What a guest's kernel command line must say on this kind of host.
    pub(crate) fn kernel_parameters(self) -> impl Iterator<Item = &'static str> {
        let emulating = if self == Self::Emulating {
            EMULATING
        } else {
            &[]
        };
        ALWAYS.iter().chain(emulating).copied()
    }
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intel => "hardware (Intel VT-x)",
            Self::Amd => "hardware (AMD-V)",
            Self::Emulating => "emulating (kvm_pvm interprets guest kernel code)",
            Self::Unknown => "of a kind podvmm does not know",
        })
    }
}

/// Whether the host is itself a virtual machine.
pub(crate) fn is_virtual_machine() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
        text.lines()
            .any(|line| is_flags_line_with(line, "hypervisor"))
    })
}

fn is_flags_line_with(line: &str, flag: &str) -> bool {
    line.starts_with("flags") && line.split_whitespace().any(|word| word == flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_emulating_kvm_gets_the_emulation_parameters() {
        let emulated = |kind: KvmKind| kind.kernel_parameters().any(|word| word == "kvm_emulated");
        let kinds = [
            KvmKind::Emulating,
            KvmKind::Intel,
            KvmKind::Amd,
            KvmKind::Unknown,
        ];
        assert_eq!(kinds.map(emulated), [true, false, false, false]);
    }

    #[test]
    fn a_host_without_known_modules_is_unknown() {
        assert_eq!(KvmKind::of(Path::new("/nonexistent")), KvmKind::Unknown);
    }

    #[test]
    fn a_flag_is_a_whole_word_of_the_flags_line() {
        assert!(is_flags_line_with(
            "flags\t\t: fpu hypervisor lm",
            "hypervisor"
        ));
        assert!(!is_flags_line_with(
            "flags\t\t: fpu nohypervisor",
            "hypervisor"
        ));
        assert!(!is_flags_line_with("model name : hypervisor", "hypervisor"));
    }
}
