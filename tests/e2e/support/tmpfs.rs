//! A small file system that can be filled and made read-only.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::commands;

/// A file system that is mounted while this value exists. Needs root.
pub struct Tmpfs {
    folder: TempDir,
}

impl Tmpfs {
    /// An outbox that is in use takes about 60 KiB, half of it for its `-shm`.
    pub fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        commands::run(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
                .arg(folder.path()),
        );
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Uses all free space, until `free`.
    pub fn fill(&self) {
        let mut file = File::options().create_new(true).write(true).open(self.filling()).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[0; 512]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    pub fn free(&self) {
        fs::remove_file(self.filling()).unwrap();
    }

    /// `ro` or `rw`. No file may be open for writing.
    pub fn remount(&self, option: &str) {
        commands::run(
            Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(self.path()),
        );
    }

    fn filling(&self) -> PathBuf {
        self.path().join("filling")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, because after a panic a heartbeat may still have its outbox open.
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).output();
    }
}
