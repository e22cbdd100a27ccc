//! A server that is not the master: the agent rejects it before it sends a byte of the request, and
//! the error gives the reason.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};

use decnet_heartbeat::loopback::{
    Answer, Authority, Fault as MasterFault, LoopbackMaster, Offered, Options, Role,
};

use crate::fault_case::{Expect, Fault, FaultCase, Retry};
use crate::test_bed::TestBed;

/// A server at the master's address.
#[derive(Clone, Debug)]
pub enum Impostor {
    /// Its certificate is issued by the right CA, for this role.
    WithRole(Role),
    WithOtherCa,
    /// It has the master's certificate, and requests client certificates of another CA.
    RequestsOtherClientCa(Offered),
    /// It sends this text, and no TLS.
    PlainText(&'static str),
    /// OpenSSL's server with TLS 1.1 only.
    Tls11Only,
}

/// A server besides the master.
pub enum OtherServer {
    /// It has the master's address.
    Impostor(LoopbackMaster),
    /// The same, and a thread that collects what OpenSSL prints: the requests that it reads.
    OpenSsl(Child, JoinHandle<Vec<String>>),
    /// The master redirects to it.
    RedirectTarget(LoopbackMaster),
}

impl Impostor {
    /// Starts it, and lets the proxy lead to it.
    pub fn start(&self, bed: &TestBed) -> OtherServer {
        let authority = bed.master.authority();
        let with_certificate = |certificate| Options {
            authority: Some(authority.clone()),
            certificate,
            ..Options::default()
        };
        let other_authority = || Authority::new().unwrap();
        let options = match self {
            Self::WithRole(role) => with_certificate(Some(authority.issue(role.clone()).unwrap())),
            Self::WithOtherCa => {
                with_certificate(Some(other_authority().issue(Role::Master).unwrap()))
            }
            Self::RequestsOtherClientCa(offered) => {
                let client_ca = Some(other_authority().certificate());
                Options { client_ca, offered: *offered, ..with_certificate(None) }
            }
            Self::PlainText(_) => with_certificate(None),
            Self::Tls11Only => return start_openssl(bed),
        };
        let master = LoopbackMaster::start_with(options).unwrap();
        if let Self::PlainText(text) = self {
            master.always(Some(MasterFault::Banner(text.as_bytes().to_vec())));
        }
        // It would accept the beats of the worker.
        master.pin(&bed.worker.uuid, &bed.worker.fingerprint);
        bed.proxy.set_target(master.address());
        bed.proxy.close_connections();
        OtherServer::Impostor(master)
    }
}

fn start_openssl(bed: &TestBed) -> OtherServer {
    let issued = bed.master.authority().issue(Role::Master).unwrap();
    let pem = bed.path("openssl.pem");
    std::fs::write(&pem, format!("{}{}", issued.certificate, issued.key)).unwrap();
    let mut command = Command::new("openssl");
    command.args(["s_server", "-accept", "127.0.0.1:0", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]);
    command.arg("-cert").arg(&pem).arg("-key").arg(&pem);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let port = lines.find_map(|line| line.strip_prefix("ACCEPT 127.0.0.1:")?.parse::<u16>().ok());
    bed.proxy.set_target(([127, 0, 0, 1], port.expect("OpenSSL's server listens")).into());
    bed.proxy.close_connections();
    OtherServer::OpenSsl(child, thread::spawn(move || lines.collect()))
}

impl OtherServer {
    /// The master gives every request this answer, with a `Location` at another master.
    pub fn redirect_to(bed: &TestBed, answer: Answer) -> Self {
        let authority = Some(bed.master.authority().clone());
        let other =
            LoopbackMaster::start_with(Options { authority, ..Options::default() }).unwrap();
        let answer = answer.header("Location", format!("{}/swarm/heartbeat", other.url()));
        bed.master.always(Some(answer.into()));
        Self::RedirectTarget(other)
    }

    /// Asserts that it received no byte of a request.
    pub fn assert_no_request(self) {
        match self {
            Self::Impostor(master) => {
                assert_eq!(master.received().len(), 0);
                assert!(!master.connections().is_empty());
            }
            Self::RedirectTarget(master) => {
                assert_eq!(master.connections().len(), 0, "the redirect was followed");
            }
            Self::OpenSsl(mut child, output) => {
                let _ = child.stdin.take().unwrap().write_all(b"Q\n");
                let _ = child.kill();
                child.wait().unwrap();
                let output = output.join().unwrap().join("\n");
                assert!(!output.contains("POST") && !output.contains("host_uuid"), "{output}");
            }
        }
    }
}

pub fn cases() -> Vec<FaultCase> {
    let case = |name: &str, impostor, detail| {
        let expect =
            Expect::Fails { class: "tls", detail, after: 0.0..0.5, retry: Retry::AfterBackoff };
        FaultCase::new(format!("tls/{name}"), Fault::Impostor(impostor), expect)
    };
    let with_role = |name, role, detail| case(name, Impostor::WithRole(role), detail);
    let not_master = "is not the master's own";
    let refused = "the master refused our certificate";
    let web_enrolled =
        Role::WebEnrolled { name: "sibling".to_owned(), master_host: "127.0.0.1".to_owned() };
    vec![
        with_role("expired", Role::Expired, "has expired by this host's clock, which shows 20"),
        with_role(
            "not_yet_valid",
            Role::NotYetValid,
            "is not yet valid by this host's clock, which shows 20",
        ),
        case("other_ca", Impostor::WithOtherCa, "is not issued by the CA in ca.crt"),
        with_role("without_server_auth", Role::WithoutServerAuth, "is not for servers"),
        with_role("ca_as_leaf", Role::CaAsLeaf, "is a CA certificate"),
        with_role("other_name", Role::Named("elsewhere".to_owned()), not_master),
        with_role("sibling_worker", Role::Worker("sibling".to_owned()), not_master),
        with_role("sibling_worker_with_master_host_as_name", web_enrolled, not_master),
        case(
            "requests_other_client_ca",
            Impostor::RequestsOtherClientCa(Offered::Tls12And13),
            refused,
        ),
        case(
            "requests_other_client_ca_with_tls_1.2",
            Impostor::RequestsOtherClientCa(Offered::Tls12Only),
            refused,
        ),
        case(
            "plain_http",
            Impostor::PlainText("HTTP/1.1 400 Bad Request\r\n\r\n"),
            "is plain HTTP, not TLS",
        ),
        case("ssh", Impostor::PlainText("SSH-2.0-OpenSSH_9.2\r\n"), "is neither TLS nor HTTP"),
        case("tls_1.1_only", Impostor::Tls11Only, "neither TLS 1.2 nor TLS 1.3"),
    ]
}
