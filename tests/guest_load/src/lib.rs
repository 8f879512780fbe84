//! What the program of this name does in a guest, and what the tests outside have to know of it.
//!
//! It is a crate of its own, which needs few others, because it is built apart from the tests: linked statically and
//! optimized.

pub mod neighbour;
pub mod reach;
pub mod transfer;
