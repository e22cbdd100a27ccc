//! Panics of others (a status source, a logger, an error's `Display`) end no thread. For any thread.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::text::sanitize;

/// Runs foreign code. A panic becomes its message, safe to log.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(message)
}

/// Logs. A logger that panics costs its line, and no more.
pub(crate) fn quietly(log: impl FnOnce()) {
    let _ = caught(log);
}

/// Drops a value of others, whose `Drop` may panic.
pub(crate) fn discard<T>(value: T) {
    if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(value))) {
        // Dropping what a drop has thrown could throw again, without end.
        mem::forget(again);
    }
}

/// What a panic said, safe to log.
pub(crate) fn said(panic: &(dyn Any + Send)) -> String {
    let said = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    sanitize(said.unwrap_or("a panic without a message"))
}

fn message(panic: Box<dyn Any + Send>) -> String {
    let message = said(panic.as_ref());
    // Of two parts of a payload that panic when they are dropped the second one would end the process.
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

    /// Throws itself again when it is dropped, so many times.
    struct Stubborn(u32);

    impl Drop for Stubborn {
        fn drop(&mut self) {
            if self.0 > 0 {
                panic_any(Stubborn(self.0 - 1));
            }
        }
    }

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| -> u8 { panic!("no \u{1b}") }), Err("no \\u{1b}".to_owned()));
        assert_eq!(caught(|| -> u8 { panic_any(7) }), Err("a panic without a message".to_owned()));
    }

    #[test]
    fn a_payload_that_panics_when_it_is_dropped_goes_no_further() {
        for times in [0, 1, 2, 7] {
            assert_eq!(
                caught(|| panic_any(Stubborn(times))),
                Err("a panic without a message".to_owned())
            );
        }
    }
}
