//! Moves bytes between guest memory and host files in one copy, the kernel's.
//!
//! The place where guest memory is handed to system calls as pointers. Guest RAM has no dirty
//! bitmap of its own; should it get one, [`read`] and [`read_exact_at`] must mark what they fill.

use std::io::{self, IoSlice};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr;

use rustix::io::{ReadWriteFlags, retry_on_intr};

use super::{GuestRam, Segments};

/// Pieces per system call; longer runs take several. Below the kernel's IOV_MAX of 1024 because
/// the array lies on the stack.
pub const MAX_PIECES: usize = 64;

/// Fills the front of `into` with exactly `len` bytes found at `offset`.
pub fn read_exact_at(
    file: impl AsFd,
    ram: &GuestRam,
    into: &mut Segments,
    len: usize,
    offset: u64,
) -> io::Result<()> {
    let end = io::ErrorKind::UnexpectedEof;
    exactly(len, offset, end, |len, offset| {
        read_at(&file, ram, into, len, offset)
    })
}

/// Writes exactly `len` bytes from the front of `from` to `offset`.
pub fn write_all_at(
    file: impl AsFd,
    ram: &GuestRam,
    from: &mut Segments,
    len: usize,
    offset: u64,
) -> io::Result<()> {
    let end = io::ErrorKind::WriteZero;
    exactly(len, offset, end, |len, offset| {
        write_at(&file, ram, from, len, offset)
    })
}

fn exactly(
    len: usize,
    offset: u64,
    end: io::ErrorKind,
    mut step: impl FnMut(usize, u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match step(len - done, offset.saturating_add(done as u64))? {
            0 => return Err(end.into()),
            count => done += count,
        }
    }
    Ok(())
}

/// Fills the front of `into` with what is at `offset`: `len` bytes, or fewer where the file ends.
/// Returns how many.
pub fn read_at(
    file: impl AsFd,
    ram: &GuestRam,
    into: &mut Segments,
    len: usize,
    offset: u64,
) -> io::Result<usize> {
    until_short(file.as_fd(), ram, into, len, |fd, pieces, done| {
        let offset = position(offset, done)?;
        // SAFETY: see `transfer`.
        Ok(unsafe { libc::preadv(fd, pieces.as_ptr(), count_of(pieces.len()), offset) })
    })
}

/// Writes `len` bytes from the front of `from` to `offset`, or fewer where there is no room.
/// Returns how many.
pub fn write_at(
    file: impl AsFd,
    ram: &GuestRam,
    from: &mut Segments,
    len: usize,
    offset: u64,
) -> io::Result<usize> {
    until_short(file.as_fd(), ram, from, len, |fd, pieces, done| {
        let offset = position(offset, done)?;
        // SAFETY: see `transfer`.
        Ok(unsafe { libc::pwritev(fd, pieces.as_ptr(), count_of(pieces.len()), offset) })
    })
}

/// Like [`write_at`], but to the end of the file, as with O_APPEND. This is one write, however many
/// pieces there are: no other writer's bytes come between its bytes. If there are more pieces than
/// a call takes, they are copied first. The caller has to bound `len`.
pub fn append(
    file: impl AsFd,
    ram: &GuestRam,
    from: &mut Segments,
    len: usize,
) -> io::Result<usize> {
    if from.slices(ram, len).nth(MAX_PIECES).is_some() {
        let mut bytes = vec![0; len];
        from.read(ram, &mut bytes)?;
        let flags = ReadWriteFlags::APPEND;
        let write = || rustix::io::pwritev2(&file, &[IoSlice::new(&bytes)], 0, flags);
        return Ok(retry_on_intr(write)?);
    }
    until_short(file.as_fd(), ram, from, len, |fd, pieces, _| {
        let (count, flags) = (count_of(pieces.len()), libc::RWF_APPEND);
        // SAFETY: see `transfer`.
        Ok(unsafe { libc::pwritev2(fd, pieces.as_ptr(), count, 0, flags) })
    })
}

/// Repeats `call`, which is told how far it is, up to `len` bytes or the first call that moves
/// none. An error after a part is for the next call to meet.
fn until_short(
    file: BorrowedFd<'_>,
    ram: &GuestRam,
    segments: &mut Segments,
    len: usize,
    call: impl Fn(RawFd, &[libc::iovec], usize) -> io::Result<isize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < len {
        let step = |fd: RawFd, pieces: &[libc::iovec]| call(fd, pieces, done);
        match transfer(file, ram, segments, len - done, step) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn position(offset: u64, done: usize) -> io::Result<libc::off_t> {
    let at = offset
        .checked_add(done as u64)
        .and_then(|at| libc::off_t::try_from(at).ok());
    at.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Reads once, at most `max` bytes, into the front of `into`. Returns how many; 0 is the end.
pub fn read(file: impl AsFd, ram: &GuestRam, into: &mut Segments, max: usize) -> io::Result<usize> {
    transfer(file.as_fd(), ram, into, max, |fd, pieces| {
        // SAFETY: see `transfer`, which calls this.
        Ok(unsafe { libc::readv(fd, pieces.as_ptr(), count_of(pieces.len())) })
    })
}

/// Writes once, at most `max` bytes, from the front of `from`. Returns how many.
pub fn write(
    file: impl AsFd,
    ram: &GuestRam,
    from: &mut Segments,
    max: usize,
) -> io::Result<usize> {
    transfer(file.as_fd(), ram, from, max, |fd, pieces| {
        // SAFETY: see `transfer`, which calls this.
        Ok(unsafe { libc::writev(fd, pieces.as_ptr(), count_of(pieces.len())) })
    })
}

/// Like [`write()`] to a socket, failing with WouldBlock instead of blocking, whatever its flags.
pub fn send(
    socket: impl AsFd,
    ram: &GuestRam,
    from: &mut Segments,
    max: usize,
) -> io::Result<usize> {
    transfer(socket.as_fd(), ram, from, max, |fd, pieces| {
        Ok(send_pieces(fd, pieces))
    })
}

/// Sends once, from the front of `bytes`, without blocking.
pub fn send_bytes(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let piece = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let sent = send_pieces(socket.as_fd().as_raw_fd(), &[piece]);
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn send_pieces(fd: RawFd, pieces: &[libc::iovec]) -> isize {
    // SAFETY: a msghdr is numbers and pointers, for which zero is a value: no name, no control.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` and the pieces it points to live during the call, which only reads them;
    // both callers give pieces that may be read.
    unsafe { libc::sendmsg(fd, &raw const message, flags) }
}

/// Makes `call` with the pieces at the front of `segments`, and consumes what it says it moved.
///
/// Each piece is guest RAM that `ram` keeps mapped for as long as the call lasts. The guest may
/// change it meanwhile and Rust holds no reference into it, so the kernel may read and write it.
fn transfer(
    fd: BorrowedFd<'_>,
    ram: &GuestRam,
    segments: &mut Segments,
    max: usize,
    call: impl FnOnce(RawFd, &[libc::iovec]) -> io::Result<isize>,
) -> io::Result<usize> {
    let mut pieces = [libc::iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    }; MAX_PIECES];
    let mut count = 0;
    for (piece, slice) in pieces.iter_mut().zip(segments.slices(ram, max)) {
        let slice = slice?;
        piece.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        piece.iov_len = slice.len();
        count += 1;
    }
    let moved = call(fd.as_raw_fd(), &pieces[..count])?;
    let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
    segments.skip(moved);
    Ok(moved)
}

fn count_of(pieces: usize) -> libc::c_int {
    libc::c_int::try_from(pieces).expect("at most MAX_PIECES")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    /// `count` pieces of three bytes, four bytes apart.
    fn pieces(ram: &GuestRam, count: u64) -> Segments {
        let mut segments = Segments::default();
        for index in 0..count {
            segments.push(ram, GuestAddress(index * 4), 3).unwrap();
        }
        segments
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_read_and_written_in_order() {
        let ram = ram();
        let bytes: Vec<u8> = (0..=255).cycle().take(600).collect();
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&bytes).unwrap();
        read_exact_at(&file, &ram, &mut pieces(&ram, 200), 597, 3).unwrap();
        let mut back = vec![0; 597];
        pieces(&ram, 200).read(&ram, &mut back).unwrap();
        assert_eq!(back, bytes[3..]);

        write_all_at(&file, &ram, &mut pieces(&ram, 200), 597, 0).unwrap();
        file.rewind().unwrap();
        file.read_exact(&mut back).unwrap();
        assert_eq!(back, bytes[3..]);
    }

    #[test]
    fn what_is_appended_at_once_stays_together() {
        const BYTES: usize = 600;
        let file = TempFile::new().unwrap().into_file();
        let append = |byte: u8| {
            let ram = ram();
            ram.write_slice(&[byte; 800], GuestAddress(0)).unwrap();
            for _ in 0..500 {
                let appended = append(&file, &ram, &mut pieces(&ram, 200), BYTES);
                assert_eq!(appended.unwrap(), BYTES);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| append(b'a'));
            scope.spawn(|| append(b'b'));
        });
        let mut bytes = Vec::new();
        (&file).rewind().unwrap();
        (&file).read_to_end(&mut bytes).unwrap();
        let torn = bytes
            .chunks(BYTES)
            .filter(|all| all.iter().any(|byte| *byte != all[0]));
        assert_eq!((bytes.len(), torn.count()), (1000 * BYTES, 0));
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let ram = ram();
        let file = TempFile::new().unwrap().into_file();
        file.set_len(100).unwrap();
        let error = read_exact_at(&file, &ram, &mut pieces(&ram, 10), 30, 90).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_transfer_longer_than_the_chain_or_beyond_any_file_is_refused() {
        let ram = ram();
        let file = TempFile::new().unwrap().into_file();
        read_exact_at(&file, &ram, &mut pieces(&ram, 10), 31, 0).unwrap_err();
        write_all_at(&file, &ram, &mut pieces(&ram, 10), 30, u64::MAX).unwrap_err();
    }

    #[test]
    fn one_read_and_one_write_move_what_they_can() {
        let ram = ram();
        let (read_end, mut write_end) = io::pipe().unwrap();
        write_end.write_all(b"hello").unwrap();
        let mut into = pieces(&ram, 3);
        assert_eq!(read(&read_end, &ram, &mut into, 9).unwrap(), 5);
        assert_eq!(into.len(), 4);
        assert_eq!(write(&write_end, &ram, &mut pieces(&ram, 3), 4).unwrap(), 4);
        drop(write_end);
        let mut byte: [u8; 1] = [0];
        ram.read_slice(&mut byte, GuestAddress(4)).unwrap();
        assert_eq!(&byte, b"l");
        let mut into = pieces(&ram, 3);
        assert_eq!(read(&read_end, &ram, &mut into, 9).unwrap(), 4);
        assert_eq!(read(&read_end, &ram, &mut into, 9).unwrap(), 0);
    }
}
