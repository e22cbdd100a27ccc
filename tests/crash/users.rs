//! `users`: the programs of `programs`, as root and as the user of the service, who owns the agent
//! dir. `run` is that user's, but root starts one at times.

use std::fs::{self, Permissions, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Options;
use crate::crash_test::{CrashTest, pause};
use crate::programs::{Users, run_rounds, start_run};

/// The user of the service.
const SERVICE: u32 = 1_000;

/// The longest time until all deltas are delivered. A `run` checks at each tick, here every 50 ms,
/// which owners of rows have ended.
const DELIVERY: Duration = Duration::from_secs(20);

/// The time between two checks of the outbox.
const POLL: Duration = Duration::from_millis(50);

pub fn users(options: &Options) -> String {
    if !rustix::process::geteuid().is_root() {
        return "skipped, because it needs root".to_owned();
    }
    let mut test = CrashTest::new();
    install(&mut test);
    let users = Users { reporters: &[None, Some(SERVICE)], service: Some(SERVICE) };
    run_rounds(&mut test, options, &users);
    // The user of the service must be able to deliver the deltas of both.
    test.start_master();
    let run = start_run(&test, Some(SERVICE));
    let end = Instant::now() + DELIVERY;
    loop {
        pause(POLL);
        let rows = test.check();
        let undelivered = test.undelivered();
        if rows == 0 && undelivered.is_empty() {
            break;
        }
        assert!(Instant::now() <= end, "{rows} rows in the outbox, undelivered: {undelivered:?}");
    }
    drop(run);
    test.finish()
}

/// Gives the agent dir to the user of the service. Both users can read the program and the ini.
fn install(test: &mut CrashTest) {
    test.worker.write_ini(&test.ini()).unwrap();
    let program = test.folder().join("decnet-heartbeat");
    fs::copy(&test.program, &program).unwrap();
    for (file, mode) in [(test.folder(), 0o755), (&test.ini(), 0o644), (&program, 0o755)] {
        set_permissions(file, Permissions::from_mode(mode)).unwrap();
    }
    test.program = program;
    let change_owner = |file: &Path| chown(file, Some(SERVICE), Some(SERVICE)).unwrap();
    let agent_dir = &test.worker.agent_dir;
    change_owner(agent_dir);
    fs::read_dir(agent_dir).unwrap().for_each(|file| change_owner(&file.unwrap().path()));
}
