//! What belongs to the process that made it. A fork copies the memory, the descriptors and none of the threads: in the child a
//! mutex stays locked that another thread held just then, and a socket or a lock file is still the parent's. For any thread.

use std::mem;
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::error::Error;

/// A value that is used and dropped only in the process that made it. In a child that was forked later it is leaked: its drop
/// might wait for a mutex that nobody unlocks there, or end what is the parent's.
#[derive(Clone, Debug)]
pub(crate) struct OfProcess<T> {
    /// `None` only while it is dropped.
    value: Option<T>,
    process: u32,
}

impl<T> OfProcess<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), process: process::id() }
    }

    /// The value.
    ///
    /// # Errors
    ///
    /// This process was forked from the one that made it.
    pub(crate) fn get(&self) -> Result<&T, Error> {
        self.value.as_ref().filter(|_| self.is_ours()).ok_or_else(|| Error::forked(self.process))
    }

    /// A part of it, of the same process. `part` also runs in a child, so it must not lock anything.
    pub(crate) fn map<U>(&self, part: impl FnOnce(&T) -> U) -> OfProcess<U> {
        OfProcess { value: self.value.as_ref().map(part), process: self.process }
    }

    /// The value, in the process that made it.
    pub(crate) fn into_ours(mut self) -> Option<T> {
        if self.is_ours() { self.value.take() } else { None }
    }

    fn is_ours(&self) -> bool {
        self.process == process::id()
    }
}

impl<T> Drop for OfProcess<T> {
    fn drop(&mut self) {
        if !self.is_ours() {
            mem::forget(self.value.take());
        }
    }
}

/// The process that [`OUTBOX_THREADS`] counts those of. Atomics, as a mutex could stay locked in a child.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static OUTBOX_THREADS: AtomicUsize = AtomicUsize::new(0);

/// An outbox thread runs. While one does, SQLite has a list of this process' locks, which a fork copies and the kernel does not:
/// a database that the child opens then may be changed by two processes at once. So nothing is opened there.
#[derive(Debug)]
pub(crate) struct OutboxThreadRuns(());

impl OutboxThreadRuns {
    /// # Errors
    ///
    /// One ran in the process from which this one was forked, at that moment.
    pub(crate) fn new() -> Result<Self, Error> {
        let this = process::id();
        // In this order: whoever sees the count sees whose it is.
        if OUTBOX_THREADS.load(Ordering::SeqCst) > 0 && PROCESS.load(Ordering::SeqCst) != this {
            return Err(Error::forked(PROCESS.load(Ordering::SeqCst)));
        }
        PROCESS.store(this, Ordering::SeqCst);
        OUTBOX_THREADS.fetch_add(1, Ordering::SeqCst);
        Ok(Self(()))
    }
}

impl Drop for OutboxThreadRuns {
    fn drop(&mut self) {
        OUTBOX_THREADS.fetch_sub(1, Ordering::SeqCst);
    }
}
