//! The checker of `tests/chaos/` finds every kind of violation, and raises no false alarm.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "chaos/checker.rs"]
#[allow(dead_code, reason = "the run uses more of it")]
mod checker;
#[path = "chaos/history.rs"]
#[allow(dead_code, reason = "the run uses more of it")]
mod history;

use std::time::Duration;

use self::checker::{LEFT, Report, Run, Violation, check};
use self::history::{Event, GUARDS_PER_WORKER, GuardId, Mode, Nanos, Recorder, now, read};

/// A history in which instants are small numbers.
#[derive(Default)]
struct History {
    events: Vec<Event>,
}

impl History {
    fn new() -> Self {
        Self::default()
    }

    fn event(mut self, event: Event) -> Self {
        self.events.push(event);
        self
    }

    fn attempt_as(self, at: Nanos, guard: GuardId, mode: Mode, holder: &str) -> Self {
        let (holder, keys) = (holder.to_owned(), vec!["k".to_owned()]);
        self.event(Event::Attempt { at, guard, mode, holder, keys, patient: true })
    }

    fn attempt(self, at: Nanos, guard: GuardId) -> Self {
        self.attempt_as(at, guard, Mode::Exclusive, &guard.to_string())
    }

    fn granted(self, at: Nanos, guard: GuardId, fence: u64) -> Self {
        self.event(Event::Granted { at, guard, fence })
    }

    /// The guard says that it is held.
    fn held(self, before: Nanos, after: Nanos, guard: GuardId) -> Self {
        self.event(Event::Held { before, after, guard, deadline: after + 1_000 })
    }

    fn lost(self, at: Nanos, guard: GuardId, loss: &str, deadline: Nanos) -> Self {
        self.event(Event::Lost { at, guard, loss: loss.to_owned(), deadline })
    }

    fn ending(self, at: Nanos, guard: GuardId) -> Self {
        self.event(Event::Ending { at, guard, how: "released".to_owned() })
    }

    /// Asked for at `from`, and held until `until`.
    fn turn(self, guard: GuardId, mode: Mode, fence: u64, from: Nanos, until: Nanos) -> Self {
        let history = self.attempt_as(from, guard, mode, &guard.to_string()).granted(from + 1, guard, fence);
        history.held(until, until + 1, guard).ending(until + 2, guard)
    }

    fn wrote(self, before: Nanos, after: Nanos, guard: GuardId, accepted: bool) -> Self {
        self.event(Event::Wrote { before, after, guard, key: "k".to_owned(), accepted })
    }

    fn report(self) -> Report {
        check(self.events, &[], &run())
    }

    fn violations(self) -> Vec<Violation> {
        self.report().violations
    }
}

fn run() -> Run {
    Run { nobody_forgets: true, calm: 10_000, patience: 1_000, killed: [7].into() }
}

const ALONE: Mode = Mode::Exclusive;

#[test]
fn one_after_the_other_is_right() {
    let report =
        History::new().turn(1, ALONE, 10, 0, 100).turn(2, ALONE, 11, 50, 40).turn(3, ALONE, 12, 110, 200).report();
    assert_eq!(report.violations, []);
    assert_eq!((report.attempts, report.grants, report.after_expiry), (3, 3, 0));
}

#[test]
fn two_holders_at_a_time_are_found_to_the_nanosecond() {
    let history = || History::new().turn(1, ALONE, 10, 0, 100);
    assert_eq!(history().turn(2, ALONE, 11, 99, 200).violations(), []);
    let found = history().turn(2, ALONE, 11, 98, 200).violations();
    assert_eq!(found, [Violation::Overlap { key: "k".into(), first: 1, second: 2, at: 99, lasts: 1 }]);
}

#[test]
fn an_overlap_with_any_earlier_holder_is_found() {
    let found = History::new()
        .turn(1, ALONE, 10, 0, 1_000)
        .attempt_as(5, 2, ALONE, "1")
        .granted(6, 2, 10)
        .held(20, 21, 2)
        .turn(3, ALONE, 12, 500, 600)
        .violations();
    assert!(matches!(found[..], [Violation::Overlap { first: 1, second: 3, lasts: 99, .. }]), "{found:?}");
}

#[test]
fn a_sample_across_a_freeze_counts_from_before_it() {
    // Frozen between the instant and the call, or between the call and the record: the answer may be as old as 10.
    let history = History::new().attempt(0, 1).granted(1, 1, 10).held(10, 5_000, 1);
    assert_eq!(history.turn(2, ALONE, 11, 20, 30).violations(), []);
    // A record that is written late changes nothing.
    let history = History::new().attempt(0, 1).granted(1, 1, 10).turn(2, ALONE, 11, 20, 30).held(10, 12, 1);
    assert_eq!(history.violations(), []);
}

#[test]
fn whoever_was_held_before_and_after_a_freeze_was_held_in_between() {
    let history = History::new().attempt(0, 1).granted(1, 1, 10).held(2, 3, 1).held(900, 901, 1);
    let found = history.turn(2, ALONE, 11, 400, 500).violations();
    assert!(matches!(found[..], [Violation::Overlap { first: 1, second: 2, lasts: 99, .. }]), "{found:?}");
}

#[test]
fn whoever_expired_was_held_until_its_deadline() {
    // It was not asked again before the deadline, nor at all.
    for sampled in [true, false] {
        let history = || {
            let history = History::new().attempt(0, 1).granted(1, 1, 10);
            if sampled { history.held(2, 3, 1) } else { history }.lost(900, 1, "Expired", 300)
        };
        assert_eq!(history().turn(2, ALONE, 11, 299, 400).violations(), []);
        let found = history().turn(2, ALONE, 11, 200, 400).violations();
        assert!(matches!(found[..], [Violation::Overlap { lasts: 99, .. }]), "{found:?}");
    }
}

#[test]
fn a_deadline_that_had_passed_before_the_grant_returned_is_no_time_at_all() {
    let history = History::new().attempt(0, 1).granted(500, 1, 10).lost(501, 1, "Expired", 300);
    assert_eq!(history.turn(2, ALONE, 11, 400, 600).violations(), []);
}

#[test]
fn whoever_was_ended_by_the_server_was_held_when_it_last_said_so() {
    let history = History::new().attempt(0, 1).granted(1, 1, 10).held(100, 101, 1).lost(900, 1, "Taken", 5_000);
    let found = history.turn(2, ALONE, 11, 200, 400).violations();
    assert_eq!(found, [Violation::Verdict { guard: 1, loss: "Taken".into() }]);
}

#[test]
fn a_verdict_of_the_server_is_no_violation_where_one_may_forget() {
    let history = History::new().attempt(0, 1).granted(1, 1, 10).held(100, 101, 1).lost(900, 1, "Missing", 5_000);
    let run = Run { nobody_forgets: false, ..run() };
    assert_eq!(check(history.events, &[], &run).violations, []);
}

#[test]
fn what_becomes_of_a_guard_that_its_worker_has_ended_is_no_loss() {
    for loss in ["Missing", "Expired"] {
        let history = History::new().turn(1, ALONE, 10, 0, 100).lost(900, 1, loss, 500);
        assert_eq!(history.turn(2, ALONE, 11, 110, 400).violations(), []);
    }
}

#[test]
fn guards_of_one_holder_are_held_together() {
    let history = History::new().attempt_as(0, 1, ALONE, "user").granted(1, 1, 10).held(100, 101, 1);
    let history = history.attempt_as(50, 2, ALONE, "user").granted(51, 2, 10).held(200, 201, 2);
    assert_eq!(history.violations(), []);
}

#[test]
fn modes_admit_each_other_or_do_not() {
    let (read, permit) = (Mode::Read, Mode::Permit { limit: 2 });
    for (first, second, together) in [
        (read, read, true),
        (permit, permit, true),
        (read, ALONE, false),
        (ALONE, permit, false),
        (permit, ALONE, false),
        (read, permit, false),
    ] {
        let found = History::new().turn(1, first, 10, 0, 100).turn(2, second, 11, 50, 150).violations();
        assert_eq!(found.is_empty(), together, "{first:?}, {second:?}: {found:?}");
    }
}

#[test]
fn one_permit_too_many_is_found() {
    let permit = Mode::Permit { limit: 2 };
    let history = || History::new().turn(1, permit, 10, 0, 100).turn(2, permit, 11, 10, 50);
    assert_eq!(history().turn(3, permit, 12, 60, 150).violations(), []);
    let found = history().turn(3, permit, 12, 40, 150).violations();
    assert_eq!(found, [Violation::Crowd { key: "k".into(), limit: 2, last: 3, at: 41 }]);
}

#[test]
fn a_token_must_be_greater_than_that_of_any_grant_before_the_request() {
    for mode in [ALONE, Mode::Read] {
        let found = History::new().turn(1, mode, 10, 0, 100).turn(2, mode, 9, 150, 200).violations();
        let order = |found: &Violation| matches!(found, Violation::Order { earlier: 1, later: 2, tokens: (10, 9), .. });
        assert!(!found.is_empty() && found.iter().all(order), "{found:?}");
    }
    // Not of the last one alone.
    let found = History::new()
        .turn(1, Mode::Read, 10, 0, 100)
        .turn(2, Mode::Read, 12, 1, 100)
        .turn(3, Mode::Read, 11, 20, 30)
        .violations();
    assert!(matches!(found[..], [Violation::Order { earlier: 2, later: 3, .. }]), "{found:?}");
}

#[test]
fn tokens_of_waiters_rise_in_the_order_of_their_turns() {
    let history = History::new().attempt(0, 1).attempt(0, 2);
    let history = history.granted(10, 1, 11).held(20, 21, 1).ending(22, 1).granted(30, 2, 10).held(40, 41, 2);
    let found = history.ending(42, 2).violations();
    assert!(matches!(found[..], [Violation::Order { earlier: 1, later: 2, .. }]), "{found:?}");
}

#[test]
fn requests_of_one_holder_at_the_same_time_may_hear_of_their_grants_in_any_order() {
    let twins = |fence| {
        let history = History::new().turn(1, ALONE, 9, 0, 2);
        let history = history.attempt_as(0, 2, ALONE, "twin").attempt_as(0, 3, ALONE, "twin");
        // The later one was granted first, and learns of it last.
        let history = history.granted(20, 2, 12).held(21, 22, 2).ending(23, 2);
        history.granted(24, 3, fence).held(25, 26, 3).ending(27, 3)
    };
    assert_eq!(twins(11).violations(), []);
    // But no earlier than the holder before both.
    let found = twins(8).violations();
    assert!(found.iter().any(|found| matches!(found, Violation::Order { earlier: 1, later: 3, .. })), "{found:?}");
}

#[test]
fn shared_holders_that_have_waited_at_the_same_time_may_have_their_tokens_in_any_order() {
    let history = History::new().attempt_as(0, 1, Mode::Read, "1").attempt_as(0, 2, Mode::Read, "2");
    let history = history.granted(10, 1, 11).held(20, 21, 1).granted(30, 2, 10).held(40, 41, 2);
    assert_eq!(history.violations(), []);
}

#[test]
fn whoever_continues_the_lease_of_a_reader_has_its_token() {
    let history = |fence| {
        let history = History::new().attempt_as(0, 1, Mode::Read, "1").granted(10, 1, 10).held(20, 21, 1);
        let history = history.ending(22, 1).turn(2, Mode::Read, 11, 30, 100);
        history.attempt_as(40, 3, Mode::Read, "1").granted(50, 3, fence).held(60, 61, 3).ending(62, 3)
    };
    assert_eq!(history(10).violations(), []);
    assert!(matches!(history(9).violations()[..], [Violation::Order { earlier: 2, later: 3, .. }]));
}

#[test]
fn a_token_is_of_one_holder() {
    let history = |second: &str| {
        let history = History::new().attempt_as(0, 1, ALONE, "1").granted(10, 1, 10).held(20, 21, 1).ending(22, 1);
        history.attempt_as(0, 2, ALONE, second).granted(30, 2, 10).held(40, 41, 2).ending(42, 2)
    };
    assert_eq!(history("1").violations(), []);
    let found = history("2").violations();
    assert!(matches!(found[..], [Violation::Order { tokens: (10, 10), .. }]), "{found:?}");
}

#[test]
fn a_holder_whose_write_is_refused_is_found() {
    let turn = || History::new().turn(1, ALONE, 10, 0, 100);
    assert_eq!(turn().wrote(10, 20, 1, false).violations(), [Violation::RefusedHolder { key: "k".into(), guard: 1 }]);
    // It may have ended meanwhile.
    let report = turn().wrote(90, 110, 1, false).wrote(10, 20, 1, true).report();
    assert_eq!((report.violations, report.accepted, report.refused), (vec![], 1, 1));
}

#[test]
fn a_holder_may_be_refused_for_its_own_greater_token_alone() {
    let history = |holder: &str| {
        let history = History::new().attempt_as(0, 1, ALONE, "user").granted(10, 1, 10).attempt_as(0, 2, ALONE, holder);
        history.granted(20, 2, 11).held(30, 31, 2).ending(32, 2).wrote(50, 60, 1, false).held(100, 101, 1)
    };
    assert_eq!(history("user").violations(), []);
    assert!(history("other").violations().contains(&Violation::RefusedHolder { key: "k".into(), guard: 1 }));
}

#[test]
fn a_register_that_accepts_a_stale_write_is_found() {
    let accepted = |tokens: [(&str, u64); 4]| {
        let tokens: Vec<_> = tokens.into_iter().map(|(key, token)| (key.to_owned(), token)).collect();
        check([], &tokens, &run()).violations
    };
    assert_eq!(accepted([("a", 5), ("b", 3), ("a", 5), ("a", 6)]), []);
    assert_eq!(
        accepted([("a", 5), ("b", 3), ("a", 6), ("a", 5)]),
        [Violation::Stale { key: "a".into(), tokens: (6, 5) }]
    );
}

#[test]
fn a_request_without_an_answer_is_found_unless_its_worker_was_killed() {
    let found = History::new().attempt(0, 1).violations();
    assert_eq!(found, [Violation::Unserved { guard: 1 }]);
    assert_eq!(History::new().attempt(0, 7 * GUARDS_PER_WORKER).violations(), []);
}

#[test]
fn whoever_waits_too_long_after_the_last_fault_is_found() {
    let history =
        |at, answered| History::new().attempt(at, 1).granted(answered, 1, 10).held(answered + 1, answered + 2, 1);
    assert_eq!(history(0, 11_000).violations(), []);
    assert_eq!(history(10_500, 11_500).violations(), []);
    assert_eq!(history(0, 11_001).violations(), [Violation::Unserved { guard: 1 }]);
    assert_eq!(history(10_500, 11_501).violations(), [Violation::Unserved { guard: 1 }]);
}

#[test]
fn whoever_waits_without_limit_and_gets_an_error_is_found() {
    let failed = Event::Failed { at: 10, guard: 1, reason: "no answer".to_owned() };
    let found = History::new().attempt(0, 1).event(failed).violations();
    assert_eq!(found, [Violation::Unserved { guard: 1 }]);
}

#[test]
fn a_history_without_sense_is_found() {
    assert!(matches!(History::new().granted(1, 1, 10).violations()[..], [Violation::Broken(_)]));
}

#[test]
fn grants_after_an_expiry_or_a_death_are_counted() {
    let history = History::new().attempt(0, 1).granted(1, 1, 10).held(100, 101, 1).lost(300, 1, "Expired", 200);
    let died = 7 * GUARDS_PER_WORKER;
    let history = history.attempt(250, died).granted(260, died, 11).held(280, 281, died);
    let report = history.turn(2, ALONE, 12, 1_300, 1_400).turn(3, ALONE, 13, 1_500, 1_600).report();
    assert_eq!((report.violations, report.after_expiry, report.waited_for_expiry), (vec![], 2, 0));
}

#[test]
fn a_request_that_had_waited_for_an_expiry_is_counted_as_such() {
    let history = |asked| {
        let history = History::new().attempt(0, 1).granted(1, 1, 10).held(100, 101, 1).lost(300, 1, "Expired", 200);
        history.attempt(asked, 2).granted(250, 2, 11).held(260, 261, 2).ending(262, 2).report()
    };
    assert_eq!((history(199).after_expiry, history(199).waited_for_expiry), (1, 1));
    assert_eq!((history(200).after_expiry, history(200).waited_for_expiry), (1, 0));
}

#[test]
fn what_the_server_has_ended_or_a_holder_has_released_is_no_expiry() {
    let ended = |loss| {
        let history = History::new().attempt(0, 1).granted(1, 1, 10).held(100, 101, 1).lost(300, 1, loss, 200);
        history.turn(2, ALONE, 12, 400, 500).report().after_expiry
    };
    assert_eq!((ended("Expired"), ended("Missing"), ended("Taken")), (1, 0, 0));
    assert_eq!(History::new().turn(1, ALONE, 10, 0, 100).turn(2, ALONE, 11, 110, 200).report().after_expiry, 0);
}

#[test]
fn a_lease_that_was_left_has_expired_if_nobody_else_had_it_and_its_time_was_over() {
    let left = |taken: bool, next| {
        let history = History::new().attempt_as(0, 1, ALONE, "1").granted(1, 1, 10).held(100, 101, 1);
        let mut history = history.event(Event::Ending { at: 102, guard: 1, how: LEFT.to_owned() });
        if taken {
            history = history.attempt_as(103, 2, ALONE, "1").granted(104, 2, 10).held(110, 111, 2).ending(112, 2);
        }
        history.turn(3, ALONE, 12, next, next + 100).report().after_expiry
    };
    // Its deadline is 1101.
    assert_eq!((left(false, 1_100), left(false, 1_000), left(true, 1_200)), (1, 0, 0));
}

#[tokio::test]
async fn instants_are_the_same_on_both_clocks_also_long_ago() {
    use tokio::time::Instant;

    let file = tempfile::NamedTempFile::new().unwrap();
    let recorder = Recorder::create(file.path());
    let (before, instant, after) = (now(), Instant::now(), now());
    assert!(recorder.nanos(instant) <= after);
    assert!(recorder.nanos(instant) + 1_000_000 >= before);
    let minute = 60_000_000_000;
    let long_ago = instant - Duration::from_secs(60);
    assert_eq!(recorder.nanos(long_ago), recorder.nanos(instant) - minute);
    assert_eq!(recorder.nanos(instant + Duration::from_secs(60)), recorder.nanos(instant) + minute);
}

#[test]
fn a_history_is_read_as_it_was_written_without_a_torn_line() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let recorder = Recorder::create(file.path());
    let events = History::new().turn(1, Mode::Permit { limit: 3 }, 10, 0, 100).wrote(1, 2, 1, true).events;
    events.iter().for_each(|event| recorder.write(event));
    assert_eq!(read(file.path()), events);
    let text = std::fs::read_to_string(file.path()).unwrap();
    std::fs::write(file.path(), &text[..text.len() - 5]).unwrap();
    assert_eq!(read(file.path()), events[..events.len() - 1]);
}
