//! `check`: what an agent needs, step by step, in the order in which it needs it. Runs on the program's main thread.
//!
//! It makes no file, changes none and delivers no delta. The one beat that it sends says what `run` would say. An outbox that
//! is there is only read.

mod bundle;
mod certificate;
mod handshake;
mod host;
mod master;
mod outbox;
mod steps;

use std::path::Path;
use std::process::ExitCode;

use super::arguments::{CheckOptions, Common};
use super::enrolment;
use super::own_files::OwnFiles;
use crate::credentials;
use crate::credentials::enrolment::Enrolment;
use crate::error::{Error, chain, sanitize_path};
use crate::folder_access::others_may_write;
use crate::master::identity::MasterIdentity;
use crate::status::Snapshot;
use steps::{Checklist, Step};

/// Every step is a line of the answer, and so is what went wrong in it.
pub(super) fn check(common: &Common, options: &CheckOptions) -> Result<ExitCode, Error> {
    let run = &options.run;
    let mut list = Checklist::new(options.json);
    let enrolment = enrolment(common);
    let dir = enrolment.as_ref().ok().map(|enrolment| enrolment.agent_dir().value().as_path());
    // Looked at first, and shown later: the beat says what is found, as one of `run` would.
    let mut source = run.source(dir.unwrap_or(Path::new("")));
    let found = source.probe();
    let steps =
        [host::state_file(run, &found), host::docker(run, &found), host::topology(dir, &found)];
    match &enrolment {
        Ok(enrolment) => {
            enrolled(enrolment, common.master_identity, &found.into_snapshot(), &mut list)
        }
        Err(error) => not_enrolled(error, &mut list),
    }
    steps.into_iter().for_each(|step| list.add(step));
    list.add(outbox::step(&super::outbox(run.outbox.clone()), dir));
    let own = OwnFiles::of(common, run, enrolment.as_ref().ok());
    for (name, option, path) in [
        ("stats-file", "--stats-file", &run.stats_file),
        ("metrics-file", "--metrics-file", &run.metrics_file),
    ] {
        if let Some(path) = path {
            list.add(host::report(name, path, own.at(option, path)));
        }
    }
    list.finish()
}

/// What can be looked at on a host that is enrolled.
fn enrolled(
    enrolment: &Enrolment,
    given: Option<MasterIdentity>,
    snapshot: &Snapshot,
    list: &mut Checklist,
) {
    let rule = credentials::identity(enrolment, given);
    who_and_where(enrolment, given, rule).into_iter().for_each(|step| list.add(step));
    let bundle = bundle::check(enrolment.agent_dir().value(), list);
    if let Err(error) = master::check(enrolment, bundle.as_ref(), rule, snapshot, list) {
        list.add(Step::refused("tls", &error, chain(&error), MEND));
    }
}

const MEND: &str =
    "mend what is named here; the README's table of the configuration says what it may be";

/// Who we are and where the master is, each with where that was written.
fn who_and_where(
    enrolment: &Enrolment,
    given: Option<MasterIdentity>,
    rule: MasterIdentity,
) -> [Step; 4] {
    let said = |step, value: String, from: String| {
        Step::good(step, format!("{value} ({from})")).fact("value", value).fact("from", from)
    };
    let (uuid, host, port) =
        (enrolment.host_uuid(), enrolment.master_host(), enrolment.master_port());
    let (dir, written) = (enrolment.agent_dir(), enrolment.master_identity());
    let rule_from = match (given, written) {
        (Some(_), _) => "--master-identity".to_owned(),
        (None, Some(rule)) => rule.provenance().to_string(),
        (None, None) => "default".to_owned(),
    };
    let agent_dir = said("agent-dir", sanitize_path(dir.value()), dir.provenance().to_string());
    let agent_dir = others_advice(dir.value()).into_iter().fold(agent_dir, Step::advise);
    [
        said("host", uuid.value().clone(), uuid.provenance().to_string()),
        said(
            "master",
            enrolment.master_authority(),
            format!("{}; port: {}", host.provenance(), port.provenance()),
        ),
        agent_dir,
        said("identity", rule.to_string(), rule_from),
    ]
}

/// What to do about others who may write into a folder of the heartbeat's.
fn others_advice(folder: &Path) -> Option<String> {
    let why = others_may_write(folder)?;
    Some(format!("others may replace the heartbeat's files, as {why}: chmod go-w or chown it"))
}

fn not_enrolled(error: &Error, list: &mut Checklist) {
    let name_it = "if it is enrolled, name its ini with --config";
    let advice = if error.is_not_enrolled() { name_it } else { MEND };
    list.add(Step::refused("enrolment", error, chain(error), advice));
    for step in ["ca.crt", "worker.crt", "worker.key", "name", "tcp", "tls", "beat"] {
        list.add(Step::not_tried(step, "it takes an enrolment"));
    }
}
