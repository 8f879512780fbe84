//! What goes between the guest's consoles and the host: terminals, files, sockets, and the streams of the
//! agent's command.

pub(crate) mod command;
pub(crate) mod keyboard;
pub(crate) mod socket;
pub(crate) mod streams;
pub(crate) mod transcript;
