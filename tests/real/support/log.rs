//! What the library logs as errors, told apart by the thread that it happened on.

use std::cell::RefCell;
use std::sync::Once;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Errors;

thread_local! {
    static SAID: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

impl Log for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() == Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            SAID.with_borrow_mut(|said| said.push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// The errors that this thread has logged since the last call; the first call begins.
pub fn errors() -> Vec<String> {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        log::set_logger(&Errors).unwrap();
        log::set_max_level(LevelFilter::Error);
    });
    SAID.take()
}
