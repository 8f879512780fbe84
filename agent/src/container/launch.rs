//! What passes between the agent and the process it starts for a container, which is this program
//! once more, in namespaces of its own, until it becomes the container's.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use agent::protocol::oci;
use prost::Message;
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// The descriptor of the child's end of the channel.
pub(crate) const CHANNEL: i32 = 3;
/// The descriptor of its [`Launch`].
pub(crate) const LAUNCH: i32 = 4;
/// The argument that tells such a process from the agent.
pub(crate) const STAGE: &str = "container";

/// What the child is to become.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Launch {
    /// The container; its first process.
    #[prost(message, optional, tag = "1")]
    pub(crate) spec: Option<oci::Spec>,
    /// One more process.
    #[prost(message, optional, tag = "2")]
    pub(crate) process: Option<oci::Process>,
    /// In the namespaces of this one.
    #[prost(int32, tag = "3")]
    pub(crate) join: i32,
}

impl Launch {
    /// A file the child reads it from.
    pub(crate) fn to_file(&self) -> io::Result<File> {
        let file = rustix::fs::memfd_create(c"launch", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(file);
        file.write_all(&self.encode_to_vec())?;
        file.rewind()?;
        Ok(file)
    }

    pub(crate) fn from_file(mut file: File) -> io::Result<Self> {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Self::decode(&bytes[..]).map_err(io::Error::other)
    }
}

/// What the child says.
#[derive(Debug)]
pub(crate) enum Word {
    /// Another process goes on in its place: its number where the agent is.
    Pid(i32),
    /// The host's end of its terminal.
    Terminal(OwnedFd),
    /// All is prepared; it goes on when it is told to.
    Ready,
    /// It cannot, and why.
    Failed(String),
}

const LONGEST: usize = 4 << 10;

/// Says a word, as one packet.
pub(crate) fn say(channel: BorrowedFd<'_>, word: &Word) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let terminal;
    let bytes = match word {
        Word::Pid(pid) => [b"p", &pid.to_le_bytes()[..]].concat(),
        Word::Ready => b"r".to_vec(),
        Word::Failed(why) => [b"e", &why.as_bytes()[..why.len().min(LONGEST - 1)]].concat(),
        Word::Terminal(fd) => {
            terminal = [fd.as_fd()];
            control.push(SendAncillaryMessage::ScmRights(&terminal));
            b"t".to_vec()
        }
    };
    let parts = [IoSlice::new(&bytes)];
    rustix::net::sendmsg(channel, &parts, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Waits for the next word. None if there are no more: the child has become its program, or ended.
pub(crate) fn hear(channel: BorrowedFd<'_>) -> io::Result<Option<Word>> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::net::recvmsg(channel, &mut parts, &mut control, flags) {
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        other => other?.bytes,
    };
    let nonsense = || io::Error::other("the container's process says what nobody understands");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match bytes[..received].split_first() {
        None => Ok(None),
        Some((b'p', pid)) => {
            let pid = pid.try_into().map_err(|_| nonsense())?;
            Ok(Some(Word::Pid(i32::from_le_bytes(pid))))
        }
        Some((b'r', _)) => Ok(Some(Word::Ready)),
        Some((b't', _)) => Ok(Some(Word::Terminal(fd.ok_or_else(nonsense)?))),
        Some((b'e', why)) => Ok(Some(Word::Failed(String::from_utf8_lossy(why).into()))),
        Some(_) => Err(nonsense()),
    }
}
