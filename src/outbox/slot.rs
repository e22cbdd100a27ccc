//! A lock that is waited for until a deadline and no longer, which the standard one cannot: a disk that hangs must stop
//! neither the beat nor a push. For any thread.

use std::ops::{Deref, DerefMut};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

/// Holds one value, which one thread at a time takes out and, by dropping [`Taken`], puts back.
#[derive(Debug)]
pub(super) struct Slot<T> {
    put: Sender<T>,
    take: Receiver<T>,
}

impl<T> Slot<T> {
    pub(super) fn new(value: T) -> Self {
        let (put, take) = bounded(1);
        // There is room: it is empty, and both ends are here.
        let _ = put.send(value);
        Self { put, take }
    }

    /// `None` when another thread has had it until `deadline`.
    pub(super) fn take(&self, deadline: Instant) -> Option<Taken<'_, T>> {
        let value = self.take.recv_deadline(deadline).ok()?;
        Some(Taken { value: Some(value), put: &self.put })
    }
}

/// The value. It goes back when this is dropped, also by a panic.
#[derive(Debug)]
pub(super) struct Taken<'a, T> {
    /// `None` only inside `drop`.
    value: Option<T>,
    put: &'a Sender<T>,
}

impl<T> Deref for Taken<'_, T> {
    type Target = T;

    #[expect(clippy::expect_used, reason = "there from `take` to `drop`")]
    fn deref(&self) -> &T {
        self.value.as_ref().expect("taken")
    }
}

impl<T> DerefMut for Taken<'_, T> {
    #[expect(clippy::expect_used, reason = "there from `take` to `drop`")]
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("taken")
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            // There is room: this is the only value.
            let _ = self.put.try_send(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_thread_has_it_and_the_others_give_up_in_time() {
        let slot = Slot::new(1);
        let mut taken = slot.take(Instant::now()).unwrap();
        *taken += 1;
        let since = Instant::now();
        assert!(slot.take(since + Duration::from_millis(20)).is_none());
        assert!(since.elapsed() >= Duration::from_millis(20));
        drop(taken);
        assert_eq!(*slot.take(Instant::now()).unwrap(), 2);
    }

    #[test]
    fn a_panic_gives_it_back() {
        let slot = Slot::new(());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _taken = slot.take(Instant::now()).unwrap();
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert!(slot.take(Instant::now()).is_some());
    }
}
