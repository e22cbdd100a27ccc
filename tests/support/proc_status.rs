//! Figures of a process, from `/proc`.

use std::fs;

/// The number in a line of `/proc/PID/status`, such as `Threads` or `VmRSS` (in KiB).
pub fn status_number(process: u32, key: &str) -> u64 {
    number_in(&format!("/proc/{process}/status"), key)
}

/// The sum of such a number over the threads of a process.
pub fn sum_over_threads(process: u32, key: &str) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let statuses = tasks.map(|task| task.unwrap().path().join("status"));
    statuses.map(|status| number_in(status.to_str().unwrap(), key)).sum()
}

fn number_in(file: &str, key: &str) -> u64 {
    let status = fs::read_to_string(file).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    value.split_whitespace().next().unwrap().parse().unwrap()
}
