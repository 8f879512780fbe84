//! Host resources that move from a device into its handler and home again.
//!
//! A handler owns what it works with, but the device must have it back when the driver resets and
//! activates once more. So the device keeps a [`Lender`], the handler holds the [`Lent`], and
//! dropping that brings the resource home. The lock is taken when it moves, never while it works.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

#[derive(Debug)]
pub struct Lender<T>(Arc<Mutex<Option<T>>>);

/// A resource away from home. Returns when dropped.
#[derive(Debug)]
pub struct Lent<T> {
    resource: Option<T>,
    home: Arc<Mutex<Option<T>>>,
}

impl<T> Lender<T> {
    pub fn new(resource: T) -> Self {
        Self(Arc::new(Mutex::new(Some(resource))))
    }

    /// The resource, unless it is lent already.
    pub fn lend(&self) -> Option<Lent<T>> {
        let resource = self.0.lock().expect("a panic ends the process").take()?;
        Some(Lent {
            resource: Some(resource),
            home: self.0.clone(),
        })
    }
}

impl<T> Deref for Lent<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.resource.as_ref().expect("only drop takes it")
    }
}

impl<T> DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.resource.as_mut().expect("only drop takes it")
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        *self.home.lock().expect("a panic ends the process") = self.resource.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resource_is_lent_once_and_comes_home_changed() {
        let lender = Lender::new(1);
        let mut lent = lender.lend().unwrap();
        assert!(lender.lend().is_none());
        *lent += 1;
        drop(lent);
        assert_eq!(*lender.lend().unwrap(), 2);
    }
}
