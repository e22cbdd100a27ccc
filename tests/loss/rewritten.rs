//! `rewritten`: the agent dir is renamed away, or removed, and written again as an enrolment does it, at random moments, while a
//! `run` that nobody kills, `push` and `track` work on it, and the master is there or not. What was promised must be heard before the next time: until then
//! somebody has the file open.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Options;
use crate::crash::{PATIENCE, Stage, pause};
use crate::programs::{Reporter, kill, run};

/// Programs that report something, in each round.
const REPORTERS: u32 = 3;

/// Longer than the 10 s after which a process with an operation in flight looks whether the file was replaced.
const LATEST: Duration = Duration::from_secs(20);

/// Between two looks at what has come in.
const LOOK: Duration = Duration::from_millis(5);

pub fn rewritten(options: &Options) -> String {
    let mut stage = Stage::new();
    stage.worker.write_ini(&stage.ini()).unwrap();
    let bundle = Bundle::of(&stage.worker.agent_dir);
    let mut run = run(&stage, None);
    assert!(stage.master.wait_for_beats(1, PATIENCE));
    let (mut without, mut lost) = (0, BTreeSet::new());
    for round in 1..=options.rounds {
        let is_away = fastrand::bool();
        if is_away {
            stage.take_away();
        }
        let reporters: Vec<_> = (0..REPORTERS).map(|n| Reporter::start(&mut stage, None, round, n)).collect();
        pause(Duration::from_millis(fastrand::u64(..100)));
        let how = bundle.write_again(&stage.worker.agent_dir, &stage.folder().join(format!("away-{round}")));
        for reporter in reporters {
            let (has_promised, _) = reporter.try_end(&mut stage).expect("nobody kills it");
            without += u32::from(!has_promised);
        }
        assert_eq!(run.try_wait().unwrap(), None, "run has ended");
        stage.bring_back();
        // Once this one is heard `run` has the new file open.
        Reporter::left_to_run(&mut stage, round, REPORTERS).end(&mut stage);
        for name in owed_after_all(&mut stage, &lost) {
            let master = if is_away { "away" } else { "there" };
            eprintln!("lost: {name}, the folder was {how}, the master was {master}");
            lost.insert(name);
        }
    }
    kill(&mut run);
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

/// The files that an enrolment writes.
struct Bundle(Vec<(String, Vec<u8>, Permissions)>);

impl Bundle {
    fn of(folder: &Path) -> Self {
        let read = |path: PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(&path).unwrap(), fs::metadata(&path).unwrap().permissions())
        };
        Self(fs::read_dir(folder).unwrap().map(|file| read(file.unwrap().path())).collect())
    }

    /// How it has removed what was there. The folder is renamed in any case: a push may make a file anew in one that is being
    /// emptied, and nobody else has that one open when it is removed, too.
    fn write_again(&self, folder: &Path, away: &Path) -> &'static str {
        let removes = fastrand::bool();
        fs::rename(folder, away).unwrap();
        if removes {
            // Who has a file in it open may still make files beside it.
            while fs::remove_dir_all(away).is_err_and(|error| error.kind() != ErrorKind::NotFound) {}
        }
        fs::create_dir_all(folder).unwrap();
        for (name, content, permissions) in &self.0 {
            fs::write(folder.join(name), content).unwrap();
            fs::set_permissions(folder.join(name), permissions.clone()).unwrap();
        }
        if removes { "removed" } else { "renamed" }
    }
}
