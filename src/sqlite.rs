//! SQLite files that other processes use, too.

pub(crate) mod files;
pub(crate) mod read_only;
