//! SQLite files that other processes also use.

pub(crate) mod files;
pub(crate) mod read_only;
