//! Which certificates of a master are accepted. No byte of a request is sent before that.

use decnet_heartbeat::loopback::{Authority, Issued, Offered, Options, Role, TlsVersion};
use decnet_heartbeat::{EnrolmentSources, MasterIdentity};

use crate::support::{Fixture, OpenSsl, TIMEOUT, now, wait_for_stats};

/// A master that presents the certificate of this role, issued by the worker's CA.
fn master_with(role: Role) -> Fixture {
    let authority = Authority::new().unwrap();
    let certificate = Some(authority.issue(role).unwrap());
    Fixture::with(Options { authority: Some(authority), certificate, ..Options::default() })
}

fn assert_accepted(fixture: &Fixture, identity: MasterIdentity) {
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.master_identity(identity).start().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT), "{:?}", heartbeat.stats());
}

/// Asserts that the beat fails in TLS and that the master receives no request. Returns the detail
/// of the failure.
fn assert_rejected(fixture: &Fixture, identity: MasterIdentity) -> String {
    let (builder, _tick) = fixture.builder();
    let heartbeat = builder.master_identity(identity).start().unwrap();
    let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(failure.class, "tls", "{failure:?}");
    assert_eq!(fixture.master.received().len(), 0);
    failure.detail
}

fn pin(certificate: &Issued) -> MasterIdentity {
    format!("sha256:{}", certificate.fingerprint).parse().unwrap()
}

#[test]
fn master_certificate_is_accepted_by_every_rule_except_public() {
    let fixture = Fixture::new();
    assert_accepted(&fixture, MasterIdentity::Name);
    assert_accepted(&fixture, MasterIdentity::Host);
    assert_accepted(&fixture, MasterIdentity::AnyFromCa);
    assert_accepted(&fixture, pin(fixture.master.certificate()));
    let fixture = Fixture::new();
    let detail = assert_rejected(&fixture, MasterIdentity::PublicCa);
    assert!(detail.starts_with("the certificate is not issued by a public CA"), "{detail}");
}

#[test]
fn sibling_worker_cannot_impersonate_the_master_by_default() {
    let fixture = master_with(Role::Worker("sibling".to_owned()));
    let detail = assert_rejected(&fixture, MasterIdentity::default());
    let expected = r#"the certificate is not the master's own: its common name is "sibling", and must be "swarmctl""#;
    assert_eq!(detail, expected);
    let detail =
        assert_rejected(&master_with(Role::Worker("sibling".to_owned())), MasterIdentity::Host);
    assert_eq!(detail, format!("{expected}; and it is not valid for the configured host"));
}

#[test]
fn sibling_worker_can_impersonate_the_master_by_rule_ca() {
    assert_accepted(&master_with(Role::Worker("sibling".to_owned())), MasterIdentity::AnyFromCa);
}

#[test]
fn web_enrolled_worker_cannot_impersonate_the_master_by_default() {
    for master_host in ["127.0.0.1", "swarmctl"] {
        let role =
            Role::WebEnrolled { name: "worker-07".to_owned(), master_host: master_host.to_owned() };
        let detail = assert_rejected(&master_with(role), MasterIdentity::Name);
        assert!(detail.contains(r#"its common name is "worker-07""#), "{detail}");
    }
}

#[test]
fn rule_host_accepts_any_certificate_of_the_ca_for_the_host() {
    assert_accepted(&master_with(Role::Named("127.0.0.1".to_owned())), MasterIdentity::Host);
    // This includes a worker that was enrolled through the web page.
    let role =
        Role::WebEnrolled { name: "worker-07".to_owned(), master_host: "127.0.0.1".to_owned() };
    assert_accepted(&master_with(role), MasterIdentity::Host);
}

#[test]
fn wildcard_does_not_match_the_masters_name() {
    for name in ["*", "*.swarmctl", "swarmctl.lan", "Swarmctl"] {
        assert_rejected(&master_with(Role::Named(name.to_owned())), MasterIdentity::Name);
    }
}

/// An impostor whose certificate was signed with the key of a worker. Returns the worker's
/// certificate, too.
fn impostor_of(authority: &Authority) -> (Fixture, String) {
    let worker = authority.subordinate(Role::Worker("thief".to_owned())).unwrap();
    let certificate = Some(worker.issue(Role::Master).unwrap());
    let authority = Some(authority.clone());
    (Fixture::with(Options { authority, certificate, ..Options::default() }), worker.certificate())
}

#[test]
fn worker_cannot_issue_a_master_certificate() {
    let authority = Authority::new().unwrap();
    let (mut fixture, issuer) = impostor_of(&authority);
    for identity in [MasterIdentity::Name, MasterIdentity::Host, MasterIdentity::AnyFromCa] {
        assert_rejected(&fixture, identity);
    }
    // With the worker's certificate as an intermediate one.
    let mut certificate = fixture.master.certificate().clone();
    certificate.certificate += &issuer;
    fixture = Fixture::with(Options {
        authority: Some(authority),
        certificate: Some(certificate),
        ..Options::default()
    });
    for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
        assert_rejected(&fixture, identity);
    }
}

#[test]
fn worker_certificate_in_ca_crt_cannot_issue() {
    let authority = Authority::new().unwrap();
    let (fixture, issuer) = impostor_of(&authority);
    let path = fixture.agent_dir().join("ca.crt");
    for content in [
        format!("{}{issuer}", authority.certificate()),
        format!("{issuer}{}", authority.certificate()),
    ] {
        std::fs::write(&path, content).unwrap();
        for identity in [MasterIdentity::Name, MasterIdentity::Host, MasterIdentity::AnyFromCa] {
            let detail = assert_rejected(&fixture, identity);
            assert!(
                detail.starts_with("the master's certificate is not issued by the CA in ca.crt"),
                "{detail}"
            );
        }
    }
    // The worker's certificate in ca.crt is not accepted as the master's, either.
    let worker = authority.issue(Role::Named("swarmctl".to_owned())).unwrap();
    let other = Authority::new().unwrap();
    let options = Options {
        certificate: Some(worker.clone()),
        authority: Some(other.clone()),
        ..Options::default()
    };
    let fixture = Fixture::with(options);
    let content = format!("{}{}", other.certificate(), worker.certificate);
    std::fs::write(fixture.agent_dir().join("ca.crt"), content).unwrap();
    assert_rejected(&fixture, MasterIdentity::Name);
}

#[test]
fn stricter_rule_does_not_resume_an_earlier_session() {
    let fixture = master_with(Role::Worker("sibling".to_owned()));
    let ini = fixture.ini();
    let write = |rule: &str| {
        fixture.worker.write_ini(&ini).unwrap();
        let text = std::fs::read_to_string(&ini).unwrap() + &format!("master-identity = {rule}\n");
        std::fs::write(&ini, text).unwrap();
    };
    write("ca");
    let enrolment =
        EnrolmentSources::from_variables([("HOME", "/nonexistent")]).config(&ini).read().unwrap();
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.enrolment(enrolment).start().unwrap();
    assert!(fixture.master.wait_for_beats(1, TIMEOUT), "{:?}", heartbeat.stats());
    write("name");
    tick.send(now()).unwrap();
    let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
    assert_eq!(failure.class, "tls", "{failure:?}");
    assert_eq!(fixture.master.received().len(), 1);
}

#[test]
fn unsupported_key_or_signature_is_named() {
    let fixture = Fixture::new();
    let openssl = OpenSsl::new(fixture.dir.path());
    std::fs::write(fixture.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    for (name, key, digest, reason) in [
        ("small", "rsa:1024", "-sha256", "its key is an RSA key of 1024 bits; supported are "),
        ("old", "rsa:2048", "-sha1", "it is signed with RSA and SHA-1; supported are "),
        // OpenSSL finds no common signature algorithm before it sends its certificate.
        ("large", "ec -pkeyopt ec_paramgen_curve:P-521", "-sha256", "such as P-521"),
    ] {
        openssl.issue(name, key, digest);
        let server = openssl.start_server(name, "-cipher ALL:@SECLEVEL=0");
        let enrolment = fixture.worker.enrolment().unwrap().with_master_port(server.port).unwrap();
        let (builder, _tick) = fixture.builder();
        let heartbeat = builder.enrolment(enrolment).start().unwrap();
        let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert!(failure.class == "tls" && failure.detail.contains(reason), "{name}: {failure:?}");
    }
}

#[test]
fn self_signed_proxy_certificate_is_rejected_in_any_x509_version() {
    let fixture = Fixture::new();
    let openssl = OpenSsl::new(fixture.dir.path());
    openssl.run("req -x509 -newkey rsa:2048 -nodes -keyout third.key -out third.crt -days 9 -subj /CN=proxy");
    openssl.run("req -new -key third.key -out first.csr -subj /CN=proxy");
    openssl.run("x509 -req -in first.csr -signkey third.key -days 9 -out first.crt");
    std::fs::copy(openssl.path("third.key"), openssl.path("first.key")).unwrap();
    for name in ["third", "first"] {
        let server = openssl.start_server(name, "-cipher ALL:@SECLEVEL=0");
        let enrolment = fixture.worker.enrolment().unwrap().with_master_port(server.port).unwrap();
        let (builder, _tick) = fixture.builder();
        let heartbeat = builder.enrolment(enrolment).start().unwrap();
        let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert!(
            failure
                .detail
                .starts_with("the master's certificate is not issued by the CA in ca.crt"),
            "{name}: {failure:?}"
        );
    }
}

#[test]
fn pin_accepts_no_other_certificate() {
    let fixture = Fixture::new();
    let other = fixture.master.authority().issue(Role::Master).unwrap();
    assert!(
        assert_rejected(&fixture, pin(&other))
            .starts_with("the master's certificate is not the pinned one")
    );
}

#[test]
fn certificate_of_another_ca_is_rejected() {
    let other = Authority::new().unwrap().issue(Role::Master).unwrap();
    let fixture = Fixture::with(Options { certificate: Some(other), ..Options::default() });
    for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
        assert!(
            assert_rejected(&fixture, identity)
                .starts_with("the master's certificate is not issued by the CA in ca.crt")
        );
    }
}

#[test]
fn certificate_with_invalid_usage_or_dates_is_rejected() {
    for role in [Role::Expired, Role::NotYetValid, Role::WithoutServerAuth, Role::CaAsLeaf] {
        let fixture = master_with(role.clone());
        for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
            let detail = assert_rejected(&fixture, identity);
            if matches!(role, Role::Expired | Role::NotYetValid) {
                assert!(
                    detail.contains("by this host's clock, which shows "),
                    "{role:?}: {detail}"
                );
            }
        }
    }
}

#[test]
fn tls_1_2_and_1_3_are_supported() {
    for (offered, version) in
        [(Offered::Tls12And13, TlsVersion::Tls13), (Offered::Tls12Only, TlsVersion::Tls12)]
    {
        let fixture = Fixture::with(Options { offered, ..Options::default() });
        assert_accepted(&fixture, MasterIdentity::Name);
        assert_eq!(fixture.master.connections()[0].handshake.as_ref().unwrap().version, version);
    }
}
