//! The program `decnet-heartbeat`.

fn main() {}
