//! Detects use in a forked child. A fork copies memory and descriptors, but no threads. In the
//! child, a mutex that another thread held stays locked, and sockets and lock files are shared with
//! the parent. For any thread.

use std::mem;
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::error::Error;

/// A value that is used and dropped only in the process that created it. A forked child leaks it,
/// because its drop could wait for a mutex that is never unlocked there, or close something of the
/// parent.
#[derive(Clone, Debug)]
pub(crate) struct OfProcess<T> {
    /// `None` only during the drop.
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
    /// If this process was forked from the one that created the value.
    pub(crate) fn get(&self) -> Result<&T, Error> {
        self.value.as_ref().filter(|_| self.is_ours()).ok_or_else(|| Error::forked(self.process))
    }

    /// A part of the value, with the same owner process. `part` also runs in a child, so it must
    /// not lock anything.
    pub(crate) fn map<U>(&self, part: impl FnOnce(&T) -> U) -> OfProcess<U> {
        OfProcess { value: self.value.as_ref().map(part), process: self.process }
    }

    /// The value, if this is the process that created it.
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

/// The process whose threads [`OUTBOX_THREADS`] counts. Both are atomics, because a mutex could
/// stay locked in a child.
static PROCESS: AtomicU32 = AtomicU32::new(0);
static OUTBOX_THREADS: AtomicUsize = AtomicUsize::new(0);

/// Held while an outbox thread is running. SQLite then has a list of this process' locks. A fork
/// copies this list, but not the locks in the kernel, so two processes could change a database at
/// once. In such a child no database is opened.
#[derive(Debug)]
pub(crate) struct OutboxThreadRuns(());

impl OutboxThreadRuns {
    /// # Errors
    ///
    /// If this process was forked while an outbox thread was running in its parent.
    pub(crate) fn new() -> Result<Self, Error> {
        let this = process::id();
        // The process is stored before the count, so that a reader of the count sees its process.
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
