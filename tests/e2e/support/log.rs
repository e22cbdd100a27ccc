//! Records the errors that the heartbeats of all tests log. A test finds its own by their folder.

use std::path::Path;
use std::sync::{Mutex, Once};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct ErrorLog(Mutex<Vec<String>>);

static ERRORS: ErrorLog = ErrorLog(Mutex::new(Vec::new()));

impl Log for ErrorLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() == Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// The errors with a file of this folder since the last call. The first call starts the recording.
pub fn logged_errors(folder: &Path) -> Vec<String> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&ERRORS).unwrap();
        log::set_max_level(LevelFilter::Error);
    });
    let folder = folder.to_str().unwrap();
    ERRORS.0.lock().unwrap().extract_if(.., |error| error.contains(folder)).collect()
}
