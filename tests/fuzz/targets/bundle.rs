//! The bundle's three PEM files with any content.

use std::path::Path;

use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::{assert_sanitized, parts};
use crate::credentials::bundle::Bundle;
use crate::error::chain;
use crate::master::identity::MasterIdentity;
use crate::master::verifier;

/// The number of base64 digits of a key that are a leak.
const LEAK: usize = 16;

/// Loads a bundle: `ca.crt`, `worker.crt` and `worker.key`, separated by NUL.
pub fn bundle(input: &[u8]) {
    let [ca, certificate, key] = parts(input);
    let content = |path: &Path| {
        Ok(match path.extension() {
            _ if path.ends_with("ca.crt") => ca,
            Some(extension) if extension == "key" => key,
            _ => certificate,
        }
        .to_vec())
    };
    match Bundle::load_with(Path::new("/"), content) {
        Ok(bundle) => {
            assert!(!bundle.roots.is_empty());
            assert_eq!(bundle.certificate.fingerprint.len(), 64);
            assert!(
                bundle
                    .certificate
                    .fingerprint
                    .bytes()
                    .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
            );
            let name = ServerName::try_from("swarmctl").unwrap();
            let config = verifier::client_config(
                &bundle.identity,
                verifier::verifier(&bundle.roots, MasterIdentity::Name, &name),
            )
            .unwrap();
            ClientConnection::new(config, name).unwrap();
        }
        Err(error) => {
            assert!(error.is_bundle());
            let message = format!("{error} {}", chain(&error));
            assert_sanitized(&message);
            assert!(!leaks(message.as_bytes(), key), "{message}");
        }
    }
}

/// Whether a message contains a run of the key's base64 digits. The run must have a decimal digit,
/// because the words of a message have none.
fn leaks(message: &[u8], key: &[u8]) -> bool {
    let is_base64 = |run: &&[u8]| {
        run.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
            && run.iter().any(u8::is_ascii_digit)
    };
    message.windows(LEAK).filter(is_base64).any(|run| key.windows(LEAK).any(|of_key| of_key == run))
}
