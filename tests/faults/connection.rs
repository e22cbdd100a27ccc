//! A connection that ended while it was idle or in use: the beat is sent on a new one, and no beat
//! fails.

use decnet_heartbeat::loopback::{Effect, Fault as MasterFault};

use crate::fault_case::{Expect, Fault, FaultCase};

pub fn cases() -> Vec<FaultCase> {
    let case = |name: &str, fault, after| {
        FaultCase::new(format!("connection/{name}"), fault, Expect::Delivers { after })
    };
    let next = Fault::NextRequest;
    vec![
        case("closed_while_idle", Fault::CloseConnections, 0.0..0.5),
        case("reset_while_idle", Fault::ResetConnections, 0.0..0.5),
        case("closed_before_request", next(MasterFault::CutBeforeRequest), 0.0..0.5),
        case("closed_in_body", next(MasterFault::CutInBody), 0.0..0.5),
        case("closed_after_body", next(MasterFault::CutAfterBody(Effect::Lost)), 0.0..0.5),
        case("closed_without_close_notify", next(MasterFault::CutAfterAnswer), 0.0..0.5),
        // The new connection is tried when no answer has come for ten seconds.
        case("half_open", Fault::FreezeConnections, 9.9..10.5),
    ]
}
