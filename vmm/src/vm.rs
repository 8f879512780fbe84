//! A VM from its creation to its end, and what others ask and hear of it.

pub(crate) mod control;
pub(crate) mod events;
pub(crate) mod lifecycle;
mod metrics;
pub(crate) mod service;
