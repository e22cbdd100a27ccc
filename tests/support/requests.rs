//! The deltas in requests that the loopback master received.

use decnet_heartbeat::loopback::Received;
use serde_json::Value;

/// The deltas of a request, in their order. A body that is not JSON, or has none, gives none.
pub fn deltas(request: &Received) -> Vec<Value> {
    let json = request.json.as_ref();
    json.and_then(|json| json["lifecycle"].as_array()).cloned().unwrap_or_default()
}

/// The deckies of these deltas.
pub fn deckies(request: &Received) -> Vec<String> {
    deltas(request).iter().map(|delta| delta["decky_name"].as_str().unwrap().to_owned()).collect()
}
