//! `rewritten`: the agent dir is renamed or removed and written again, as by an enrolment; or some
//! files of the outbox are removed, renamed, or replaced by an older copy. This happens at random
//! moments while `run`, `push` and `track` use them, with and without a master. Queued deltas must
//! be delivered before the next change, because until then a process has the file open.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::Options;
use crate::crash_test::{CrashTest, TIMEOUT, pause};
use crate::programs::{Reporter, start_run};

/// The number of reporters in each round.
const REPORTERS: u32 = 3;

/// The longest time until a delta is delivered. A process with an operation in flight checks every
/// 10 s whether the file was replaced.
const DELIVERY: Duration = Duration::from_secs(20);

/// The time between two checks of the requests.
const POLL: Duration = Duration::from_millis(5);

/// The maximum age of an older copy of the database, in rounds. The outbox remembers the last 100
/// delivered deltas, and a round has four or more.
const COPY_ROUNDS: u32 = 10;

/// The suffixes of the database, its log, its index and the lock file.
const PARTS: [&str; 4] = ["", "-wal", "-shm", "-lock"];

pub fn rewritten(options: &Options) -> String {
    let mut test = CrashTest::new();
    test.worker.write_ini(&test.ini()).unwrap();
    let files = Files::of(&test);
    let mut run = start_run(&test, None);
    assert!(test.master.wait_for_beats(1, TIMEOUT));
    let mut refused = 0;
    let mut lost = BTreeSet::new();
    for round in 1..=options.rounds {
        let has_master = fastrand::bool();
        if !has_master {
            test.stop_master();
        }
        let reporters: Vec<_> =
            (0..REPORTERS).map(|n| Reporter::start(&mut test, None, round, n)).collect();
        pause(Duration::from_millis(fastrand::u64(..100)));
        if round % COPY_ROUNDS == 1 {
            files.copy();
        }
        let change = files.change(round);
        let is_restarted = fastrand::u8(..8) == 0;
        if is_restarted {
            // `run` must have the new file before. Only `run` has the deltas that a program that
            // has ended added to the old one.
            test.start_master();
            Reporter::left_to_run(&mut test, round, REPORTERS + 2).finish(&mut test);
            wait_until_delivered(&mut test, &lost);
            run.assert_is_running();
            drop(run);
            run = start_run(&test, None);
        }
        for reporter in reporters {
            let end = reporter.wait(&mut test).expect("no reporter is killed");
            refused += u32::from(!end.is_queued);
        }
        run.assert_is_running();
        test.start_master();
        // `run` has the new file open when the delta of this push is delivered.
        Reporter::left_to_run(&mut test, round, REPORTERS).finish(&mut test);
        for name in wait_until_delivered(&mut test, &lost) {
            eprintln!(
                "lost: {name}, {change}, with master: {has_master}, run restarted: {is_restarted}"
            );
            lost.insert(name);
        }
    }
    drop(run);
    assert!(lost.is_empty(), "lost: {lost:?}");
    format!("{} rounds, {refused} reports refused, {}", options.rounds, test.finish())
}

/// Waits until all queued deltas are delivered, except for those that were lost before. Returns
/// those that are not delivered in time.
fn wait_until_delivered(test: &mut CrashTest, lost: &BTreeSet<String>) -> Vec<String> {
    let end = Instant::now() + DELIVERY;
    loop {
        let mut undelivered = test.undelivered();
        undelivered.retain(|name| !lost.contains(name));
        if undelivered.is_empty() || Instant::now() > end {
            return undelivered;
        }
        pause(POLL);
    }
}

/// The files of an agent dir.
struct Files {
    agent_dir: PathBuf,
    /// The folder of the agent dir.
    folder: PathBuf,
    /// The name, content and permissions of each file that the enrolment wrote.
    bundle: Vec<(String, Vec<u8>, Permissions)>,
}

impl Files {
    fn of(test: &CrashTest) -> Self {
        let read = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&path).unwrap(), fs::metadata(&path).unwrap().permissions())
        };
        let agent_dir = test.worker.agent_dir.clone();
        let folder = test.folder().to_owned();
        let bundle =
            fs::read_dir(&agent_dir).unwrap().map(|file| read(file.unwrap().path())).collect();
        Self { agent_dir, folder, bundle }
    }

    /// The file of the outbox with this suffix.
    fn part(&self, suffix: &str) -> PathBuf {
        self.agent_dir.join(format!("heartbeat.db{suffix}"))
    }

    fn older(&self) -> PathBuf {
        self.folder.join("older.db")
    }

    /// Makes a copy of the database, which becomes the older one.
    fn copy(&self) {
        remove(&self.older());
        let database = Connection::open(self.part("")).unwrap();
        database.busy_timeout(TIMEOUT).unwrap();
        database.execute("VACUUM INTO ?1", [self.older().to_str()]).unwrap();
    }

    /// Makes a random change, and returns its description.
    fn change(&self, round: u32) -> String {
        let renamed = self.folder.join(format!("renamed-{round}"));
        match fastrand::u8(..6) {
            0 | 1 => self.rewrite_folder(&renamed).to_owned(),
            2 => self.restore_older_copy(),
            _ => self.remove_or_rename_some(&renamed),
        }
    }

    /// Renames or removes the folder and writes the bundle again. To be removed, the folder is
    /// renamed first. Otherwise a push may create a file in it during the removal, and no other
    /// process would have that file open.
    fn rewrite_folder(&self, renamed: &Path) -> &'static str {
        let removes = fastrand::bool();
        fs::rename(&self.agent_dir, renamed).unwrap();
        if removes {
            // A process with an open file in it may still create other files there.
            while fs::remove_dir_all(renamed)
                .is_err_and(|error| error.kind() != ErrorKind::NotFound)
            {}
        }
        fs::create_dir_all(&self.agent_dir).unwrap();
        for (name, content, permissions) in &self.bundle {
            fs::write(self.agent_dir.join(name), content).unwrap();
            fs::set_permissions(self.agent_dir.join(name), permissions.clone()).unwrap();
        }
        if removes { "the folder was removed" } else { "the folder was renamed" }
    }

    /// Replaces the database by the older copy. The log and its index are removed first, because
    /// they belong to the present database.
    fn restore_older_copy(&self) -> String {
        let next = self.part("-next");
        fs::copy(self.older(), &next).unwrap();
        ["-wal", "-shm"].iter().for_each(|part| remove(&self.part(part)));
        fs::rename(next, self.part("")).unwrap();
        "the database was replaced by an older copy".to_owned()
    }

    /// Removes or renames one or several files.
    fn remove_or_rename_some(&self, renamed: &Path) -> String {
        let mut parts = Vec::new();
        while parts.is_empty() {
            parts = PARTS.into_iter().filter(|_| fastrand::u8(..3) == 0).collect();
        }
        fastrand::shuffle(&mut parts);
        let removes = fastrand::bool();
        for part in &parts {
            if removes {
                remove(&self.part(part));
            } else {
                // This fails if another process is creating the file at this moment.
                let _ = fs::rename(self.part(part), renamed.with_extension(format!("db{part}")));
            }
        }
        format!("{parts:?} {}", if removes { "removed" } else { "renamed" })
    }
}

/// Removes a file, which may not exist.
fn remove(path: &Path) {
    let removed = fs::remove_file(path);
    assert!(
        removed.is_ok() || removed.is_err_and(|error| error.kind() == ErrorKind::NotFound),
        "{}",
        path.display()
    );
}
