//! `shim`: prints the module that makes DECNET's own agent report through this program. Runs on the
//! main thread.

use super::output::print_result;
use crate::error::Error;

const MODULE: &str = include_str!("shim.py");

pub(super) fn print() -> Result<(), Error> {
    print_result(MODULE)
}
