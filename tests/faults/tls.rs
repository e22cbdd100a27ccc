//! Who is not the master: it is refused before a byte of the request leaves, and the error says why.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use decnet_heartbeat::loopback::{
    Answer, Authority, Fault as Wire, LoopbackMaster, Offered, Options, Role,
};

use crate::row::{Again, Fault, Right, Row};
use crate::stage::{PATIENCE, Stage};

/// Who has taken the master's address over.
#[derive(Clone, Debug)]
pub enum Impostor {
    /// With a certificate of our CA, in this role.
    As(Role),
    OfAnotherCa,
    /// The master's own certificate, but it wants the agents of another CA.
    WantingAnotherCa(Offered),
    /// No TLS at all: it says this in plain text.
    Saying(&'static str),
    /// OpenSSL's server, which speaks nothing newer than TLS 1.1 here.
    OfTls11,
}

/// The impostor, for as long as it poses.
pub enum Posing {
    As(LoopbackMaster),
    /// OpenSSL's server says what it has read.
    OpenSsl(Child),
    /// It does not pose: the master sends us there.
    Elsewhere(LoopbackMaster),
}

impl Impostor {
    pub fn replace_credentials(&self, stage: &Stage) -> Posing {
        let ours = stage.master.authority();
        let with = |certificate| Options {
            authority: Some(ours.clone()),
            certificate,
            ..Options::default()
        };
        let other = || Authority::new().unwrap();
        let options = match self {
            Self::As(role) => with(Some(ours.issue(role.clone()).unwrap())),
            Self::OfAnotherCa => with(Some(other().issue(Role::Master).unwrap())),
            Self::WantingAnotherCa(offered) => {
                let client_ca = Some(other().certificate());
                Options { client_ca, offered: *offered, ..with(None) }
            }
            Self::Saying(_) => with(None),
            Self::OfTls11 => return open_ssl(stage),
        };
        let master = LoopbackMaster::start_with(options).unwrap();
        if let Self::Saying(text) = self {
            master.always(Some(Wire::Banner(text.as_bytes().to_vec())));
        }
        // It would accept our beats if they came.
        master.pin(&stage.worker.uuid, &stage.worker.fingerprint);
        stage.gate.lead_to(master.address());
        stage.gate.cut();
        Posing::As(master)
    }
}

fn open_ssl(stage: &Stage) -> Posing {
    let issued = stage.master.authority().issue(Role::Master).unwrap();
    let pem = stage.path("openssl.pem");
    std::fs::write(&pem, format!("{}{}", issued.certificate, issued.key)).unwrap();
    let port = fastrand::u16(20_000..32_000);
    let mut command = Command::new("openssl");
    command.args([
        "s_server",
        "-accept",
        &format!("127.0.0.1:{port}"),
        "-tls1_1",
        "-cipher",
        "ALL:@SECLEVEL=0",
    ]);
    command
        .arg("-cert")
        .arg(&pem)
        .arg("-key")
        .arg(&pem)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    let end = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "openssl s_server does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    stage.gate.lead_to(([127, 0, 0, 1], port).into());
    stage.gate.cut();
    Posing::OpenSsl(child)
}

impl Posing {
    /// From here on the master answers like this, and names another one as the place to go to.
    pub fn elsewhere(stage: &Stage, answer: Answer) -> Self {
        let authority = Some(stage.master.authority().clone());
        let other =
            LoopbackMaster::start_with(Options { authority, ..Options::default() }).unwrap();
        let answer = answer.header("Location", format!("{}/swarm/heartbeat", other.url()));
        stage.master.always(Some(answer.into()));
        Self::Elsewhere(other)
    }

    /// It was refused, and has read nothing of the request.
    pub fn check(self) {
        match self {
            Self::As(master) => {
                assert_eq!(master.received().len(), 0);
                assert!(!master.connections().is_empty());
            }
            Self::Elsewhere(master) => assert_eq!(master.connections().len(), 0, "nobody follows"),
            Self::OpenSsl(mut child) => {
                let _ = child.stdin.take().unwrap().write_all(b"Q\n");
                let _ = child.kill();
                let said =
                    String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned();
                assert!(!said.contains("POST") && !said.contains("host_uuid"), "{said}");
            }
        }
    }
}

pub fn rows() -> Vec<Row> {
    let row = |name: &str, impostor, says| {
        let right = Right::Fails { class: "tls", says, after: 0.0..0.5, again: Again::Soon };
        Row::new(format!("tls/{name}"), Fault::Master(impostor), right)
    };
    let refused = "the master refused our certificate";
    let web_enrolled =
        Role::WebEnrolled { name: "sibling".to_owned(), master_host: "127.0.0.1".to_owned() };
    vec![
        row(
            "expired",
            Impostor::As(Role::Expired),
            "has expired by this host's clock, which shows 20",
        ),
        row(
            "not_yet_valid",
            Impostor::As(Role::NotYetValid),
            "is not yet valid by this host's clock, which shows 20",
        ),
        row("of_another_ca", Impostor::OfAnotherCa, "is not issued by the CA in ca.crt"),
        row("without_server_auth", Impostor::As(Role::WithoutServerAuth), "is not for servers"),
        row("a_ca_as_leaf", Impostor::As(Role::CaAsLeaf), "is a CA certificate"),
        row(
            "of_the_wrong_name",
            Impostor::As(Role::Named("elsewhere".to_owned())),
            "is not the master's own",
        ),
        row(
            "of_a_sibling",
            Impostor::As(Role::Worker("sibling".to_owned())),
            "is not the master's own",
        ),
        row(
            "of_a_sibling_enrolled_with_the_masters_host",
            Impostor::As(web_enrolled),
            "is not the master's own",
        ),
        row("wants_another_client_ca", Impostor::WantingAnotherCa(Offered::Tls12And13), refused),
        row(
            "wants_another_client_ca_by_tls_1.2",
            Impostor::WantingAnotherCa(Offered::Tls12Only),
            refused,
        ),
        row(
            "speaks_plain_http",
            Impostor::Saying("HTTP/1.1 400 Bad Request\r\n\r\n"),
            "is plain HTTP, not TLS",
        ),
        row("speaks_ssh", Impostor::Saying("SSH-2.0-OpenSSH_9.2\r\n"), "is neither TLS nor HTTP"),
        row("speaks_tls_1.1_only", Impostor::OfTls11, "neither TLS 1.2 nor TLS 1.3"),
    ]
}
