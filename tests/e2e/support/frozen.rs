//! A file system of the test's own that can be frozen: who writes to it hangs until the thaw.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::process;

/// Mounted as long as this value lives. Needs root.
pub struct Freezable {
    folder: TempDir,
}

impl Freezable {
    pub fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (image, disk) = (folder.path().join("image"), folder.path().join("disk"));
        File::create_new(&image).unwrap().set_len(24 * 1024 * 1024).unwrap();
        std::fs::create_dir(&disk).unwrap();
        process::run(Command::new("mkfs.ext4").arg("-qF").arg(&image));
        process::run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&disk));
        Self { folder }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub fn freeze(&self) {
        fsfreeze("-f", &self.path());
    }

    pub fn thaw(&self) {
        fsfreeze("-u", &self.path());
    }
}

impl Drop for Freezable {
    fn drop(&mut self) {
        // It may not be frozen, or not be mounted any more.
        let _ = Command::new("fsfreeze").arg("-u").arg(self.path()).output();
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

fn fsfreeze(how: &str, disk: &Path) {
    process::run(Command::new("fsfreeze").arg(how).arg(disk));
}
