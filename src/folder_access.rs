//! Checks whether other users may write to a folder of the heartbeat. Runs on the calling thread.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::sanitize_path;
use crate::files::folder;

/// Write permission for group and others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// The sticky bit: only the owner of a file in such a folder may rename or delete it.
const STICKY: u32 = 0o1000;

/// The owner of files whose user does not exist in this user namespace, so it is unknown.
const NOBODY: u32 = 65_534;

/// The folder of an outbox, if it is not the agent dir.
pub(crate) fn other_folder<'a>(outbox: &'a Path, agent_dir: &Path) -> Option<&'a Path> {
    let real = |folder: &Path| fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    Some(folder(outbox)).filter(|folder| real(folder) != real(agent_dir))
}

/// Why users other than the folder's owner and root may write to it, or replace it; safe to print.
/// `None`: they may not, or the folder cannot be accessed, which other errors report.
///
/// A sticky parent folder, such as `/tmp`, protects its entries; a sticky folder itself may still
/// get new files. Access control lists count only as far as they show in the group's bits.
pub(crate) fn others_may_write(folder: &Path) -> Option<String> {
    let folder = fs::canonicalize(folder).ok()?;
    let owner = fs::metadata(&folder).ok()?.uid();
    folder.ancestors().find_map(|above| {
        let found = fs::metadata(above).ok()?;
        let mode = found.mode() & 0o7777;
        let uid = found.uid();
        let name = sanitize_path(above);
        let is_protected = above != folder && mode & STICKY != 0;
        if mode & WRITABLE_BY_OTHERS != 0 && !is_protected {
            Some(format!("{name} has the mode {mode:04o}"))
        } else if ![0, owner, NOBODY].contains(&uid) {
            Some(format!("{name} belongs to the user {uid}"))
        } else {
            None
        }
    })
}
