//! A file system that can be frozen: writes to it block until it is thawed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::commands;

/// The size of its image. ext4 with a journal needs most of it.
const SIZE: u64 = 24 * 1024 * 1024;

/// A file system that is mounted while this value exists. Needs root.
pub struct FreezableDisk {
    folder: TempDir,
}

impl FreezableDisk {
    pub fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let disk = folder.path().join("disk");
        File::create_new(&image).unwrap().set_len(SIZE).unwrap();
        std::fs::create_dir(&disk).unwrap();
        commands::run(Command::new("mkfs.ext4").arg("-qF").arg(&image));
        commands::run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&disk));
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

impl Drop for FreezableDisk {
    fn drop(&mut self) {
        // These fail if it is not frozen, or not mounted any more.
        let _ = Command::new("fsfreeze").arg("-u").arg(self.path()).output();
        let _ = Command::new("umount").arg("-l").arg(self.path()).output();
    }
}

fn fsfreeze(option: &str, disk: &Path) {
    commands::run(Command::new("fsfreeze").arg(option).arg(disk));
}
