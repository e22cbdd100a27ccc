//! `check`: checks what `run` needs, step by step, in the order in which `run` needs it. Runs on
//! the main thread.
//!
//! It creates and changes no file, and delivers no delta. It sends one beat, with the status that
//! `run` would send. An existing outbox is only read.

mod bundle;
mod certificate;
mod handshake;
mod host;
mod master;
mod other_outbox;
mod outbox;
mod steps;

use std::path::Path;
use std::process::ExitCode;

use super::arguments::{CheckOptions, Common};
use super::enrolment::enrolment;
use super::own_files::OwnFiles;
use crate::credentials;
use crate::credentials::enrolment::Enrolment;
use crate::error::{Error, chain, sanitize_path};
use crate::master::identity::MasterIdentity;
use crate::status::Snapshot;
use steps::{Checklist, Step};

/// Prints every step and what is wrong with it.
pub(super) fn check(common: &Common, options: &CheckOptions) -> Result<ExitCode, Error> {
    let run = &options.run;
    let mut list = Checklist::new(options);
    let enrolment = enrolment(common);
    let dir = enrolment.as_ref().ok().map(|enrolment| enrolment.agent_dir().value().as_path());
    // Probed first and shown later, because the beat carries it.
    let mut source = run.source(dir.unwrap_or(Path::new("")));
    let probe = source.probe();
    let steps =
        [host::state_file(run, &probe), host::docker(run, &probe), host::topology(dir, &probe)];
    match &enrolment {
        Ok(enrolment) => {
            enrolled(enrolment, common.master_identity, &probe.into_snapshot(), &mut list)
        }
        Err(error) => not_enrolled(error, &mut list),
    }
    steps.into_iter().for_each(|step| list.add(step));
    let location = super::enrolment::outbox(run.outbox.clone());
    list.add(other_outbox::advise(outbox::step(&location, dir), &location, run, dir));
    let own = OwnFiles::of(common, run, enrolment.as_ref().ok());
    for (name, option, path) in [
        ("stats-file", "--stats-file", &run.stats_file),
        ("metrics-file", "--metrics-file", &run.metrics_file),
    ] {
        if let Some(path) = path {
            list.add(host::output_file(name, path, own.at(option, path)));
        }
    }
    list.finish()
}

/// The steps that need an enrolment.
fn enrolled(
    enrolment: &Enrolment,
    given: Option<MasterIdentity>,
    snapshot: &Snapshot,
    list: &mut Checklist,
) {
    let rule = credentials::identity(enrolment, given);
    enrolment_steps(enrolment, given, rule).into_iter().for_each(|step| list.add(step));
    let bundle = bundle::check(enrolment.agent_dir().value(), list);
    if let Err(error) = master::check(enrolment, bundle.as_ref(), rule, snapshot, list) {
        list.add(Step::refused("tls", &error, chain(&error), CORRECT_IT));
    }
}

const CORRECT_IT: &str =
    "correct the setting that is named here; the README has a table of the configuration";

/// Host, master, agent dir and identity rule, each with its origin.
fn enrolment_steps(
    enrolment: &Enrolment,
    given: Option<MasterIdentity>,
    rule: MasterIdentity,
) -> [Step; 4] {
    let step = |step, value: String, from: String| {
        Step::good(step, format!("{value} ({from})")).fact("value", value).fact("from", from)
    };
    let uuid = enrolment.host_uuid();
    let host = enrolment.master_host();
    let port = enrolment.master_port();
    let dir = enrolment.agent_dir();
    let rule_from = match (given, enrolment.master_identity()) {
        (Some(_), _) => "--master-identity".to_owned(),
        (None, Some(rule)) => rule.provenance().to_string(),
        (None, None) => "default".to_owned(),
    };
    let agent_dir = step("agent-dir", sanitize_path(dir.value()), dir.provenance().to_string());
    let agent_dir = host::others_advice(dir.value()).into_iter().fold(agent_dir, Step::advise);
    [
        step("host", uuid.value().clone(), uuid.provenance().to_string()),
        step(
            "master",
            enrolment.master_authority(),
            format!("{}; port: {}", host.provenance(), port.provenance()),
        ),
        agent_dir,
        step("identity", rule.to_string(), rule_from),
    ]
}

fn not_enrolled(error: &Error, list: &mut Checklist) {
    let name_it = "if this host is enrolled, name its ini with --config";
    let advice = if error.is_not_enrolled() { name_it } else { CORRECT_IT };
    list.add(Step::refused("enrolment", error, chain(error), advice));
    for step in ["ca.crt", "worker.crt", "worker.key", "name", "tcp", "tls", "beat"] {
        list.add(Step::not_tried(step, "needs an enrolment"));
    }
}
