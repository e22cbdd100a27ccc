//! The bundle is proven before it is used, and what is wrong is named.

use std::fs;

use decnet_heartbeat::Error;
use decnet_heartbeat::loopback::Role;

use crate::support::{OpenSsl, Stage};

/// Starts with a bundle in which one file has another content.
fn start_with(file: &str, content: &[u8]) -> (Stage, Error) {
    let stage = Stage::new();
    fs::write(stage.agent_dir().join(file), content).unwrap();
    let (builder, _tick) = stage.builder();
    let error = builder.start().map(drop).unwrap_err();
    assert!(error.is_bundle(), "{error}");
    (stage, error)
}

/// The error of a bundle in which one file has another content, without its beginning: its path.
fn problem(file: &str, content: &[u8]) -> String {
    let (stage, error) = start_with(file, content);
    let path = stage.agent_dir().join(file);
    assert_eq!(error.path(), Some(path.as_path()));
    let said = format!("{error:?}");
    said.strip_prefix(&format!("bundle: {}: ", path.display()))
        .unwrap_or_else(|| panic!("{said}"))
        .to_owned()
}

const ENROL: &str = "enrol this host again from its master, which writes all three files";

#[test]
fn wrong_material_is_named_with_its_file() {
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
        let said = self::problem(file, content);
        assert!(
            said.starts_with(&format!("{problem}; ")) && said.contains("enrol this host again"),
            "{file}: {said}"
        );
    }
}

#[test]
fn a_byte_order_mark_is_nothing_in_each_file() {
    for file in ["ca.crt", "worker.crt", "worker.key"] {
        let stage = Stage::new();
        let path = stage.agent_dir().join(file);
        let marked = [b"\xef\xbb\xbf", fs::read(&path).unwrap().as_slice()].concat();
        fs::write(&path, marked).unwrap();
        stage.beating();
    }
}

#[test]
fn a_section_that_would_be_lost_is_refused_in_each_file() {
    let stage = Stage::new();
    for file in ["ca.crt", "worker.crt", "worker.key"] {
        let text = fs::read_to_string(stage.agent_dir().join(file)).unwrap();
        let said = problem(file, format!("{}{text}", text.trim_end()).as_bytes());
        assert_eq!(
            said,
            "has two PEM sections on one line; put a line break between the END and the BEGIN"
        );
        let said =
            problem(file, format!("{text}{}", text.replace("-----BEGIN", "----BEGIN")).as_bytes());
        assert!(said.starts_with("has a damaged BEGIN or END line; "), "{said}");
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(problem(file, &wide), "is UTF-16 text; save it as ASCII or UTF-8");
    }
}

#[test]
fn the_other_labels_of_a_certificate_are_understood() {
    let stage = Stage::new();
    let openssl = OpenSsl::new(stage.dir.path());
    for file in ["ca.crt", "worker.crt"] {
        let path = stage.agent_dir().join(file);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(openssl.path(file), &text).unwrap();
        // OpenSSL's form has what the certificate is trusted for behind it.
        openssl.run(&format!(
            "x509 -in {file} -trustout -addtrust serverAuth -setalias master -out trusted.crt"
        ));
        let trusted = openssl.read("trusted.crt");
        assert!(trusted.starts_with("-----BEGIN TRUSTED CERTIFICATE-----"));
        for written in [trusted, text.replace("CERTIFICATE", "X509 CERTIFICATE")] {
            fs::write(&path, written).unwrap();
            let (heartbeat, _tick) = stage.beating();
            assert_eq!(
                heartbeat.stats().fingerprint.as_deref(),
                Some(stage.worker.fingerprint.as_str())
            );
        }
    }
}

#[test]
fn an_encrypted_key_has_encrypted() {
    let stage = Stage::new();
    let openssl = OpenSsl::new(stage.dir.path());
    fs::copy(stage.agent_dir().join("worker.key"), openssl.path("worker.key")).unwrap();
    for command in [
        "pkcs8 -topk8 -in worker.key -passout pass:word -out encrypted.key",
        "ec -in worker.key -aes128 -passout pass:word -out encrypted.key",
    ] {
        openssl.run(command);
        let said = problem("worker.key", openssl.read("encrypted.key").as_bytes());
        assert!(
            said.starts_with("holds an encrypted private key, ") && said.contains("decrypt it"),
            "{said}"
        );
    }
}

#[test]
fn a_key_of_a_kind_that_is_not_supported_is_named() {
    let stage = Stage::new();
    let openssl = OpenSsl::new(stage.dir.path());
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
        let said = problem("worker.key", openssl.read("weak.key").as_bytes());
        assert!(
            said.starts_with(&format!("cannot be used: it is {kind}; supported are ")),
            "{said}"
        );
        assert!(said.contains(" (exponent 65537 and up), "), "{said}");
        assert!(said.ends_with(
            "; let the master issue a certificate whose key is supported, and enrol this host again"
        ));
        // A signature of these two kinds can be verified, but not made.
        if !kind.ends_with("exponent 3") && !kind.contains("2560") {
            for (file, beginning) in [
                ("worker.crt", "cannot be used: "),
                ("ca.crt", "holds no usable CA certificate: w: "),
            ] {
                let said = problem(file, openssl.read("weak.crt").as_bytes());
                assert!(
                    said.starts_with(&format!("{beginning}its key is {kind}; supported are ")),
                    "{said}"
                );
            }
        }
    }
    openssl.run("ecparam -name secp521r1 -genkey -out sec1.key");
    let said = problem("worker.key", openssl.read("sec1.key").as_bytes());
    assert!(said.starts_with("cannot be used: it is an ECDSA key on P-521; "), "{said}");
    openssl.run("genrsa -traditional -out pkcs1.key 1024");
    let said = problem("worker.key", openssl.read("pkcs1.key").as_bytes());
    assert!(said.starts_with("cannot be used: it is an RSA key of 1024 bits; "), "{said}");
}

#[test]
fn a_ca_crt_without_a_ca_is_refused() {
    let stage = Stage::new();
    let worker = fs::read_to_string(stage.agent_dir().join("worker.crt")).unwrap();
    let said = problem("ca.crt", worker.as_bytes());
    assert!(said.starts_with("holds no usable CA certificate: "), "{said}");
    assert!(
        said.ends_with(&format!(": it is a certificate that is not marked as a CA; {ENROL}")),
        "{said}"
    );
    let openssl = OpenSsl::new(stage.dir.path());
    openssl.run(
        "req -x509 -newkey rsa:2048 -nodes -keyout k -out no.crt -days 9 -subj /CN=no -addext keyUsage=digitalSignature",
    );
    let said = problem("ca.crt", openssl.read("no.crt").as_bytes());
    assert!(said.contains("whose key usage does not allow issuing certificates"), "{said}");
}

#[test]
fn what_is_no_ca_beside_one_is_ignored() {
    let stage = Stage::new();
    let path = stage.agent_dir().join("ca.crt");
    let (ca, worker) =
        (fs::read(&path).unwrap(), fs::read(stage.agent_dir().join("worker.crt")).unwrap());
    for content in [[ca.clone(), worker.clone()], [worker, ca]] {
        fs::write(&path, content.concat()).unwrap();
        stage.beating();
    }
}

#[test]
fn a_certificate_that_does_not_stand_first_is_named() {
    let stage = Stage::new();
    let own = fs::read_to_string(stage.agent_dir().join("worker.crt")).unwrap();
    let path = stage.agent_dir().join("worker.crt");
    fs::write(&path, stage.master.authority().certificate() + &own).unwrap();
    let (builder, _tick) = stage.builder();
    let said = format!("{:?}", builder.start().map(drop).unwrap_err());
    assert!(
        said.contains("do not match; put this host's own certificate first in worker.crt: "),
        "{said}"
    );
}

#[test]
fn two_keys_in_one_file_are_refused() {
    let stage = Stage::new();
    let key = fs::read_to_string(stage.agent_dir().join("worker.key")).unwrap();
    assert_eq!(
        problem("worker.key", key.repeat(2).as_bytes()),
        "holds 2 private keys; keep only the key of worker.crt"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named_with_what_helps() {
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
        // Its first page cannot be read.
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
        let stage = Stage::new();
        let path = stage.agent_dir().join("ca.crt");
        fs::remove_file(&path).unwrap();
        damage(&path);
        let (builder, _tick) = stage.builder();
        let said = format!("{:?}", builder.start().map(drop).unwrap_err());
        assert!(said.starts_with(&format!("bundle: {}: {problem}", path.display())), "{said}");
    }
}

#[test]
fn a_key_of_another_certificate_is_an_error_and_no_panic() {
    let authority = Stage::new();
    let other = authority.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    let (stage, error) = start_with("worker.key", other.key.as_bytes());
    assert_eq!(
        format!("{error:?}"),
        format!(
            "bundle: {}: worker.crt and worker.key do not match; enrol this host again, unless its enrolment is \
             in progress: keys may not be consistent: KeyMismatch",
            stage.agent_dir().display()
        )
    );
}

#[test]
fn a_key_that_cannot_be_parsed_never_reaches_the_error() {
    let secret = "AAAAc2VjcmV0c2VjcmV0c2VjcmV0";
    let key = format!("-----BEGIN PRIVATE KEY-----\n{secret}\n-----END PRIVATE KEY-----\n");
    let (_stage, error) = start_with("worker.key", key.as_bytes());
    assert!(
        !format!("{error:?}").contains("c2VjcmV0") && !format!("{error:?}").contains("secret"),
        "{error:?}"
    );
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
    let converted =
        std::process::Command::new("openssl").args(["ec", "-in"]).arg(&path).output().unwrap();
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
