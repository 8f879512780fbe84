//! x86-64: a board with an MP table, an in-kernel PIC, IOAPIC, PIT and local
//! APICs; and ACPI tables if it has a PCI bus.

pub mod acpi;
pub mod boot;
pub mod cpuid;
mod error;
pub mod irqchip;
pub mod layout;
#[cfg(test)]
mod machines;
mod mitigations;
pub mod mptable;
pub mod msr;
pub mod pmu;
mod raw;
pub mod regs;
pub mod state;
pub mod tsc;
pub mod vcpu;
