//! Checks the outbox: who can use it, what is queued, and which process delivers. Runs on the main
//! thread.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;
use rustix::fs::{Access, access};

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

/// The suffixes of an outbox's files.
const FILES: [&str; 5] = ["", "-journal", "-wal", "-shm", "-lock"];

const CONSEQUENCE: &str = "until then deltas are in memory and do not survive a restart";

/// The step `outbox`. A missing file is not created: it would belong to this user, not to that of
/// `run`.
pub(super) fn step(location: &OutboxLocation, agent_dir: Option<&Path>) -> Step {
    let known = agent_dir.is_some() || *location != OutboxLocation::AgentDir;
    let Some(path) = location.path(agent_dir.unwrap_or(Path::new(""))).filter(|_| known) else {
        return Step::not_tried("outbox", "needs the agent dir");
    };
    let file = sanitize_path(&path);
    let folder = folder(&path);
    // `check_room` reports problems of the folder itself.
    let sharing = Users::of(folder).map_or(Sharing::Shared, |users| users.sharing(&path));
    let step = match (&sharing, path.symlink_metadata(), check_room(folder)) {
        (Sharing::Unusable { problem, advice }, ..) => {
            Step::bad("outbox", problem, format!("{advice}; {CONSEQUENCE}"))
        }
        (_, _, Err(problem)) => unusable(format!("{file}: {problem}")),
        (_, Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            Step::good("outbox", format!("{file}: does not exist yet; run creates it"))
        }
        (_, Err(error), _) => unusable(format!("{file}: {error}")),
        (_, Ok(_), Ok(())) => existing(&path),
    };
    let sharing_advice = if let Sharing::Unshared(advice) = sharing { Some(advice) } else { None };
    let other_folder = agent_dir.map_or(Some(folder), |agent_dir| other_folder(&path, agent_dir));
    let advice = [other_folder.and_then(others_advice), sharing_advice];
    advice.into_iter().flatten().fold(step, Step::advise_first).fact("file", file)
}

/// Which users can use an outbox.
#[derive(Debug)]
enum Sharing {
    /// Root and the owner of the folder. This user is one of them.
    Shared,
    /// This user, but not both of them. What to do.
    Unshared(String),
    /// Not this user.
    Unusable { problem: String, advice: String },
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

    fn sharing(&self, path: &Path) -> Sharing {
        let mut sharing = if self.may_share() {
            Sharing::Shared
        } else {
            Sharing::Unshared(self.run_as_another())
        };
        for file in FILES.map(|part| beside(path, part)) {
            match DatabaseFile::open(&file) {
                Ok(None) => (),
                Ok(Some(place)) => match self.sharing_of(&place) {
                    Sharing::Shared => (),
                    Sharing::Unshared(advice) => sharing = Sharing::Unshared(advice),
                    unusable => return unusable,
                },
                Err(error) => {
                    return Sharing::Unusable {
                        problem: format!("{}: {error}", sanitize_path(&file)),
                        advice: "the files of an outbox must be regular files with one link"
                            .to_owned(),
                    };
                }
            }
        }
        sharing
    }

    fn sharing_of(&self, place: &DatabaseFile) -> Sharing {
        let file_owner = place.metadata.uid();
        let path = &place.path;
        let is_accessible =
            || self.own == 0 || access(path, Access::READ_OK | Access::WRITE_OK).is_ok();
        let is_usable =
            file_owner == self.own || ([0, self.owner].contains(&file_owner) && is_accessible());
        let file = sanitize_path(path);
        let problem = format!(
            "{file} belongs to {}, and its folder to {}",
            named(file_owner),
            named(self.owner)
        );
        let chown = format!("chown {}:{} {file}", self.owner, self.group);
        match (is_usable, file_owner == self.owner) {
            (true, true) => Sharing::Shared,
            (true, false) if self.may_share() => {
                Sharing::Unshared(format!("{problem}, who cannot use it: {chown}"))
            }
            (true, false) => {
                Sharing::Unshared(format!("{problem}: {chown}; {}", self.run_as_another()))
            }
            (false, true) => Sharing::Unusable {
                problem: format!(
                    "{file} belongs to {}, but check runs as {}",
                    named(file_owner),
                    named(self.own)
                ),
                advice: self.run_as_another(),
            },
            (false, false) => {
                Sharing::Unusable { problem, advice: format!("{chown}, or move the file away") }
            }
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

fn unusable(problem: impl Into<String>) -> Step {
    let advice = "let this user write there, free disk space, or name another file with --outbox \
                  (run replaces a corrupt file)";
    Step::bad("outbox", problem, format!("{advice}; {CONSEQUENCE}"))
}

/// The step of an existing file, which is only read.
fn existing(path: &Path) -> Step {
    let file = sanitize_path(path);
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
