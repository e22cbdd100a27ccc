//! `check`: its text for operators and its JSON for programs.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
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

use crate::support::{
    Fixture, OpenSsl, TIMEOUT, Terminal, json_answer, now, program, start_docker,
    start_docker_with, wait_for_stats,
};

/// The steps of a healthy worker, in order.
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

/// An enrolled worker with a Docker, and nothing deployed.
fn worker() -> Fixture {
    worker_of(Options::default())
}

/// The same, with a master that has these options.
fn worker_of(options: Options) -> Fixture {
    let fixture = Fixture::with(options);
    start_docker(&fixture.path("docker.sock"));
    fixture.write_ini();
    fixture
}

fn check(fixture: &Fixture) -> Command {
    let mut command = program();
    command.arg("--config").arg(fixture.ini()).arg("check").stdin(Stdio::null());
    command.arg("--state-file").arg(fixture.path("state.json"));
    command.arg("--docker-socket").arg(fixture.path("docker.sock"));
    command
}

/// The step of this name in the output of `check --json`.
pub fn step_of(check_json: &Output, name: &str) -> Value {
    let report: Value =
        serde_json::from_slice(&check_json.stdout).unwrap_or_else(|_| panic!("{check_json:?}"));
    let mut steps = report["steps"].as_array().unwrap().iter();
    steps
        .find(|step| step["step"] == name)
        .unwrap_or_else(|| panic!("no {name}: {report:#}"))
        .clone()
}

/// The JSON of `check`.
struct Report(Value);

impl Report {
    /// Runs `check`. Asserts that its exit code is the one in the JSON.
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

    fn message(&self, name: &str) -> &str {
        self.step(name)["message"].as_str().unwrap()
    }

    fn advice(&self, name: &str) -> &str {
        self.step(name)["advice"].as_str().unwrap_or_default()
    }

    /// The steps with this outcome.
    fn ended(&self, outcome: &str) -> Vec<&str> {
        let steps =
            self.0["steps"].as_array().unwrap().iter().filter(|step| step["outcome"] == outcome);
        steps.map(|step| step["step"].as_str().unwrap()).collect()
    }

    /// Asserts that only this step failed, with advice, and that the exit code is `code`.
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
fn healthy_worker_passes_every_step_and_only_one_beat_is_sent() {
    let fixture = worker();
    let before = fs::read_dir(fixture.agent_dir()).unwrap().count();
    let output = check(&fixture).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]), "{text}");
    let passed: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("✓ ")?.split(' ').next()).collect();
    assert_eq!(passed, STEPS, "{text}");
    assert!(
        text.ends_with("\n`run` would work here.\n") && !text.contains(['✗', '\u{1b}']),
        "{text}"
    );
    let ini = fixture.ini();
    assert!(
        text.contains(&format!("{} ({} [agent] host-uuid)", fixture.worker.uuid, ini.display())),
        "{text}"
    );
    let [beat] = &fixture.master.received()[..] else { panic!("{:?}", fixture.master.received()) };
    let beat = beat.json.as_ref().unwrap();
    assert_eq!(
        (&beat["host_uuid"], &beat["lifecycle"]),
        (&json!(fixture.worker.uuid), &Value::Null)
    );
    assert_eq!(beat["status"], json!({"deployed": false, "deckies": []}));
    assert_eq!(fs::read_dir(fixture.agent_dir()).unwrap().count(), before, "no outbox is created");
}

#[test]
fn text_and_help_wrap_to_the_terminal_and_are_not_wrapped_in_a_pipe() {
    let fixture = worker();
    let terminal = Terminal::new();
    terminal.resize(24, 70);
    for argument in [None, Some("--help")] {
        terminal.spawn(check(&fixture).args(argument)).wait().unwrap();
    }
    let shown = terminal.read_to_end();
    assert!(shown.contains("Exit codes:"), "{shown}");
    // A path, which has no space, is not broken.
    let has_spaces = |line: &&str| line.trim().contains(' ');
    let mut messages = shown.lines().filter(has_spaces).filter(|line| !line.contains("sha256"));
    let too_long = messages.find(|line| line.trim_end().chars().count() > 70);
    assert_eq!(too_long, None, "{shown}");
    let piped = String::from_utf8(check(&fixture).output().unwrap().stdout).unwrap();
    assert!(piped.lines().any(|line| line.chars().count() > 100), "{piped}");
}

#[test]
fn json_contains_the_same_steps() {
    let fixture = worker();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.ended("ok"), STEPS);
    let own = &report.step("worker.crt")["facts"];
    assert_eq!(
        (&own["fingerprint"], &own["days_left"]),
        (&json!(fixture.worker.fingerprint), &json!(824))
    );
    let master = &report.step("tls")["facts"];
    assert_eq!(
        (&master["version"], &master["rule"], &master["days_left"]),
        (&json!("TLS 1.3"), &json!("name"), &json!(824))
    );
    assert_eq!(master["fingerprint"], fixture.master.certificate().fingerprint);
    assert_eq!(master["names"], json!(["swarmctl", "localhost", "127.0.0.1"]));
    let beat = &report.step("beat")["facts"];
    // The step `tls` has received a ticket.
    assert_eq!((&beat["class"], &beat["resumed"]), (&json!("http-204"), &json!(true)));
    assert_eq!(report.step("worker.key")["facts"]["mode"], "0600");
}

#[test]
fn each_rule_explains_why_it_accepts_the_master() {
    let fixture = worker();
    let pinned = format!("sha256:{}", fixture.master.certificate().fingerprint);
    for (rule, why) in [
        (
            "name",
            "accepted by the rule name: issued by ca.crt, with swarmctl as common name and DNS name",
        ),
        (
            "host",
            "accepted by the rule host: issued by ca.crt, with swarmctl as common name and DNS name",
        ),
        ("ca", "accepted by the rule ca: issued by ca.crt; its names are not checked"),
        (&pinned, "its fingerprint matches"),
    ] {
        let report = Report::of(check(&fixture).args(["--master-identity", rule]));
        assert!(report.message("tls").ends_with(why), "{}", report.message("tls"));
        assert!(
            report.message("identity").ends_with("(--master-identity)"),
            "{}",
            report.message("identity")
        );
    }
    let report = Report::of(check(&fixture).args(["--master-identity", "public"]));
    report.fails_with("tls", 1);
    assert!(
        report.message("tls").contains("; CN=swarmctl, O=DECNET, OU=swarm-worker for swarmctl, "),
        "{}",
        report.message("tls")
    );
    assert_eq!(report.ended("not-tried"), ["beat"]);
}

#[test]
fn tls_version_of_an_older_master_is_shown() {
    let fixture = worker_of(Options { offered: Offered::Tls12Only, ..Options::default() });
    let report = Report::of(&mut check(&fixture));
    assert_eq!(
        (&report.step("tls")["facts"]["version"], &report.0["works"]),
        (&json!("TLS 1.2"), &json!(true))
    );
}

#[test]
fn rejected_certificate_is_named_for_comparison() {
    let fixture = worker();
    let other = fixture.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &other.fingerprint);
    let report = Report::of(&mut check(&fixture));
    report.fails_with("beat", 1);
    assert!(report.message("beat").starts_with("http-403 in "), "{}", report.message("beat"));
    assert!(
        report.advice("beat").contains(&fixture.worker.fingerprint),
        "{}",
        report.advice("beat")
    );
    assert!(report.advice("beat").contains("must pass TLS through"), "{}", report.advice("beat"));
    fixture.master.decommission(&fixture.worker.uuid);
    let report = Report::of(&mut check(&fixture));
    report.fails_with("beat", 1);
    assert!(report.message("beat").starts_with("http-404 in "), "{}", report.message("beat"));
    assert!(
        report.advice("beat").starts_with("enrol this host again"),
        "{}",
        report.advice("beat")
    );
    assert!(!report.advice("beat").contains("sha256"), "{}", report.advice("beat"));
}

#[test]
fn certificate_of_another_ca_is_detected_locally_and_rejected_by_the_master() {
    let fixture = worker();
    let foreign = Authority::new().unwrap().issue(Role::Worker("foreign".to_owned())).unwrap();
    fs::write(fixture.agent_dir().join("worker.crt"), &foreign.certificate).unwrap();
    fs::write(fixture.agent_dir().join("worker.key"), &foreign.key).unwrap();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert!(
        report.message("tls").starts_with("the master refused our certificate"),
        "{}",
        report.message("tls")
    );
    assert!(
        report.advice("worker.crt").starts_with("it was not issued by ca.crt"),
        "{}",
        report.advice("worker.crt")
    );
    assert_eq!(fixture.master.received().len(), 0);
}

/// Starts a master that rejects our certificate as uvicorn does: it closes the connection without
/// an alert.
fn reject_without_an_alert(fixture: &Fixture, version: &'static SupportedProtocolVersion) -> u16 {
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
    let own = fixture.master.certificate();
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
            assert!(!is_accepted, "our certificate was issued by another CA");
        }
    });
    port
}

#[test]
fn rejection_without_an_alert_is_explained() {
    for version in [&TLS12, &TLS13] {
        let mut fixture = worker();
        fixture.worker.port = reject_without_an_alert(&fixture, version);
        fixture.write_ini();
        let report = Report::of(&mut check(&fixture));
        report.fails_with("tls", 1);
        let text = report.message("tls");
        assert!(
            text.starts_with(
                "the master closed the connection after it saw this host's certificate: "
            ),
            "{text}"
        );
        assert!(
            report.advice("tls").contains("then enrol this host again"),
            "{}",
            report.advice("tls")
        );
        let (builder, _tick) = fixture.builder();
        let heartbeat = builder.start().unwrap();
        let failure = wait_for_stats(&heartbeat, |stats| stats.failure.is_some()).failure.unwrap();
        assert_eq!(failure.class, "connection-closed", "{failure:?}");
        assert!(
            failure.detail.ends_with(": the master may refuse this host's certificate"),
            "{failure:?}"
        );
        assert!(!failure.detail.contains("http"), "{failure:?}");
    }
}

#[test]
fn master_of_another_ca_is_shown_with_its_names() {
    let mut fixture = worker();
    let other = Fixture::new();
    fixture.worker.port = other.master.port();
    fixture.write_ini();
    let report = Report::of(&mut check(&fixture));
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
fn expired_certificate_of_the_master_fails() {
    let authority = Authority::new().unwrap();
    let certificate = Some(authority.issue(Role::Expired).unwrap());
    let fixture =
        worker_of(Options { certificate, authority: Some(authority), ..Options::default() });
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert!(
        report.advice("tls").starts_with("renew the master's certificate"),
        "{}",
        report.advice("tls")
    );
}

#[test]
fn expired_pinned_certificate_is_accepted_with_advice() {
    let authority = Authority::new().unwrap();
    let expired = authority.issue(Role::Expired).unwrap();
    let pinned = format!("sha256:{}", expired.fingerprint);
    let fixture = worker_of(Options {
        certificate: Some(expired),
        authority: Some(authority),
        ..Options::default()
    });
    let report = Report::of(check(&fixture).args(["--master-identity", &pinned]));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(report.message("tls").contains("expired 1 day ago"), "{}", report.message("tls"));
    let advice = report.advice("tls");
    assert!(advice.contains("this rule ignores its dates"), "{advice}");
}

#[test]
fn stopped_master_fails_in_tcp() {
    let mut fixture = worker();
    fixture.master.stop();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tcp", 1);
    assert!(report.message("tcp").contains("Connection refused"), "{}", report.message("tcp"));
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
}

#[test]
fn server_of_another_protocol_is_detected() {
    let mut fixture = worker();
    let ssh = TcpListener::bind("127.0.0.1:0").unwrap();
    fixture.worker.port = ssh.local_addr().unwrap().port();
    fixture.write_ini();
    thread::spawn(move || {
        ssh.incoming().map_while(Result::ok).for_each(|mut it| drop(it.write_all(b"SSH-2.0-x\r\n")))
    });
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert_eq!(
        report.message("tls"),
        "the answer is neither TLS nor HTTP: the peer is not the master"
    );
    assert!(
        report.advice("tls").starts_with("correct the master's host and port"),
        "{}",
        report.advice("tls")
    );
}

#[test]
fn master_without_tls_is_detected() {
    let fixture = worker();
    fixture.master.always(Some(Fault::Banner(
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec(),
    )));
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert!(
        report.message("tls").starts_with("the answer is plain HTTP, not TLS"),
        "{}",
        report.message("tls")
    );
    assert!(report.advice("tls").contains("with --tls"), "{}", report.advice("tls"));
}

#[test]
fn certificate_for_only_the_masters_host_is_rejected_by_name() {
    let authority = Authority::new().unwrap();
    let role =
        Role::WebEnrolled { name: "worker-07".to_owned(), master_host: "127.0.0.1".to_owned() };
    let certificate = Some(authority.issue(role).unwrap());
    let fixture =
        worker_of(Options { certificate, authority: Some(authority), ..Options::default() });
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert!(
        report.message("tls").contains(r#"its common name is "worker-07""#),
        "{}",
        report.message("tls")
    );
    assert!(
        report.advice("tls").contains("another host impersonates the master"),
        "{}",
        report.advice("tls")
    );
    let report = Report::of(check(&fixture).args(["--master-identity", "host"]));
    assert!(
        report.message("tls").ends_with(
            "accepted by the rule host: issued by ca.crt for 127.0.0.1; a worker's certificate could be, too"
        ),
        "{}",
        report.message("tls")
    );
}

/// A TLS server of our CA that requests no client certificate, as a proxy that terminates TLS.
#[test]
fn proxy_that_terminates_tls_is_detected() {
    let mut fixture = worker();
    let openssl = OpenSsl::new(fixture.dir.path());
    openssl.issue("proxy", "rsa:2048", "-sha256");
    fs::write(fixture.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    let server = openssl.start_server("proxy", "-cipher ALL:@SECLEVEL=0");
    fixture.worker.port = server.port;
    fixture.write_ini();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.step("tls")["outcome"], "ok", "{:#}", report.0);
    assert!(
        report.advice("tls").starts_with("it requested no certificate from this host"),
        "{}",
        report.advice("tls")
    );
    assert!(
        report.advice("ca.crt").starts_with("before it expires, renew the master's CA"),
        "{}",
        report.advice("ca.crt")
    );
    assert!(report.advice("tls").contains("pass TLS through"), "{}", report.advice("tls"));
}

#[test]
fn weak_signature_of_worker_crt_is_named() {
    let fixture = worker();
    let openssl = OpenSsl::new(fixture.dir.path());
    openssl.issue("old", "rsa:2048", "-sha1");
    fs::write(fixture.agent_dir().join("worker.crt"), openssl.read("old.crt")).unwrap();
    fs::write(fixture.agent_dir().join("worker.key"), openssl.read("old.key")).unwrap();
    let report = Report::of(&mut check(&fixture));
    let advice = report.advice("worker.crt");
    assert!(
        advice.starts_with("the master may reject it: it is signed with RSA and SHA-1"),
        "{advice}"
    );
}

#[test]
fn unreadable_bundle_gets_no_advice_to_enrol() {
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
        let fixture = worker();
        let path = fixture.agent_dir().join("worker.key");
        fs::remove_file(&path).unwrap();
        damage(&path);
        let report = Report::of(&mut check(&fixture));
        report.fails_with("worker.key", code);
        assert_eq!(report.advice("worker.key"), advice);
        assert!(
            report.message("worker.key").contains(&format!("{}: cannot be read: ", path.display()))
        );
    }
}

#[test]
fn ignored_entries_of_ca_crt_are_named() {
    let fixture = worker();
    let path = fixture.agent_dir().join("ca.crt");
    let worker = fs::read_to_string(fixture.agent_dir().join("worker.crt")).unwrap();
    fs::write(&path, worker + &fixture.master.authority().certificate()).unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.message("ca.crt").starts_with("CN=DECNET SWARM Root CA, "),
        "{}",
        report.message("ca.crt")
    );
    assert!(report.advice("ca.crt").contains("not marked as a CA"), "{}", report.advice("ca.crt"));
}

#[test]
fn silent_server_times_out_after_five_seconds() {
    let mut fixture = worker();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    fixture.worker.port = silent.local_addr().unwrap().port();
    fixture.write_ini();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert_eq!(report.message("tls"), "the handshake was not complete within 5 s");
}

#[test]
fn answers_other_than_success_fail_with_their_meaning() {
    let fixture = worker();
    for (answer, meaning) in [
        (Answer::status(503).body("busy"), "http-503 in "),
        (Answer::status(422).body("no"), "the master rejected the body: no"),
        (Answer::status(413), "the body is too large"),
        (Answer::status(500), "the master failed"),
        (Answer::status(429), "the master cannot accept beats now"),
        (Answer::status(302), "the answer is not from a DECNET master"),
    ] {
        fixture.master.script([Fault::Answer(answer)]);
        let report = Report::of(&mut check(&fixture));
        report.fails_with("beat", 1);
        assert!(report.message("beat").contains(meaning), "{}", report.message("beat"));
    }
}

#[test]
fn host_that_is_not_enrolled_exits_78_and_other_steps_still_run() {
    let fixture = worker();
    let mut command = program();
    command.args(["--config", "/nonexistent/decnet.ini", "check", "--state-file", "/nonexistent"]);
    let report = Report::of(command.arg("--docker-socket").arg(fixture.path("docker.sock")));
    report.fails_with("enrolment", 78);
    assert_eq!(report.ended("ok"), ["state-file", "docker"]);
    assert_eq!(report.ended("not-tried").len(), 9);
}

#[test]
fn invalid_file_of_the_bundle_is_named() {
    let fixture = worker();
    fs::write(fixture.agent_dir().join("worker.key"), "garbage").unwrap();
    Report::of(&mut check(&fixture)).fails_with("worker.key", 78);
    let other = fixture.master.authority().issue(Role::Worker("other".to_owned())).unwrap();
    fs::write(fixture.agent_dir().join("worker.key"), &other.key).unwrap();
    let report = Report::of(&mut check(&fixture));
    // An enrolment in progress looks like this.
    report.fails_with("worker.key", 1);
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
    fs::remove_file(fixture.agent_dir().join("ca.crt")).unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.ended("failed"), ["ca.crt", "worker.key"], "{:#}", report.0);
    assert_eq!(report.ended("not-tried"), ["tls", "beat"]);
}

#[test]
fn each_file_of_the_bundle_has_its_own_result() {
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
    for (damage, message, advice) in damages {
        let fixture = worker();
        fs::remove_file(fixture.agent_dir().join("ca.crt")).unwrap();
        damage(&fixture.agent_dir().join("worker.crt"));
        let report = Report::of(&mut check(&fixture));
        assert_eq!(report.ended("failed"), ["ca.crt", "worker.crt"], "{:#}", report.0);
        assert!(report.message("worker.crt").contains(message), "{}", report.message("worker.crt"));
        assert!(report.advice("worker.crt").starts_with(advice), "{}", report.advice("worker.crt"));
        assert_eq!(report.ended("not-tried"), ["worker.key", "tls", "beat"]);
        fs::write(fixture.agent_dir().join("worker.key"), "").unwrap();
        let report = Report::of(&mut check(&fixture));
        assert_eq!(
            report.ended("failed"),
            ["ca.crt", "worker.crt", "worker.key"],
            "{:#}",
            report.0
        );
    }
}

#[test]
fn expired_root_beside_a_valid_one_gets_advice() {
    let fixture = worker();
    let openssl = OpenSsl::new(fixture.dir.path());
    let mut old = rcgen::CertificateParams::default();
    old.distinguished_name = rcgen::DistinguishedName::new();
    old.distinguished_name.push(rcgen::DnType::CommonName, "old");
    old.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    (old.not_before, old.not_after) =
        (rcgen::date_time_ymd(2001, 1, 1), rcgen::date_time_ymd(2002, 1, 1));
    let key = rcgen::KeyPair::generate().unwrap();
    fs::write(openssl.path("old.crt"), old.self_signed(&key).unwrap().pem()).unwrap();
    fs::write(openssl.path("old.key"), key.serialize_pem()).unwrap();
    let path = fixture.agent_dir().join("ca.crt");
    fs::write(&path, openssl.read("old.crt") + &fixture.master.authority().certificate()).unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.message("ca.crt").starts_with("CN=DECNET SWARM Root CA, "),
        "{}",
        report.message("ca.crt")
    );
    let advice = report.advice("ca.crt");
    assert!(
        advice.starts_with("remove the invalid certificates from it: CN=old, expired "),
        "{advice}"
    );
    // Our certificate was issued by the expired root.
    openssl.run("req -newkey rsa:2048 -nodes -keyout own.key -out own.csr -subj /CN=worker");
    openssl.run("x509 -req -in own.csr -CA old.crt -CAkey old.key -CAcreateserial -days 90 -extfile ext -out own.crt");
    fs::write(fixture.agent_dir().join("worker.crt"), openssl.read("own.crt")).unwrap();
    fs::write(fixture.agent_dir().join("worker.key"), openssl.read("own.key")).unwrap();
    let advice = Report::of(&mut check(&fixture)).advice("worker.crt").to_owned();
    assert!(
        advice
            .starts_with("the master may reject it, because the CA that issued it is not valid: "),
        "{advice}"
    );
    fs::write(&path, openssl.read("old.crt")).unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.ended("failed")[0], "ca.crt", "{:#}", report.0);
}

#[test]
fn ca_of_the_same_name_with_another_key_type_is_rejected() {
    let fixture = worker();
    let openssl = OpenSsl::new(fixture.dir.path());
    // The name of the authority, byte for byte.
    let name = "CN=DECNET SWARM Root CA\nO=DECNET\n";
    let config =
        format!("[req]\ndistinguished_name=dn\nprompt=no\nstring_mask=utf8only\n[dn]\n{name}");
    fs::write(openssl.path("cnf"), config).unwrap();
    openssl.run(
        "req -x509 -newkey rsa:2048 -nodes -keyout k -out rsa.crt -days 90 -config cnf -addext basicConstraints=CA:TRUE",
    );
    fs::write(fixture.agent_dir().join("ca.crt"), openssl.read("rsa.crt")).unwrap();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("tls", 1);
    assert!(
        report
            .message("tls")
            .starts_with("the master's certificate is not issued by the CA in ca.crt"),
        "{}",
        report.message("tls")
    );
    assert!(
        report.advice("worker.crt").starts_with("it was not issued by ca.crt"),
        "{}",
        report.advice("worker.crt")
    );
}

#[test]
fn future_problems_get_advice() {
    let fixture = worker();
    let soon = Role::ShortLived("w".to_owned(), std::time::Duration::from_secs(86_400 * 9));
    let issued = fixture.master.authority().issue(soon).unwrap();
    fixture.master.authority().write_bundle(&issued, &fixture.agent_dir()).unwrap();
    fixture.master.pin(&fixture.worker.uuid, &issued.fingerprint);
    let key = fixture.agent_dir().join("worker.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.0["works"], true, "{:#}", report.0);
    assert!(
        report.advice("worker.crt").starts_with("before it expires, enrol this host again"),
        "{}",
        report.advice("worker.crt")
    );
    assert_eq!(
        report.advice("worker.key"),
        format!("other users can read it: chmod 600 {}", key.display())
    );
}

#[test]
fn docker_state_file_and_topology_fail_separately() {
    let fixture = worker();
    fs::remove_file(fixture.path("docker.sock")).unwrap();
    Report::of(&mut check(&fixture)).fails_with("docker", 1);
    fs::write(fixture.path("state.json"), "{").unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.ended("failed"), ["state-file", "docker"], "{:#}", report.0);
    let beat = fixture.master.received().pop().unwrap().json.unwrap();
    assert!(
        beat["status"]["error"].as_str().unwrap().contains("state.json"),
        "the beat contains the error, too: {beat}"
    );
    fs::write(
        fixture.agent_dir().join("topology.db"),
        "not a database, and long enough to be read as one",
    )
    .unwrap();
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.ended("failed"), ["state-file", "docker", "topology"], "{:#}", report.0);
}

#[test]
fn no_beat_is_sent_if_the_topology_cannot_be_read() {
    let fixture = worker();
    fs::write(
        fixture.agent_dir().join("topology.db"),
        "not a database, and long enough to be read as one",
    )
    .unwrap();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("topology", 1);
    assert_eq!(
        (report.ended("not-tried"), report.message("beat")),
        (vec!["beat"], "not tried: topology.db cannot be read")
    );
    assert_eq!(fixture.master.received().len(), 0, "the master would order a rebuild");
}

#[test]
fn missing_folder_of_the_state_file_fails() {
    let fixture = worker();
    let missing = fixture.path("none/state.json");
    // The environment variable, without the option.
    let mut command = program();
    command.arg("--config").arg(fixture.ini()).arg("check").stdin(Stdio::null());
    command.env("DECNET_HEARTBEAT_STATE_FILE", &missing);
    let report = Report::of(command.arg("--docker-socket").arg(fixture.path("docker.sock")));
    report.fails_with("state-file", 1);
    assert!(
        report.message("state-file").ends_with("(DECNET_HEARTBEAT_STATE_FILE)"),
        "{}",
        report.message("state-file")
    );
    let beat = fixture.master.received().pop().unwrap().json.unwrap();
    assert!(
        beat["status"]["error"].as_str().unwrap().contains("none/state.json: its folder "),
        "{beat}"
    );
    assert_eq!((beat["status"].get("deckies"), beat["status"].get("deployed")), (None, None));
}

#[test]
fn rejected_docker_request_is_named_and_affects_only_observed() {
    let fixture = worker();
    let socket = fixture.path("docker.sock");
    fs::remove_file(&socket).unwrap();
    start_docker_with(&socket, |request| match request.starts_with(b"GET /networks ") {
        true => "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nForbidden".to_owned(),
        false => json_answer(r#"[{"Names":["/d1-ssh"],"State":"running"}]"#),
    });
    let decky = json!({"name": "d1", "services": ["ssh"]});
    let state = json!({"config": {"mode": "swarm", "deckies": [decky]}, "compose_path": "/x"});
    fs::write(fixture.path("state.json"), state.to_string()).unwrap();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("docker", 1);
    assert!(
        report.message("docker").contains(": /networks: answered 403 Forbidden"),
        "{}",
        report.message("docker")
    );
    assert!(report.message("docker").ends_with("; 1 container"), "{}", report.message("docker"));
    let beat = fixture.master.received().pop().unwrap().json.unwrap();
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
fn outbox_shows_queued_deltas_and_the_delivering_process() {
    let mut fixture = worker();
    let (builder, tick) = fixture.builder();
    let heartbeat = builder.start().unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    fixture.master.stop();
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    tick.send(now()).unwrap();
    wait_for_stats(&heartbeat, |stats| stats.failure.is_some());
    fixture.master.start_again().unwrap();
    let report = Report::of(&mut check(&fixture));
    let facts = &report.step("outbox")["facts"];
    let deliverer = &facts["delivered_by"];
    // The first delta may have been delivered meanwhile.
    assert!(facts["waiting"].as_u64().is_some_and(|waiting| waiting <= 1), "{facts}");
    assert_eq!(deliverer, std::process::id(), "{}", report.message("outbox"));
    fixture.master.stop();
    heartbeat.deltas().push(LifecycleDelta::succeeded("e", Operation::Deploy)).unwrap();
    drop(heartbeat);
    let report = Report::of(&mut check(&fixture));
    let facts = &report.step("outbox")["facts"];
    assert!(facts["waiting"].as_u64() >= Some(1) && facts["delivered_by"].is_null(), "{facts}");
    assert!(
        report.advice("outbox").starts_with("start decnet-heartbeat run"),
        "{}",
        report.advice("outbox")
    );
    assert!(fixture.outbox().exists());
}

#[test]
fn operations_with_an_unknown_state_for_a_day_are_named() {
    let fixture = worker();
    fixture.start_heartbeat().0.stop(TIMEOUT);
    let database = rusqlite::Connection::open(fixture.outbox()).unwrap();
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
    let report = Report::of(&mut check(&fixture));
    let facts = &report.step("outbox")["facts"];
    assert_eq!(
        (&facts["operations"], &facts["stuck"], report.advice("outbox")),
        (&json!(1), &json!(0), "")
    );
    let id = add("d\u{1b}2", 86_400);
    let report = Report::of(&mut check(&fixture));
    assert_eq!(report.step("outbox")["facts"]["stuck"], 1);
    let named = format!("; 1 stuck: deploy of d\\u{{1b}}2 (row {id}, for 1day)");
    assert!(report.message("outbox").ends_with(&named), "{named}: {}", report.message("outbox"));
    let lock = fixture.agent_dir().join("heartbeat.db-lock");
    assert!(
        report.advice("outbox").contains(&format!("check why {} cannot be used", lock.display()))
    );
    for _ in 0..20 {
        add("d3", 90_000);
    }
    let message = Report::of(&mut check(&fixture)).message("outbox").to_owned();
    assert!(
        message.contains("; 21 stuck: ") && message.matches("(row ").count() == 10,
        "{message}"
    );
}

#[test]
fn unusable_outbox_fails() {
    let fixture = worker();
    fs::write(fixture.outbox(), "not an outbox, and long enough to be read as a database").unwrap();
    let report = Report::of(&mut check(&fixture));
    report.fails_with("outbox", 1);
    let content = fs::read_to_string(fixture.outbox()).unwrap();
    assert!(content.starts_with("not an outbox"), "check changes no file");
    Report::of(check(&fixture).args(["--outbox", "/nonexistent/folder/heartbeat.db"]))
        .fails_with("outbox", 1);
    Report::of(check(&fixture).args(["--outbox"]).arg(fixture.path("x.db"))).step("outbox");
}

#[test]
fn stats_and_metrics_files_are_checked_if_given() {
    let fixture = worker();
    let mut command = check(&fixture);
    command.args(["--metrics-file", "/nonexistent/decnet.prom", "--stats-file"]);
    let report = Report::of(command.arg(fixture.path("stats.json")));
    assert_eq!(report.ended("failed"), ["metrics-file"], "{:#}", report.0);
    assert_eq!(report.ended("ok").last(), Some(&"stats-file"));
}

#[test]
fn running_heartbeat_is_not_disturbed() {
    let fixture = worker();
    let heartbeat = Heartbeat::builder()
        .enrolment(fixture.worker.enrolment().unwrap())
        .status_source(|| Snapshot::new(&json!({})))
        .start()
        .unwrap();
    wait_for_stats(&heartbeat, |stats| stats.beats == 1);
    for _ in 0..5 {
        assert_eq!(Report::of(&mut check(&fixture)).0["works"], true);
    }
    heartbeat.deltas().push(LifecycleDelta::succeeded("d", Operation::Deploy)).unwrap();
    let stats = wait_for_stats(&heartbeat, |stats| stats.delivered == 1);
    assert_eq!((stats.failure.map(|failure| failure.class), stats.panics), (None, 0));
    drop::<LoopbackMaster>(fixture.master);
}

/// The real master uses OpenSSL, whose alerts name the reason why it rejects a certificate.
#[test]
fn each_alert_of_openssl_is_explained() {
    let mut fixture = worker();
    let openssl = OpenSsl::new(fixture.dir.path());
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
    // As DECNET issues them: only the issuer's name identifies the issuer.
    fs::write(openssl.path("ext"), "extendedKeyUsage=clientAuth\nauthorityKeyIdentifier=none\n")
        .unwrap();
    openssl.run(
        "x509 -req -in good.csr -CA same.crt -CAkey same.key -days 9 -extfile ext -out other.crt",
    );
    openssl.run("req -x509 -key good.key -out unknown.crt -days 9 -subj /CN=other");
    fs::write(fixture.agent_dir().join("ca.crt"), openssl.read("ca.crt")).unwrap();
    let server = openssl.start_server("server", "-Verify 1 -verify_return_error -CAfile ca.crt");
    fixture.worker.port = server.port;
    fixture.write_ini();
    for (name, key, message, advice) in [
        (
            "old",
            "old",
            "the master refused our certificate: it may be too weak",
            "see the step worker.crt",
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
        fs::write(fixture.agent_dir().join("worker.crt"), openssl.read(&format!("{name}.crt")))
            .unwrap();
        fs::write(fixture.agent_dir().join("worker.key"), openssl.read(&format!("{key}.key")))
            .unwrap();
        let report = Report::of(&mut check(&fixture));
        assert!(report.message("tls").starts_with(message), "{name}: {}", report.message("tls"));
        assert!(report.advice("tls").starts_with(advice), "{name}: {}", report.advice("tls"));
    }
}

#[test]
fn unknown_name_fails_with_its_reason() {
    let fixture = worker();
    let mut command = check(&fixture);
    command.env("DECNET_MASTER_HOST", "no-such.invalid");
    let report = Report::of(&mut command);
    report.fails_with("name", 1);
    let message = report.message("name");
    assert!(
        message.starts_with("no-such.invalid: the name no-such.invalid could not be looked up: "),
        "{message}"
    );
    assert!(
        report.advice("name").contains("configure the master's IP address"),
        "{}",
        report.advice("name")
    );
    assert_eq!(report.ended("not-tried"), ["tcp", "tls", "beat"]);
}
