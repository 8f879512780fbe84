//! Configuration space of a function (PCI 3.0 §6.1): 64 registers, and which of their bits a driver can
//! change.

/// Registers of four bytes.
const REGISTERS: usize = 64;
/// Register of the command, in its lower half, and the status, in its upper half.
pub const COMMAND: usize = 1;
/// Register of the first BAR.
pub const BAR: usize = 4;

const REVISION_AND_CLASS: usize = 2;
const SUBSYSTEM: usize = 11;
const CAPABILITIES: usize = 13;
const INTERRUPT_LINE: usize = 15;
/// The first register behind the header.
const FIRST_CAPABILITY: usize = 16;

/// Bit of the command: the BARs answer.
const MEMORY_SPACE: u32 = 1 << 1;
/// Bits of the command that mean nothing here but that drivers set: bus master, and no INTx.
const OTHER_COMMANDS: u32 = 1 << 2 | 1 << 10;
/// Bit of the status: there are capabilities.
const HAS_CAPABILITIES: u32 = 1 << 20;

/// What a driver knows a function by.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass and interface, as in the 24 bits of their register.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// A type 0 header, and capabilities.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: [u32; REGISTERS],
    writable: [u32; REGISTERS],
    /// Where the next capability goes, and where its place is named: a register and a shift.
    free: usize,
    link: (usize, u32),
}

impl ConfigSpace {
    /// Without a BAR and without capabilities: all a driver can write is the interrupt line, which
    /// is only for software to remember.
    pub fn new(identity: Identity) -> Self {
        let pair = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
        let mut registers = [0; REGISTERS];
        registers[0] = pair(identity.vendor, identity.device);
        registers[REVISION_AND_CLASS] = identity.class << 8 | u32::from(identity.revision);
        registers[SUBSYSTEM] = pair(identity.subsystem_vendor, identity.subsystem);
        let mut writable = [0; REGISTERS];
        writable[INTERRUPT_LINE] = 0xff;
        Self {
            registers,
            writable,
            free: FIRST_CAPABILITY,
            link: (CAPABILITIES, 0),
        }
    }

    /// Gives it a first BAR, of 32 bits, for `len` bytes of memory: a power of two. A driver that writes
    /// all ones reads back how long it is.
    #[must_use]
    pub fn with_bar(mut self, len: u32) -> Self {
        self.writable[BAR] = !(len - 1);
        self.writable[COMMAND] = MEMORY_SPACE | OTHER_COMMANDS;
        self
    }

    /// Adds a capability, of which a driver can write the bits that are set in `writable`. `body` is what
    /// follows its id and its link. Returns its first register.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let first = self.free;
        let bytes = [&[id, 0], body].concat();
        let masks = [&[0, 0], writable].concat();
        let word = |bytes: &[u8]| {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            u32::from_le_bytes(word)
        };
        for bytes in bytes.chunks(4) {
            self.registers[self.free] = word(bytes);
            self.free += 1;
        }
        for (register, masks) in (first..).zip(masks.chunks(4)) {
            self.writable[register] = word(masks);
        }
        let (register, shift) = self.link;
        let place = u32::try_from(first * 4).expect("it is in 256 bytes");
        self.registers[register] |= place << shift;
        self.registers[COMMAND] |= HAS_CAPABILITIES;
        self.link = (first, 8);
        first
    }

    pub fn read(&self, register: usize) -> u32 {
        self.registers.get(register).copied().unwrap_or(0)
    }

    /// Writes those bits of `mask` that can be written.
    pub fn write(&mut self, register: usize, value: u32, mask: u32) {
        if let (Some(word), Some(writable)) = (
            self.registers.get_mut(register),
            self.writable.get(register),
        ) {
            let mask = mask & writable;
            *word = *word & !mask | value & mask;
        }
    }

    /// Where the memory behind the BAR is to be, unless the command has it off.
    pub fn memory(&self) -> Option<u64> {
        (self.registers[COMMAND] & MEMORY_SPACE != 0).then(|| self.registers[BAR].into())
    }

    /// The registers, for a snapshot.
    pub fn state(&self) -> Vec<u32> {
        self.registers.to_vec()
    }

    /// Takes over the registers of another function of this kind. False if no driver could have brought
    /// them about.
    pub fn restore(&mut self, registers: &[u32]) -> bool {
        let Ok(registers) = <[u32; REGISTERS]>::try_from(registers) else {
            return false;
        };
        let differ = |(new, own): (&u32, &u32)| new ^ own;
        let changed = registers.iter().zip(&self.registers).map(differ);
        if changed
            .zip(&self.writable)
            .any(|(bits, writable)| bits & !writable != 0)
        {
            return false;
        }
        self.registers = registers;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0xff_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut space = ConfigSpace::new(identity).with_bar(0x8000);
        space.add_capability(0x11, &[1, 0, 2, 0], &[0, 0xc0]);
        space.add_capability(0x09, &[16], &[]);
        space
    }

    #[test]
    fn a_driver_finds_what_it_is_and_its_capabilities() {
        let space = space();
        assert_eq!(space.read(0), 0x1042_1af4);
        assert_eq!(space.read(2), 0xff00_0001);
        assert_eq!(space.read(11), 0x1100_1af4);
        assert_eq!(space.read(COMMAND) >> 16, 0x10);
        let first = space.read(CAPABILITIES);
        assert_eq!(first, 0x40);
        assert_eq!(space.read(16), 0x0001_4811, "it links to the next");
        assert_eq!(space.read(18), 0x0010_0009, "the last one links to none");
        assert_eq!(space.read(64), 0);
    }

    #[test]
    fn a_bar_says_its_size_and_answers_when_it_is_to() {
        let mut space = space();
        space.write(BAR, u32::MAX, u32::MAX);
        assert_eq!(space.read(BAR), 0xffff_8000);
        space.write(BAR, 0xe001_2345, u32::MAX);
        assert_eq!((space.read(BAR), space.memory()), (0xe001_0000, None));
        space.write(COMMAND, 2, 0xff);
        assert_eq!(space.memory(), Some(0xe001_0000));
        for absent in 5..10 {
            space.write(absent, u32::MAX, u32::MAX);
            assert_eq!(space.read(absent), 0);
        }
    }

    #[test]
    fn registers_that_no_driver_could_write_are_not_restored() {
        let mut written = space();
        written.write(COMMAND, u32::MAX, u32::MAX);
        written.write(16, u32::MAX, u32::MAX);
        let mut restored = space();
        assert!(restored.restore(&written.state()));
        assert_eq!(restored.state(), written.state());
        let mut other = written.state();
        other[0] ^= 1;
        assert!(!space().restore(&other));
        assert!(!space().restore(&other[1..]));
    }

    proptest! {
        #[test]
        fn nothing_but_what_can_be_written_changes(
            writes in prop::collection::vec((0..80_usize, any::<u32>(), any::<u32>()), 0..100)
        ) {
            let mut changed = space();
            for (register, value, mask) in writes {
                changed.write(register, value, mask);
            }
            prop_assert!(space().restore(&changed.state()));
        }
    }
}
