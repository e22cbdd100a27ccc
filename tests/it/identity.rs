//! Who counts as the master: nothing of the request leaves before its certificate has been accepted.

use decnet_heartbeat::MasterIdentity;
use decnet_heartbeat::loopback::{Authority, Issued, Offered, Options, Role, TlsVersion};

use crate::support::{PATIENCE, Stage, settled};

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
    accepted(&stage, MasterIdentity::AnyFromCa);
    accepted(&stage, pin(stage.master.certificate()));
    let stage = Stage::new();
    assert!(refused(&stage, MasterIdentity::PublicCa).contains("UnknownIssuer"));
}

#[test]
fn a_sibling_worker_cannot_pose_as_the_master_by_default() {
    let stage = posing(Role::Worker("sibling".to_owned()));
    let said = refused(&stage, MasterIdentity::default());
    assert!(said.starts_with("the master's certificate is neither for swarmctl nor for its host"), "{said}");
}

#[test]
fn a_sibling_worker_can_pose_as_the_master_under_the_originals_rule() {
    accepted(&posing(Role::Worker("sibling".to_owned())), MasterIdentity::AnyFromCa);
}

#[test]
fn a_certificate_for_the_configured_host_is_accepted() {
    accepted(&posing(Role::Named("127.0.0.1".to_owned())), MasterIdentity::Name);
}

#[test]
fn a_pinned_certificate_is_the_only_one() {
    let stage = Stage::new();
    let other = stage.master.authority().issue(Role::Master).unwrap();
    assert!(refused(&stage, pin(&other)).starts_with("the master's certificate is not the pinned one"));
}

#[test]
fn a_certificate_of_another_ca_is_refused() {
    let other = Authority::new().unwrap().issue(Role::Master).unwrap();
    let stage = Stage::with(Options { certificate: Some(other), ..Options::default() });
    for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
        assert!(refused(&stage, identity).starts_with("the master's certificate is not of our ca.crt"));
    }
}

#[test]
fn a_certificate_that_may_not_serve_or_is_out_of_date_is_refused() {
    for role in [Role::Expired, Role::NotYetValid, Role::WithoutServerAuth, Role::CaAsLeaf] {
        let stage = posing(role.clone());
        for identity in [MasterIdentity::Name, MasterIdentity::AnyFromCa] {
            let said = refused(&stage, identity);
            if matches!(role, Role::Expired | Role::NotYetValid) {
                assert!(said.contains("by this host's clock, which says "), "{role:?}: {said}");
            }
        }
    }
}

#[test]
fn both_tls_versions_are_spoken() {
    for (offered, version) in [(Offered::Tls12And13, TlsVersion::Tls13), (Offered::Tls12Only, TlsVersion::Tls12)] {
        let stage = Stage::with(Options { offered, ..Options::default() });
        accepted(&stage, MasterIdentity::Name);
        assert_eq!(stage.master.connections()[0].handshake.as_ref().unwrap().version, version);
    }
}
