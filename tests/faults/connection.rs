//! A connection that has ended while nobody looked: the next beat goes out on a fresh one, and no beat has failed.

use decnet_heartbeat::loopback::{Effect, Fault as Wire};

use crate::row::{Fault, Right, Row};

pub fn rows() -> Vec<Row> {
    let row = |name: &str, fault, after| {
        Row::new(format!("connection/{name}"), fault, Right::Delivers { after })
    };
    vec![
        row("closed_while_idle", Fault::Cut, 0.0..0.5),
        row("reset_while_idle", Fault::Reset, 0.0..0.5),
        row(
            "closed_right_after_our_write",
            Fault::Once(Wire::CutAfterBody(Effect::Lost)),
            0.0..0.5,
        ),
        row("closed_before_our_write", Fault::Once(Wire::CutBeforeRequest), 0.0..0.5),
        row("closed_in_our_write", Fault::Once(Wire::CutInBody), 0.0..0.5),
        row("closed_without_close_notify", Fault::Once(Wire::CutAfterAnswer), 0.0..0.5),
        // Noticed when no answer has come for ten seconds.
        row("half_open", Fault::Freeze, 9.9..10.5),
    ]
}
