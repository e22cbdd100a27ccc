//! Wakes the process that delivers from the outbox, for a `pipe` that adds to it. Runs on the
//! thread `pipe`.

use std::path::Path;

/// Called after a commit of deltas to an outbox from which another process delivers. Nothing is
/// sent yet: that process finds them with its next tick.
pub(super) fn wake_deliverer(_outbox: &Path) {}
