//! What passes between the agent and the process it starts for a container, which is this program
//! once more, in namespaces of its own, until it becomes the container's.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use protocol::agent::oci;
use rustix::fs::MemfdFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::seccomp::Filter;

/// The descriptor of the child's end of the channel.
pub(crate) const CHANNEL: i32 = 3;
/// The descriptor of its [`Launch`].
pub(crate) const LAUNCH: i32 = 4;
/// The descriptor of what it is to enter: a pid namespace, or all namespaces of a process (a pidfd).
pub(crate) const NAMESPACES: i32 = 5;
/// The argument that tells such a process from the agent.
pub(crate) const STAGE: &str = "container";

/// What the child is to become.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Launch {
    /// The container's specification, for its first process.
    #[prost(message, optional, tag = "1")]
    pub(crate) spec: Option<oci::Spec>,
    /// The process, if it is one more in the container's namespaces.
    #[prost(message, optional, tag = "2")]
    pub(crate) process: Option<oci::Process>,
    /// The seccomp filter that the process is held to.
    #[prost(message, optional, tag = "3")]
    pub(crate) seccomp: Option<Filter>,
    /// Whether the container enters a pid namespace that is there already.
    #[prost(bool, tag = "4")]
    pub(crate) shares_pids: bool,
    /// The name of the container's session keyring.
    #[prost(string, tag = "5")]
    pub(crate) keyring: String,
    /// Whether what is mounted for the container is found without following a link.
    #[prost(bool, tag = "6")]
    pub(crate) follows_no_links: bool,
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
    /// The child cannot become what it is told to, and why.
    Failed(String),
}

const MAX_WORD_LEN: usize = 4 << 10;

/// Says a word, as one packet.
pub(crate) fn say(channel: BorrowedFd<'_>, word: &Word) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let terminal;
    let bytes = match word {
        Word::Pid(pid) => [b"p", &pid.to_le_bytes()[..]].concat(),
        Word::Ready => b"r".to_vec(),
        Word::Failed(why) => [b"e", &why.as_bytes()[..why.len().min(MAX_WORD_LEN - 1)]].concat(),
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
    let mut bytes = [0; MAX_WORD_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::net::recvmsg(channel, &mut parts, &mut control, flags) {
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        other => other?.bytes,
    };
    let nonsense =
        || io::Error::other("the container's process says what the agent does not understand");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match bytes[..received].split_first() {
        None => Ok(None),
        Some((b'p', pid)) => {
            let pid = i32::from_le_bytes(pid.try_into().map_err(|_| nonsense())?);
            // What is not a process's is many processes', or the agent's.
            if pid <= 1 {
                return Err(nonsense());
            }
            Ok(Some(Word::Pid(pid)))
        }
        Some((b'r', _)) => Ok(Some(Word::Ready)),
        Some((b't', _)) => Ok(Some(Word::Terminal(fd.ok_or_else(nonsense)?))),
        Some((b'e', why)) => Ok(Some(Word::Failed(String::from_utf8_lossy(why).into()))),
        Some(_) => Err(nonsense()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    fn channel() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn words_are_heard_as_they_are_said() {
        let (ours, theirs) = channel();
        let (end, _) = io::pipe().unwrap();
        let long = Word::Failed("long".repeat(MAX_WORD_LEN));
        for word in [Word::Pid(7), Word::Terminal(end.into()), Word::Ready, long] {
            say(theirs.as_fd(), &word).unwrap();
        }
        drop(theirs);
        let hear = || hear(ours.as_fd()).unwrap();
        assert!(matches!(hear(), Some(Word::Pid(7))));
        assert!(matches!(hear(), Some(Word::Terminal(_))));
        assert!(matches!(hear(), Some(Word::Ready)));
        assert!(matches!(hear(), Some(Word::Failed(why)) if why.len() == MAX_WORD_LEN - 1));
        assert!(hear().is_none());
    }

    proptest! {
        #[test]
        fn whatever_a_process_says_is_a_word_or_nonsense(
            first in prop::sample::select(&b"prtex"[..]),
            rest in prop::collection::vec(any::<u8>(), 0..20),
            fds in 0..4_usize,
        ) {
            let (ours, theirs) = channel();
            let fd = [theirs.as_fd(); 4];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if fds > 0 {
                control.push(SendAncillaryMessage::ScmRights(&fd[..fds]));
            }
            let bytes = [&[first], &rest[..]].concat();
            let parts = [IoSlice::new(&bytes)];
            rustix::net::sendmsg(&theirs, &parts, &mut control, SendFlags::empty()).unwrap();
            match hear(ours.as_fd()) {
                Ok(Some(Word::Pid(pid))) => prop_assert!(pid > 1 && rest.len() == 4),
                Ok(Some(Word::Terminal(_))) => prop_assert!(fds > 0),
                Ok(None) => prop_assert!(false, "something was said"),
                Ok(Some(Word::Ready | Word::Failed(_))) | Err(_) => {}
            }
        }
    }
}
