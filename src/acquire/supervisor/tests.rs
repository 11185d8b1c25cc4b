//! When the supervisor's task starts and ends.

use std::future::pending;

use super::*;

/// Relies on the supervisor. Returns whether that started a task.
pub(super) fn rely_on(supervisor: &Supervisor, now: Instant) -> bool {
    let mut has_started = false;
    supervisor.start_if_needed(now, Handle::current().id(), |_| {
        has_started = true;
        AbortOnDropHandle::new(tokio::spawn(pending()))
    });
    has_started
}

#[tokio::test(start_paused = true)]
async fn a_task_that_is_relied_on_after_its_last_check_goes_on() {
    let (supervisor, now) = (Supervisor::default(), Instant::now());
    assert!(rely_on(&supervisor, now));
    supervisor.begin_check(1, now);
    // The check finds nothing to do, and the waiter comes before the task ends.
    assert!(!rely_on(&supervisor, now), "it runs");
    assert!(!supervisor.end(1), "it goes on");
    supervisor.begin_check(1, now);
    assert!(supervisor.end(1));
    assert!(rely_on(&supervisor, now), "it has ended, even if its runtime has not noticed yet");
}

#[tokio::test(start_paused = true)]
async fn a_task_that_another_has_replaced_decides_nothing() {
    let (supervisor, now) = (Supervisor::default(), Instant::now());
    assert!(rely_on(&supervisor, now));
    let later = now + STALLED;
    assert!(rely_on(&supervisor, later), "its runtime is not driven");
    supervisor.begin_check(1, later + STALLED);
    assert!(supervisor.end(1));
    assert!(!rely_on(&supervisor, later), "the other one runs");
}

#[test]
fn a_task_of_another_runtime_is_told_from_one_of_the_own() {
    let [here, there] = [(); 2].map(|()| tokio::runtime::Builder::new_current_thread().build().unwrap());
    let (supervisor, now) = (Supervisor::default(), Instant::now());
    let rely_on = |runtime: &tokio::runtime::Runtime, now| {
        let start = |_| AbortOnDropHandle::new(runtime.spawn(pending()));
        supervisor.start_if_needed(now, runtime.handle().id(), start)
    };
    assert!(rely_on(&there, now));
    assert!(!rely_on(&here, now));
    assert!(rely_on(&there, now));
    // The other runtime stands still.
    assert!(rely_on(&here, now + STALLED));
    assert!(!rely_on(&there, now + STALLED));
}
