//! What the library logs as errors, told apart by the file that they name: other tests run at the same time.

use std::path::Path;
use std::sync::{Mutex, Once};

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Errors;

static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

impl Log for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() == Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            SAID.lock().unwrap().push(record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// The errors with a file of this folder that were logged since the last call; the first call begins.
pub fn errors(folder: &Path) -> Vec<String> {
    static BEGUN: Once = Once::new();
    BEGUN.call_once(|| {
        log::set_logger(&Errors).unwrap();
        log::set_max_level(LevelFilter::Error);
    });
    let folder = folder.to_str().unwrap();
    SAID.lock().unwrap().extract_if(.., |said| said.contains(folder)).collect()
}
