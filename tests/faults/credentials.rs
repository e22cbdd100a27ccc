//! Changes of the bundle and the ini: the last valid pair stays in use, and a new one is used once
//! it is valid.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use decnet_heartbeat::loopback::Role;

use crate::fault_case::{Expect, Fault, FaultCase};
use crate::test_bed::{Scenario, TestBed};

/// A fault of the bundle's files.
#[derive(Clone, Copy, Debug)]
pub enum BundleFault {
    /// A new certificate with the old key.
    CertificateOfOtherKey,
    KeyOfOtherCertificate,
    EmptyCa,
    /// A worker's certificate besides that of the CA.
    WorkerInCa,
    /// Two PEM sections without a line break between them.
    CaWithoutLineBreak,
    EncryptedKey,
    TruncatedCertificate,
    /// Other users can read the key.
    ReadableKey,
    /// The folder is renamed.
    FolderRenamed,
}

impl BundleFault {
    pub fn inject(self, bed: &TestBed) {
        let authority = bed.master.authority();
        let ca = authority.certificate();
        let other = authority.issue(Role::Worker("other".to_owned())).unwrap();
        let write = |name, content: &str| fs::write(bed.agent_file(name), content).unwrap();
        match self {
            Self::CertificateOfOtherKey => write("worker.crt", &other.certificate),
            Self::KeyOfOtherCertificate => write("worker.key", &other.key),
            Self::EmptyCa => write("ca.crt", ""),
            Self::WorkerInCa => write("ca.crt", &format!("{ca}{}", other.certificate)),
            Self::CaWithoutLineBreak => write("ca.crt", &format!("{}{ca}", ca.trim_end())),
            Self::EncryptedKey => {
                write("worker.key", &other.key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"));
            }
            Self::TruncatedCertificate => {
                write("worker.crt", &other.certificate[..other.certificate.len() / 2]);
            }
            Self::ReadableKey => {
                let mode = Permissions::from_mode(0o644);
                fs::set_permissions(bed.agent_file("worker.key"), mode).unwrap();
            }
            Self::FolderRenamed => {
                fs::rename(&bed.worker.agent_dir, bed.path("renamed")).unwrap();
            }
        }
    }

    /// Restores the bundle after any of the faults.
    pub fn restore(bed: &TestBed) {
        if bed.path("renamed").exists() {
            fs::rename(bed.path("renamed"), &bed.worker.agent_dir).unwrap();
        }
        bed.write_bundle();
    }
}

pub fn cases() -> Vec<FaultCase> {
    let case = |name: &str, fault, warning| {
        FaultCase::new(format!("credentials/{name}"), Fault::Bundle(fault), Expect::Warns(warning))
    };
    vec![
        case(
            "certificate_of_other_key",
            BundleFault::CertificateOfOtherKey,
            "worker.crt and worker.key do not match",
        ),
        case(
            "key_of_other_certificate",
            BundleFault::KeyOfOtherCertificate,
            "worker.crt and worker.key do not match",
        ),
        case(
            "truncated_certificate",
            BundleFault::TruncatedCertificate,
            "worker.crt: ends in the middle of a PEM section",
        ),
        case("empty_ca", BundleFault::EmptyCa, "ca.crt: holds no PEM section"),
        case("worker_in_ca", BundleFault::WorkerInCa, "certificate in ca.crt ignored: file="),
        case(
            "ca_without_line_break",
            BundleFault::CaWithoutLineBreak,
            "ca.crt: has two PEM sections on one line",
        ),
        case(
            "encrypted_key",
            BundleFault::EncryptedKey,
            "worker.key: holds an encrypted private key",
        ),
        case(
            "key_readable_by_other_users",
            BundleFault::ReadableKey,
            "private key is accessible to other users, set its mode to 0600: file=",
        ),
        case(
            "folder_renamed",
            BundleFault::FolderRenamed,
            "ca.crt: cannot be read; enrol this host, or correct the agent dir, which does not exist: No such file",
        ),
    ]
}

/// A renewed enrolment while the heartbeat runs: the next beat uses the new certificate in a new
/// TLS session.
pub fn renewed_certificate_is_used_for_next_beat() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    let renewed = bed.master.re_enrol(&bed.worker.uuid, &bed.worker.agent_dir).unwrap();
    agent.push("d");
    let stats = agent.wait_for("the delivery", |stats| stats["delivered"] == 1);
    assert_eq!(stats["fingerprint"], renewed.fingerprint);
    assert!(stats["failure"].is_null(), "{stats}");
    let last = bed.master.connections().pop().unwrap().handshake.unwrap();
    assert_eq!(last.fingerprint, renewed.fingerprint);
    assert!(!last.resumed, "the session of the old certificate was resumed");
    assert_eq!(agent.log_lines("credentials reloaded").len(), 1);
}

/// The host is decommissioned and enrolled as another one: the new uuid of the ini is read together
/// with the files.
pub fn new_uuid_is_read_with_new_bundle() {
    let bed = TestBed::new(Scenario::default());
    let mut agent = bed.start();
    bed.master.decommission(&bed.worker.uuid);
    agent.push("d");
    let stats = agent.wait_for("the rejection", |stats| !stats["failure"].is_null());
    assert_eq!(stats["failure"]["class"], "http-404");
    assert_eq!(stats["waiting"], 1);
    let mut enrolled = bed.master.enrol(&bed.worker.agent_dir).unwrap();
    enrolled.port = bed.proxy.port();
    enrolled.write_ini(&bed.path("decnet.ini")).unwrap();
    agent.tick();
    let stats = agent.wait_for("the delivery", |stats| stats["delivered"] == 1);
    assert_eq!(stats["host_uuid"], enrolled.uuid);
    assert!(stats["failure"].is_null(), "{stats}");
    assert_eq!(bed.last_body()["host_uuid"], enrolled.uuid);
    assert!(!bed.master.connections().pop().unwrap().handshake.unwrap().resumed);
}
