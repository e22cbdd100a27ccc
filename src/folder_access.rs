//! Who else may put files into a folder of the heartbeat's. Runs on the thread that asks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::sanitize_path;
use crate::files::folder;

/// Group and others.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// What others have put into such a folder they alone may rename or remove.
const STICKY: u32 = 0o1000;

/// Who has no number in this user namespace: it is not known who that is.
const NOBODY: u32 = 65_534;

/// The folder of an outbox, if it is another one than the agent dir.
pub(crate) fn other_folder<'a>(outbox: &'a Path, agent_dir: &Path) -> Option<&'a Path> {
    let real = |folder: &Path| fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    Some(folder(outbox)).filter(|folder| real(folder) != real(agent_dir))
}

/// Why others than the folder's owner and root may write into it, or put another one in its place; safe to print. `None`:
/// they may not, or it cannot be looked at, which other errors say.
///
/// A folder above that is sticky, such as `/tmp`, protects what is in it; the folder itself may still get new files. Access
/// control lists count as far as the group's bits show them.
pub(crate) fn others_may_write(folder: &Path) -> Option<String> {
    let folder = fs::canonicalize(folder).ok()?;
    let owner = fs::metadata(&folder).ok()?.uid();
    folder.ancestors().find_map(|above| {
        let found = fs::metadata(above).ok()?;
        let (mode, uid, shown) = (found.mode() & 0o7777, found.uid(), sanitize_path(above));
        let is_protected = above != folder && mode & STICKY != 0;
        if mode & WRITABLE_BY_OTHERS != 0 && !is_protected {
            Some(format!("{shown} has the mode {mode:04o}"))
        } else if ![0, owner, NOBODY].contains(&uid) {
            Some(format!("{shown} belongs to the user {uid}"))
        } else {
            None
        }
    })
}
