//! `pipe` beside a process that delivers, and that ends.

use crate::hand_over::start_run;
use crate::pipe::{rarely, rows};
use crate::support::{Agent, Fixture, TIMEOUT, wait_for_line};

#[test]
fn end_of_stdin_delivers_what_an_ended_process_no_longer_does() {
    let fixture = Fixture::new();
    fixture.master.open_operation(&fixture.worker.uuid, "a", "deploy");
    let mut run = start_run(&fixture, "1h");
    let mut agent = Agent::start(&mut rarely(&fixture));
    wait_for_line(&agent.log, "another process delivers");
    agent.deploy(&["a"]);
    run.signal("KILL");
    run.wait(TIMEOUT);
    assert_eq!(agent.close(), Some(0));
    let error = rows(&fixture)[0].2.clone();
    assert_eq!(error.as_deref(), Some("the agent ended during deploy"));
}
