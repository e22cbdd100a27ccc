//! Tests against the loopback master.
