//! The outbox' file: rows of any values in its table, and a file of any bytes in its place.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, params_from_iter};

use super::scratch;
use crate::delta::{LifecycleDelta, Operation};
use crate::limits;
use crate::master::body::Body;
use crate::outbox::schema::{LAST_ID_AT_MOST, last_id};
use crate::outbox::{DeliveryResult, Outbox, OutboxLocation, QueuedDelta, Role, deadline};
use crate::status::Snapshot;

/// Rows of one input: more of them find nothing new.
const ROWS: usize = 40;

/// What the master will hear; rows whose owner lives no more count, too.
const WAITING: &str = "rejected IS NULL AND (completed_at IS NOT NULL OR owner IS NOT NULL)";

/// Where a SQLite file says who may write it. A file that says "later ones" cannot be told from one on a disk that
/// nobody may write.
const WRITE_VERSION: usize = 18;

/// Delivers from an outbox with rows of any values, as far as its schema takes them, beside a good one, and lets an hour
/// pass: no row that waits is lost, or kept from the master by another.
pub fn outbox_rows(input: &[u8]) {
    let path = fresh("rows");
    fs::write(&path, template()).unwrap();
    let mut input = Input(input);
    let settling = input.byte();
    let [waiting, too_old] = fill(&path, &mut input);
    let used_up = waiting.is_empty();

    let mut outbox = open(&path);
    outbox.keep(&[good("new")]).unwrap();
    let kept = deliverable(&mut outbox);
    assert_eq!(kept.len(), waiting.len() + 1);
    assert!(ids(&kept).is_superset(&waiting));
    let (settled, left): (Vec<_>, Vec<_>) =
        kept.into_iter().partition(|kept| settling >> (kept.id & 7) & 1 == 1);
    settle(&mut outbox, &settled);
    assert_eq!(deliverable(&mut outbox), left);
    outbox.pass(limits::OUTBOX_AGING).unwrap();
    outbox.tend().unwrap();
    outbox.keep(&[good("last")]).unwrap();
    let last = deliverable(&mut outbox);
    assert_eq!(ids(&last[1..]), &ids(&left) - &too_old);
    drop(outbox);

    assert_eq!(deliverable(&mut open(&path)), last);
    assert_eq!(asides(&path).len(), usize::from(used_up));
}

/// Of a SQLite file, what may have changed before SQLite found that it cannot use it.
const HEADER: usize = 100;

/// Delivers from a file of these bytes. One that is no outbox, or a broken one, is moved aside as it is; the outbox is in
/// a file in any case, but where only a later SQLite may write it.
pub fn outbox_file(input: &[u8]) {
    if input.get(WRITE_VERSION).is_some_and(|version| *version > 2) {
        return;
    }
    let path = fresh("file");
    fs::write(&path, input).unwrap();
    let mut outbox = open(&path);
    outbox.keep(&[good("new")]).unwrap();
    let kept = deliverable(&mut outbox);
    assert_eq!(kept[0].delta.decky(), "good-new");
    settle(&mut outbox, &kept[1..]);
    outbox.pass(limits::OUTBOX_AGING).unwrap();
    outbox.tend().unwrap();
    outbox.keep(&[good("last")]).unwrap();
    let last = deliverable(&mut outbox);
    assert_eq!(
        last.iter().map(|kept| kept.delta.decky()).collect::<Vec<_>>(),
        ["good-last", "good-new"]
    );
    drop(outbox);

    assert_eq!(deliverable(&mut open(&path)), last);
    let asides = asides(&path);
    assert!(asides.len() <= 1);
    let content = |file: &[u8]| file.get(HEADER..).map(<[u8]>::to_vec);
    assert!(
        asides.iter().all(|aside| content(&fs::read(aside).unwrap()) == content(input)),
        "it is as it was"
    );
}

/// The place of an outbox in a folder of its own, where nothing is.
fn fresh(name: &str) -> PathBuf {
    let folder = scratch().join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    folder.join("heartbeat.db")
}

/// An outbox' file with one good row.
fn template() -> &'static [u8] {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let path = fresh("template");
        open(&path).keep(&[good("old")]).unwrap();
        fs::read(path).unwrap()
    })
}

/// Puts the input's rows into the file; what the schema refuses is in no file. The ids of those that wait now, and of those
/// that have waited for too long in an hour. There are none in a file whose ids are used up: it is moved aside.
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
    if last_id(&file).unwrap() > LAST_ID_AT_MOST {
        return Default::default();
    }
    let most = limits::OUTBOX_AGE.as_secs() - limits::OUTBOX_AGING.as_secs();
    // Whose owner has ended, waits from now on.
    [WAITING.to_owned(), format!("{WAITING} AND owner IS NULL AND age > {most}")].map(|which| {
        let mut select = file.prepare(&format!("SELECT id FROM delta WHERE {which}")).unwrap();
        let ids = select.query_map([], |row| row.get(0)).unwrap();
        ids.map(Result::unwrap).collect()
    })
}

/// As `run` does; where the folder can be written, the outbox is in a file.
fn open(path: &Path) -> Outbox {
    let location = OutboxLocation::File(path.to_owned());
    let (outbox, problem) = Outbox::open_at(&location, Path::new("/"), Role::Deliver).unwrap();
    assert!(problem.is_none(), "{problem:?}");
    assert_eq!(outbox.path(), Some(path));
    outbox
}

fn good(decky: &str) -> LifecycleDelta {
    LifecycleDelta::failed(format!("good-{decky}"), Operation::Deploy, "why")
}

/// What waits, newest first, as a beat can say it.
fn deliverable(outbox: &mut Outbox) -> Vec<QueuedDelta> {
    let kept = outbox.deliverable(limits::OUTBOX_ROWS, deadline()).unwrap();
    assert!(kept.windows(2).all(|pair| pair[0].id > pair[1].id));
    assert_eq!(outbox.books().counts.waiting, kept.len() as u64);
    let (status, lifecycle) =
        (Snapshot::unknown(""), kept.iter().map(|kept| &kept.delta).collect::<Vec<_>>());
    serde_json::to_vec(&Body::of("u", &status, &lifecycle)).unwrap();
    kept
}

fn ids(kept: &[QueuedDelta]) -> BTreeSet<i64> {
    kept.iter().map(|kept| kept.id).collect()
}

/// The master takes those with even ids, and never will the others.
fn settle(outbox: &mut Outbox, kept: &[QueuedDelta]) {
    let (delivered, rejected): (Vec<_>, Vec<_>) =
        kept.iter().cloned().partition(|kept| kept.id & 1 == 0);
    outbox.settle(&delivered, &DeliveryResult::Delivered, deadline()).unwrap();
    outbox.settle(&rejected, &DeliveryResult::Rejected("no".to_owned()), deadline()).unwrap();
}

/// The files that were moved aside.
fn asides(path: &Path) -> Vec<PathBuf> {
    let names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|name| name.to_string_lossy().contains("-aside-")).collect()
}

/// An input that is read from its beginning; beyond its end are zeros.
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

    /// Any value that SQLite can hold. The digits `0` to `7` say of what kind it is.
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
