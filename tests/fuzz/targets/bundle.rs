//! The bundle's three PEM files, whatever stands in them.

use std::path::Path;

use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::{assert_sayable, parts};
use crate::credentials::bundle::Bundle;
use crate::error::chain;
use crate::master::identity::MasterIdentity;
use crate::master::verifier;

/// So many base64 digits of a key are a leak.
const LEAK: usize = 16;

/// Proves a bundle: `ca.crt`, `worker.crt` and `worker.key` with a NUL between each two.
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
            let said = format!("{error} {}", chain(&error));
            assert_sayable(&said);
            assert!(!leaks(said.as_bytes(), key), "{said}");
        }
    }
}

/// Whether a run of base64 of the key is in what is said. One with a digit: our own words have no such run.
fn leaks(said: &[u8], key: &[u8]) -> bool {
    let is_base64 = |run: &&[u8]| {
        run.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'))
            && run.iter().any(u8::is_ascii_digit)
    };
    said.windows(LEAK).filter(is_base64).any(|run| key.windows(LEAK).any(|of_key| of_key == run))
}
