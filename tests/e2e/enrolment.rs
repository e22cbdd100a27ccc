//! Compares how this crate and the real agent read the environment and `decnet.ini`, case by case.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use decnet_heartbeat::{EnrolmentSources, Error};
use serde::Deserialize;

use crate::support;

/// What one of them reads.
#[derive(Debug, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
enum Outcome {
    Enrolled {
        host_uuid: String,
        master_host: String,
        master_port: u16,
        agent_dir: PathBuf,
    },
    #[serde(rename = "not enrolled")]
    NotEnrolled,
    Refused {
        error: String,
    },
}

impl Outcome {
    fn of_this_crate(variables: &BTreeMap<String, String>) -> Self {
        let read = EnrolmentSources::from_variables(variables).read();
        match read {
            Ok(found) => Self::Enrolled {
                host_uuid: found.host_uuid().value().clone(),
                master_host: found.master_host().value().clone(),
                master_port: *found.master_port().value(),
                agent_dir: found.agent_dir().value().clone(),
            },
            Err(error) if error.is_not_enrolled() => Self::NotEnrolled,
            Err(error) => Self::Refused { error: config_error(&error) },
        }
    }

    fn agrees_with(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Enrolled { host_uuid, master_host, master_port, agent_dir },
                Self::Enrolled {
                    host_uuid: other_uuid,
                    master_host: other_host,
                    master_port: other_port,
                    agent_dir: other_dir,
                },
            ) => {
                // Ours is absolute, so that it does not change with the working directory.
                let other_dir = std::path::absolute(other_dir).unwrap();
                (host_uuid, master_host, master_port, agent_dir)
                    == (other_uuid, other_host, other_port, &other_dir)
            }
            (Self::NotEnrolled, Self::NotEnrolled) => true,
            // The texts differ. They must not be empty.
            (Self::Refused { error }, Self::Refused { error: other_error }) => {
                !error.is_empty() && !other_error.is_empty()
            }
            _ => false,
        }
    }
}

/// The text of an error about a configured value. There is no other error.
fn config_error(error: &Error) -> String {
    assert!(error.is_config(), "{error}");
    error.to_string()
}

struct Case {
    name: &'static str,
    ini: Vec<u8>,
    variables: Vec<(&'static str, &'static str)>,
}

fn ini(name: &'static str, text: impl Into<Vec<u8>>) -> Case {
    Case { name, ini: text.into(), variables: Vec::new() }
}

fn with(
    name: &'static str,
    text: impl Into<Vec<u8>>,
    variables: &[(&'static str, &'static str)],
) -> Case {
    Case { name, ini: text.into(), variables: variables.to_vec() }
}

/// An enrolled worker's ini with `text` at the end of its `[agent]` section.
fn agent(name: &'static str, text: &str) -> Case {
    ini(name, worker(text))
}

fn worker(text: &str) -> String {
    format!("[decnet]\nmode = agent\n[agent]\nhost-uuid = u-1\nmaster-host = master.lan\n{text}")
}

/// An ini with mode agent whose `[agent]` section is `text`.
fn bare(name: &'static str, text: &str) -> Case {
    ini(name, format!("[decnet]\nmode = agent\n[agent]\n{text}"))
}

const UUID: (&str, &str) = ("DECNET_HOST_UUID", "u-env");
const HOST: (&str, &str) = ("DECNET_MASTER_HOST", "env.lan");

/// Cases that are read differently on purpose, and why. An entry for a case that does not differ
/// fails the test.
const DELIBERATE: &[(&str, &str)] = &[
    ("value on the next line", "the line break before the value is not part of a uuid"),
    ("value after a blank line", "as above"),
    ("spaces around the uuid", "white space around a variable is not part of its value"),
    ("spaces around the host", "as above"),
    ("NUL in another key", "a key that a heartbeat does not use cannot make it fail"),
    ("single percent in another key", "as above"),
    ("over a MiB", "a file of that size is not an ini, and reading all of it is a risk"),
    ("port with underscores", "valid in a Python literal; in an ini it is more likely a mistake"),
    ("port in Arabic digits", "as above"),
    ("very long uuid", "it does not fit into the master's database"),
    (
        "uuid on two lines",
        "a line indented by mistake; the original sends both lines and always gets 404",
    ),
    ("agent dir on two lines", "a line indented by mistake; the original finds no bundle"),
    ("quoted host", "such a host cannot exist; the original fails at every beat"),
    ("host with a space", "as above"),
    ("host with a long label", "as above"),
    ("host with a scheme", "the original posts to a host named https"),
    ("host with a path", "the original posts to port 443 of that host"),
    ("host with a query", "as above"),
    ("host with a user", "the original sends the user as a login without a password"),
    ("host IPv4 cut short", "some resolvers read 10.1 as 10.0.0.1, and TLS rejects it"),
    ("host IPv6", "the brackets that a URL needs are added; the original fails at every beat"),
    (
        "host IPv6 in brackets",
        "the brackets are removed, because TLS and the resolver need the address without them",
    ),
    ("host IPv6 with a zone", "a certificate cannot contain a zone"),
    ("host in unicode", "only the xn-- form is unambiguous"),
];

fn cases() -> Vec<Case> {
    vec![
        // The file as the master writes it, and common variations.
        ini(
            "as the master writes it",
            "; Generated\n[decnet]\nmode = agent\ndisallow-master = true\nlog-directory = /var/log/decnet\n\n[agent]\n\
             host-uuid = 0c4f9a52-8d1f-4b7e-9a51-3c1d3a5f6b70\nmaster-host = 10.0.0.1\nswarmctl-port = 8770\n\
             swarm-syslog-port = 6514\nagent-port = 8765\nagent-dir = /etc/decnet/agent\n\
             updater-dir = /etc/decnet/updater\n",
        ),
        ini("empty file", ""),
        ini("only comments", "# a\n  ; b\n"),
        agent("comment lines", "# swarmctl-port = 1\n  ; swarmctl-port = 2\nswarmctl-port = 3\n"),
        agent("inline hash", "swarmctl-port = 9000 # the port\n"),
        agent("inline semicolon after a tab", "swarmctl-port = 9000\t; the port\n"),
        agent("hash inside a value", "agent-dir = /srv/a#b\n"),
        agent("semicolon inside a value", "agent-dir = /srv/a;b\n"),
        agent("second hash begins the comment", "agent-dir = /srv/a#b #c\n"),
        agent("hash and then semicolon begin comments", "agent-dir = /srv/a#b #c ;d\n"),
        agent("value that is a comment", "agent-dir = # none\n"),
        ini(
            "inline comment on a header",
            "[decnet] # who\nmode=agent\n[agent] ; we\nhost-uuid=u\nmaster-host=h\n",
        ),
        ini(
            "text after a header",
            "[decnet] who\nmode=agent\n[agent]x=y\nhost-uuid=u\nmaster-host=h\n",
        ),
        bare("quotes are kept", "host-uuid = \"u-1\"\nmaster-host = h\n"),
        bare("quoted host", "host-uuid = u\nmaster-host = \"h\"\n"),
        bare("keys fold case", "Host-UUID = u\nMASTER-HOST = h\n"),
        bare("underscores for dashes", "host_uuid = u\nmaster_host = h\n"),
        bare("both spellings of a key", "host_uuid = first\nhost-uuid = second\nmaster-host = h\n"),
        bare("long s in a key", "ho\u{17f}t-uuid = u\nma\u{17f}ter-host = h\n"),
        ini(
            "sections do not fold case",
            "[Decnet]\nmode = agent\n[Agent]\nhost-uuid = u\nmaster-host = h\n",
        ),
        ini(
            "spaces in a header",
            "[decnet]\nmode = agent\n[ agent ]\nhost-uuid = u\nmaster-host = h\n",
        ),
        ini("empty header", "[decnet]\nmode = agent\n[]\nhost-uuid = u\n"),
        ini("header of a bracket", "[decnet]\nmode = agent\n[]]\nhost-uuid = u\n"),
        ini("header without an end", "[decnet]\nmode = agent\n[agent\nhost-uuid = u\n"),
        bare("colons", "host-uuid: u\nmaster-host:h\n"),
        bare("equals after colon", "host-uuid := u\nmaster-host = h\n"),
        bare("equals inside a value", "host-uuid = a=b:c\nmaster-host = h\n"),
        bare("no spaces, many spaces", "host-uuid=u\nmaster-host   =   h   \n"),
        // Lines and indentation.
        ini("windows line ends", worker("swarmctl-port = 9000\n").replace('\n', "\r\n")),
        ini("old mac line ends", worker("swarmctl-port = 9000\n").replace('\n', "\r")),
        ini("no line end at the end", worker("swarmctl-port = 9000")),
        ini("byte order mark", format!("\u{feff}{}", worker(""))),
        ini("byte order mark before a comment", format!("\u{feff}# hi\n{}", worker(""))),
        ini(
            "indented sections and keys",
            "  [decnet]\n  mode = agent\n  [agent]\n  host-uuid = u\n  master-host = h\n",
        ),
        ini(
            "indented keys",
            "[decnet]\n\tmode = agent\n[agent]\n\thost-uuid = u\n\tmaster-host = h\n",
        ),
        ini(
            "indented header continues the value above",
            "[decnet]\nmode = agent\n  [agent]\nhost-uuid = u\nmaster-host = h\n",
        ),
        bare("value on the next line", "host-uuid =\n    u-1\nmaster-host = h\n"),
        bare("value after a blank line", "host-uuid = u-1\nmaster-host =\n\n  h\n"),
        bare("less indented line", "    host-uuid = u\n  master-host = h\n"),
        bare("comment inside a continuation", "host-uuid = u\nmaster-host =\n  # no\n"),
        agent("comment below a value", "agent-dir = /srv/a\n  # deeper\n"),
        bare("host on two lines", "host-uuid = u\nmaster-host = a\n  b\n"),
        agent("port on two lines", "swarmctl-port = 90\n  00\n"),
        agent("form feed is white space", "swarmctl-port =\u{c}9000\u{c}\n"),
        agent("separator is white space", "agent-dir = /srv/a\u{1f}\n"),
        agent("no-break space is white space", "agent-dir = \u{a0}/srv/a \u{a0}# c\n"),
        // Invalid files.
        ini("key before any section", "host-uuid = u\n[agent]\n"),
        agent("key without a value", "swarmctl-port\n"),
        agent("key without a name", "= 5\n"),
        agent("key twice", "host-uuid = u-2\n"),
        agent("key twice in two cases", "Host-UUID = u-2\n"),
        agent("section twice", "[agent]\nagent-port = 1\n"),
        agent("other section twice", "[x]\n[x]\n"),
        agent("DEFAULT twice", "[DEFAULT]\na = 1\n[DEFAULT]\nb = 2\n"),
        agent("key twice over two DEFAULTs", "[DEFAULT]\na = 1\n[DEFAULT]\na = 2\n"),
        agent("section resumed after DEFAULT", "[DEFAULT]\nswarmctl-port = 9000\n"),
        ini("not UTF-8", [worker("# ").as_bytes(), b"\xe9\n"].concat()),
        bare("NUL in the uuid", "host-uuid = a\0b\nmaster-host = h\n"),
        agent("NUL in the agent dir", "agent-dir = /a\0b\n"),
        agent("NUL in a comment", "# a\0b\n"),
        agent("NUL in another key", "updater-dir = /a\0b\n"),
        agent("very long comment", &format!("# {}\n", "x".repeat(500_000))),
        agent("over a MiB", &"# 0123456789\n".repeat(90_000)),
        bare("very long uuid", &format!("host-uuid = {}\nmaster-host = h\n", "u".repeat(3_000))),
        // Interpolation.
        agent("reference in the section", "base = /srv\nagent-dir = %(base)s/agent\n"),
        agent("reference folds case", "base = /srv\nagent-dir = %(BASE)s/agent\n"),
        agent("reference to DEFAULT", "agent-dir = %(base)s/agent\n[DEFAULT]\nbase = /srv\n"),
        agent("references in a row", "a = /%(b)s\nb = %(c)s%%\nc = d\nagent-dir = %(a)s%(a)s\n"),
        agent("reference to itself", "agent-dir = %(agent-dir)s\n"),
        agent("reference to nothing", "agent-dir = %(nothing)s\n"),
        agent("reference to another section", "agent-dir = /%(mode)s\n"),
        agent("ten references deep", &chain(10)),
        agent("eleven references deep", &chain(11)),
        agent("doubled percent", "agent-dir = /srv/100%%\n"),
        agent("single percent", "agent-dir = /srv/100%\n"),
        agent("reference without its s", "base = a\nagent-dir = /srv/%(base)\n"),
        agent("reference without a name", "agent-dir = /srv/%()s\n"),
        agent("single percent in another key", "updater-dir = 100%\n"),
        // The section that is read.
        ini("mode left out", "[agent]\nhost-uuid = u\nmaster-host = h\n"),
        ini(
            "mode master",
            "[decnet]\nmode = master\n[agent]\nhost-uuid = u\n[master]\nhost-uuid = m\nmaster-host = h\n",
        ),
        ini("mode in capitals", worker("").replace("= agent", "= AGENT")),
        ini("mode unknown", worker("").replace("= agent", "= worker")),
        ini("mode empty", worker("").replace("= agent", "=")),
        ini("mode quoted", worker("").replace("= agent", "= 'agent'")),
        with(
            "mode from the environment",
            "[agent]\nhost-uuid = u\nmaster-host = h\n",
            &[("DECNET_MODE", "agent")],
        ),
        with("mode of the environment first", worker(""), &[("DECNET_MODE", "Master")]),
        with("mode of the environment with a space", worker(""), &[("DECNET_MODE", "agent ")]),
        with("mode of the environment empty", worker(""), &[("DECNET_MODE", "")]),
        ini(
            "all in [decnet]",
            "[decnet]\nhost-uuid = u\nmaster-host = h\nswarmctl-port = 5\nagent-dir = /d\n",
        ),
        ini("[decnet] before [agent]", worker("").replace("[agent]", "host-uuid = u-0\n[agent]")),
        ini(
            "empty value in [decnet] hides [agent]",
            worker("").replace("[agent]", "host-uuid =\n[agent]"),
        ),
        ini("only DEFAULT", "[DEFAULT]\nmode = agent\nhost-uuid = u\nmaster-host = h\n"),
        ini(
            "DEFAULT and an empty [decnet]",
            "[DEFAULT]\nhost-uuid = u\nmaster-host = h\n[decnet]\n",
        ),
        ini(
            "DEFAULT's mode",
            "[DEFAULT]\nmode = agent\n[decnet]\n[agent]\nhost-uuid = u\nmaster-host = h\n",
        ),
        agent("DEFAULT through [decnet] comes first", "[DEFAULT]\nhost-uuid = d\n"),
        agent("DEFAULT's spelling comes first", "[DEFAULT]\nhost_uuid = d\n"),
        agent("port of [swarm]", "[swarm]\nswarmctl-port = 9001\n"),
        agent(
            "port of [agent] before [swarm]",
            "swarmctl-port = 9000\n[swarm]\nswarmctl-port = 9001\n",
        ),
        agent("port of [swarm] with an underscore", "[swarm]\nswarmctl_port = 9001\n"),
        agent("host of [swarm] is another", "[swarm]\nmaster-host = other\n"),
        ini("port of [swarm] through DEFAULT", "[swarm]\n[DEFAULT]\nswarmctl-port = 0\n"),
        // The environment and the ini.
        with("only the environment", "", &[UUID, HOST]),
        with(
            "environment first",
            worker("swarmctl-port = 1\nagent-dir = /a\n"),
            &[UUID, HOST, ("DECNET_SWARMCTL_PORT", "2"), ("DECNET_AGENT_DIR", "/b")],
        ),
        with("empty uuid hides the ini", worker(""), &[("DECNET_HOST_UUID", "")]),
        with("empty host hides the ini", worker(""), &[("DECNET_MASTER_HOST", "")]),
        with("empty port", worker("swarmctl-port = 9000\n"), &[("DECNET_SWARMCTL_PORT", "")]),
        with(
            "empty agent dir hides the ini",
            worker("agent-dir = /a\n"),
            &[("DECNET_AGENT_DIR", "")],
        ),
        with("spaces around the uuid", worker(""), &[("DECNET_HOST_UUID", " u-env ")]),
        with("spaces around the host", worker(""), &[("DECNET_MASTER_HOST", " env.lan")]),
        with("percent in the environment", worker(""), &[("DECNET_AGENT_DIR", "/srv/100%")]),
        with(
            "bad port of the ini, good one of the environment",
            worker("swarmctl-port = x\n"),
            &[("DECNET_SWARMCTL_PORT", "9000")],
        ),
        with("bad port, not enrolled", "", &[("DECNET_SWARMCTL_PORT", "x")]),
        with("bad host, no uuid", "", &[("DECNET_MASTER_HOST", "a b")]),
        with("no such ini", "", &[UUID, HOST, ("DECNET_CONFIG", "/nowhere/decnet.ini")]),
        with("no such ini, not enrolled", "", &[("DECNET_CONFIG", "/nowhere/decnet.ini")]),
        with(
            "no such ini, bad mode",
            "",
            &[UUID, HOST, ("DECNET_MODE", "x"), ("DECNET_CONFIG", "/nowhere/decnet.ini")],
        ),
        with("ini below a file", "", &[UUID, HOST, ("DECNET_CONFIG", "/dev/null/decnet.ini")]),
        with("ini that is a folder", "", &[UUID, HOST, ("DECNET_CONFIG", "/")]),
        with("ini that is a device", "", &[("DECNET_CONFIG", "/dev/zero")]),
        // Values.
        agent("port 1", "swarmctl-port = 1\n"),
        agent("port 65535", "swarmctl-port = 65535\n"),
        agent("port 0", "swarmctl-port = 0\n"),
        agent("port 65536", "swarmctl-port = 65536\n"),
        agent("port negative", "swarmctl-port = -1\n"),
        agent("port empty", "swarmctl-port =\n"),
        agent("port in hex", "swarmctl-port = 0x10\n"),
        agent("port with a fraction", "swarmctl-port = 8770.0\n"),
        agent("port with a plus", "swarmctl-port = +8770\n"),
        agent("port with zeros", "swarmctl-port = 0008770\n"),
        agent("port with underscores", "swarmctl-port = 8_770\n"),
        agent("port in Arabic digits", "swarmctl-port = \u{668}\u{667}\u{667}\u{660}\n"),
        with("port with spaces", worker(""), &[("DECNET_SWARMCTL_PORT", " 8770\n")]),
        with("port with a separator", worker(""), &[("DECNET_SWARMCTL_PORT", "8770\u{1f}")]),
        bare("uuid empty", "host-uuid =\nmaster-host = h\n"),
        bare("uuid in unicode", "host-uuid = höst-Ω\nmaster-host = h\n"),
        bare("uuid with spaces", "host-uuid = a b\nmaster-host = h\n"),
        bare("uuid on two lines", "host-uuid = a\n  master-host = x\nmaster-host = h\n"),
        bare("host empty", "host-uuid = u\nmaster-host =\n"),
        bare("host in capitals", "host-uuid = u\nmaster-host = Master.LAN.\n"),
        bare("host with an underscore", "host-uuid = u\nmaster-host = decnet_master\n"),
        bare("host IPv4", "host-uuid = u\nmaster-host = 192.168.1.5\n"),
        bare("host IPv4 cut short", "host-uuid = u\nmaster-host = 10.1\n"),
        bare("host IPv6", "host-uuid = u\nmaster-host = fd00::1\n"),
        bare("host IPv6 in brackets", "host-uuid = u\nmaster-host = [fd00::1]\n"),
        bare("host IPv6 with a zone", "host-uuid = u\nmaster-host = [fe80::1%%eth0]\n"),
        bare("host with a scheme", "host-uuid = u\nmaster-host = https://master\n"),
        bare("host with a port", "host-uuid = u\nmaster-host = master:9000\n"),
        bare("host with a path", "host-uuid = u\nmaster-host = master/x\n"),
        bare("host with a user", "host-uuid = u\nmaster-host = root@master\n"),
        bare("host with a space", "host-uuid = u\nmaster-host = a b\n"),
        bare("host in unicode", "host-uuid = u\nmaster-host = zürich.lan\n"),
        bare("host with a query", "host-uuid = u\nmaster-host = a?b\n"),
        bare(
            "host with a long label",
            &format!("host-uuid = u\nmaster-host = {}\n", "a".repeat(64)),
        ),
        agent("agent dir empty", "agent-dir =\n"),
        agent("agent dir with a tilde", "agent-dir = ~/.decnet/agent\n"),
        agent("agent dir relative", "agent-dir = here/agent\n"),
        agent("agent dir with spaces", "agent-dir = /srv/my agent/\n"),
        agent("agent dir on two lines", "agent-dir = /srv/a\n  agent-port = 1\n"),
    ]
}

/// An agent dir that refers to a key that refers to another key, and so on, for `depth` keys.
fn chain(depth: usize) -> String {
    let mut text = "agent-dir = %(k1)s\n".to_owned();
    for level in 1..depth {
        text.push_str(&format!("k{level} = %(k{})s\n", level + 1));
    }
    text + &format!("k{depth} = /srv\n")
}

#[test]
#[ignore = "needs Python with decnet 1.0.0: see tests/e2e/setup.sh"]
fn ini_is_read_as_by_the_real_agent() {
    let scratch = tempfile::tempdir().unwrap();
    let home = scratch.path().to_str().unwrap();
    let cases = cases();
    let variables: Vec<BTreeMap<String, String>> = cases
        .iter()
        .enumerate()
        .map(|(number, case)| {
            let path = scratch.path().join(format!("{number}.ini"));
            fs::write(&path, &case.ini).unwrap();
            let base = [("HOME", home), ("DECNET_CONFIG", path.to_str().unwrap())];
            let all = base.into_iter().chain(case.variables.iter().copied());
            all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        })
        .collect();
    let original = read_with_real_agent(&variables, scratch.path());
    assert_eq!(original.len(), cases.len());

    let mut differences = String::new();
    for ((case, variables), original) in cases.iter().zip(&variables).zip(&original) {
        let ours = Outcome::of_this_crate(variables);
        let deliberate = DELIBERATE.iter().find(|(name, _)| *name == case.name);
        let problem = match (ours.agrees_with(original), deliberate) {
            (true, None) | (false, Some(_)) => continue,
            (true, Some((_, why))) => format!("does not differ, although it is listed ({why})"),
            (false, None) => "differs".to_owned(),
        };
        differences.push_str(&format!(
            "{}: {problem}\n    ours:     {ours:?}\n    original: {original:?}\n",
            case.name
        ));
    }
    for (name, _) in DELIBERATE {
        if !cases.iter().any(|case| case.name == *name) {
            differences.push_str(&format!("{name}: no such case\n"));
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}

/// Reads all cases in one Python process. It has its own working directory and home, because the
/// package reads `.env` files from them.
fn read_with_real_agent(variables: &[BTreeMap<String, String>], scratch: &Path) -> Vec<Outcome> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/enrolment_peer.py");
    let mut peer = Command::new(support::python())
        .arg(script)
        .current_dir(scratch)
        .env_clear()
        .envs([
            ("HOME", scratch.to_str().unwrap()),
            ("PYTHONUTF8", "1"),
            ("DECNET_BUS_ENABLED", "false"),
            ("DECNET_TESTING", "1"),
            ("DECNET_JWT_SECRET", "0123456789012345678901234567890123456789"),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The pipe is closed at the end of the statement.
    peer.stdin.take().unwrap().write_all(&serde_json::to_vec(variables).unwrap()).unwrap();
    let output = peer.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the peer failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}
