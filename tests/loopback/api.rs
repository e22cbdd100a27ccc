//! The types that the public functions accept, and the threads on which the handles work.

use std::io;
use std::panic::{RefUnwindSafe, UnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use decnet_heartbeat::loopback::RowStatus::{Failed, Succeeded};
use decnet_heartbeat::{
    DeltaSender, Error, Heartbeat, LifecycleDelta, Operation, TrackedOperation,
};

use crate::support::{Fixture, TIMEOUT};

#[test]
fn handles_work_from_any_thread_and_after_a_caught_panic() {
    fn assert_auto_traits<T: Send + Sync + UnwindSafe + RefUnwindSafe>() {}
    assert_auto_traits::<Heartbeat>();
    assert_auto_traits::<DeltaSender>();
    assert_auto_traits::<TrackedOperation>();

    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let deltas = heartbeat.deltas();
    let panicked = catch_unwind(|| {
        deltas.push(LifecycleDelta::succeeded("before", Operation::Deploy)).unwrap();
        let _operation = heartbeat.begin(Operation::Mutate, "d").unwrap();
        panic!("on purpose");
    });
    assert!(panicked.is_err());
    deltas.push(LifecycleDelta::succeeded("after", Operation::Deploy)).unwrap();
    assert!(heartbeat.flush(TIMEOUT));
    assert_eq!(heartbeat.stats().delivered, 3);
}

#[test]
fn begin_accepts_one_name_or_any_collection() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    let deltas = heartbeat.deltas();
    let owned = "a".to_owned();
    let names = vec!["a".to_owned(), "b".to_owned()];
    let open_deckies =
        |operation: &TrackedOperation| operation.open().map(str::to_owned).collect::<Vec<_>>();
    let one = [
        deltas.begin(Operation::Deploy, "a").unwrap(),
        deltas.begin(Operation::Deploy, &owned).unwrap(),
        deltas.begin(Operation::Deploy, owned.clone()).unwrap(),
        deltas.begin(Operation::Deploy, owned.as_str()).unwrap(),
        deltas.begin(Operation::Deploy, ["a"]).unwrap(),
        deltas.begin(Operation::Deploy, Some("a")).unwrap(),
    ];
    one.iter().for_each(|operation| assert_eq!(open_deckies(operation), ["a"]));
    let array = ["a", "b"];
    let several = [
        heartbeat.begin(Operation::Mutate, vec!["a", "b"]).unwrap(),
        heartbeat.begin(Operation::Mutate, array).unwrap(),
        heartbeat.begin(Operation::Mutate, array).unwrap(),
        heartbeat.begin(Operation::Mutate, array.as_slice()).unwrap(),
        heartbeat.begin(Operation::Mutate, &names).unwrap(),
        heartbeat.begin(Operation::Mutate, names.clone()).unwrap(),
        heartbeat.begin(Operation::Mutate, names.iter()).unwrap(),
        heartbeat.begin(Operation::Mutate, names.iter().map(String::as_str)).unwrap(),
        heartbeat.begin(Operation::Mutate, ('a'..='b').map(String::from)).unwrap(),
        heartbeat.begin(Operation::Mutate, [owned.clone(), "b".to_owned()]).unwrap(),
    ];
    several.iter().for_each(|operation| assert_eq!(open_deckies(operation), ["a", "b"]));
}

#[test]
fn work_may_return_unit_or_a_result() {
    let fixture = Fixture::new();
    let (heartbeat, _tick) = fixture.start_heartbeat();
    for decky in ["unit", "result", "error", "text", "boxed", "panic"] {
        fixture.master.open_operation(&fixture.worker.uuid, decky, "deploy");
    }
    let run = |thread: Result<JoinHandle<()>, Error>| thread.unwrap().join().unwrap();
    run(heartbeat.run(Operation::Deploy, "unit", || ()));
    run(heartbeat.run(Operation::Deploy, "result", || Ok::<(), io::Error>(())));
    run(heartbeat.run(Operation::Deploy, "error", || Err(io::Error::other("no space left"))));
    run(heartbeat.run(Operation::Deploy, "text", || Err("in words")));
    let boxed =
        || -> Result<(), Box<dyn std::error::Error + Send + Sync>> { Err("in a box".into()) };
    run(heartbeat.run(Operation::Deploy, "boxed", boxed));
    let panics = || -> () { panic!("on purpose") };
    run(heartbeat.run(Operation::Deploy, "panic", panics));
    assert!(heartbeat.flush(TIMEOUT));
    let rows = fixture.master.rows();
    let ends: Vec<_> =
        rows.iter().map(|row| (row.decky.as_str(), row.status, row.error.as_deref())).collect();
    let expected = [
        ("unit", Succeeded, None),
        ("result", Succeeded, None),
        ("error", Failed, Some("no space left")),
        ("text", Failed, Some("in words")),
        ("boxed", Failed, Some("in a box")),
        ("panic", Failed, Some("deploy panicked: on purpose")),
    ];
    assert_eq!(ends, expected);
}
