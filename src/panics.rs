//! Catches panics of foreign code (a status source, a logger, an error's `Display`), so that they
//! do not end a thread. For any thread.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::text::sanitize;

/// Runs foreign code. Returns the message of a panic, safe to log.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

/// Runs a log statement. If the logger panics, the line is lost.
pub(crate) fn quietly(log: impl FnOnce()) {
    let _ = caught(log);
}

/// Drops a foreign value, whose `Drop` may panic.
pub(crate) fn discard<T>(value: T) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        // The drop of the payload could panic again, without end.
        mem::forget(payload);
    }
}

/// The message of a panic, safe to log.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    sanitize(message.unwrap_or("a panic without a message"))
}

fn message(panic: Box<dyn Any + Send>) -> String {
    let message = panic_message(panic.as_ref());
    // If two parts of a payload panic when they are dropped, the second panic ends the process.
    if panic.is::<&str>() || panic.is::<String>() {
        drop(panic)
    } else {
        mem::forget(panic)
    }
    message
}

#[cfg(test)]
mod tests {
    use std::panic::panic_any;

    use super::*;

    /// Panics with itself when it is dropped, this many times.
    struct Stubborn(u32);

    impl Drop for Stubborn {
        fn drop(&mut self) {
            if self.0 > 0 {
                panic_any(Stubborn(self.0 - 1));
            }
        }
    }

    #[test]
    fn caught_returns_the_message_of_a_panic() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| -> u8 { panic!("no \u{1b}") }), Err("no \\u{1b}".to_owned()));
        assert_eq!(caught(|| -> u8 { panic_any(7) }), Err("a panic without a message".to_owned()));
    }

    #[test]
    fn panic_in_the_drop_of_a_payload_is_contained() {
        for times in [0, 1, 2, 7] {
            assert_eq!(
                caught(|| panic_any(Stubborn(times))),
                Err("a panic without a message".to_owned())
            );
        }
    }
}
