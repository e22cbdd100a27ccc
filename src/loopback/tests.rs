//! Tests of the loopback master. Their client is a TCP stream with rustls, on the test's thread.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// Far longer than any step takes. It only ends if a test fails.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client reads from a master that is expected to send nothing.
const SILENCE: Duration = Duration::from_millis(50);

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// A master, an enrolled worker, and the worker's TLS configuration.
struct Fixture {
    master: LoopbackMaster,
    worker: Enrolled,
    tls: Arc<ClientConfig>,
    dir: TempDir,
}

fn fixture(options: Options) -> Fixture {
    let master = LoopbackMaster::start_with(options).unwrap();
    let dir = TempDir::new().unwrap();
    let worker = master.enrol(dir.path()).unwrap();
    let read = |name| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let tls = client_tls(&read("ca.crt"), Some((&read("worker.crt"), &read("worker.key"))));
    Fixture { master, worker, tls, dir }
}

fn client_tls(ca: &str, identity: Option<(&str, &str)>) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(ca));
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes())
                .collect::<Result<_, _>>()
                .unwrap();
            builder
                .with_client_auth_cert(
                    chain,
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap()
        }
    })
}

fn roots(ca: &str) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    roots
}

fn connect(master: &LoopbackMaster, tls: &Arc<ClientConfig>) -> io::Result<Stream> {
    let socket = TcpStream::connect(master.address())?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let name = ServerName::try_from("swarmctl").unwrap();
    Ok(StreamOwned::new(ClientConnection::new(Arc::clone(tls), name).unwrap(), socket))
}

fn send(stream: &mut Stream, body: &[u8]) -> io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "POST /swarm/heartbeat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )?;
    stream.write_all(body)?;
    stream.flush()
}

/// Reads the status and the body of the next answer.
fn answer(stream: &mut Stream) -> io::Result<(u16, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status, String::from_utf8(body).unwrap()))
}

fn post(stream: &mut Stream, body: &Value) -> io::Result<(u16, String)> {
    send(stream, body.to_string().as_bytes())?;
    answer(stream)
}

impl Fixture {
    fn connect(&self) -> Stream {
        connect(&self.master, &self.tls).unwrap()
    }

    /// Sends one beat with these deltas on a new connection. Returns the status.
    fn beat(&self, deltas: &Value) -> u16 {
        let body = json!({ "host_uuid": self.worker.uuid, "status": {}, "lifecycle": deltas });
        post(&mut self.connect(), &body).unwrap().0
    }

    fn status(&self, status: &Value) -> u16 {
        post(&mut self.connect(), &json!({ "host_uuid": self.worker.uuid, "status": status }))
            .unwrap()
            .0
    }
}

fn delta(decky: &str, status: &str, error: &str) -> Value {
    json!({ "decky_name": decky, "operation": "deploy", "status": status, "error": error,
            "completed_at": "2026-01-02T03:04:05Z" })
}

#[test]
fn beat_is_answered_204_and_recorded() {
    let fixture = fixture(Options::default());
    let body = json!({ "host_uuid": fixture.worker.uuid, "agent_version": "1.0", "status": { "deployed": false } });
    let mut stream = fixture.connect();
    assert_eq!(post(&mut stream, &body).unwrap(), (204, String::new()));
    assert_eq!(post(&mut stream, &body).unwrap(), (204, String::new()));
    assert!(fixture.master.wait_for_beats(2, TIMEOUT));
    let received = fixture.master.received();
    assert_eq!(received.len(), 2);
    assert_eq!(received[1].json, Some(body.clone()));
    assert_eq!(received[1].body, body.to_string().as_bytes());
    assert_eq!(received[1].header("Content-Type"), Some("application/json"));
    assert_eq!((received[1].status, received[1].connection), (Some(204), 1));
    assert!(fixture.master.wait_until(TIMEOUT, |seen| seen.connections()[0].requests == 2));
    assert!(!fixture.master.wait_for_beats(3, Duration::ZERO));
}

#[test]
fn unknown_host_and_other_certificate_are_rejected() {
    let fixture = fixture(Options::default());
    let unknown = json!({ "host_uuid": "nobody", "status": {} });
    let mine = json!({ "host_uuid": fixture.worker.uuid, "status": {} });
    let mut stream = fixture.connect();
    assert_eq!(
        post(&mut stream, &unknown).unwrap(),
        (404, r#"{"detail":"unknown host"}"#.to_owned())
    );
    let fresh = fixture.master.re_enrol(&fixture.worker.uuid, fixture.dir.path()).unwrap();
    assert_ne!(fresh.fingerprint, fixture.worker.fingerprint);
    assert_eq!(
        post(&mut stream, &mine).unwrap(),
        (403, r#"{"detail":"cert fingerprint mismatch"}"#.to_owned())
    );
    fixture.master.pin(&fixture.worker.uuid, &fixture.worker.fingerprint.to_uppercase());
    assert_eq!(post(&mut stream, &mine).unwrap().0, 204);
    fixture.master.decommission(&fixture.worker.uuid);
    assert_eq!(post(&mut stream, &mine).unwrap().0, 404);
    assert!(!fixture.master.wait_for_beats(2, Duration::ZERO), "rejected beats do not count");
}

#[test]
fn body_that_does_not_fit_the_model_is_rejected() {
    let fixture = fixture(Options::default());
    let mut stream = fixture.connect();
    let uuid = &fixture.worker.uuid;
    let table: &[(Vec<u8>, u16)] = &[
        (json!({ "host_uuid": uuid }).to_string().into(), 422),
        (json!({ "status": {} }).to_string().into(), 422),
        (json!({ "host_uuid": 5, "status": {} }).to_string().into(), 422),
        (json!({ "host_uuid": uuid, "status": [] }).to_string().into(), 422),
        (json!({ "host_uuid": uuid, "status": {}, "agent_version": 1 }).to_string().into(), 422),
        (json!({ "host_uuid": uuid, "status": {}, "topology": "t" }).to_string().into(), 422),
        (json!({ "host_uuid": uuid, "status": {}, "lifecycle": ["x"] }).to_string().into(), 422),
        (json!([uuid, null, {}, null, null]).to_string().into(), 422),
        (b"{".to_vec(), 422),
        (b"".to_vec(), 422),
        (b"{\"a\": \"\xff\"}".to_vec(), 400),
        (
            json!({ "host_uuid": uuid, "status": {}, "topology": null, "lifecycle": null, "more": 1 })
                .to_string()
                .into(),
            204,
        ),
        (format!(r#"{{"host_uuid": 1, "host_uuid": "{uuid}", "status": {{}}}}"#).into(), 204),
    ];
    for (body, status) in table {
        send(&mut stream, body).unwrap();
        assert_eq!(answer(&mut stream).unwrap().0, *status, "{}", String::from_utf8_lossy(body));
    }
}

#[test]
fn other_paths_and_methods_are_rejected() {
    let fixture = fixture(Options::default());
    let mut stream = fixture.connect();
    for (line, status, detail) in [
        ("POST /swarm/else", 404, "Not Found"),
        ("GET /swarm/heartbeat?a=b", 405, "Method Not Allowed"),
    ] {
        write!(stream, "{line} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        assert_eq!(answer(&mut stream).unwrap(), (status, format!(r#"{{"detail":"{detail}"}}"#)));
    }
    stream.write_all(b"what is this\r\n\r\n").unwrap();
    assert_eq!(answer(&mut stream).unwrap().0, 400);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "closed in order");
}

#[test]
fn delta_closes_the_newest_open_row_of_its_decky_operation_and_host() {
    let fixture = fixture(Options::default());
    let open = |uuid: &str, decky, operation| fixture.master.open_operation(uuid, decky, operation);
    let old = open(&fixture.worker.uuid, "d1", "deploy");
    let new = open(&fixture.worker.uuid, "d1", "deploy");
    for (uuid, decky, operation) in [
        ("another", "d1", "deploy"),
        (&fixture.worker.uuid, "d2", "deploy"),
        (&fixture.worker.uuid, "d1", "mutate"),
    ] {
        open(uuid, decky, operation);
    }
    assert_eq!(
        fixture.beat(&json!([
            delta("d1", "failed", &"ä".repeat(3000)),
            delta("d1", "succeeded", "x")
        ])),
        204
    );
    let rows = fixture.master.rows();
    let row = |id| rows.iter().find(|row| row.id == id).unwrap();
    assert_eq!(row(new).status, RowStatus::Failed);
    assert_eq!(row(new).error.as_ref().unwrap(), &"ä".repeat(2000));
    assert_eq!(row(new).completed_at, humantime::parse_rfc3339("2026-01-02T03:04:05Z").ok());
    assert_eq!(row(old).status, RowStatus::Succeeded);
    assert_eq!(rows.iter().filter(|row| row.status == RowStatus::Running).count(), 3);
}

#[test]
fn malformed_deltas_are_dropped_and_running_closes_no_row() {
    let fixture = fixture(Options::default());
    fixture.master.open_operation(&fixture.worker.uuid, "d1", "deploy");
    let unfinished = json!([
        { "operation": "deploy", "status": "failed" },
        delta("d1", "gone", "x"),
        { "decky_name": "d1", "operation": "deploy", "status": "running" },
    ]);
    assert_eq!(fixture.beat(&unfinished), 204);
    assert_eq!(
        (fixture.master.rows()[0].status, fixture.master.rows()[0].completed_at),
        (RowStatus::Running, None)
    );
    let finished = json!([{ "decky_name": "d1", "operation": "deploy", "status": "succeeded", "completed_at": "soon" }]);
    assert_eq!(fixture.beat(&finished), 204);
    assert_eq!(fixture.master.rows()[0].status, RowStatus::Succeeded);
    assert!(fixture.master.rows()[0].completed_at.is_some(), "the master's own clock");
    assert_eq!(fixture.beat(&finished), 204, "a duplicate is no error");
}

#[test]
fn runtime_decides_the_state_of_shards() {
    let fixture = fixture(Options::default());
    let decky = |name| {
        json!({ "name": name, "ip": "10.0.0.1", "services": ["ssh"], "distro": "debian", "base_image": "debian",
                "hostname": name })
    };
    let mut strange = decky("strange");
    strange["unknown_key"] = json!(1);
    let mut idle = decky("idle");
    idle["services"] = json!([]);
    let deckies =
        json!([decky("up"), decky("down"), decky("missing"), strange, idle, "not a decky"]);
    let runtime = json!({ "up": { "running": true }, "down": { "running": false } });
    assert_eq!(fixture.status(&json!({ "deployed": false, "deckies": deckies })), 204);
    assert_eq!(fixture.status(&json!({ "deployed": true, "deckies": [] })), 204);
    assert!(fixture.master.shards().is_empty());
    assert_eq!(
        fixture.status(&json!({ "deployed": true, "deckies": deckies, "runtime": runtime })),
        204
    );
    let shards = fixture.master.shards();
    let states: Vec<_> = shards.iter().map(|(name, shard)| (name.as_str(), shard.state)).collect();
    assert_eq!(
        states,
        [
            ("down", ShardState::Degraded),
            ("missing", ShardState::Degraded),
            ("up", ShardState::Running)
        ]
    );
    assert_eq!(shards["up"].services, ["ssh"]);
}

#[test]
fn resumed_session_has_the_certificate() {
    for (offered, version) in
        [(Offered::Tls12And13, TlsVersion::Tls13), (Offered::Tls12Only, TlsVersion::Tls12)]
    {
        let fixture = fixture(Options { offered, ..Options::default() });
        assert_eq!(fixture.beat(&json!([])), 204);
        assert_eq!(fixture.beat(&json!([])), 204);
        let handshakes: Vec<_> =
            fixture.master.connections().into_iter().filter_map(|one| one.handshake).collect();
        let expected = |resumed| Handshake {
            version,
            resumed,
            fingerprint: fixture.worker.fingerprint.clone(),
            server_name: Some("swarmctl".to_owned()),
        };
        assert_eq!(handshakes, [expected(false), expected(true)]);
    }
}

#[test]
fn handshake_requires_a_certificate_of_the_ca() {
    let fixture = fixture(Options::default());
    let ca = fixture.master.authority().certificate();
    let foreign = Authority::new().unwrap().issue(Role::Worker("w".to_owned())).unwrap();
    let expired = fixture.master.authority().issue(Role::Expired).unwrap();
    let clients = [
        (client_tls(&ca, None), "peer sent no certificates"),
        (client_tls(&ca, Some((&foreign.certificate, &foreign.key))), "invalid peer certificate"),
        (client_tls(&ca, Some((&expired.certificate, &expired.key))), "expired"),
    ];
    for (tls, reason) in clients {
        let mut stream = connect(&fixture.master, &tls).unwrap();
        let error = post(&mut stream, &json!({})).unwrap_err();
        assert!(error.to_string().contains("alert"), "{error}");
        drop(stream);
        let is_rejected = |seen: &Seen| {
            seen.connections()
                .last()
                .unwrap()
                .failure
                .as_ref()
                .is_some_and(|failure| failure.contains(reason))
        };
        assert!(
            fixture.master.wait_until(TIMEOUT, is_rejected),
            "{reason}: {:?}",
            fixture.master.connections().last()
        );
    }
    assert!(fixture.master.received().is_empty());
}

#[test]
fn options_set_the_client_ca_and_the_certificate() {
    let ca = Authority::new().unwrap();
    let clients = Authority::new().unwrap();
    let certificate = ca.issue(Role::Named("swarmctl".to_owned())).unwrap();
    let worker = clients.issue(Role::Worker("w".to_owned())).unwrap();
    let master = LoopbackMaster::start_with(Options {
        certificate: Some(certificate),
        client_ca: Some(clients.certificate()),
        ..Options::default()
    })
    .unwrap();
    master.pin("u", &worker.fingerprint);
    let tls = client_tls(&ca.certificate(), Some((&worker.certificate, &worker.key)));
    let mut stream = connect(&master, &tls).unwrap();
    assert_eq!(post(&mut stream, &json!({ "host_uuid": "u", "status": {} })).unwrap().0, 204);
}

#[test]
fn certificates_fit_their_roles() {
    let ca = Authority::new().unwrap();
    let other = Authority::new().unwrap();
    let provider = Arc::new(default_provider());
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots(&ca.certificate())), provider)
            .build()
            .unwrap();
    let verify = |issued: &Issued, name: &'static str| {
        let leaf = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap();
        let name = ServerName::try_from(name).unwrap();
        match verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::now()) {
            Ok(_) => String::new(),
            Err(error) => format!("{error:?}"),
        }
    };
    let table = [
        (Role::Master, "swarmctl", ""),
        (Role::Master, "localhost", ""),
        (Role::Master, "127.0.0.1", ""),
        (Role::Master, "example.test", "NotValidForName"),
        (Role::Worker("w1".to_owned()), "w1", ""),
        (Role::Worker("w1".to_owned()), "swarmctl", "NotValidForName"),
        (Role::Named("192.0.2.1".to_owned()), "192.0.2.1", ""),
        (
            Role::WebEnrolled { name: "w1".to_owned(), master_host: "127.0.0.1".to_owned() },
            "w1",
            "",
        ),
        (
            Role::WebEnrolled { name: "w1".to_owned(), master_host: "127.0.0.1".to_owned() },
            "127.0.0.1",
            "",
        ),
        (
            Role::WebEnrolled { name: "w1".to_owned(), master_host: "127.0.0.1".to_owned() },
            "swarmctl",
            "NotValidForName",
        ),
        (Role::Expired, "swarmctl", "Expired"),
        (Role::NotYetValid, "swarmctl", "NotValidYet"),
        (Role::WithoutServerAuth, "swarmctl", "InvalidPurpose"),
        (Role::CaAsLeaf, "swarmctl", "CaUsedAsEndEntity"),
    ];
    for (role, name, expected) in table {
        let error = verify(&ca.issue(role.clone()).unwrap(), name);
        assert!(
            error.contains(expected) && error.is_empty() == expected.is_empty(),
            "{role:?} {name}: {error}"
        );
        // A master can present each of them.
        let certificate = Some(ca.issue(role).unwrap());
        LoopbackMaster::start_with(Options { certificate, ..Options::default() }).unwrap();
    }
    assert_ne!(verify(&other.issue(Role::Master).unwrap(), "swarmctl"), "");
}

#[test]
fn bundle_and_ini_have_the_expected_content_and_modes() {
    let fixture = fixture(Options::default());
    let mode =
        std::fs::metadata(fixture.dir.path().join("worker.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let ini = fixture.dir.path().join("decnet.ini");
    fixture.worker.write_ini(&ini).unwrap();
    let text = std::fs::read_to_string(ini).unwrap();
    let lines = [
        "mode = agent".to_owned(),
        "master-host = 127.0.0.1".to_owned(),
        format!("swarmctl-port = {}", fixture.master.port()),
        format!("agent-dir = {}", fixture.dir.path().display()),
        format!("host-uuid = {}", fixture.worker.uuid),
    ];
    for line in lines {
        assert!(text.lines().any(|known| known == line), "{line} in {text}");
    }
    assert_eq!(fixture.worker.uuid.as_bytes()[14], b'4', "{}", fixture.worker.uuid);
    let error = fixture.worker.write_ini(Path::new("/nowhere/decnet.ini")).unwrap_err();
    assert_eq!(error.to_string(), "loopback master: cannot write /nowhere/decnet.ini");
}

#[test]
fn outage_cuts_connections_and_only_sessions_are_lost() {
    let mut fixture = fixture(Options::default());
    let row = fixture.master.open_operation(&fixture.worker.uuid, "d1", "deploy");
    let mut open = fixture.connect();
    assert_eq!(
        post(&mut open, &json!({ "host_uuid": fixture.worker.uuid, "status": {} })).unwrap().0,
        204
    );
    let port = fixture.master.port();
    fixture.master.stop();
    fixture.master.stop();
    assert!(post(&mut open, &json!({})).is_err(), "cut");
    assert_eq!(
        connect(&fixture.master, &fixture.tls).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    assert!(fixture.master.connections().iter().all(|one| !one.open));
    fixture.master.start_again().unwrap();
    assert_eq!(fixture.master.port(), port);
    assert_eq!(fixture.beat(&json!([delta("d1", "succeeded", "x")])), 204);
    assert_eq!(
        (fixture.master.rows()[0].id, fixture.master.rows()[0].status),
        (row, RowStatus::Succeeded)
    );
    assert_eq!(fixture.master.received().len(), 2);
    assert!(
        !fixture.master.connections()[1].handshake.as_ref().unwrap().resumed,
        "the tickets' keys are new"
    );
}

#[test]
fn idle_connection_is_closed_with_close_notify() {
    let fixture = fixture(Options { idle: SILENCE, ..Options::default() });
    let mut stream = fixture.connect();
    assert_eq!(
        post(&mut stream, &json!({ "host_uuid": fixture.worker.uuid, "status": {} })).unwrap().0,
        204
    );
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "with close_notify");
    drop(stream);
    assert!(fixture.master.wait_until(TIMEOUT, |seen| !seen.connections()[0].open));
    assert_eq!(fixture.master.connections()[0].failure, None);
}

/// The result of a beat for the client.
#[derive(Debug, PartialEq)]
enum Outcome {
    Answered(u16),
    Cut,
    Silence,
    NotTls,
}

fn outcome(result: io::Result<(u16, String)>) -> Outcome {
    match result {
        Ok((status, _)) => Outcome::Answered(status),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Outcome::Silence,
            ErrorKind::InvalidData => Outcome::NotTls,
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                Outcome::Cut
            }
            other => panic!("{other:?}"),
        },
    }
}

fn endless(first: &[u8]) -> Fault {
    Fault::Endless(first.to_vec(), vec![b'.'; 1024], Duration::ZERO)
}

#[test]
fn each_fault_has_its_effect() {
    let unavailable = Answer::status(503).header("Retry-After", "7").body("later");
    // The fault, the client's result, the statuses that the master records, and whether the delta
    // is applied.
    let table = [
        (Fault::Serve, Outcome::Answered(204), vec![Some(204)], true),
        (Fault::CutBeforeHandshake, Outcome::Cut, vec![], false),
        (Fault::NeverHandshake, Outcome::Silence, vec![], false),
        (Fault::Banner(b"220 mail ready\r\n".to_vec()), Outcome::NotTls, vec![], false),
        (Fault::CutBeforeRequest, Outcome::Cut, vec![], false),
        (Fault::CutInBody, Outcome::Cut, vec![None], false),
        (Fault::CutAfterBody(Effect::Applied), Outcome::Cut, vec![None], true),
        (Fault::CutAfterBody(Effect::Lost), Outcome::Cut, vec![None], false),
        (Fault::CutAfterSilence(Duration::from_millis(10)), Outcome::Cut, vec![None], false),
        (Fault::NeverAnswer(Effect::Applied), Outcome::Silence, vec![None], true),
        (Fault::NeverAnswer(Effect::Lost), Outcome::Silence, vec![None], false),
        (unavailable.into(), Outcome::Answered(503), vec![Some(503)], false),
        (
            Fault::AnswerTo(b"\"d1\"".to_vec(), Answer::status(422)),
            Outcome::Answered(422),
            vec![Some(422)],
            false,
        ),
        (
            Fault::AnswerTo(b"\"d2\"".to_vec(), Answer::status(422)),
            Outcome::Answered(204),
            vec![Some(204)],
            true,
        ),
        (
            Fault::Raw(b"HTTP/1.1 299 Odd\r\n\r\n".to_vec()),
            Outcome::Answered(299),
            vec![None],
            false,
        ),
        (endless(b"HTTP/1.1 200 OK\r\n\r\n"), Outcome::Answered(200), vec![None], false),
        (Fault::Slowly(Duration::from_micros(10)), Outcome::Answered(204), vec![Some(204)], true),
        (Fault::CutAfterAnswer, Outcome::Answered(204), vec![Some(204)], true),
    ];
    for (fault, expected, statuses, applied) in table {
        let fixture = fixture(Options::default());
        fixture.master.open_operation(&fixture.worker.uuid, "d1", "deploy");
        fixture.master.script([fault.clone()]);
        let mut stream = fixture.connect();
        if expected == Outcome::Silence {
            stream.sock.set_read_timeout(Some(SILENCE)).unwrap();
        }
        let deltas = json!([delta("d1", "succeeded", "x")]);
        let body = json!({ "host_uuid": fixture.worker.uuid, "status": {}, "lifecycle": deltas });
        assert_eq!(outcome(post(&mut stream, &body)), expected, "{fault:?}");
        if fault == Fault::CutAfterAnswer {
            assert_eq!(
                stream.read(&mut [0]).unwrap_err().kind(),
                ErrorKind::UnexpectedEof,
                "no close_notify"
            );
        }
        drop(stream);
        assert!(
            fixture.master.wait_until(TIMEOUT, |seen| !seen.connections()[0].open),
            "{fault:?}"
        );
        let recorded: Vec<_> =
            fixture.master.received().iter().map(|request| request.status).collect();
        assert_eq!(recorded, statuses, "{fault:?}");
        assert_eq!(fixture.master.rows()[0].status == RowStatus::Succeeded, applied, "{fault:?}");
        assert_eq!(fixture.master.faults_left(), 0);
        assert_eq!(fixture.beat(&json!([])), 204, "service resumes after {fault:?}");
    }
}

#[test]
fn script_runs_in_order_and_then_the_permanent_fault() {
    let fixture = fixture(Options::default());
    let answer = |status| Fault::Answer(Answer::status(status));
    fixture.master.always(Some(answer(500)));
    fixture.master.script([answer(429), Fault::Serve, Fault::CutBeforeHandshake, answer(503)]);
    let mut stream = fixture.connect();
    let body = json!({ "host_uuid": fixture.worker.uuid, "status": {} });
    let mut status = || post(&mut stream, &body).unwrap().0;
    // A fault of a connection takes effect on the next connection, and the faults after it wait.
    assert_eq!([status(), status(), status()], [429, 204, 204]);
    assert_eq!(outcome(post(&mut fixture.connect(), &body)), Outcome::Cut);
    assert_eq!([status(), status(), status()], [503, 500, 500]);
    fixture.master.always(None);
    assert_eq!(status(), 204);
}

#[test]
fn stop_does_not_wait_for_clients() {
    for fault in
        [Fault::Serve, Fault::NeverHandshake, Fault::NeverAnswer(Effect::Lost), endless(b"")]
    {
        let mut fixture = fixture(Options::default());
        let moment = fault.moment();
        fixture.master.script([fault.clone()]);
        let mut stream = fixture.connect();
        if moment == fault::Moment::Request {
            send(&mut stream, &[]).unwrap();
        }
        let has_begun = |seen: &Seen| match moment {
            fault::Moment::Connection => !seen.connections().is_empty(),
            fault::Moment::Request => !seen.received().is_empty(),
        };
        assert!(fixture.master.wait_until(TIMEOUT, has_begun));
        let start = Instant::now();
        fixture.master.stop();
        assert!(start.elapsed() < Duration::from_secs(2), "{fault:?}: {:?}", start.elapsed());
        assert_eq!(fixture.master.shared.lock().threads, 0, "{fault:?}");
    }
}

#[test]
fn panic_under_the_lock_does_not_stop_the_master() {
    let fixture = fixture(Options::default());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        fixture.master.wait_until(TIMEOUT, |_| panic!("on purpose"))
    }));
    assert!(panicked.is_err());
    assert_eq!(fixture.beat(&json!([])), 204);
}

#[test]
fn recorded_requests_are_bounded() {
    let mut seen = Seen::default();
    let request = Received {
        at: Instant::now(),
        connection: 1,
        method: "POST".to_owned(),
        path: "/".to_owned(),
        headers: Vec::new(),
        body: Vec::new(),
        json: None,
        status: Some(204),
    };
    for _ in 0..2 * limits::loopback::HISTORY {
        seen.record_request(request.clone());
    }
    assert_eq!(seen.received().len(), limits::loopback::HISTORY);
}
