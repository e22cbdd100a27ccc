//! The file of the outbox: rows with any values in its table, and a file with any bytes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params_from_iter};

use super::temporary_folder;
use crate::delta::{LifecycleDelta, Operation};
use crate::limits;
use crate::master::body::Body;
use crate::outbox::schema::{MAX_LAST_ID, last_id};
use crate::outbox::{
    DeliveryResult, NewRows, Outbox, QueuedDelta, Role, RowChange, SentBy, SharedOutboxStats,
    deadline,
};
use crate::status::Snapshot;

/// The maximum number of rows of an input. More do not find more.
const ROWS: usize = 40;

/// The rows that are to be delivered, those whose owner has ended included.
const WAITING: &str = "rejected IS NULL AND (completed_at IS NOT NULL OR owner IS NOT NULL)";

/// The offset of the version of SQLite that is needed to write the file. A file of a later version
/// cannot be distinguished from one on a read-only disk.
const WRITE_VERSION: usize = 18;

/// Delivers from an outbox that has a valid row and rows with any values that its schema accepts,
/// and lets an hour pass. No row is lost, and no row prevents the delivery of another one.
pub fn outbox_rows(input: &[u8]) {
    let path = new_path("rows");
    fs::write(&path, template()).unwrap();
    let mut input = Input(input);
    let acknowledged_ids = input.byte();
    let [waiting, too_old] = fill(&path, &mut input);
    let used_up = waiting.is_empty();

    let mut outbox = open(&path);
    outbox.push(valid_delta("new"));
    let queued = deliverable(&mut outbox);
    assert_eq!(queued.len(), waiting.len() + 1);
    assert!(ids(&queued).is_superset(&waiting));
    let (processed, left): (Vec<_>, Vec<_>) =
        queued.into_iter().partition(|queued| acknowledged_ids >> (queued.id & 7) & 1 == 1);
    record_results(&mut outbox, &processed);
    assert_eq!(deliverable(&mut outbox), left);
    outbox.pass_an_hour();
    outbox.push(valid_delta("last"));
    let last = deliverable(&mut outbox);
    assert_eq!(ids(&last[1..]), &ids(&left) - &too_old);
    drop(outbox);

    assert_eq!(deliverable(&mut open(&path)), last);
    assert_eq!(quarantined(&path).len(), usize::from(used_up));
}

/// The size of a SQLite file's header, which SQLite may change before it finds that the file is
/// invalid.
const HEADER: usize = 100;

/// Delivers from a file with these bytes. A file that is corrupt or not an outbox is renamed
/// unchanged. The outbox is in a file in any case, unless only a later SQLite may write that file.
pub fn outbox_file(input: &[u8]) {
    if input.get(WRITE_VERSION).is_some_and(|version| *version > 2) {
        return;
    }
    let path = new_path("file");
    fs::write(&path, input).unwrap();
    let mut outbox = open(&path);
    outbox.push(valid_delta("new"));
    let queued = deliverable(&mut outbox);
    assert_eq!(queued[0].delta.decky(), "good-new");
    record_results(&mut outbox, &queued[1..]);
    outbox.pass_an_hour();
    outbox.push(valid_delta("last"));
    let last = deliverable(&mut outbox);
    assert_eq!(
        last.iter().map(|queued| queued.delta.decky()).collect::<Vec<_>>(),
        ["good-last", "good-new"]
    );
    drop(outbox);

    assert_eq!(deliverable(&mut open(&path)), last);
    let renamed = quarantined(&path);
    assert!(renamed.len() <= 1);
    let content = |file: &[u8]| file.get(HEADER..).map(<[u8]>::to_vec);
    assert!(
        renamed.iter().all(|file| content(&fs::read(file).unwrap()) == content(input)),
        "the renamed file was changed"
    );
}

/// The path of an outbox in an empty folder.
fn new_path(name: &str) -> PathBuf {
    let folder = temporary_folder().join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    folder.join("heartbeat.db")
}

/// The file of an outbox with one valid row.
fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let path = new_path("template");
        open(&path).push(valid_delta("old"));
        fs::read(path).unwrap()
    })
}

/// Inserts the rows of the input that the schema accepts. Returns the ids of the rows that wait,
/// and of those that are too old after an hour. There are none if the ids are used up, because such
/// a file is renamed.
fn fill(path: &Path, input: &mut Input<'_>) -> [BTreeSet<i64>; 2] {
    let file = Connection::open(path).unwrap();
    let sequence = ToSqlOutput::Borrowed(input.value());
    file.execute("UPDATE sqlite_sequence SET seq = ifnull(?1, seq)", [sequence]).unwrap();
    let mut insert =
        file.prepare("INSERT INTO delta VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)").unwrap();
    for _ in 0..ROWS {
        if input.0.is_empty() {
            break;
        }
        let row: [_; 8] = std::array::from_fn(|_| ToSqlOutput::Borrowed(input.value()));
        let _ = insert.execute(params_from_iter(row));
    }
    if last_id(&file).unwrap() > MAX_LAST_ID {
        return Default::default();
    }
    let most = limits::OUTBOX_AGE.as_secs() - limits::OUTBOX_AGING.as_secs();
    // The age of a row whose owner has ended counts from now on.
    [WAITING.to_owned(), format!("{WAITING} AND owner IS NULL AND age > {most}")].map(|which| {
        let mut select = file.prepare(&format!("SELECT id FROM delta WHERE {which}")).unwrap();
        let ids = select.query_map([], |row| row.get(0)).unwrap();
        ids.map(Result::unwrap).collect()
    })
}

/// Opens the outbox as `run` does. It is in a file, because its folder is writable.
fn open(path: &Path) -> OpenOutbox {
    let stats = Arc::<SharedOutboxStats>::default();
    let path = Some(path.to_owned());
    let (outbox, problem) = Outbox::open(path, Role::Deliver, Arc::clone(&stats)).unwrap();
    assert!(problem.is_none(), "{problem:?}");
    assert!(stats.read().on_disk);
    OpenOutbox { outbox, stats }
}

struct OpenOutbox {
    outbox: Outbox,
    stats: Arc<SharedOutboxStats>,
}

impl OpenOutbox {
    fn push(&mut self, delta: LifecycleDelta) {
        let rows = NewRows::Deltas(vec![delta], SentBy::Deliverer);
        self.outbox.commit(&[rows], deadline()).added.remove(0).unwrap();
        self.outbox.verify_after_commit();
    }

    fn record_result(&mut self, deltas: &[QueuedDelta], result: DeliveryResult) {
        let ids = deltas.iter().map(|queued| queued.id).collect();
        self.outbox.record_change(RowChange::Answered(ids, result));
        self.outbox.commit(&[], deadline()).changed.unwrap();
        self.outbox.verify_after_commit();
    }

    fn pass_an_hour(&mut self) {
        self.outbox.age_by(limits::OUTBOX_AGING).unwrap();
        self.outbox.maintain().unwrap();
    }
}

fn valid_delta(decky: &str) -> LifecycleDelta {
    LifecycleDelta::failed(format!("good-{decky}"), Operation::Deploy, "why")
}

/// The waiting deltas, newest first. Asserts that a body can contain them.
fn deliverable(opened: &mut OpenOutbox) -> Vec<QueuedDelta> {
    let queued = opened.outbox.read_deliverable(limits::OUTBOX_ROWS, |_| true).unwrap();
    opened.outbox.recount();
    assert!(queued.windows(2).all(|pair| pair[0].id > pair[1].id));
    assert_eq!(opened.stats.read().counts.waiting, queued.len() as u64);
    let status = Snapshot::unknown("");
    let lifecycle: Vec<_> = queued.iter().map(|queued| &queued.delta).collect();
    serde_json::to_vec(&Body::of("u", &status, &lifecycle)).unwrap();
    queued
}

fn ids(queued: &[QueuedDelta]) -> BTreeSet<i64> {
    queued.iter().map(|queued| queued.id).collect()
}

/// Acknowledges the deltas with even ids, and rejects the others.
fn record_results(outbox: &mut OpenOutbox, queued: &[QueuedDelta]) {
    let (delivered, rejected): (Vec<_>, Vec<_>) =
        queued.iter().cloned().partition(|queued| queued.id & 1 == 0);
    outbox.record_result(&delivered, DeliveryResult::Delivered);
    outbox.record_result(&rejected, DeliveryResult::Rejected("no".to_owned()));
}

/// The files that were renamed because they could not be used.
fn quarantined(path: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|name| name.to_string_lossy().contains("-aside-")).collect()
}

/// An input that is read from its beginning. After its end there are zeros.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self) -> [u8; 8] {
        let mut number = [0; 8];
        let taken = self.take(8);
        number[..taken.len()].copy_from_slice(taken);
        number
    }

    /// A value of any type of SQLite. The digits `0` to `7` select the type.
    fn value(&mut self) -> ValueRef<'a> {
        match self.byte() % 8 {
            0 => ValueRef::Null,
            1 => ValueRef::Integer(i64::from_le_bytes(self.number())),
            2 => ValueRef::Integer(i64::from(self.byte())),
            3 => ValueRef::Real(f64::from_le_bytes(self.number())),
            // It may not be UTF-8.
            4 => ValueRef::Text(self.bytes()),
            5 => ValueRef::Blob(self.bytes()),
            6 => ValueRef::Text(b"deploy"),
            _ => ValueRef::Text(b"mutate"),
        }
    }

    fn bytes(&mut self) -> &'a [u8] {
        let length = self.byte();
        self.take(usize::from(length))
    }
}
