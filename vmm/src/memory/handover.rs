//! What a VM hands to the process that is to give it pages: a userfaultfd, and an array of JSON that
//! says which addresses are which RAM. Firecracker's VMs hand over the same
//! (docs/snapshotting/handling-page-faults-on-snapshot-resume.md there), so handlers serve both.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::memory::userfault::Userfault;
use crate::memory::{PAGE_BYTES, are_pages};

/// Longest message that is read, in bytes: far more than a VM's.
const MOST_BYTES: usize = 1 << 20;

/// A run of RAM in the VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mapping {
    /// Address of the run in the VM's process.
    pub(crate) base_host_virt_addr: u64,
    /// Length of the run, in bytes.
    pub(crate) size: u64,
    /// Offset in RAM of the run's first byte.
    pub(crate) offset: u64,
    /// Size of the run's pages, in bytes.
    pub(crate) page_size: u64,
}

impl Mapping {
    pub(crate) fn of(addresses: &Range<u64>, offset: u64) -> Self {
        Self {
            base_host_virt_addr: addresses.start,
            size: addresses.end - addresses.start,
            offset,
            page_size: PAGE_BYTES,
        }
    }

    /// Whether this can be a run of RAM of `ram_len` bytes.
    fn fits(&self, ram_len: u64) -> bool {
        let run = |start: u64| start.checked_add(self.size).map(|end| start..end);
        let (addresses, offsets) = (run(self.base_host_virt_addr), run(self.offset));
        let are_pages =
            |run: Option<Range<u64>>, len| run.is_some_and(|run| are_pages(&[run], len));
        self.page_size == PAGE_BYTES
            && are_pages(addresses, u64::MAX)
            && are_pages(offsets, ram_len)
    }

    /// The run's offsets in RAM.
    pub(crate) fn offsets(&self) -> Range<u64> {
        self.offset..self.offset + self.size
    }

    /// Address of the RAM at `offset`, if it is of this run.
    pub(crate) fn address(&self, offset: u64) -> u64 {
        self.base_host_virt_addr + (offset - self.offset)
    }

    /// Offset of the RAM at `address`; `None` if it is not of this run.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        let from = address.checked_sub(self.base_host_virt_addr)?;
        (from < self.size).then_some(self.offset + from)
    }
}

pub(crate) fn send(
    mut stream: &UnixStream,
    userfault: &Userfault,
    mappings: &[Mapping],
) -> io::Result<()> {
    let text = serde_json::to_string(mappings)?;
    let fds = [userfault.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(
        control.push(SendAncillaryMessage::ScmRights(&fds)),
        "there is space for one"
    );
    let parts = [IoSlice::new(text.as_bytes())];
    let sent = sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
    stream.write_all(&text.as_bytes()[sent..])
}

/// Takes what a VM, whose RAM should have `ram_len` bytes, hands over. The sender is not trusted.
pub(crate) fn receive(stream: &UnixStream, ram_len: u64) -> io::Result<(Userfault, Vec<Mapping>)> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut userfault = None;
    let mut text = Vec::new();
    loop {
        let mut bytes = [0; 16 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(stream, &mut parts, &mut control, flags)?.bytes;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        userfault = userfault.or_else(|| fds.flatten().next());
        text.extend_from_slice(&bytes[..received]);
        match parse(&text, ram_len) {
            Ok(mappings) => {
                let fd: OwnedFd = userfault.ok_or_else(|| invalid("no descriptor came along"))?;
                return Ok((fd.try_into()?, mappings));
            }
            Err(error) if !error.is_eof() => return Err(error.into()),
            Err(_) if received == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) if text.len() > MOST_BYTES => return Err(invalid("too many mappings")),
            Err(_) => {}
        }
    }
}

fn parse(text: &[u8], ram_len: u64) -> serde_json::Result<Vec<Mapping>> {
    let mappings: Vec<Mapping> = serde_json::from_slice(text)?;
    match mappings.iter().find(|mapping| !mapping.fits(ram_len)) {
        None => Ok(mappings),
        Some(mapping) => Err(serde::de::Error::custom(format_args!(
            "{mapping:?} is none of {ram_len} bytes of RAM in pages of {PAGE_BYTES}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: u64 = 1 << 30;

    #[test]
    fn what_is_sent_arrives() {
        let (here, there) = UnixStream::pair().unwrap();
        // More than a socket takes at once.
        let run =
            |number: u64| 0x7000_0000_0000 + (number << 13)..0x7000_0000_1000 + (number << 13);
        let mappings: Vec<_> = (0..8000)
            .map(|it| Mapping::of(&run(it), it << 12))
            .collect();
        let sent = mappings.clone();
        let stand_in = match Userfault::new() {
            Ok(userfault) => userfault,
            Err(error) => {
                eprintln!("SKIPPED: no userfaultfd: {error}");
                return;
            }
        };
        let sender = std::thread::spawn(move || send(&here, &stand_in, &sent));
        let (_, received) = receive(&there, LEN).unwrap();
        sender.join().unwrap().unwrap();
        assert_eq!(received, mappings);
        assert_eq!(received[3].offset_of(0x7000_0000_6008), Some(0x3008));
        assert_eq!(received[3].offset_of(0x7000_0000_7000), None);
        assert_eq!(received[3].address(0x3000), 0x7000_0000_6000);
    }

    #[test]
    fn what_is_no_ram_is_refused() {
        let good = Mapping::of(&(0x1000..0x3000), LEN - 0x2000);
        let text = |mapping: &Mapping| serde_json::to_vec(&[mapping]).unwrap();
        assert_eq!(parse(&text(&good), LEN).unwrap(), [good]);
        let bad: [fn(&mut Mapping); 6] = [
            |it| it.size = 0,
            |it| it.size += 0x1000,
            |it| it.size = u64::MAX - 4095,
            |it| it.base_host_virt_addr = 1,
            |it| it.offset += 1,
            |it| it.page_size = 2 << 20,
        ];
        for spoil in bad {
            let mut bad = good;
            spoil(&mut bad);
            let why = parse(&text(&bad), LEN).unwrap_err();
            assert!(
                !why.is_eof() && why.to_string().contains("is none of"),
                "{why}"
            );
        }
    }

    #[test]
    fn a_sender_that_leaves_or_sends_no_descriptor_is_refused() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"[]").unwrap();
        let why = receive(&there, LEN).unwrap_err();
        assert_eq!(why.to_string(), "no descriptor came along");
        here.write_all(b"[{").unwrap();
        drop(here);
        assert_eq!(
            receive(&there, LEN).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_descriptor_that_is_no_userfaultfd_is_refused() {
        let (here, there) = UnixStream::pair().unwrap();
        let fds = [here.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let parts = [IoSlice::new(b"[]")];
        sendmsg(&here, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
        let why = receive(&there, LEN).unwrap_err().to_string();
        assert!(why.starts_with("the descriptor is socket:["), "{why}");
        assert!(why.ends_with("], not a userfaultfd"), "{why}");
    }

    proptest! {
        #[test]
        fn any_mapping_is_survived(base: u64, size: u64, offset: u64, address: u64) {
            let mapping = Mapping { base_host_virt_addr: base, size, offset, page_size: 4096 };
            if mapping.fits(LEN) && let Some(offset) = mapping.offset_of(address) {
                prop_assert!(mapping.offsets().contains(&offset));
                prop_assert_eq!(mapping.address(offset), address);
            }
        }
    }
}
