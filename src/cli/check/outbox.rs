//! Checks the outbox: who can use it, what is queued, and which process delivers. Runs on the main
//! thread.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;
use rustix::fs::{Access, access};

use super::super::own_files::OUTBOX_SUFFIXES;
use super::host::check_room;
use super::others_advice;
use super::steps::Step;
use crate::delta::from_micros;
use crate::error::{chain, sanitize_path};
use crate::files::{beside, folder};
use crate::folder_access::other_folder;
use crate::outbox::queued::{QueueCounts, StuckRow};
use crate::outbox::{self, OutboxLocation, OutboxSummary, deliverer};
use crate::sqlite::files::DatabaseFile;

const CONSEQUENCE: &str = "until then deltas are in memory and do not survive a restart";

/// The step `outbox`. A missing file is not created: it would belong to this user, not to that of
/// `run`.
pub(super) fn step(location: &OutboxLocation, agent_dir: Option<&Path>) -> Step {
    let known = agent_dir.is_some() || *location != OutboxLocation::AgentDir;
    let Some(path) = location.path(agent_dir.unwrap_or(Path::new(""))).filter(|_| known) else {
        return Step::not_tried("outbox", "needs the agent dir");
    };
    let folder = folder(&path);
    // `step_of_file` reports problems of the folder itself.
    let sharing = Users::of(folder).map_or(Ok(None), |users| users.sharing(&path));
    let (step, sharing_advice) = match sharing {
        Ok(advice) => (step_of_file(&path, folder), advice),
        Err(step) => (step, None),
    };
    let other_folder = agent_dir.map_or(Some(folder), |agent_dir| other_folder(&path, agent_dir));
    let advice = [other_folder.and_then(others_advice), sharing_advice];
    let step = advice.into_iter().flatten().fold(step, Step::advise_first);
    step.fact("file", sanitize_path(&path))
}

/// The users of an outbox. Its files have mode 0600. A process accepts files of its own user, of
/// root and of the owner of the folder. Files that root creates get that owner.
struct Users {
    own: u32,
    owner: u32,
    group: u32,
    /// The folder, safe to print.
    folder: String,
}

impl Users {
    fn of(folder: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(folder)?;
        Ok(Self {
            own: geteuid().as_raw(),
            owner: metadata.uid(),
            group: metadata.gid(),
            folder: sanitize_path(folder),
        })
    }

    /// What to do so that both root and the owner of the folder can use the outbox. `None`: they
    /// can. The error is the step if this user cannot use it.
    fn sharing(&self, path: &Path) -> Result<Option<String>, Step> {
        let mut advice = (!self.may_share()).then(|| self.run_as_another());
        for file in OUTBOX_SUFFIXES.map(|suffix| beside(path, suffix)) {
            let opened = DatabaseFile::open(&file).map_err(|error| {
                let problem = format!("{}: {error}", sanitize_path(&file));
                failed(problem, "the files of an outbox must be regular files with one link")
            })?;
            if let Some(database) = opened {
                advice = self.sharing_of(&database)?.or(advice);
            }
        }
        Ok(advice)
    }

    /// As [`sharing`](Self::sharing), for one file.
    fn sharing_of(&self, database: &DatabaseFile) -> Result<Option<String>, Step> {
        let file_owner = database.metadata.uid();
        let path = &database.path;
        let is_accessible =
            || self.own == 0 || access(path, Access::READ_OK | Access::WRITE_OK).is_ok();
        let is_usable =
            file_owner == self.own || ([0, self.owner].contains(&file_owner) && is_accessible());
        let file = sanitize_path(path);
        let belongs = format!("{file} belongs to {}", named(file_owner));
        let problem = format!("{belongs}, and its folder to {}", named(self.owner));
        let chown = format!("chown {}:{} {file}", self.owner, self.group);
        match (is_usable, file_owner == self.owner) {
            (true, true) => Ok(None),
            (true, false) if self.may_share() => {
                Ok(Some(format!("{problem}, who cannot use it: {chown}")))
            }
            (true, false) => Ok(Some(format!("{problem}: {chown}; {}", self.run_as_another()))),
            (false, true) => {
                let problem = format!("{belongs}, but check runs as {}", named(self.own));
                Err(failed(problem, &self.run_as_another()))
            }
            (false, false) => Err(failed(problem, &format!("{chown}, or rename the file"))),
        }
    }

    fn may_share(&self) -> bool {
        [0, self.owner].contains(&self.own)
    }

    fn run_as_another(&self) -> String {
        let folder = &self.folder;
        let own = named(self.own);
        let owner = named(self.owner);
        let root_and_owner =
            if self.owner == 0 { "root".to_owned() } else { format!("root and {owner}") };
        format!("only {root_and_owner} can share an outbox in {folder}, not {own}: run as {owner}")
    }
}

/// `root`, or `user 1000`.
fn named(user: u32) -> String {
    if user == 0 { "root".to_owned() } else { format!("user {user}") }
}

/// The step if this user cannot use the outbox.
fn failed(problem: String, advice: &str) -> Step {
    Step::bad("outbox", problem, format!("{advice}; {CONSEQUENCE}"))
}

fn unusable(problem: String) -> Step {
    let advice = "let this user write there, free disk space, or name another file with --outbox \
                  (run replaces a corrupt file)";
    failed(problem, advice)
}

/// The step of the file. An existing one is only read.
fn step_of_file(path: &Path, folder: &Path) -> Step {
    let file = sanitize_path(path);
    if let Err(problem) = check_room(folder) {
        return unusable(format!("{file}: {problem}"));
    }
    match path.symlink_metadata() {
        Ok(_) => (),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Step::good("outbox", format!("{file}: does not exist yet; run creates it"));
        }
        Err(error) => return unusable(format!("{file}: {error}")),
    }
    if let Err(error) = access(path, Access::READ_OK | Access::WRITE_OK) {
        return unusable(format!("{file} cannot be written: {error}"));
    }
    let OutboxSummary { counts, stuck } = match outbox::summarize(path) {
        Ok(Some(summary)) => summary,
        Ok(None) => {
            return Step::good("outbox", format!("{file}: has an older format; run migrates it"));
        }
        Err(error) => return unusable(chain(&error)),
    };
    let suffixes = ["", "-wal", "-shm"].map(|suffix| beside(path, suffix));
    let readable = suffixes.iter().find(|file| is_readable_by_others(file));
    let readable = readable.map(|file| {
        format!("other users can read it: chmod 600 {} (run does that)", sanitize_path(file))
    });
    readable.into_iter().fold(counted_step(path, counts, &stuck), Step::advise_first)
}

fn is_readable_by_others(file: &Path) -> bool {
    fs::symlink_metadata(file)
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o077 != 0)
}

fn counted_step(path: &Path, counts: QueueCounts, stuck: &[StuckRow]) -> Step {
    let QueueCounts { waiting, held, operations, rejected, oldest } = counts;
    let age = oldest.and_then(|at| SystemTime::now().duration_since(from_micros(at)).ok());
    let age = age.map(|age| Duration::from_secs(age.as_secs()));
    let oldest_age = age.map_or_else(String::new, |age| {
        format!(" (the oldest {} ago)", humantime::format_duration(age))
    });
    let deliverer = deliverer(path);
    let by = deliverer.map_or_else(
        || "no process delivers from it".to_owned(),
        |pid| format!("process {pid} delivers from it"),
    );
    let file = sanitize_path(path);
    let stuck_rows = stuck_rows(stuck);
    let message = format!(
        "{file}: {waiting} queued{oldest_age}, {operations} in flight, {rejected} rejected; \
         {by}{stuck_rows}"
    );
    let step = Step::good("outbox", message)
        .fact("waiting", waiting)
        .fact("held", held)
        .fact("operations", operations)
        .fact("rejected", rejected)
        .fact("stuck", stuck.len())
        .fact("oldest_seconds", age.map(|age| age.as_secs()))
        .fact("delivered_by", deliverer);
    match (stuck, waiting, deliverer, rejected) {
        ([_, ..], ..) => step.advise(format!(
            "run cannot determine whether the processes of the stuck operations are running: \
             check why {} cannot be used",
            sanitize_path(&beside(path, "-lock"))
        )),
        (_, 1.., None, _) => {
            step.advise("start decnet-heartbeat run, which delivers the queued deltas")
        }
        (.., 1..) => step.advise(
            "see the rejected deltas and the reasons in the file; the page on operations has the query",
        ),
        _ => step,
    }
}

/// The operations whose processes have had an unknown state for a day.
fn stuck_rows(stuck: &[StuckRow]) -> String {
    if stuck.is_empty() {
        String::new()
    } else {
        format!("; {} stuck: {}", stuck.len(), StuckRow::list(stuck))
    }
}
