//! The outbox file: rows with any values in its table, and a file of any bytes in its place.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params_from_iter};

use super::scratch;
use crate::delta::{LifecycleDelta, Operation};
use crate::limits;
use crate::master::body::Body;
use crate::outbox::schema::{MAX_LAST_ID, last_id};
use crate::outbox::{
    DeliveryResult, NewRows, Outbox, QueuedDelta, Role, RowChange, SentBy, SharedOutboxStats,
    deadline,
};
use crate::status::Snapshot;

/// The rows of one input. More rows find nothing new.
const ROWS: usize = 40;

/// The rows that are sent, also those of owners that have ended.
const WAITING: &str = "rejected IS NULL AND (completed_at IS NOT NULL OR owner IS NOT NULL)";

/// The offset of a SQLite file's write version. A file with a later version looks like one on a
/// read-only disk.
const WRITE_VERSION: usize = 18;

/// Delivers from an outbox with a good row and rows with any values that the schema accepts, and
/// ages them by an hour. No waiting row is lost, and none blocks another.
pub fn outbox_rows(input: &[u8]) {
    let path = fresh("rows");
    fs::write(&path, template()).unwrap();
    let mut input = Input(input);
    let answers = input.byte();
    let [waiting, too_old] = fill(&path, &mut input);
    let used_up = waiting.is_empty();

    let mut subject = open(&path);
    subject.push(good("new"));
    let queued = deliverable(&mut subject);
    assert_eq!(queued.len(), waiting.len() + 1);
    assert!(ids(&queued).is_superset(&waiting));
    let (answered, left): (Vec<_>, Vec<_>) =
        queued.into_iter().partition(|queued| answers >> (queued.id & 7) & 1 == 1);
    answer(&mut subject, &answered);
    assert_eq!(deliverable(&mut subject), left);
    subject.outbox.age_by(limits::OUTBOX_AGING).unwrap();
    subject.outbox.maintain().unwrap();
    subject.push(good("last"));
    let last = deliverable(&mut subject);
    assert_eq!(ids(&last[1..]), &ids(&left) - &too_old);
    drop(subject);

    assert_eq!(deliverable(&mut open(&path)), last);
    assert_eq!(quarantined(&path).len(), usize::from(used_up));
}

/// The bytes of a SQLite file that may change before SQLite rejects the file.
const HEADER: usize = 100;

/// Delivers from a file of these bytes. A corrupt file, or one that is not an outbox, is
/// quarantined unchanged. The outbox is in a file in any case, except for files that only a later
/// SQLite may write.
pub fn outbox_file(input: &[u8]) {
    if input.get(WRITE_VERSION).is_some_and(|version| *version > 2) {
        return;
    }
    let path = fresh("file");
    fs::write(&path, input).unwrap();
    let mut subject = open(&path);
    subject.push(good("new"));
    let queued = deliverable(&mut subject);
    assert_eq!(queued[0].delta.decky(), "good-new");
    answer(&mut subject, &queued[1..]);
    subject.outbox.age_by(limits::OUTBOX_AGING).unwrap();
    subject.outbox.maintain().unwrap();
    subject.push(good("last"));
    let last = deliverable(&mut subject);
    assert_eq!(
        last.iter().map(|queued| queued.delta.decky()).collect::<Vec<_>>(),
        ["good-last", "good-new"]
    );
    drop(subject);

    assert_eq!(deliverable(&mut open(&path)), last);
    let quarantined = quarantined(&path);
    assert!(quarantined.len() <= 1);
    let content = |file: &[u8]| file.get(HEADER..).map(<[u8]>::to_vec);
    assert!(
        quarantined.iter().all(|file| content(&fs::read(file).unwrap()) == content(input)),
        "it is unchanged"
    );
}

/// The path of an outbox in a new folder.
fn fresh(name: &str) -> PathBuf {
    let folder = scratch().join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    folder.join("heartbeat.db")
}

/// An outbox file with one good row.
fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let path = fresh("template");
        open(&path).push(good("old"));
        fs::read(path).unwrap()
    })
}

/// Inserts the input's rows, as far as the schema accepts them. Returns the ids of the waiting
/// rows, and of those that are too old in an hour. Both are empty if the file has no unused ids,
/// because it is then quarantined.
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
    // The age of a row whose owner has ended starts now.
    [WAITING.to_owned(), format!("{WAITING} AND owner IS NULL AND age > {most}")].map(|which| {
        let mut select = file.prepare(&format!("SELECT id FROM delta WHERE {which}")).unwrap();
        let ids = select.query_map([], |row| row.get(0)).unwrap();
        ids.map(Result::unwrap).collect()
    })
}

/// An outbox with one transaction for each call.
struct Subject {
    outbox: Outbox,
    stats: Arc<SharedOutboxStats>,
}

/// Opens the outbox as `run` does. The folder can be written, so the outbox is in a file.
fn open(path: &Path) -> Subject {
    let stats = Arc::<SharedOutboxStats>::default();
    let (outbox, problem) =
        Outbox::open(Some(path.to_owned()), Role::Deliver, Arc::clone(&stats)).unwrap();
    assert!(problem.is_none(), "{problem:?}");
    assert!(stats.read().on_disk);
    Subject { outbox, stats }
}

impl Subject {
    fn push(&mut self, delta: LifecycleDelta) {
        let rows = NewRows::Deltas(vec![delta], SentBy::Deliverer);
        self.outbox.commit(&[rows], deadline()).added.remove(0).unwrap();
        self.outbox.verify_after_commit();
    }

    fn answer(&mut self, deltas: &[QueuedDelta], result: DeliveryResult) {
        let ids = deltas.iter().map(|queued| queued.id).collect();
        self.outbox.record_change(RowChange::Answered(ids, result));
        self.outbox.commit(&[], deadline()).changed.unwrap();
        self.outbox.verify_after_commit();
    }
}

fn good(decky: &str) -> LifecycleDelta {
    LifecycleDelta::failed(format!("good-{decky}"), Operation::Deploy, "why")
}

/// The waiting deltas, newest first. A beat can contain all of them.
fn deliverable(subject: &mut Subject) -> Vec<QueuedDelta> {
    let queued = subject.outbox.read_deliverable(limits::OUTBOX_ROWS, |_| true).unwrap();
    subject.outbox.recount();
    assert!(queued.windows(2).all(|pair| pair[0].id > pair[1].id));
    assert_eq!(subject.stats.read().counts.waiting, queued.len() as u64);
    let status = Snapshot::unknown("");
    let lifecycle: Vec<_> = queued.iter().map(|queued| &queued.delta).collect();
    serde_json::to_vec(&Body::of("u", &status, &lifecycle)).unwrap();
    queued
}

fn ids(queued: &[QueuedDelta]) -> BTreeSet<i64> {
    queued.iter().map(|queued| queued.id).collect()
}

/// The master accepts the deltas with even ids, and rejects the others.
fn answer(subject: &mut Subject, queued: &[QueuedDelta]) {
    let (delivered, rejected): (Vec<_>, Vec<_>) =
        queued.iter().cloned().partition(|queued| queued.id & 1 == 0);
    subject.answer(&delivered, DeliveryResult::Delivered);
    subject.answer(&rejected, DeliveryResult::Rejected("no".to_owned()));
}

/// The quarantined files.
fn quarantined(path: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|name| name.to_string_lossy().contains("-file-")).collect()
}

/// An input, read from its beginning. After its end it has zeros.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self) -> [u8; 8] {
        let mut number = [0; 8];
        let taken = self.take(8);
        number[..taken.len()].copy_from_slice(taken);
        number
    }

    /// Any value of SQLite. The digits `0` to `7` select its type.
    fn value(&mut self) -> ValueRef<'a> {
        match self.byte() % 8 {
            0 => ValueRef::Null,
            1 => ValueRef::Integer(i64::from_le_bytes(self.number())),
            2 => ValueRef::Integer(i64::from(self.byte())),
            3 => ValueRef::Real(f64::from_le_bytes(self.number())),
            // It need not be UTF-8.
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
