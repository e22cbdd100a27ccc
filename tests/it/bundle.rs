//! The bundle is proven before it is used, and what is wrong is named.

use std::fs;

use decnet_heartbeat::Error;
use decnet_heartbeat::loopback::Role;

use crate::support::Stage;

/// Starts with a bundle in which one file has another content.
fn start_with(file: &str, content: &[u8]) -> (Stage, Error) {
    let stage = Stage::new();
    fs::write(stage.agent_dir().join(file), content).unwrap();
    let (builder, _tick) = stage.builder();
    let error = builder.start().map(drop).unwrap_err();
    assert!(error.is_bundle(), "{error}");
    (stage, error)
}

#[test]
fn wrong_material_is_named_with_its_file() {
    let key_only = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let half = b"-----BEGIN CERTIFICATE-----\nAAAA\n";
    let junk = b"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n";
    let not_der = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (file, content, problem) in [
        ("ca.crt", &b""[..], "holds no certificate; it should be a PEM file that begins -----BEGIN CERT"),
        ("ca.crt", key_only, "holds no certificate; it should be a PEM file that begins -----BEGIN CERT"),
        ("ca.crt", half, "ends in the middle of a PEM section; was it written half?"),
        ("ca.crt", junk, "has a PEM section that is not base64"),
        ("ca.crt", not_der, "is not a CA certificate: invalid peer certificate: BadEncoding"),
        ("worker.crt", b"", "holds no certificate; it should be a PEM file that begins -----BEGIN CERT"),
        ("worker.key", b"", "holds no private key; PKCS#1, PKCS#8 and SEC1 are understood"),
        ("worker.key", half, "ends in the middle of a PEM section; was it written half?"),
    ] {
        let (stage, error) = start_with(file, content);
        let path = stage.agent_dir().join(file);
        assert_eq!(format!("{error:?}"), format!("bundle: {}: {problem}", path.display()));
        assert_eq!(error.path(), Some(path.as_path()));
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let stage = Stage::new();
    let path = stage.agent_dir().join("worker.key");
    fs::remove_file(&path).unwrap();
    let (builder, _tick) = stage.builder();
    let error = builder.start().map(drop).unwrap_err();
    let expected = format!("bundle: {}: cannot be read: No such file or directory (os error 2)", path.display());
    assert_eq!(format!("{error:?}"), expected);
}

#[test]
fn a_key_of_another_certificate_is_an_error_and_no_panic() {
    let authority = Stage::new();
    let other = authority.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    let (stage, error) = start_with("worker.key", other.key.as_bytes());
    assert_eq!(
        format!("{error:?}"),
        format!(
            "bundle: {}: worker.crt and worker.key do not make an identity; enrol this host again: \
             keys may not be consistent: KeyMismatch",
            stage.agent_dir().display()
        )
    );
}

#[test]
fn a_key_that_cannot_be_parsed_never_reaches_the_error() {
    let secret = "AAAAc2VjcmV0c2VjcmV0c2VjcmV0";
    let key = format!("-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----\n");
    let (_stage, error) = start_with("worker.key", key.as_bytes());
    assert!(!format!("{error:?}").contains("c2VjcmV0") && !format!("{error:?}").contains("secret"), "{error:?}");
}

#[test]
fn chains_are_understood() {
    let stage = Stage::new();
    let ca = stage.master.authority().certificate();
    // Another CA before ours, as while a master's CA is being replaced; and our own certificate with its issuer.
    let other = decnet_heartbeat::loopback::Authority::new().unwrap().certificate();
    fs::write(stage.agent_dir().join("ca.crt"), format!("{other}{ca}")).unwrap();
    let path = stage.agent_dir().join("worker.crt");
    fs::write(&path, format!("{}{ca}", fs::read_to_string(&path).unwrap())).unwrap();
    let (heartbeat, _tick) = stage.beating();
    assert_eq!(heartbeat.stats().fingerprint.as_deref(), Some(stage.worker.fingerprint.as_str()));
}

#[test]
fn sec1_and_pkcs8_keys_are_understood() {
    let stage = Stage::new();
    let path = stage.agent_dir().join("worker.key");
    let pkcs8 = fs::read_to_string(&path).unwrap();
    assert!(pkcs8.starts_with("-----BEGIN PRIVATE KEY-----"));
    let converted = std::process::Command::new("openssl").args(["ec", "-in"]).arg(&path).output().unwrap();
    assert!(converted.status.success(), "{converted:?}");
    let sec1 = String::from_utf8(converted.stdout).unwrap();
    assert!(sec1.starts_with("-----BEGIN EC PRIVATE KEY-----"), "openssl's own format");
    for key in [pkcs8, sec1] {
        fs::write(&path, key).unwrap();
        let beats = stage.master.received().len() as u64;
        let (_heartbeat, _tick) = stage.beating();
        assert!(stage.master.wait_for_beats(beats + 1, crate::support::PATIENCE));
    }
}
