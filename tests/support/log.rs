//! Records the errors that all heartbeats of a test program log. A test finds its own errors by a
//! part of their text, such as a path or a uuid.

use std::sync::{Mutex, Once};

use log::{LevelFilter, Log, Metadata, Record};

struct ErrorLog(Mutex<Vec<String>>);

static ERRORS: ErrorLog = ErrorLog(Mutex::new(Vec::new()));

impl Log for ErrorLog {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// Starts to record errors.
pub fn record_errors() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&ERRORS).unwrap();
        log::set_max_level(LevelFilter::Error);
    });
}

/// The recorded errors that contain this text.
pub fn errors_containing(part: &str) -> Vec<String> {
    ERRORS.0.lock().unwrap().iter().filter(|error| error.contains(part)).cloned().collect()
}

/// Removes the recorded errors that contain this text, and returns them.
pub fn take_errors_containing(part: &str) -> Vec<String> {
    ERRORS.0.lock().unwrap().extract_if(.., |error| error.contains(part)).collect()
}
