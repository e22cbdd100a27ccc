//! `users`: the same programs, of root and of the service's user on one agent dir, which is the latter's. `run` is the latter's,
//! too, but root starts one now and then.

use std::fs::{self, Permissions, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Options;
use crate::crash::{Stage, pause};
use crate::programs::{Running, play};

/// The service's user.
const SERVICE: u32 = 1_000;

/// A `run` judges dead owners at each tick, of 50 ms here.
const LATEST: Duration = Duration::from_secs(20);

/// Between two looks at the outbox.
const LOOK: Duration = Duration::from_millis(50);

pub fn users(options: &Options) -> String {
    if !rustix::process::geteuid().is_root() {
        return "passed over, as it takes root".to_owned();
    }
    let mut stage = Stage::new();
    install(&mut stage);
    play(&mut stage, options, &[None, Some(SERVICE)], Some(SERVICE));
    // The service's user alone must come to an end with what both have left.
    stage.bring_back();
    let run = Running::start(&stage, Some(SERVICE));
    let end = Instant::now() + LATEST;
    loop {
        pause(LOOK);
        let rows = stage.check();
        if rows == 0 && stage.owed().is_empty() {
            break;
        }
        assert!(
            Instant::now() <= end,
            "the service's user leaves {rows} rows, and owes {:?}",
            stage.owed()
        );
    }
    drop(run);
    stage.finish()
}

/// The agent dir is the service's user's; the program and its ini can be read by both.
fn install(stage: &mut Stage) {
    stage.worker.write_ini(&stage.ini()).unwrap();
    let program = stage.folder().join("decnet-heartbeat");
    fs::copy(&stage.program, &program).unwrap();
    for (file, mode) in [(stage.folder(), 0o755), (&stage.ini(), 0o644), (&program, 0o755)] {
        set_permissions(file, Permissions::from_mode(mode)).unwrap();
    }
    stage.program = program;
    let give = |file: &Path| chown(file, Some(SERVICE), Some(SERVICE)).unwrap();
    give(&stage.worker.agent_dir);
    fs::read_dir(&stage.worker.agent_dir).unwrap().for_each(|file| give(&file.unwrap().path()));
}
