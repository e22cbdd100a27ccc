//! The log lines in the page on operations are the program's.

use std::fs;
use std::path::Path;

/// All sources, each string on one line.
fn sources(folder: &Path) -> String {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let text = |path: std::path::PathBuf| {
        if path.is_dir() { sources(&path) } else { fs::read_to_string(path).unwrap() }
    };
    let text: String = entries.map(text).collect();
    text.split("\\\n").map(str::trim_start).collect()
}

#[test]
fn every_message_of_the_troubleshooting_is_one_that_is_said() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let page = include_str!("../../src/docs/operations.md");
    let table = page
        .split_once("| message | what it means | what to do |")
        .unwrap()
        .1
        .split_once("\n\n")
        .unwrap()
        .0;
    let first_cells = table.lines().filter_map(|row| row.split('|').nth(1));
    let messages = first_cells
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .filter(|it| !it.starts_with("class="));
    let mut count = 0;
    for message in messages {
        // What it says of which file, and after which colon, stands apart in the source.
        let message = message.trim_end_matches([' ', ':']).trim_end_matches(": error=");
        assert!(sources.contains(message), "{message:?} is said nowhere");
        count += 1;
    }
    assert!(count > 20, "{count}");
}
