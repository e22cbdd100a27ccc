//! `rewritten`: the agent dir is renamed away, or removed, and written again as an enrolment does it; or some of the outbox' files
//! are removed, renamed, or replaced by an older copy. At random moments, while `run`, `push` and `track` work on them, and the
//! master is there or not. What was promised must be heard before the next time: until then somebody has the file open.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::Options;
use crate::crash::{PATIENCE, Stage, pause};
use crate::programs::{Reporter, Running};

/// Programs that report something, in each round.
const REPORTERS: u32 = 3;

/// Longer than the 10 s after which a process with an operation in flight looks whether the file was replaced.
const LATEST: Duration = Duration::from_secs(20);

/// Between two looks at what has come in.
const LOOK: Duration = Duration::from_millis(5);

/// An older copy of the database is so many rounds old at the most: the outbox remembers the last 100 that were delivered, and
/// a round has four or more.
const COPY_ROUNDS: u32 = 10;

/// The database, what SQLite keeps beside it, and the lock file.
const PARTS: [&str; 4] = ["", "-wal", "-shm", "-lock"];

pub fn rewritten(options: &Options) -> String {
    let mut stage = Stage::new();
    stage.worker.write_ini(&stage.ini()).unwrap();
    let files = Files::of(&stage);
    let mut run = Running::start(&stage, None);
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    let (mut without, mut lost) = (0, BTreeSet::new());
    for round in 1..=options.rounds {
        let is_away = fastrand::bool();
        if is_away {
            stage.take_away();
        }
        let reporters: Vec<_> =
            (0..REPORTERS).map(|n| Reporter::start(&mut stage, None, round, n)).collect();
        pause(Duration::from_millis(fastrand::u64(..100)));
        if round % COPY_ROUNDS == 1 {
            files.copy();
        }
        let how = files.disturb(round);
        let restarts = fastrand::u8(..8) == 0;
        if restarts {
            // Not before it has the new file: what was added to the old one by a program that has ended, `run` alone has.
            stage.bring_back();
            Reporter::left_to_run(&mut stage, round, REPORTERS + 2).end(&mut stage);
            owed_after_all(&mut stage, &lost);
            run.assert_runs();
            run.kill();
            run = Running::start(&stage, None);
        }
        for reporter in reporters {
            let (has_promised, _) = reporter.try_end(&mut stage).expect("nobody kills it");
            without += u32::from(!has_promised);
        }
        run.assert_runs();
        stage.bring_back();
        // Once this one is heard `run` has the new file open.
        Reporter::left_to_run(&mut stage, round, REPORTERS).end(&mut stage);
        for name in owed_after_all(&mut stage, &lost) {
            let master = if is_away { "away" } else { "there" };
            eprintln!(
                "lost: {name}, {how}, the master was {master}, run was restarted: {restarts}"
            );
            lost.insert(name);
        }
    }
    run.kill();
    assert!(lost.is_empty(), "lost: {lost:?}");
    format!("{} rounds, {without} reports refused, {}", options.rounds, stage.finish())
}

/// What is not heard in time, but for what was lost before.
fn owed_after_all(stage: &mut Stage, lost: &BTreeSet<String>) -> Vec<String> {
    let end = Instant::now() + LATEST;
    loop {
        let mut owed = stage.owed();
        owed.retain(|name| !lost.contains(name));
        if owed.is_empty() || Instant::now() > end {
            return owed;
        }
        pause(LOOK);
    }
}

/// The files of an agent dir.
struct Files {
    agent_dir: PathBuf,
    /// Beside the agent dir.
    folder: PathBuf,
    /// What an enrolment writes.
    bundle: Vec<(String, Vec<u8>, Permissions)>,
}

impl Files {
    fn of(stage: &Stage) -> Self {
        let read = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&path).unwrap(), fs::metadata(&path).unwrap().permissions())
        };
        let (agent_dir, folder) = (stage.worker.agent_dir.clone(), stage.folder().to_owned());
        let bundle =
            fs::read_dir(&agent_dir).unwrap().map(|file| read(file.unwrap().path())).collect();
        Self { agent_dir, folder, bundle }
    }

    /// One of the outbox' files.
    fn part(&self, part: &str) -> PathBuf {
        self.agent_dir.join(format!("heartbeat.db{part}"))
    }

    fn older(&self) -> PathBuf {
        self.folder.join("older.db")
    }

    /// Copies the database, as it is now.
    fn copy(&self) {
        remove(&self.older());
        let database = Connection::open(self.part("")).unwrap();
        database.busy_timeout(PATIENCE).unwrap();
        database.execute("VACUUM INTO ?1", [self.older().to_str()]).unwrap();
    }

    /// What it has done.
    fn disturb(&self, round: u32) -> String {
        let away = self.folder.join(format!("away-{round}"));
        match fastrand::u8(..6) {
            0 | 1 => self.write_again(&away).to_owned(),
            2 => self.put_older_copy(),
            _ => self.take_some(&away),
        }
    }

    /// The folder is renamed in any case: a push may make a file anew in one that is being emptied, and nobody else has that
    /// one open when it is removed, too.
    fn write_again(&self, away: &Path) -> &'static str {
        let removes = fastrand::bool();
        fs::rename(&self.agent_dir, away).unwrap();
        if removes {
            // Who has a file in it open may still make files beside it.
            while fs::remove_dir_all(away).is_err_and(|error| error.kind() != ErrorKind::NotFound) {
            }
        }
        fs::create_dir_all(&self.agent_dir).unwrap();
        for (name, content, permissions) in &self.bundle {
            fs::write(self.agent_dir.join(name), content).unwrap();
            fs::set_permissions(self.agent_dir.join(name), permissions.clone()).unwrap();
        }
        if removes { "the folder was removed" } else { "the folder was renamed" }
    }

    /// The log and its index go first: they are not that copy's.
    fn put_older_copy(&self) -> String {
        let next = self.part("-next");
        fs::copy(self.older(), &next).unwrap();
        ["-wal", "-shm"].iter().for_each(|part| remove(&self.part(part)));
        fs::rename(next, self.part("")).unwrap();
        "an older copy was put in its place".to_owned()
    }

    /// Removes or renames one or several files.
    fn take_some(&self, away: &Path) -> String {
        let mut taken = Vec::new();
        while taken.is_empty() {
            taken = PARTS.into_iter().filter(|_| fastrand::u8(..3) == 0).collect();
        }
        fastrand::shuffle(&mut taken);
        let removes = fastrand::bool();
        for part in &taken {
            // Another process may just be making it anew.
            match removes {
                true => remove(&self.part(part)),
                false => {
                    drop(fs::rename(self.part(part), away.with_extension(format!("db{part}"))))
                }
            }
        }
        format!("{taken:?} {}", if removes { "removed" } else { "renamed" })
    }
}

fn remove(path: &Path) {
    let removed = fs::remove_file(path);
    assert!(
        removed.is_ok() || removed.is_err_and(|error| error.kind() == ErrorKind::NotFound),
        "{}",
        path.display()
    );
}
