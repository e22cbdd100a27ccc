//! Who counts as the master: nothing of the request leaves before its certificate has been accepted.

use decnet_heartbeat::loopback::{Authority, Issued, Offered, Options, Role, TlsVersion};
use decnet_heartbeat::{EnrolmentSources, MasterIdentity};

use crate::support::{OpenSsl, PATIENCE, Stage, now, settled};

/// A master that shows the certificate of another role, from our CA.
fn posing(role: Role) -> Stage {
    let authority = Authority::new().unwrap();
    let certificate = Some(authority.issue(role).unwrap());
    Stage::with(Options { authority: Some(authority), certificate, ..Options::default() })
}

fn accepted(stage: &Stage, identity: MasterIdentity) {
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.master_identity(identity).start().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE), "{:?}", heartbeat.stats());
}

/// The beat fails in TLS, and the master never sees a request. What the heartbeat says of it.
fn refused(stage: &Stage, identity: MasterIdentity) -> String {
    let (builder, _tick) = stage.builder();
    let heartbeat = builder.master_identity(identity).start().unwrap();
    let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(failure.class, "tls", "{failure:?}");
    assert_eq!(stage.master.received().len(), 0);
    failure.detail
}

fn pin(certificate: &Issued) -> MasterIdentity {
    format!("sha256:{}", certificate.fingerprint).parse().unwrap()
}

#[test]
fn the_masters_own_certificate_is_accepted_under_every_rule_but_public() {
    let stage = Stage::new();
    accepted(&stage, MasterIdentity::Name);
    accepted(&stage, MasterIdentity::Host);
    accepted(&stage, MasterIdentity::AnyFromCa);
    accepted(&stage, pin(stage.master.certificate()));
    let stage = Stage::new();
    let said = refused(&stage, MasterIdentity::PublicCa);
    assert!(said.starts_with("the certificate is not issued by a public CA"), "{said}");
}

#[test]
fn a_sibling_worker_cannot_pose_as_the_master_by_default() {
    let stage = posing(Role::Worker("sibling".to_owned()));
    let said = refused(&stage, MasterIdentity::default());
    let expected = r#"the certificate is not the master's own: its common name is "sibling", and must be "swarmctl""#;
    assert_eq!(said, expected);
    let said = refused(&posing(Role::Worker("sibling".to_owned())), MasterIdentity::Host);
    assert_eq!(said, format!("{expected}; and it is not valid for the configured host"));
}

#[test]
fn a_sibling_worker_can_pose_as_the_master_under_the_originals_rule() {
    accepted(&posing(Role::Worker("sibling".to_owned())), MasterIdentity::AnyFromCa);
}

#[test]
fn a_worker_that_was_enrolled_with_the_masters_host_cannot_pose_as_the_master_by_default() {
    for master_host in ["127.0.0.1", "swarmctl"] {
        let role =
            Role::WebEnrolled { name: "worker-07".to_owned(), master_host: master_host.to_owned() };
        let said = refused(&posing(role), MasterIdentity::Name);
        assert!(said.contains(r#"its common name is "worker-07""#), "{said}");
    }
}

#[test]
fn the_rule_host_accepts_any_certificate_of_the_ca_for_the_configured_host() {
    accepted(&posing(Role::Named("127.0.0.1".to_owned())), MasterIdentity::Host);
    // Which is its weakness.
    let role =
        Role::WebEnrolled { name: "worker-07".to_owned(), master_host: "127.0.0.1".to_owned() };
    accepted(&posing(role), MasterIdentity::Host);
}

#[test]
fn a_wildcard_is_not_the_masters_name() {
    for name in ["*", "*.swarmctl", "swarmctl.lan", "Swarmctl"] {
        refused(&posing(Role::Named(name.to_owned())), MasterIdentity::Name);
    }
}

/// An impostor with what a stolen worker's key has signed; the worker's certificate, too.
fn forged(authority: &Authority) -> (Stage, String) {
    let thief = authority.subordinate(Role::Worker("thief".to_owned())).unwrap();
    let certificate = Some(thief.issue(Role::Master).unwrap());
    let authority = Some(authority.clone());
    (Stage::with(Options { authority, certificate, ..Options::default() }), thief.certificate())
}

#[test]
fn a_worker_cannot_issue_a_masters_certificate() {
    let authority = Authority::new().unwrap();
    let (mut stage, thief) = forged(&authority);
    for identity in [MasterIdentity::Name, MasterIdentity::Host, MasterIdentity::AnyFromCa] {
        refused(&stage, identity);
    }
    // As the issuer that comes along.
    let mut certificate = stage.master.certificate().clone();
    certificate.certificate += &thief;
    stage = Stage::with(Options {
        authority: Some(authority),
        certificate: Some(certificate),
        ..Options::default()
    });
    for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
        refused(&stage, identity);
    }
}

#[test]
fn a_workers_certificate_in_ca_crt_does_not_let_it_issue() {
    let authority = Authority::new().unwrap();
    let (stage, thief) = forged(&authority);
    let path = stage.agent_dir().join("ca.crt");
    for content in [
        format!("{}{thief}", authority.certificate()),
        format!("{thief}{}", authority.certificate()),
    ] {
        std::fs::write(&path, content).unwrap();
        for identity in [MasterIdentity::Name, MasterIdentity::Host, MasterIdentity::AnyFromCa] {
            let said = refused(&stage, identity);
            assert!(
                said.starts_with("the master's certificate is not issued by the CA in ca.crt"),
                "{said}"
            );
        }
    }
    // Nor does it count itself.
    let worker = authority.issue(Role::Named("swarmctl".to_owned())).unwrap();
    let other = Authority::new().unwrap();
    let options = Options {
        certificate: Some(worker.clone()),
        authority: Some(other.clone()),
        ..Options::default()
    };
    let stage = Stage::with(options);
    let content = format!("{}{}", other.certificate(), worker.certificate);
    std::fs::write(stage.agent_dir().join("ca.crt"), content).unwrap();
    refused(&stage, MasterIdentity::Name);
}

#[test]
fn a_stricter_rule_does_not_resume_a_session_of_a_laxer_one() {
    let stage = posing(Role::Worker("sibling".to_owned()));
    let ini = stage.dir.path().join("decnet.ini");
    let write = |rule: &str| {
        stage.worker.write_ini(&ini).unwrap();
        let text = std::fs::read_to_string(&ini).unwrap() + &format!("master-identity = {rule}\n");
        std::fs::write(&ini, text).unwrap();
    };
    write("ca");
    let enrolment =
        EnrolmentSources::from_variables([("HOME", "/nonexistent")]).config(&ini).read().unwrap();
    let (builder, tick) = stage.builder();
    let heartbeat = builder.enrolment(enrolment).start().unwrap();
    assert!(stage.master.wait_for_beats(1, PATIENCE), "{:?}", heartbeat.stats());
    write("name");
    tick.send(now()).unwrap();
    let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(failure.class, "tls", "{failure:?}");
    assert_eq!(stage.master.received().len(), 1);
}

#[test]
fn a_key_or_a_signature_that_cannot_be_verified_is_named() {
    let stage = Stage::new();
    let openssl = OpenSsl::new(stage.dir.path());
    std::fs::write(stage.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    for (name, key, digest, says) in [
        ("small", "rsa:1024", "-sha256", "its key is an RSA key of 1024 bits; supported are "),
        ("old", "rsa:2048", "-sha1", "it is signed with RSA and SHA-1; supported are "),
        // OpenSSL finds no signature that both sides know, before it shows its certificate.
        ("large", "ec -pkeyopt ec_paramgen_curve:P-521", "-sha256", "such as P-521"),
    ] {
        openssl.issue(name, key, digest);
        let served = openssl.serve(name, "-cipher ALL:@SECLEVEL=0");
        let enrolment = stage.worker.enrolment().unwrap().with_master_port(served.port).unwrap();
        let (builder, _tick) = stage.builder();
        let heartbeat = builder.enrolment(enrolment).start().unwrap();
        let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert!(failure.class == "tls" && failure.detail.contains(says), "{name}: {failure:?}");
    }
}

#[test]
fn the_own_certificate_of_a_proxy_is_not_of_our_ca_whatever_its_version() {
    let stage = Stage::new();
    let openssl = OpenSsl::new(stage.dir.path());
    openssl.run("req -x509 -newkey rsa:2048 -nodes -keyout third.key -out third.crt -days 9 -subj /CN=proxy");
    openssl.run("req -new -key third.key -out first.csr -subj /CN=proxy");
    openssl.run("x509 -req -in first.csr -signkey third.key -days 9 -out first.crt");
    std::fs::copy(openssl.path("third.key"), openssl.path("first.key")).unwrap();
    for name in ["third", "first"] {
        let served = openssl.serve(name, "-cipher ALL:@SECLEVEL=0");
        let enrolment = stage.worker.enrolment().unwrap().with_master_port(served.port).unwrap();
        let (builder, _tick) = stage.builder();
        let heartbeat = builder.enrolment(enrolment).start().unwrap();
        let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert!(
            failure
                .detail
                .starts_with("the master's certificate is not issued by the CA in ca.crt"),
            "{name}: {failure:?}"
        );
    }
}

#[test]
fn a_pinned_certificate_is_the_only_one() {
    let stage = Stage::new();
    let other = stage.master.authority().issue(Role::Master).unwrap();
    assert!(
        refused(&stage, pin(&other)).starts_with("the master's certificate is not the pinned one")
    );
}

#[test]
fn a_certificate_of_another_ca_is_refused() {
    let other = Authority::new().unwrap().issue(Role::Master).unwrap();
    let stage = Stage::with(Options { certificate: Some(other), ..Options::default() });
    for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
        assert!(
            refused(&stage, identity)
                .starts_with("the master's certificate is not issued by the CA in ca.crt")
        );
    }
}

#[test]
fn a_certificate_that_may_not_serve_or_is_out_of_date_is_refused() {
    for role in [Role::Expired, Role::NotYetValid, Role::WithoutServerAuth, Role::CaAsLeaf] {
        let stage = posing(role.clone());
        for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
            let said = refused(&stage, identity);
            if matches!(role, Role::Expired | Role::NotYetValid) {
                assert!(said.contains("by this host's clock, which shows "), "{role:?}: {said}");
            }
        }
    }
}

#[test]
fn both_tls_versions_are_spoken() {
    for (offered, version) in
        [(Offered::Tls12And13, TlsVersion::Tls13), (Offered::Tls12Only, TlsVersion::Tls12)]
    {
        let stage = Stage::with(Options { offered, ..Options::default() });
        accepted(&stage, MasterIdentity::Name);
        assert_eq!(stage.master.connections()[0].handshake.as_ref().unwrap().version, version);
    }
}
