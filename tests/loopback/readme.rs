//! The documentation: its log lines, metrics and keys are in the code, and its links have targets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use decnet_heartbeat::Stats;

/// The code of a folder, with each string on one line.
fn sources(folder: &Path) -> String {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    // Not the pages, which are below `src`, too.
    let code =
        entries.filter(|path| path.is_dir() || path.extension().is_some_and(|it| it == "rs"));
    let text = |path: PathBuf| {
        if path.is_dir() { sources(&path) } else { fs::read_to_string(path).unwrap() }
    };
    let text: String = code.map(text).collect();
    text.split("\\\n").map(str::trim_start).collect()
}

/// The code spans in the first column of the table with this header, in the page on operations.
fn first_column(header: &str) -> Vec<&'static str> {
    let page = include_str!("../../src/docs/operations.md");
    let table = page.split_once(header).unwrap().1.split_once("\n\n").unwrap().0;
    let first_cells = table.lines().filter_map(|row| row.split('|').nth(1));
    first_cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
}

#[test]
fn documented_log_lines_are_in_the_code() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let messages = first_column("| message | what it means | what to do |");
    assert!(messages.len() > 20, "{messages:?}");
    for message in messages.into_iter().filter(|it| !it.starts_with("class=")) {
        // The rest of the line is arguments in the code.
        let message = message.trim_end_matches([' ', ':']).trim_end_matches(": error=");
        assert!(sources.contains(message), "{message:?} is not in the code");
    }
}

#[test]
fn documented_metrics_are_in_the_code() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli"));
    for metric in first_column("| metric | type | what it is |") {
        assert!(sources.contains(&format!("\"{metric}\"")), "{metric:?} is not in the code");
    }
}

#[test]
fn documented_stats_are_the_keys_of_the_stats() {
    let documented: BTreeSet<_> = first_column("| key | what it is |").into_iter().collect();
    let stats = serde_json::to_value(Stats::default()).unwrap();
    let keys: BTreeSet<_> = stats.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(documented, keys);
}

/// The definitions of links in a page: `[label]: destination`.
fn definitions(page: &str) -> impl Iterator<Item = (&str, &str)> {
    page.lines().filter_map(|line| line.strip_prefix('[')?.split_once("]: "))
}

fn pages(root: &Path) -> Vec<PathBuf> {
    let pages = fs::read_dir(root.join("src/docs")).unwrap().map(|entry| entry.unwrap().path());
    pages.chain([root.join("README.md")]).collect()
}

#[test]
fn relative_links_of_the_pages_lead_to_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for page in pages(root) {
        let text = fs::read_to_string(&page).unwrap();
        let inline = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let destinations =
            inline.chain(definitions(&text).map(|(_, to)| to)).filter(|to| !to.contains("::"));
        // Folders with a dot are not in the package.
        for to in destinations.filter(|to| !to.starts_with(['#', '.']) || to.starts_with("..")) {
            let file = page.parent().unwrap().join(to.split('#').next().unwrap());
            assert!(to.starts_with("https://") || file.exists(), "{}: {to}", page.display());
        }
    }
}

#[test]
fn each_link_of_a_page_is_defined_for_rustdoc() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let for_rustdoc = fs::read_to_string(root.join("src/docs/rustdoc-links.md")).unwrap();
    let for_rustdoc: BTreeMap<_, _> = definitions(&for_rustdoc).collect();
    for (label, to) in &for_rustdoc {
        // docs.rs shows the files of the package.
        if let Some((_, file)) = to.split_once("/latest/source/") {
            assert!(root.join(file).exists(), "{label}: {to}");
        }
    }
    for page in pages(root) {
        let text = fs::read_to_string(&page).unwrap();
        for (label, _) in definitions(&text) {
            assert!(for_rustdoc.contains_key(label), "{}: {label}", page.display());
        }
    }
}
