//! The bundle is checked when it is loaded. Errors name the file and the problem.

use std::fs;

use decnet_heartbeat::Error;
use decnet_heartbeat::loopback::Role;

use crate::support::{Fixture, OpenSsl, TIMEOUT};

/// Starts a heartbeat with this content in one file of the bundle, which is an error.
fn start_with(file: &str, content: &[u8]) -> (Fixture, Error) {
    let fixture = Fixture::new();
    fs::write(fixture.agent_dir().join(file), content).unwrap();
    let (builder, _tick) = fixture.builder();
    let error = builder.start().map(drop).unwrap_err();
    assert!(error.is_bundle(), "{error}");
    (fixture, error)
}

/// The text of that error, without the path at its beginning.
fn problem(file: &str, content: &[u8]) -> String {
    let (fixture, error) = start_with(file, content);
    let path = fixture.agent_dir().join(file);
    assert_eq!(error.path(), Some(path.as_path()));
    let text = format!("{error:?}");
    text.strip_prefix(&format!("bundle: {}: ", path.display()))
        .unwrap_or_else(|| panic!("{text}"))
        .to_owned()
}

const ENROL: &str = "enrol this host again from its master, which writes all three files";

#[test]
fn invalid_pem_is_named_with_its_file() {
    let key_only = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let half = b"-----BEGIN CERTIFICATE-----\nAAAA\n";
    let junk = b"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n";
    let not_der = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (file, content, problem) in [
        ("ca.crt", &b""[..], "holds no PEM section that begins with -----BEGIN CERTIFICATE-----"),
        ("ca.crt", key_only, "holds no certificate, but a private key"),
        ("ca.crt", half, "ends in the middle of a PEM section"),
        ("ca.crt", junk, "has a PEM section that is not base64"),
        ("ca.crt", not_der, "has a section that is not an X.509 certificate"),
        ("worker.crt", b"", "holds no PEM section that begins with -----BEGIN CERTIFICATE-----"),
        ("worker.crt", not_der, "has a section that is not an X.509 certificate"),
        ("worker.key", b"", "holds no private key in PEM (PKCS#1, PKCS#8 or SEC1)"),
        ("worker.key", key_only, "holds a private key that cannot be read"),
        ("worker.key", half, "ends in the middle of a PEM section"),
    ] {
        let text = self::problem(file, content);
        assert!(
            text.starts_with(&format!("{problem}; ")) && text.contains("enrol this host again"),
            "{file}: {text}"
        );
    }
}

#[test]
fn byte_order_mark_is_ignored_in_each_file() {
    for file in ["ca.crt", "worker.crt", "worker.key"] {
        let fixture = Fixture::new();
        let path = fixture.agent_dir().join(file);
        let marked = [b"\xef\xbb\xbf", fs::read(&path).unwrap().as_slice()].concat();
        fs::write(&path, marked).unwrap();
        fixture.start_heartbeat();
    }
}

#[test]
fn damaged_section_is_rejected_in_each_file() {
    let fixture = Fixture::new();
    for file in ["ca.crt", "worker.crt", "worker.key"] {
        let pem = fs::read_to_string(fixture.agent_dir().join(file)).unwrap();
        let text = problem(file, format!("{}{pem}", pem.trim_end()).as_bytes());
        assert_eq!(
            text,
            "has two PEM sections on one line; put a line break between the END and the BEGIN"
        );
        let text =
            problem(file, format!("{pem}{}", pem.replace("-----BEGIN", "----BEGIN")).as_bytes());
        assert!(text.starts_with("has a damaged BEGIN or END line; "), "{text}");
        let wide: Vec<u8> = pem.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(problem(file, &wide), "is UTF-16 text; save it as ASCII or UTF-8");
    }
}

#[test]
fn other_pem_labels_of_a_certificate_are_accepted() {
    let fixture = Fixture::new();
    let openssl = OpenSsl::new(fixture.dir.path());
    for file in ["ca.crt", "worker.crt"] {
        let path = fixture.agent_dir().join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(openssl.path(file), &text).unwrap();
        // In OpenSSL's format, the purposes of the certificate follow its DER.
        openssl.run(&format!(
            "x509 -in {file} -trustout -addtrust serverAuth -setalias master -out trusted.crt"
        ));
        let trusted = openssl.read("trusted.crt");
        assert!(trusted.starts_with("-----BEGIN TRUSTED CERTIFICATE-----"));
        for written in [trusted, text.replace("CERTIFICATE", "X509 CERTIFICATE")] {
            fs::write(&path, written).unwrap();
            let (heartbeat, _tick) = fixture.start_heartbeat();
            assert_eq!(
                heartbeat.stats().fingerprint.as_deref(),
                Some(fixture.worker.fingerprint.as_str())
            );
        }
    }
}

#[test]
fn encrypted_key_is_named() {
    let fixture = Fixture::new();
    let openssl = OpenSsl::new(fixture.dir.path());
    fs::copy(fixture.agent_dir().join("worker.key"), openssl.path("worker.key")).unwrap();
    for command in [
        "pkcs8 -topk8 -in worker.key -passout pass:word -out encrypted.key",
        "ec -in worker.key -aes128 -passout pass:word -out encrypted.key",
    ] {
        openssl.run(command);
        let text = problem("worker.key", openssl.read("encrypted.key").as_bytes());
        assert!(
            text.starts_with("holds an encrypted private key, ") && text.contains("decrypt it"),
            "{text}"
        );
    }
}

#[test]
fn unsupported_key_type_is_named() {
    let fixture = Fixture::new();
    let openssl = OpenSsl::new(fixture.dir.path());
    for (key, kind) in [
        ("rsa:1024", "an RSA key of 1024 bits"),
        ("rsa:2560", "an RSA key of 2560 bits"),
        ("rsa:2048 -pkeyopt rsa_keygen_pubexp:3", "an RSA key with the exponent 3"),
        ("ec -pkeyopt ec_paramgen_curve:P-521", "an ECDSA key on P-521"),
        ("ec -pkeyopt ec_paramgen_curve:secp256k1", "an ECDSA key on secp256k1"),
        ("ed448", "an Ed448 key"),
    ] {
        openssl.run(&format!(
            "req -x509 -newkey {key} -nodes -keyout weak.key -out weak.crt -days 9 -subj /CN=w"
        ));
        let text = problem("worker.key", openssl.read("weak.key").as_bytes());
        assert!(
            text.starts_with(&format!("cannot be used: it is {kind}; supported are ")),
            "{text}"
        );
        assert!(text.contains(" (exponent 65537 and up), "), "{text}");
        assert!(text.ends_with(
            "; let the master issue a certificate whose key is supported, and enrol this host again"
        ));
        // These two key types can verify signatures, but not create them.
        if !kind.ends_with("exponent 3") && !kind.contains("2560") {
            for (file, beginning) in [
                ("worker.crt", "cannot be used: "),
                ("ca.crt", "holds no usable CA certificate: w: "),
            ] {
                let text = problem(file, openssl.read("weak.crt").as_bytes());
                assert!(
                    text.starts_with(&format!("{beginning}its key is {kind}; supported are ")),
                    "{text}"
                );
            }
        }
    }
    openssl.run("ecparam -name secp521r1 -genkey -out sec1.key");
    let text = problem("worker.key", openssl.read("sec1.key").as_bytes());
    assert!(text.starts_with("cannot be used: it is an ECDSA key on P-521; "), "{text}");
    openssl.run("genrsa -traditional -out pkcs1.key 1024");
    let text = problem("worker.key", openssl.read("pkcs1.key").as_bytes());
    assert!(text.starts_with("cannot be used: it is an RSA key of 1024 bits; "), "{text}");
}

#[test]
fn ca_crt_without_a_ca_is_rejected() {
    let fixture = Fixture::new();
    let worker = fs::read_to_string(fixture.agent_dir().join("worker.crt")).unwrap();
    let text = problem("ca.crt", worker.as_bytes());
    assert!(text.starts_with("holds no usable CA certificate: "), "{text}");
    assert!(
        text.ends_with(&format!(": it is a certificate that is not marked as a CA; {ENROL}")),
        "{text}"
    );
    let openssl = OpenSsl::new(fixture.dir.path());
    openssl.run(
        "req -x509 -newkey rsa:2048 -nodes -keyout k -out no.crt -days 9 -subj /CN=no -addext keyUsage=digitalSignature",
    );
    let text = problem("ca.crt", openssl.read("no.crt").as_bytes());
    assert!(text.contains("whose key usage does not allow issuing certificates"), "{text}");
}

#[test]
fn other_certificates_beside_a_ca_are_ignored() {
    let fixture = Fixture::new();
    let path = fixture.agent_dir().join("ca.crt");
    let ca = fs::read(&path).unwrap();
    let worker = fs::read(fixture.agent_dir().join("worker.crt")).unwrap();
    for content in [[ca.clone(), worker.clone()], [worker, ca]] {
        fs::write(&path, content.concat()).unwrap();
        fixture.start_heartbeat();
    }
}

#[test]
fn worker_certificate_must_be_first() {
    let fixture = Fixture::new();
    let own = fs::read_to_string(fixture.agent_dir().join("worker.crt")).unwrap();
    let path = fixture.agent_dir().join("worker.crt");
    fs::write(&path, fixture.master.authority().certificate() + &own).unwrap();
    let (builder, _tick) = fixture.builder();
    let text = format!("{:?}", builder.start().map(drop).unwrap_err());
    assert!(
        text.contains("do not match; put this host's own certificate first in worker.crt: "),
        "{text}"
    );
}

#[test]
fn two_keys_in_one_file_are_rejected() {
    let fixture = Fixture::new();
    let key = fs::read_to_string(fixture.agent_dir().join("worker.key")).unwrap();
    assert_eq!(
        problem("worker.key", key.repeat(2).as_bytes()),
        "holds 2 private keys; keep only the key of worker.crt"
    );
}

#[test]
fn unreadable_file_is_named_with_advice() {
    type Damage = fn(&std::path::Path);
    let damages: [(Damage, &str); 5] = [
        (
            |_| (),
            "cannot be read; enrol this host again from its master, which writes all three files: No such file ",
        ),
        (
            |path| fs::create_dir(path).unwrap(),
            "cannot be read; restore the file that the enrolment wrote: not a regular file",
        ),
        (
            |path| fs::write(path, vec![b' '; 1 << 20]).unwrap(),
            "cannot be read; restore the file that the enrolment wrote, which has a few KiB: larger than 262144",
        ),
        // Reading its first page fails with EIO.
        (
            |path| std::os::unix::fs::symlink("/proc/self/mem", path).unwrap(),
            "cannot be read; check the disk and the kernel's log: Input/output error",
        ),
        (
            |path| fs::remove_dir_all(path.parent().unwrap()).unwrap(),
            "cannot be read; enrol this host, or correct the agent dir, which does not exist: No such file ",
        ),
    ];
    for (damage, problem) in damages {
        let fixture = Fixture::new();
        let path = fixture.agent_dir().join("ca.crt");
        fs::remove_file(&path).unwrap();
        damage(&path);
        let (builder, _tick) = fixture.builder();
        let text = format!("{:?}", builder.start().map(drop).unwrap_err());
        assert!(text.starts_with(&format!("bundle: {}: {problem}", path.display())), "{text}");
    }
}

#[test]
fn key_of_another_certificate_is_an_error() {
    let authority = Fixture::new();
    let other = authority.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    let (fixture, error) = start_with("worker.key", other.key.as_bytes());
    assert_eq!(
        format!("{error:?}"),
        format!(
            "bundle: {}: worker.crt and worker.key do not match; enrol this host again, unless its enrolment is \
             in progress: keys may not be consistent: KeyMismatch",
            fixture.agent_dir().display()
        )
    );
}

#[test]
fn invalid_key_is_not_quoted_in_the_error() {
    let secret = "AAAAc2VjcmV0c2VjcmV0c2VjcmV0";
    let key = format!("-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----\n");
    let (_stage, error) = start_with("worker.key", key.as_bytes());
    assert!(
        !format!("{error:?}").contains("c2VjcmV0") && !format!("{error:?}").contains("secret"),
        "{error:?}"
    );
}

#[test]
fn certificate_chains_are_accepted() {
    let fixture = Fixture::new();
    let ca = fixture.master.authority().certificate();
    // Another CA before ours, as during the replacement of a master's CA, and the worker's
    // certificate with its issuer.
    let other = decnet_heartbeat::loopback::Authority::new().unwrap().certificate();
    fs::write(fixture.agent_dir().join("ca.crt"), format!("{other}{ca}")).unwrap();
    let path = fixture.agent_dir().join("worker.crt");
    fs::write(&path, format!("{}{ca}", fs::read_to_string(&path).unwrap())).unwrap();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    assert_eq!(heartbeat.stats().fingerprint.as_deref(), Some(fixture.worker.fingerprint.as_str()));
}

#[test]
fn sec1_and_pkcs8_keys_are_accepted() {
    let fixture = Fixture::new();
    let path = fixture.agent_dir().join("worker.key");
    let pkcs8 = fs::read_to_string(&path).unwrap();
    assert!(pkcs8.starts_with("-----BEGIN PRIVATE KEY-----"));
    let converted =
        std::process::Command::new("openssl").args(["ec", "-in"]).arg(&path).output().unwrap();
    assert!(converted.status.success(), "{converted:?}");
    let sec1 = String::from_utf8(converted.stdout).unwrap();
    assert!(sec1.starts_with("-----BEGIN EC PRIVATE KEY-----"), "openssl's own format");
    for key in [pkcs8, sec1] {
        fs::write(&path, key).unwrap();
        let beats = fixture.master.received().len() as u64;
        let (_heartbeat, _tick) = fixture.start_heartbeat();
        assert!(fixture.master.wait_for_beats(beats + 1, TIMEOUT));
    }
}
