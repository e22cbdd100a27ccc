//! `check`, as an operator sees it and as a machine reads it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use decnet_heartbeat::loopback::{
    Answer, Authority, Fault, LoopbackMaster, Offered, Options, Role,
};
use decnet_heartbeat::{Heartbeat, LifecycleDelta, Operation, Snapshot};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, ServerConnection, SupportedProtocolVersion};
use serde_json::{Value, json};

use crate::program::program;
use crate::support::{OpenSsl, PATIENCE, Stage, now, settled};

/// Every step of a healthy worker, in its order.
const STEPS: [&str; 15] = [
    "host",
    "master",
    "agent-dir",
    "identity",
    "ca.crt",
    "worker.crt",
    "worker.key",
    "name",
    "tcp",
    "tls",
    "beat",
    "state-file",
    "docker",
    "topology",
    "outbox",
];

/// An engine without containers and networks.
pub fn start_docker(socket: &Path) {
    start_docker_that(socket, |_| ok("[]"));
}

/// An engine that gives these answers to requests.
fn start_docker_that(socket: &Path, answer: impl Fn(&[u8]) -> String + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut request = [0; 4096];
            while let Ok(read @ 1..) = stream.read(&mut request) {
                if stream.write_all(answer(&request[..read]).as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
}

fn ok(json: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{json}", json.len())
}

/// An enrolled worker with an engine, and nothing deployed.
fn worker() -> Stage {
    worker_of(Options::default())
}

fn worker_of(options: Options) -> Stage {
    let stage = Stage::with(options);
    start_docker(&stage.dir.path().join("docker.sock"));
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    stage
}

fn check(stage: &Stage) -> Command {
    let (dir, mut command) = (stage.dir.path(), program());
    command.arg("--config").arg(dir.join("decnet.ini")).arg("check").stdin(Stdio::null());
    command
        .arg("--state-file")
        .arg(dir.join("state.json"))
        .arg("--docker-socket")
        .arg(dir.join("docker.sock"));
    command
}

/// What a machine reads, and that the program exits as it says.
struct Report(Value);

impl Report {
    fn of(command: &mut Command) -> Self {
        let output = command.arg("--json").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["exit_code"], output.status.code().unwrap(), "{report:#}");
        assert_eq!(report["works"], output.status.success(), "{report:#}");
        Self(report)
    }

    fn step(&self, name: &str) -> &Value {
        let steps = self.0["steps"].as_array().unwrap();
        steps
            .iter()
            .find(|step| step["step"] == name)
            .unwrap_or_else(|| panic!("no {name}: {:#}", self.0))
    }

    fn says(&self, name: &str) -> &str {
        self.step(name)["says"].as_str().unwrap()
    }

    fn advice(&self, name: &str) -> &str {
        self.step(name)["advice"].as_str().unwrap_or_default()
    }

    /// The steps that ended like this.
    fn ended(&self, outcome: &str) -> Vec<&str> {
        let steps =
            self.0["steps"].as_array().unwrap().iter().filter(|step| step["outcome"] == outcome);
        steps.map(|step| step["step"].as_str().unwrap()).collect()
    }

    /// The one step that failed, and what the program exits with.
    fn fails_with(&self, name: &str, code: i32) {
        assert_eq!(
            (self.ended("failed"), &self.0["exit_code"]),
            (vec![name], &json!(code)),
            "{:#}",
            self.0
        );
        assert!(!self.advice(name).is_empty(), "{:#}", self.0);
    }
}

#[test]
fn a_healthy_worker_is_all_ticks_and_nothing_has_changed_but_for_one_beat() {
    let stage = worker();
    let before = fs::read_dir(stage.agent_dir()).unwrap().count();
    let output = check(&stage).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{said}");
    let ticked: Vec<_> =
        said.lines().filter_map(|line| line.strip_prefix("✓ ")?.split(' ').next()).collect();
    assert_eq!(ticked, STEPS, "{said}");
    assert!(
        said.ends_with("\nAn agent would work here.\n") && !said.contains(['✗', '\u{1b}']),
        "{said}"
    );
    let ini = stage.dir.path().join("decnet.ini");
    assert!(
        said.contains(&format!("{} ({} [agent] host-uuid)", stage.worker.uuid, ini.display())),
        "{said}"
    );
    let [beat] = &stage.master.received()[..] else { panic!("{:?}", stage.master.received()) };
    let beat = beat.json.as_ref().unwrap();
    assert_eq!((&beat["host_uuid"], &beat["lifecycle"]), (&json!(stage.worker.uuid), &Value::Null));
    assert_eq!(beat["status"], json!({"deployed": false, "deckies": []}));
    assert_eq!(fs::read_dir(stage.agent_dir()).unwrap().count(), before, "no outbox is made");
}

#[test]
fn a_machine_reads_the_same() {
    let stage = worker();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.ended("ok"), STEPS);
    let own = &report.step("worker.crt")["facts"];
    assert_eq!(
        (&own["fingerprint"], &own["days"]),
        (&json!(stage.worker.fingerprint), &json!(824))
    );
    let master = &report.step("tls")["facts"];
    assert_eq!(
        (&master["version"], &master["rule"], &master["days"]),
        (&json!("TLS 1.3"), &json!("name"), &json!(824))
    );
    assert_eq!(master["fingerprint"], stage.master.certificate().fingerprint);
    assert_eq!(master["names"], json!(["swarmctl", "localhost", "127.0.0.1"]));
    let beat = &report.step("beat")["facts"];
    // The handshake that was tried first has left a ticket.
    assert_eq!((&beat["class"], &beat["resumed"]), (&json!("http-204"), &json!(true)));
    assert_eq!(report.step("worker.key")["facts"]["mode"], "0600");
}

#[test]
fn each_rule_says_why_it_accepts_the_master() {
    let stage = worker();
    let pinned = format!("sha256:{}", stage.master.certificate().fingerprint);
    for (rule, why) in [
        (
            "name",
            "accepted by name: it is of ca.crt, and its common name and a DNS name are swarmctl",
        ),
        (
            "host",
            "accepted by host: it is of ca.crt, and its common name and a DNS name are swarmctl",
        ),
        ("ca", "accepted by ca: it is of ca.crt, and its names do not matter"),
        (&pinned, "it is the pinned one"),
    ] {
        let report = Report::of(check(&stage).args(["--master-identity", rule]));
        assert!(report.says("tls").ends_with(why), "{}", report.says("tls"));
        assert!(
            report.says("identity").ends_with("(--master-identity)"),
            "{}",
            report.says("identity")
        );
    }
    let report = Report::of(check(&stage).args(["--master-identity", "public"]));
    report.fails_with("tls", 1);
    assert!(
        report.says("tls").contains("; CN=swarmctl, O=DECNET, OU=swarm-worker for swarmctl, "),
        "{}",
        report.says("tls")
    );
    assert_eq!(report.ended("not-tried"), ["beat"]);
}

#[test]
fn an_older_master_is_known_by_its_tls() {
    let stage = worker_of(Options { offered: Offered::Tls12Only, ..Options::default() });
    let report = Report::of(&mut check(&stage));
    assert_eq!(
        (&report.step("tls")["facts"]["version"], &report.0["works"]),
        (&json!("TLS 1.2"), &json!(true))
    );
}

#[test]
fn a_certificate_that_the_master_does_not_pin_is_named_to_be_compared() {
    let stage = worker();
    let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    stage.master.pin(&stage.worker.uuid, &other.fingerprint);
    let report = Report::of(&mut check(&stage));
    report.fails_with("beat", 1);
    assert!(report.says("beat").starts_with("http-403 in "), "{}", report.says("beat"));
    assert!(report.advice("beat").contains(&stage.worker.fingerprint), "{}", report.advice("beat"));
    assert!(report.advice("beat").contains("must pass TLS through"), "{}", report.advice("beat"));
    stage.master.decommission(&stage.worker.uuid);
    let report = Report::of(&mut check(&stage));
    report.fails_with("beat", 1);
    assert!(report.says("beat").starts_with("http-404 in "), "{}", report.says("beat"));
    assert!(
        report.advice("beat").starts_with("enrol this host again"),
        "{}",
        report.advice("beat")
    );
    assert!(!report.advice("beat").contains("sha256"), "{}", report.advice("beat"));
}

#[test]
fn a_certificate_of_another_ca_is_refused_by_the_master_and_seen_here() {
    let stage = worker();
    let stranger = Authority::new().unwrap().issue(Role::Worker("stranger".to_owned())).unwrap();
    fs::write(stage.agent_dir().join("worker.crt"), &stranger.certificate).unwrap();
    fs::write(stage.agent_dir().join("worker.key"), &stranger.key).unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report.says("tls").starts_with("the master refused our certificate"),
        "{}",
        report.says("tls")
    );
    assert!(
        report.advice("worker.crt").starts_with("it was not issued by ca.crt"),
        "{}",
        report.advice("worker.crt")
    );
    assert_eq!(stage.master.received().len(), 0);
}

/// A master that refuses our certificate as uvicorn does: it closes the connection, and sends no alert.
fn refuse_without_an_alert(stage: &Stage, version: &'static SupportedProtocolVersion) -> u16 {
    let mut roots = RootCertStore::empty();
    roots
        .add(
            CertificateDer::from_pem_slice(Authority::new().unwrap().certificate().as_bytes())
                .unwrap(),
        )
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let own = stage.master.certificate();
    let chain = vec![CertificateDer::from_pem_slice(own.certificate.as_bytes()).unwrap()];
    let config =
        ServerConfig::builder_with_provider(provider).with_protocol_versions(&[version]).unwrap();
    let config = config.with_client_cert_verifier(verifier);
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
    let config = Arc::new(config.with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            let mut tls = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut is_accepted = true;
            while is_accepted && tls.is_handshaking() {
                while tls.wants_write() {
                    tls.write_tls(&mut socket).unwrap();
                }
                tls.read_tls(&mut socket).unwrap();
                is_accepted = tls.process_new_packets().is_ok();
            }
            assert!(!is_accepted, "our certificate is of another CA");
        }
    });
    port
}

#[test]
fn a_master_that_refuses_our_certificate_without_an_alert_is_understood() {
    for version in [&TLS12, &TLS13] {
        let mut stage = worker();
        stage.worker.port = refuse_without_an_alert(&stage, version);
        stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
        let report = Report::of(&mut check(&stage));
        report.fails_with("tls", 1);
        let said = report.says("tls");
        assert!(
            said.starts_with(
                "the master closed the connection after it saw this host's certificate: "
            ),
            "{said}"
        );
        assert!(
            report.advice("tls").contains("then enrol this host again"),
            "{}",
            report.advice("tls")
        );
        let (builder, _tick) = stage.builder();
        let heartbeat = builder.start().unwrap();
        let failure = settled(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert_eq!(failure.class, "connection-closed", "{failure:?}");
        assert!(
            failure.detail.ends_with(": the master may refuse this host's certificate"),
            "{failure:?}"
        );
        assert!(!failure.detail.contains("http"), "{failure:?}");
    }
}

#[test]
fn a_master_of_another_ca_is_shown_with_its_names() {
    let (mut stage, other) = (worker(), Stage::new());
    stage.worker.port = other.master.port();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report.advice("tls").starts_with("enrol this host from this master"),
        "{}",
        report.advice("tls")
    );
    assert!(report.advice("tls").contains("must pass TLS through"), "{}", report.advice("tls"));
    assert_eq!(report.step("tls")["facts"]["fingerprint"], other.master.certificate().fingerprint);
}

#[test]
fn a_master_whose_certificate_has_expired_is_said_to_be_so() {
    let authority = Authority::new().unwrap();
    let certificate = Some(authority.issue(Role::Expired).unwrap());
    let stage =
        worker_of(Options { certificate, authority: Some(authority), ..Options::default() });
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report.advice("tls").starts_with("renew the master's certificate"),
        "{}",
        report.advice("tls")
    );
}

#[test]
fn a_pinned_certificate_that_has_expired_is_accepted_and_said_to_be_so() {
    let authority = Authority::new().unwrap();
    let expired = authority.issue(Role::Expired).unwrap();
    let pinned = format!("sha256:{}", expired.fingerprint);
    let stage = worker_of(Options {
        certificate: Some(expired),
        authority: Some(authority),
        ..Options::default()
    });
    let report = Report::of(check(&stage).args(["--master-identity", &pinned]));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(report.says("tls").contains("expired 1 days ago"), "{}", report.says("tls"));
    let advice = report.advice("tls");
    assert!(advice.contains("its dates do not matter to this rule"), "{advice}");
}

#[test]
fn a_master_that_is_down_is_a_matter_of_tcp() {
    let mut stage = worker();
    stage.master.stop();
    let report = Report::of(&mut check(&stage));
    report.fails_with("tcp", 1);
    assert!(report.says("tcp").contains("Connection refused"), "{}", report.says("tcp"));
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
}

#[test]
fn what_listens_there_and_is_no_master_is_told_apart() {
    let mut stage = worker();
    let ssh = TcpListener::bind("127.0.0.1:0").unwrap();
    stage.worker.port = ssh.local_addr().unwrap().port();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    thread::spawn(move || {
        ssh.incoming().map_while(Result::ok).for_each(|mut it| drop(it.write_all(b"SSH-2.0-x\r\n")))
    });
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert_eq!(
        report.says("tls"),
        "the answer is neither TLS nor HTTP: the peer is not the master"
    );
    assert!(
        report.advice("tls").starts_with("correct the master's host and port"),
        "{}",
        report.advice("tls")
    );
}

#[test]
fn a_master_without_tls_is_told_to_use_it() {
    let stage = worker();
    stage.master.always(Some(Fault::Banner(
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec(),
    )));
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report.says("tls").starts_with("the answer is plain HTTP, not TLS"),
        "{}",
        report.says("tls")
    );
    assert!(report.advice("tls").contains("with --tls"), "{}", report.advice("tls"));
}

#[test]
fn a_certificate_for_the_masters_host_alone_is_not_the_masters() {
    let authority = Authority::new().unwrap();
    let role =
        Role::WebEnrolled { name: "worker-07".to_owned(), master_host: "127.0.0.1".to_owned() };
    let certificate = Some(authority.issue(role).unwrap());
    let stage =
        worker_of(Options { certificate, authority: Some(authority), ..Options::default() });
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report.says("tls").contains(r#"its common name is "worker-07""#),
        "{}",
        report.says("tls")
    );
    assert!(
        report.advice("tls").contains("another host impersonates the master"),
        "{}",
        report.advice("tls")
    );
    let report = Report::of(check(&stage).args(["--master-identity", "host"]));
    assert!(
        report.says("tls").ends_with(
            "accepted by host: it is of ca.crt, and for 127.0.0.1, as any worker's may be"
        ),
        "{}",
        report.says("tls")
    );
}

/// A TLS server of our CA that asks for no client certificate, as a proxy that ends TLS.
#[test]
fn a_proxy_that_ends_tls_is_told_to_pass_it_through() {
    let mut stage = worker();
    let openssl = OpenSsl::new(stage.dir.path());
    openssl.issue("proxy", "rsa:2048", "-sha256");
    fs::write(stage.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    let served = openssl.serve("proxy", "-cipher ALL:@SECLEVEL=0");
    stage.worker.port = served.port;
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.step("tls")["outcome"], "ok", "{:#}", report.0);
    assert!(
        report.advice("tls").starts_with("it asked for no certificate of ours"),
        "{}",
        report.advice("tls")
    );
    assert!(
        report.advice("ca.crt").starts_with("in time, renew the master's CA"),
        "{}",
        report.advice("ca.crt")
    );
    assert!(report.advice("tls").contains("pass TLS through"), "{}", report.advice("tls"));
}

#[test]
fn an_old_signature_of_worker_crt_is_named_where_the_master_refuses_it() {
    let stage = worker();
    let openssl = OpenSsl::new(stage.dir.path());
    openssl.issue("old", "rsa:2048", "-sha1");
    fs::write(stage.agent_dir().join("worker.crt"), openssl.read("old.crt")).unwrap();
    fs::write(stage.agent_dir().join("worker.key"), openssl.read("old.key")).unwrap();
    let report = Report::of(&mut check(&stage));
    let advice = report.advice("worker.crt");
    assert!(
        advice.starts_with("the master may refuse it: it is signed with RSA and SHA-1"),
        "{advice}"
    );
}

#[test]
fn a_bundle_that_cannot_be_read_is_not_told_to_enrol_again() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str, i32); 2] = [
        (|path| fs::create_dir(path).unwrap(), "restore the file that the enrolment wrote", 78),
        (
            |path| std::os::unix::fs::symlink("/proc/self/mem", path).unwrap(),
            "check the disk and the kernel's log",
            1,
        ),
    ];
    for (damage, advice, code) in damages {
        let stage = worker();
        let path = stage.agent_dir().join("worker.key");
        fs::remove_file(&path).unwrap();
        damage(&path);
        let report = Report::of(&mut check(&stage));
        report.fails_with("worker.key", code);
        assert_eq!(report.advice("worker.key"), advice);
        assert!(
            report.says("worker.key").contains(&format!("{}: cannot be read: ", path.display()))
        );
    }
}

#[test]
fn what_is_ignored_in_ca_crt_is_named() {
    let stage = worker();
    let path = stage.agent_dir().join("ca.crt");
    let worker = fs::read_to_string(stage.agent_dir().join("worker.crt")).unwrap();
    fs::write(&path, worker + &stage.master.authority().certificate()).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.says("ca.crt").starts_with("CN=DECNET SWARM Root CA, "),
        "{}",
        report.says("ca.crt")
    );
    assert!(report.advice("ca.crt").contains("not marked as a CA"), "{}", report.advice("ca.crt"));
}

#[test]
fn a_master_that_takes_a_connection_and_says_nothing_is_given_five_seconds() {
    let mut stage = worker();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    stage.worker.port = silent.local_addr().unwrap().port();
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert_eq!(report.says("tls"), "the handshake has not come to its end within 5 s");
}

#[test]
fn an_answer_that_is_none_of_the_good_ones_fails_and_says_what_it_means() {
    let stage = worker();
    for (answer, means) in [
        (Answer::status(503).body("busy"), "http-503 in "),
        (Answer::status(422).body("no"), "the master refuses what this host reports: no"),
        (Answer::status(413), "what this host reports is too large"),
        (Answer::status(500), "the master has failed on it"),
        (Answer::status(429), "the master cannot take it now"),
        (Answer::status(302), "this is no answer of the master's"),
    ] {
        stage.master.script([Fault::Answer(answer)]);
        let report = Report::of(&mut check(&stage));
        report.fails_with("beat", 1);
        assert!(report.says("beat").contains(means), "{}", report.says("beat"));
    }
}

#[test]
fn a_host_that_is_not_enrolled_is_78_and_the_rest_is_looked_at_all_the_same() {
    let stage = worker();
    let mut command = program();
    command.args(["--config", "/nonexistent/decnet.ini", "check", "--state-file", "/nonexistent"]);
    let report =
        Report::of(command.arg("--docker-socket").arg(stage.dir.path().join("docker.sock")));
    report.fails_with("enrolment", 78);
    assert_eq!(report.ended("ok"), ["state-file", "docker"]);
    assert_eq!(report.ended("not-tried").len(), 9);
}

#[test]
fn a_bundle_that_cannot_be_used_is_named_by_its_file() {
    let stage = worker();
    fs::write(stage.agent_dir().join("worker.key"), "garbage").unwrap();
    Report::of(&mut check(&stage)).fails_with("worker.key", 78);
    let other = stage.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    fs::write(stage.agent_dir().join("worker.key"), &other.key).unwrap();
    let report = Report::of(&mut check(&stage));
    // As in the middle of an enrolment.
    report.fails_with("worker.key", 1);
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
    fs::remove_file(stage.agent_dir().join("ca.crt")).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.ended("failed"), ["ca.crt", "worker.key"], "{:#}", report.0);
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
}

#[test]
fn each_file_of_a_bundle_is_judged_by_itself() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str, &str); 3] = [
        (|path| fs::remove_file(path).unwrap(), "cannot be read: ", "enrol this host again"),
        (|path| fs::write(path, "none").unwrap(), "holds no PEM section", "enrol this host again"),
        (
            |path| {
                fs::write(path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
                    .unwrap()
            },
            "has a section that is not an X.509 certificate",
            "repair the file",
        ),
    ];
    for (damage, says, advice) in damages {
        let stage = worker();
        fs::remove_file(stage.agent_dir().join("ca.crt")).unwrap();
        damage(&stage.agent_dir().join("worker.crt"));
        let report = Report::of(&mut check(&stage));
        assert_eq!(report.ended("failed"), ["ca.crt", "worker.crt"], "{:#}", report.0);
        assert!(report.says("worker.crt").contains(says), "{}", report.says("worker.crt"));
        assert!(report.advice("worker.crt").starts_with(advice), "{}", report.advice("worker.crt"));
        assert_eq!(report.ended("not-tried"), ["worker.key", "tls", "beat"]);
        fs::write(stage.agent_dir().join("worker.key"), "").unwrap();
        let report = Report::of(&mut check(&stage));
        assert_eq!(
            report.ended("failed"),
            ["ca.crt", "worker.crt", "worker.key"],
            "{:#}",
            report.0
        );
    }
}

#[test]
fn an_old_root_beside_a_valid_one_is_an_advice() {
    let stage = worker();
    let openssl = OpenSsl::new(stage.dir.path());
    let mut old = rcgen::CertificateParams::default();
    old.distinguished_name = rcgen::DistinguishedName::new();
    old.distinguished_name.push(rcgen::DnType::CommonName, "old");
    old.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    (old.not_before, old.not_after) =
        (rcgen::date_time_ymd(2001, 1, 1), rcgen::date_time_ymd(2002, 1, 1));
    let key = rcgen::KeyPair::generate().unwrap();
    fs::write(openssl.path("old.crt"), old.self_signed(&key).unwrap().pem()).unwrap();
    fs::write(openssl.path("old.key"), key.serialize_pem()).unwrap();
    let path = stage.agent_dir().join("ca.crt");
    fs::write(&path, openssl.read("old.crt") + &stage.master.authority().certificate()).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.says("ca.crt").starts_with("CN=DECNET SWARM Root CA, "),
        "{}",
        report.says("ca.crt")
    );
    let advice = report.advice("ca.crt");
    assert!(advice.starts_with("remove from it what is not valid: CN=old, expired "), "{advice}");
    // Our certificate is of the old one.
    openssl.run("req -newkey rsa:2048 -nodes -keyout own.key -out own.csr -subj /CN=worker");
    openssl.run("x509 -req -in own.csr -CA old.crt -CAkey old.key -CAcreateserial -days 90 -extfile ext -out own.crt");
    fs::write(stage.agent_dir().join("worker.crt"), openssl.read("own.crt")).unwrap();
    fs::write(stage.agent_dir().join("worker.key"), openssl.read("own.key")).unwrap();
    let advice = Report::of(&mut check(&stage)).advice("worker.crt").to_owned();
    assert!(
        advice.starts_with("the master may refuse it, as the CA that issued it is not valid: "),
        "{advice}"
    );
    fs::write(&path, openssl.read("old.crt")).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.ended("failed")[0], "ca.crt", "{:#}", report.0);
}

#[test]
fn a_ca_of_the_same_name_with_a_key_of_another_type_is_not_ours() {
    let stage = worker();
    let openssl = OpenSsl::new(stage.dir.path());
    // A name byte for byte that of the authority.
    let name = "CN=DECNET SWARM Root CA\nO=DECNET\n";
    let config =
        format!("[req]\ndistinguished_name=dn\nprompt=no\nstring_mask=utf8only\n[dn]\n{name}");
    fs::write(openssl.path("cnf"), config).unwrap();
    openssl.run(
        "req -x509 -newkey rsa:2048 -nodes -keyout k -out rsa.crt -days 90 -config cnf -addext basicConstraints=CA:TRUE",
    );
    fs::write(stage.agent_dir().join("ca.crt"), openssl.read("rsa.crt")).unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("tls", 1);
    assert!(
        report
            .says("tls")
            .starts_with("the master's certificate is not issued by the CA in ca.crt"),
        "{}",
        report.says("tls")
    );
    assert!(
        report.advice("worker.crt").starts_with("it was not issued by ca.crt"),
        "{}",
        report.advice("worker.crt")
    );
}

#[test]
fn what_will_be_wrong_is_advised_in_time() {
    let stage = worker();
    let soon = Role::ShortLived("w".to_owned(), std::time::Duration::from_secs(86_400 * 9));
    let issued = stage.master.authority().issue(soon).unwrap();
    stage.master.authority().write_bundle(&issued, &stage.agent_dir()).unwrap();
    stage.master.pin(&stage.worker.uuid, &issued.fingerprint);
    let key = stage.agent_dir().join("worker.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.advice("worker.crt").starts_with("in time, enrol this host again"),
        "{}",
        report.advice("worker.crt")
    );
    assert_eq!(
        report.advice("worker.key"),
        format!("others can read it: chmod 600 {}", key.display())
    );
}

#[test]
fn docker_and_files_that_cannot_be_read_are_said_each_by_itself() {
    let stage = worker();
    fs::remove_file(stage.dir.path().join("docker.sock")).unwrap();
    Report::of(&mut check(&stage)).fails_with("docker", 1);
    fs::write(stage.dir.path().join("state.json"), "{").unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.ended("failed"), ["state-file", "docker"], "{:#}", report.0);
    let beat = stage.master.received().pop().unwrap().json.unwrap();
    assert!(
        beat["status"]["error"].as_str().unwrap().contains("state.json"),
        "the beat says so, too: {beat}"
    );
    fs::write(
        stage.agent_dir().join("topology.db"),
        "no database, and long enough to be looked at as one",
    )
    .unwrap();
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.ended("failed"), ["state-file", "docker", "topology"], "{:#}", report.0);
}

#[test]
fn no_beat_is_sent_without_a_topology_that_cannot_be_read() {
    let stage = worker();
    fs::write(
        stage.agent_dir().join("topology.db"),
        "no database, and long enough to be looked at as one",
    )
    .unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("topology", 1);
    assert_eq!(
        (report.ended("not-tried"), report.says("beat")),
        (vec!["beat"], "not tried: topology.db cannot be read")
    );
    assert_eq!(
        stage.master.received().len(),
        0,
        "the master would order the topology to be built again"
    );
}

#[test]
fn a_state_file_whose_folder_is_missing_is_not_taken_for_nothing_deployed() {
    let stage = worker();
    let missing = stage.dir.path().join("none/state.json");
    // The environment's, as the option is not given.
    let mut command = program();
    command
        .arg("--config")
        .arg(stage.dir.path().join("decnet.ini"))
        .arg("check")
        .stdin(Stdio::null());
    command.env("DECNET_HEARTBEAT_STATE_FILE", &missing);
    let report =
        Report::of(command.arg("--docker-socket").arg(stage.dir.path().join("docker.sock")));
    report.fails_with("state-file", 1);
    assert!(
        report.says("state-file").ends_with("(DECNET_HEARTBEAT_STATE_FILE)"),
        "{}",
        report.says("state-file")
    );
    let beat = stage.master.received().pop().unwrap().json.unwrap();
    assert!(
        beat["status"]["error"].as_str().unwrap().contains("none/state.json: its folder "),
        "{beat}"
    );
    assert_eq!((beat["status"].get("deckies"), beat["status"].get("deployed")), (None, None));
}

#[test]
fn a_refused_request_to_docker_is_named_and_costs_observed_alone() {
    let stage = worker();
    let socket = stage.dir.path().join("docker.sock");
    fs::remove_file(&socket).unwrap();
    start_docker_that(&socket, |request| match request.starts_with(b"GET /networks ") {
        true => "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden".to_owned(),
        false => ok(r#"[{"Names":["/d1-ssh"],"State":"running"}]"#),
    });
    let decky = json!({"name": "d1", "services": ["ssh"]});
    let state = json!({"config": {"mode": "swarm", "deckies": [decky]}, "compose_path": "/x"});
    fs::write(stage.dir.path().join("state.json"), state.to_string()).unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("docker", 1);
    assert!(
        report.says("docker").contains(": /networks: answered 403 Forbidden"),
        "{}",
        report.says("docker")
    );
    assert!(report.says("docker").ends_with("; 1 container"), "{}", report.says("docker"));
    let beat = stage.master.received().pop().unwrap().json.unwrap();
    assert_eq!(
        beat["status"]["runtime"],
        json!({"d1": {"running": true, "services": {"ssh": "running"}}})
    );
    assert_eq!(beat["status"].get("error"), None, "{beat}");
    assert!(
        beat["topology"]["observed"]["error"].as_str().unwrap().contains("/networks"),
        "{beat}"
    );
}

#[test]
fn the_outbox_shows_what_waits_and_who_delivers() {
    let mut stage = worker();
    let (builder, tick) = stage.builder();
    let heartbeat = builder.start().unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    stage.master.stop();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    tick.send(now()).unwrap();
    settled(&heartbeat, |stats| stats.failure.is_some());
    stage.master.start_again().unwrap();
    let report = Report::of(&mut check(&stage));
    let facts = &report.step("outbox")["facts"];
    let delivered = &facts["delivered_by"];
    // It may have been delivered meanwhile.
    assert!(facts["waiting"].as_u64().is_some_and(|waiting| waiting <= 1), "{facts}");
    assert_eq!(delivered, std::process::id(), "{}", report.says("outbox"));
    stage.master.stop();
    heartbeat.deltas().push(LifecycleDelta::succeeded("e", Operation::Deploy)).unwrap();
    drop(heartbeat);
    let report = Report::of(&mut check(&stage));
    let facts = &report.step("outbox")["facts"];
    assert!(facts["waiting"].as_u64() >= Some(1) && facts["delivered_by"].is_null(), "{facts}");
    assert!(
        report.advice("outbox").starts_with("start decnet-heartbeat run"),
        "{}",
        report.advice("outbox")
    );
    assert!(stage.agent_dir().join("heartbeat.db").exists());
}

#[test]
fn operations_that_nobody_could_judge_for_a_day_are_named() {
    let stage = worker();
    stage.beating().0.stop(PATIENCE);
    let database = rusqlite::Connection::open(stage.agent_dir().join("heartbeat.db")).unwrap();
    let add = |decky: &str, seconds: u32| {
        let row = (decky, "1@1", seconds);
        database
            .execute(
                "INSERT INTO delta (decky, operation, owner, age) VALUES (?1, 'deploy', ?2, ?3)",
                row,
            )
            .unwrap();
        database.last_insert_rowid()
    };
    add("d1", 86_399);
    let report = Report::of(&mut check(&stage));
    let facts = &report.step("outbox")["facts"];
    assert_eq!(
        (&facts["operations"], &facts["stuck"], report.advice("outbox")),
        (&json!(1), &json!(0), "")
    );
    let id = add("d\u{1b}2", 86_400);
    let report = Report::of(&mut check(&stage));
    assert_eq!(report.step("outbox")["facts"]["stuck"], 1);
    let named = format!("; 1 stuck: deploy of d\\u{{1b}}2 (row {id}, for 1day)");
    assert!(report.says("outbox").ends_with(&named), "{named}: {}", report.says("outbox"));
    let lock = stage.agent_dir().join("heartbeat.db-lock");
    assert!(
        report.advice("outbox").contains(&format!("see why {} cannot be used", lock.display()))
    );
    for _ in 0..20 {
        add("d3", 90_000);
    }
    let says = Report::of(&mut check(&stage)).says("outbox").to_owned();
    assert!(says.contains("; 21 stuck: ") && says.matches("(row ").count() == 10, "{says}");
}

#[test]
fn an_outbox_that_cannot_be_kept_fails() {
    let stage = worker();
    fs::write(
        stage.agent_dir().join("heartbeat.db"),
        "not one of ours, and of no use to anybody at all",
    )
    .unwrap();
    let report = Report::of(&mut check(&stage));
    report.fails_with("outbox", 1);
    let still = fs::read_to_string(stage.agent_dir().join("heartbeat.db")).unwrap();
    assert!(still.starts_with("not one of ours"), "it is not for check to move it aside");
    Report::of(check(&stage).args(["--outbox", "/nonexistent/folder/heartbeat.db"]))
        .fails_with("outbox", 1);
    Report::of(check(&stage).args(["--outbox"]).arg(stage.dir.path().join("x.db"))).step("outbox");
}

#[test]
fn where_reports_go_is_looked_at_where_it_is_given() {
    let stage = worker();
    let mut command = check(&stage);
    command.args(["--metrics-file", "/nonexistent/decnet.prom", "--stats-file"]);
    let report = Report::of(command.arg(stage.dir.path().join("stats.json")));
    assert_eq!(report.ended("failed"), ["metrics-file"], "{:#}", report.0);
    assert_eq!(report.ended("ok").last(), Some(&"stats-file"));
}

#[test]
fn a_heartbeat_that_runs_is_not_disturbed() {
    let stage = worker();
    let heartbeat = Heartbeat::builder()
        .enrolment(stage.worker.enrolment().unwrap())
        .status_source(|| Snapshot::new(&json!({})))
        .start()
        .unwrap();
    settled(&heartbeat, |stats| stats.beats == 1);
    for _ in 0..5 {
        assert_eq!(Report::of(&mut check(&stage)).0["works"], true);
    }
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let stats = settled(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.failure.map(|failure| failure.class), stats.panics), (None, 0));
    drop::<LoopbackMaster>(stage.master);
}

/// OpenSSL serves the real master, and its alerts say why it refuses a certificate.
#[test]
fn each_alert_of_openssl_is_explained_by_its_cause() {
    let mut stage = worker();
    let openssl = OpenSsl::new(stage.dir.path());
    openssl.issue("server", "rsa:2048", "-sha256");
    openssl.issue("good", "rsa:2048", "-sha256");
    openssl.issue("old", "rsa:2048", "-sha1");
    openssl.run(
        "x509 -req -in good.csr -CA ca.crt -CAkey ca.key -days -1 -extfile ext -out expired.crt",
    );
    fs::write(openssl.path("ext"), "extendedKeyUsage=serverAuth\n").unwrap();
    openssl.run(
        "x509 -req -in good.csr -CA ca.crt -CAkey ca.key -days 9 -extfile ext -out server-only.crt",
    );
    openssl.run("req -x509 -newkey rsa:2048 -nodes -keyout same.key -out same.crt -days 9 -subj /O=DECNET/CN=CA");
    // As DECNET issues them: nothing but the issuer's name says whose it is.
    fs::write(openssl.path("ext"), "extendedKeyUsage=clientAuth\nauthorityKeyIdentifier=none\n")
        .unwrap();
    openssl.run(
        "x509 -req -in good.csr -CA same.crt -CAkey same.key -days 9 -extfile ext -out other.crt",
    );
    openssl.run("req -x509 -key good.key -out unknown.crt -days 9 -subj /CN=other");
    fs::write(stage.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    let served = openssl.serve("server", "-Verify 1 -verify_return_error -CAfile ca.crt");
    stage.worker.port = served.port;
    stage.worker.write_ini(&stage.dir.path().join("decnet.ini")).unwrap();
    for (name, key, says, advice) in [
        (
            "old",
            "old",
            "the master refused our certificate: it may be too weak",
            "see what stands at worker.crt",
        ),
        (
            "expired",
            "good",
            "the master refused our certificate: it has expired",
            "enrol this host again, or set",
        ),
        (
            "server-only",
            "good",
            "the master refused our certificate: it is not for clients",
            "enrol this host again",
        ),
        (
            "other",
            "good",
            "the master refused our certificate: the master's CA did not sign it",
            "enrol this host again",
        ),
        (
            "unknown",
            "good",
            "the master refused our certificate: it is issued by a CA that the master does not know",
            "enrol this host",
        ),
    ] {
        fs::write(stage.agent_dir().join("worker.crt"), openssl.read(&format!("{name}.crt")))
            .unwrap();
        fs::write(stage.agent_dir().join("worker.key"), openssl.read(&format!("{key}.key")))
            .unwrap();
        let report = Report::of(&mut check(&stage));
        assert!(report.says("tls").starts_with(says), "{name}: {}", report.says("tls"));
        assert!(report.advice("tls").starts_with(advice), "{name}: {}", report.advice("tls"));
    }
}

#[test]
fn a_name_that_is_not_found_fails_and_says_why() {
    let stage = worker();
    let mut command = check(&stage);
    command.env("DECNET_MASTER_HOST", "no-such.invalid");
    let report = Report::of(&mut command);
    report.fails_with("name", 1);
    let says = report.says("name");
    assert!(
        says.starts_with("no-such.invalid: the name no-such.invalid could not be looked up: "),
        "{says}"
    );
    assert!(
        report.advice("name").contains("configure the master's IP address"),
        "{}",
        report.advice("name")
    );
    assert_eq!(report.ended("not-tried"), ["tcp", "tls", "beat"]);
}
