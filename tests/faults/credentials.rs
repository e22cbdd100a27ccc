//! The bundle and the ini, while they change: the last pair that fits goes on, and a new one is taken over once it fits.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use decnet_heartbeat::loopback::Role;

use crate::row::{Fault, Right, Row};
use crate::stage::Stage;

/// What has happened to the bundle.
#[derive(Clone, Copy, Debug)]
pub enum Bundle {
    /// A new certificate beside the old key.
    HalfWritten,
    /// A key of another certificate.
    ForeignKey,
    EmptyCa,
    /// A worker's certificate beside the CA's.
    WorkerInCa,
    /// Two sections without a line break between them.
    GluedCa,
    EncryptedKey,
    HalfACertificate,
    /// Its key can be read by others.
    Open,
    /// The folder is elsewhere.
    Gone,
}

impl Bundle {
    pub fn put(self, stage: &Stage) {
        let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
        match self {
            Self::HalfWritten => {
                fs::write(stage.agent_file("worker.crt"), other.certificate).unwrap()
            }
            Self::ForeignKey => fs::write(stage.agent_file("worker.key"), other.key).unwrap(),
            Self::EmptyCa => fs::write(stage.agent_file("ca.crt"), "").unwrap(),
            Self::WorkerInCa => {
                let ca = stage.master.authority().certificate();
                fs::write(stage.agent_file("ca.crt"), format!("{ca}{}", other.certificate))
                    .unwrap();
            }
            Self::GluedCa => {
                let ca = stage.master.authority().certificate();
                fs::write(stage.agent_file("ca.crt"), format!("{}{ca}", ca.trim_end())).unwrap();
            }
            Self::EncryptedKey => {
                let encrypted = other.key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
                fs::write(stage.agent_file("worker.key"), encrypted).unwrap();
            }
            Self::HalfACertificate => {
                let half = &other.certificate[..other.certificate.len() / 2];
                fs::write(stage.agent_file("worker.crt"), half).unwrap();
            }
            Self::Open => {
                fs::set_permissions(stage.agent_file("worker.key"), Permissions::from_mode(0o644))
                    .unwrap()
            }
            Self::Gone => fs::rename(&stage.worker.agent_dir, stage.path("elsewhere")).unwrap(),
        }
    }

    /// The bundle as it was, whatever has happened to it.
    pub fn mend(stage: &Stage) {
        if stage.path("elsewhere").exists() {
            fs::rename(stage.path("elsewhere"), &stage.worker.agent_dir).unwrap();
        }
        stage.write_bundle();
    }
}

pub fn rows() -> Vec<Row> {
    let row = |name: &str, bundle, words| {
        Row::new(format!("credentials/{name}"), Fault::Bundle(bundle), Right::Warns(words))
    };
    vec![
        row("half_written", Bundle::HalfWritten, "worker.crt and worker.key do not match"),
        row(
            "half_a_certificate",
            Bundle::HalfACertificate,
            "worker.crt: ends in the middle of a PEM section",
        ),
        row(
            "key_of_another_certificate",
            Bundle::ForeignKey,
            "worker.crt and worker.key do not match",
        ),
        row("empty_ca", Bundle::EmptyCa, "ca.crt: holds no PEM section"),
        row("worker_in_ca", Bundle::WorkerInCa, "certificate in ca.crt ignored: file="),
        row("glued_ca", Bundle::GluedCa, "ca.crt: has two PEM sections on one line"),
        row("encrypted_key", Bundle::EncryptedKey, "worker.key: holds an encrypted private key"),
        row(
            "key_readable_by_others",
            Bundle::Open,
            "private key is accessible to other users, set its mode to 0600: file=",
        ),
        row(
            "directory_gone",
            Bundle::Gone,
            "ca.crt: cannot be read; enrol this host, or correct the agent dir, which does not exist: No such file",
        ),
    ]
}

/// Enrolled anew, with another certificate, while it runs: the next beat shows the new one, in a new session.
pub fn rotated() {
    let stage = Stage::new(Default::default());
    let mut subject = stage.start();
    let again = stage.master.re_enrol(&stage.worker.uuid, &stage.worker.agent_dir).unwrap();
    subject.push("d");
    let stats = subject.until("the delivery", |stats| stats["delivered"] == 1);
    assert_eq!(
        (stats["fingerprint"].as_str(), stats["failure"].is_null()),
        (Some(&*again.fingerprint), true)
    );
    let last = stage.master.connections().pop().unwrap().handshake.unwrap();
    assert_eq!(
        (last.fingerprint, last.resumed),
        (again.fingerprint.clone(), false),
        "an old session is not resumed"
    );
    assert_eq!(subject.log_lines("credentials reloaded").len(), 1);
}

/// Decommissioned, and enrolled as another host: the ini's new uuid is taken over with the files.
pub fn a_new_uuid() {
    let stage = Stage::new(Default::default());
    let mut subject = stage.start();
    stage.master.decommission(&stage.worker.uuid);
    subject.push("d");
    let stats = subject.until("the refusal", |stats| !stats["failure"].is_null());
    assert_eq!((&stats["failure"]["class"], &stats["waiting"]), (&"http-404".into(), &1.into()));
    let mut again = stage.master.enrol(&stage.worker.agent_dir).unwrap();
    again.port = stage.gate.port();
    again.write_ini(&stage.path("decnet.ini")).unwrap();
    subject.tick();
    let stats = subject.until("the delivery", |stats| stats["delivered"] == 1);
    assert_eq!(
        (stats["host_uuid"].as_str(), stats["failure"].is_null()),
        (Some(&*again.uuid), true)
    );
    assert_eq!(stage.last()["host_uuid"], again.uuid);
    assert!(!stage.master.connections().pop().unwrap().handshake.unwrap().resumed);
}
