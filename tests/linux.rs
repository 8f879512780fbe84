//! Linux in the guest.
