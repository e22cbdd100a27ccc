//! The outbox: who can use it, what waits in it, and who delivers from it. Runs on the program's main thread.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::unistd::geteuid;
use rustix::fs::{Access, access};

use super::host::room;
use super::others_advice;
use super::steps::Step;
use crate::delta::from_micros;
use crate::error::{chain, sanitize_path};
use crate::files::{beside, folder};
use crate::folder_access::other_folder;
use crate::limits;
use crate::outbox::queued::{QueueCounts, UnjudgedRow};
use crate::outbox::{self, OutboxLocation, OutboxSummary, deliverer};
use crate::sqlite::files::DatabaseFile;

/// All that an outbox is made of.
const FILES: [&str; 5] = ["", "-journal", "-wal", "-shm", "-lock"];

const COSTS: &str = "until then deltas are in memory and do not survive a restart";

/// Where deltas are kept, what of them waits, and who delivers from it. A file that is not there is not made: that would be
/// this user's then, and not that of `run`.
pub(super) fn step(location: &OutboxLocation, agent_dir: Option<&Path>) -> Step {
    let known = agent_dir.is_some() || *location != OutboxLocation::AgentDir;
    let Some(path) = location.path(agent_dir.unwrap_or(Path::new(""))).filter(|_| known) else {
        return Step::not_tried("outbox", "it takes the agent dir");
    };
    let (file, folder) = (sanitize_path(&path), folder(&path));
    // What is wrong with the folder itself is found by `room`.
    let sharing = Users::of(folder).map_or(Sharing::Shared, |users| users.sharing(&path));
    let step = match (&sharing, path.symlink_metadata(), room(folder)) {
        (Sharing::Refused { says, advice }, ..) => {
            Step::bad("outbox", says, format!("{advice}; {COSTS}"))
        }
        (_, _, Err(problem)) => lost(format!("{file}: {problem}")),
        (_, Err(error), _) if error.kind() == io::ErrorKind::NotFound => {
            Step::good("outbox", format!("{file}: run makes it, there is none yet"))
        }
        (_, Err(error), _) => lost(format!("{file}: {error}")),
        (_, Ok(_), Ok(())) => looked_at(&path),
    };
    let alone = if let Sharing::Alone(advice) = sharing { Some(advice) } else { None };
    let beside = agent_dir.map_or(Some(folder), |agent_dir| other_folder(&path, agent_dir));
    let advice = [beside.and_then(others_advice), alone];
    advice.into_iter().flatten().fold(step, Step::advise_first).fact("file", file)
}

/// Who can use an outbox.
#[derive(Debug)]
enum Sharing {
    /// Root and the owner of the folder, one of whom this user is.
    Shared,
    /// This user, and not both of them. What to do about that.
    Alone(String),
    /// Not this user.
    Refused { says: String, advice: String },
}

/// Those who matter. All files of an outbox have mode 0600, and a process refuses those of others than itself, root and the owner
/// of the folder. What root makes belongs to that owner.
struct Users {
    us: u32,
    owner: u32,
    group: u32,
    /// The folder, safe to print.
    folder: String,
}

impl Users {
    fn of(folder: &Path) -> io::Result<Self> {
        let found = fs::metadata(folder)?;
        Ok(Self {
            us: geteuid().as_raw(),
            owner: found.uid(),
            group: found.gid(),
            folder: sanitize_path(folder),
        })
    }

    fn sharing(&self, path: &Path) -> Sharing {
        let mut sharing =
            if self.may_share() { Sharing::Shared } else { Sharing::Alone(self.run_as_another()) };
        for file in FILES.map(|part| beside(path, part)) {
            match DatabaseFile::open(&file) {
                Ok(None) => (),
                Ok(Some(place)) => match self.sharing_of(&place) {
                    Sharing::Shared => (),
                    Sharing::Alone(advice) => sharing = Sharing::Alone(advice),
                    refused => return refused,
                },
                Err(error) => {
                    return Sharing::Refused {
                        says: format!("{}: {error}", sanitize_path(&file)),
                        advice: "an outbox takes regular files with one link, and nothing else"
                            .to_owned(),
                    };
                }
            }
        }
        sharing
    }

    fn sharing_of(&self, place: &DatabaseFile) -> Sharing {
        let (whose, path) = (place.metadata.uid(), &place.path);
        let is_open_to_us =
            || self.us == 0 || access(path, Access::READ_OK | Access::WRITE_OK).is_ok();
        let is_usable = whose == self.us || ([0, self.owner].contains(&whose) && is_open_to_us());
        let file = sanitize_path(path);
        let says =
            format!("{file} belongs to {}, and its folder to {}", named(whose), named(self.owner));
        let chown = format!("chown {}:{} {file}", self.owner, self.group);
        match (is_usable, whose == self.owner) {
            (true, true) => Sharing::Shared,
            (true, false) if self.may_share() => {
                Sharing::Alone(format!("{says}, who cannot use it: {chown}"))
            }
            (true, false) => Sharing::Alone(format!("{says}: {chown}; {}", self.run_as_another())),
            (false, true) => Sharing::Refused {
                says: format!("{file} belongs to {}, and this is {}", named(whose), named(self.us)),
                advice: self.run_as_another(),
            },
            (false, false) => {
                Sharing::Refused { says, advice: format!("{chown}, or move it away") }
            }
        }
    }

    fn may_share(&self) -> bool {
        [0, self.owner].contains(&self.us)
    }

    fn run_as_another(&self) -> String {
        let (folder, us, owner) = (&self.folder, named(self.us), named(self.owner));
        let root_and_owner =
            if self.owner == 0 { "root".to_owned() } else { format!("root and {owner}") };
        format!("only {root_and_owner} can share an outbox in {folder}, not {us}: run as {owner}")
    }
}

/// In words.
fn named(user: u32) -> String {
    if user == 0 { "root".to_owned() } else { format!("user {user}") }
}

fn lost(says: impl Into<String>) -> Step {
    let advice = "let this user write there, make room, or name another file with --outbox (a damaged file is replaced by run)";
    Step::bad("outbox", says, format!("{advice}; {COSTS}"))
}

/// What is in the file, of which nothing is changed.
fn looked_at(path: &Path) -> Step {
    let file = sanitize_path(path);
    if let Err(error) = access(path, Access::READ_OK | Access::WRITE_OK) {
        return lost(format!("{file} cannot be written: {error}"));
    }
    let OutboxSummary { counts, stuck } = match outbox::look(path) {
        Ok(Some(found)) => found,
        Ok(None) => {
            return Step::good("outbox", format!("{file}: of an older version, run takes it over"));
        }
        Err(error) => return lost(chain(&error)),
    };
    let suffixes = ["", "-wal", "-shm"].map(|suffix| beside(path, suffix));
    let readable = suffixes.iter().find(|file| is_readable_by_others(file));
    let readable = readable.map(|file| {
        format!("others can read it: chmod 600 {}; run would do that", sanitize_path(file))
    });
    readable.into_iter().fold(counted_step(path, counts, &stuck), Step::advise_first)
}

fn is_readable_by_others(file: &Path) -> bool {
    fs::symlink_metadata(file)
        .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o077 != 0)
}

fn counted_step(path: &Path, counts: QueueCounts, stuck: &[UnjudgedRow]) -> Step {
    let QueueCounts { waiting, held, operations, rejected, oldest } = counts;
    let age = oldest.and_then(|at| SystemTime::now().duration_since(from_micros(at)).ok());
    let age = age.map(|age| Duration::from_secs(age.as_secs()));
    let for_how_long = age.map_or_else(String::new, |age| {
        format!(" (the oldest for {})", humantime::format_duration(age))
    });
    let who = deliverer(path);
    let by = who.map_or_else(
        || "nobody delivers from it".to_owned(),
        |pid| format!("process {pid} delivers from it"),
    );
    let (file, stuck_ones) = (sanitize_path(path), stuck_ones(stuck));
    let says = format!(
        "{file}: {waiting} waiting{for_how_long}, {operations} in flight, {rejected} refused for good; {by}{stuck_ones}"
    );
    let step = Step::good("outbox", says)
        .fact("waiting", waiting)
        .fact("held", held)
        .fact("operations", operations)
        .fact("rejected", rejected)
        .fact("stuck", stuck.len())
        .fact("oldest_seconds", age.map(|age| age.as_secs()))
        .fact("delivered_by", who);
    match (stuck, waiting, who, rejected) {
        ([_, ..], ..) => step.advise(format!(
            "run cannot tell whether the processes of what is stuck still run: see why {} cannot be used",
            sanitize_path(&beside(path, "-lock"))
        )),
        (_, 1.., None, _) => step.advise("start decnet-heartbeat run, which delivers what waits"),
        (.., 1..) => step.advise("see in the file what was refused, and why: the README has the query"),
        _ => step,
    }
}

/// The operations of which nobody could tell for a day whether they run.
fn stuck_ones(stuck: &[UnjudgedRow]) -> String {
    let named: Vec<_> =
        stuck.iter().take(limits::OUTBOX_STUCK_NAMED).map(UnjudgedRow::to_string).collect();
    if named.is_empty() {
        String::new()
    } else {
        format!("; {} stuck: {}", stuck.len(), named.join(", "))
    }
}
