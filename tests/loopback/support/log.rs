//! What all heartbeats of this binary log as errors. A test knows its own by what they say.

use std::sync::{Mutex, Once};

use log::{LevelFilter, Log, Metadata, Record};

struct Errors(Mutex<Vec<String>>);

static ERRORS: Errors = Errors(Mutex::new(Vec::new()));

impl Log for Errors {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

/// From here on they are remembered.
pub fn remember_errors() {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        log::set_logger(&ERRORS).unwrap();
        log::set_max_level(LevelFilter::Error);
    });
}

/// The errors that have this in them.
pub fn errors_with(part: &str) -> Vec<String> {
    ERRORS.0.lock().unwrap().iter().filter(|said| said.contains(part)).cloned().collect()
}
