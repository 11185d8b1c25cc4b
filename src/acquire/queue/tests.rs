//! The queue by itself: who is next, and what becomes of a hand-over.

use std::time::Duration;

use tokio::time::{advance, timeout};
use tokio_util::task::TaskTracker;

use super::*;
use crate::hold::Grant;
use crate::locker::cleanups::{Cleanup, Cleanups};
use crate::mode::Mode;
use crate::{Error, Token};

pub(super) fn wanted(queueing: Queueing) -> Arc<Wanted> {
    wanted_for(queueing, Mode::Exclusive)
}

fn wanted_for(queueing: Queueing, mode: Mode) -> Arc<Wanted> {
    let owned = Owned { keys: Box::new([Key::from("k")]), token: Token::random(), own_token: true, grant: None, mode };
    let ttl = Duration::from_secs(1);
    let (metadata, latest) = (Box::default(), Arc::default());
    let since = Instant::now();
    Arc::new(Wanted { owned, metadata, ttl, fenced: false, queueing, takes_over: false, latest, limit: 0, since })
}

pub(super) fn grant() -> Grant {
    Grant::new(Instant::now(), Duration::from_secs(1), None)
}

fn enter(queues: &Queues, queueing: Queueing) -> Ticket {
    queues.enter(Key::from("k"), wanted(queueing))
}

fn token_of(ticket: &Ticket) -> &Token {
    &ticket.waiter.wanted.owned.token
}

#[tokio::test(start_paused = true)]
async fn the_first_to_come_is_the_first_and_the_next_when_it_leaves() {
    let queues = Queues::default();
    let [a, b, c] = [0; 3].map(|_| enter(&queues, Queueing::Shared));
    assert!(a.is_first() && !b.is_first());
    assert!(!b.leave().may_hold && !a.leave().may_hold);
    assert!(c.is_first());
    assert!(!c.leave().may_hold);
    assert!(lock(&queues.by_key).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_is_for_the_first_and_one_at_a_time() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    let from = wanted(Queueing::None).owned.clone();
    let hand_over = queues.next(&from).unwrap();
    assert_eq!(hand_over.wanted().owned.token, a.waiter.wanted.owned.token);
    assert!(queues.next(&from).is_none(), "nobody knows yet how the first one goes");
    assert!(hand_over.granted(grant(), false));
    assert!(queues.next(&from).is_none(), "it has not heard of it yet");
    assert!(matches!(a.take_outcome(), Some(Wakeup::HandedOver(..))));
    assert!(!a.leave().may_hold);
    assert!(b.is_first() && queues.next(&from).is_some());
}

/// Its reply may get lost: then only the waiter knows that there is something to undo.
#[tokio::test(start_paused = true)]
async fn a_waiter_that_leaves_undoes_a_hand_over_until_that_can_no_longer_be_sent() {
    let queues = Queues::default();
    let waiter = enter(&queues, Queueing::Shared);
    let latest = waiter.waiter.wanted.latest.clone();
    let hand_over = queues.next(&wanted(Queueing::None).owned).unwrap();
    assert!(waiter.leave().may_hold);
    assert!(latest.remaining(7).is_some(), "it is about to be sent");
    latest.extend(10);
    assert!(latest.remaining(11).is_some(), "it may be sent again, if the server's clock was not as expected");
    drop(hand_over);
    assert!(latest.remaining(10).is_some() && latest.remaining(11).is_none());
}

/// Two holds of one process may both end, if the server has lost the first of their locks: neither lock may get lost.
#[tokio::test(start_paused = true)]
async fn who_has_claimed_a_lock_is_handed_no_other() {
    let queues = Queues::default();
    let takes_over = Wanted { takes_over: true, ..Wanted::clone(&wanted(Queueing::Shared)) };
    let ticket = queues.enter(Key::from("k"), Arc::new(takes_over));
    let from = wanted(Queueing::None).owned.clone();
    assert!(queues.next(&from).unwrap().granted(grant(), false));
    assert!(matches!(ticket.take_outcome(), Some(Wakeup::HandedOver(..))));
    assert!(matches!(ticket.claim(), Claim::Kept(None)));
    assert!(queues.next(&from).is_none() && queues.next_to_take_over(&from).is_none());
    ticket.give_up_claim();
    queues.next_to_take_over(&from).unwrap().not_tried();
    assert!(matches!(ticket.claim(), Claim::Kept(None)));
    assert!(ticket.take_outcome().is_none());
    assert!(!ticket.leave().may_hold);
}

/// Found by `tests/line_model.rs`.
#[tokio::test(start_paused = true)]
async fn a_hand_over_whose_outcome_comes_late_does_not_take_those_after_it_out_of_the_line() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    a.enters_line();
    let late = queues.next(&wanted(Queueing::None).owned).unwrap();
    // It has the lock by asking, before the release learns that it has handed the lock over.
    assert!(matches!(a.claim(), Claim::Kept(None)));
    let (at, obtained) = (Instant::now(), |at| Obtained { at, held_until: at, by: By::Asking(Place::TakenOut) });
    a.pass_on(None, obtained(at), token_of(&a));
    a.leave();
    assert!(!b.may_be_in_line());
    b.enters_line();
    assert!(late.granted(grant(), false));
    assert!(b.may_be_in_line());
}

/// Found by `tests/line_model.rs`.
#[tokio::test(start_paused = true)]
async fn a_hand_over_that_a_waiter_learns_of_by_asking_is_a_turn_in_a_row() {
    let queues = Queues::default();
    let from = wanted(Queueing::None).owned.clone();
    let tickets: Vec<_> = (0..=IN_A_ROW).map(|_| enter(&queues, Queueing::Shared)).collect();
    let mut may_keep = Vec::new();
    for ticket in tickets {
        let hand_over = queues.next(&from).unwrap();
        may_keep.push(hand_over.next().may_keep);
        ticket.claim();
        let at = Instant::now();
        ticket.pass_on(None, Obtained { at, held_until: at, by: By::Asking(Place::TakenOut) }, token_of(&ticket));
        ticket.leave();
        assert!(hand_over.granted(grant(), false));
    }
    assert_eq!(may_keep.iter().filter(|may_keep| **may_keep).count(), IN_A_ROW as usize);
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_to_another_process_that_is_heard_of_late_begins_no_turn_here() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    let from = wanted(Queueing::None).owned.clone();
    let late = queues.next(&from).unwrap();
    // The other process has had its turn, and it is the turn of this one again.
    a.claim();
    let at = Instant::now();
    a.pass_on(None, Obtained { at, held_until: at, by: By::Asking(Place::TakenOut) }, token_of(&a));
    a.leave();
    let next = queues.next(&from).unwrap();
    let queue = lock(&queues.by_key)[&Key::from("k")].clone();
    let in_a_row = lock(&queue.state).in_a_row;
    assert!(late.passed_by().is_none());
    assert_eq!(lock(&queue.state).in_a_row, in_a_row);
    next.not_ours();
    b.leave();
}

/// Found by `tests/line_model.rs`.
#[tokio::test(start_paused = true)]
async fn a_request_without_the_place_takes_none_out_of_the_line() {
    let queues = Queues::default();
    let ticket = enter(&queues, Queueing::Shared);
    assert!(queues.next(&wanted(Queueing::None).owned).unwrap().passed_by().is_none());
    ticket.claim();
    let at = Instant::now();
    ticket.pass_on(None, Obtained { at, held_until: at, by: By::Asking(Place::Untouched) }, token_of(&ticket));
    assert!(ticket.leave().line.is_some());
}

/// Found by `tests/line_model.rs`.
#[tokio::test(start_paused = true)]
async fn a_hand_over_that_entered_a_place_that_nobody_has_any_longer_says_so() {
    let from = wanted(Queueing::None).owned.clone();
    for queueing in [Queueing::Shared, Queueing::Own] {
        let queues = Queues::default();
        let [gone, served] = [0; 2].map(|_| enter(&queues, queueing));
        let [late, later] = [&gone, &served].map(|ticket| {
            let hand_over = queues.next(&from).unwrap();
            assert_eq!(hand_over.next().place, ticket.line_place());
            ticket.claim();
            ticket.leave();
            hand_over
        });
        assert_eq!(late.passed_by(), Some(gone.line_place()), "{queueing:?}");
        assert_eq!(later.passed_by(), Some(served.line_place()), "{queueing:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_leaves_while_the_lock_is_on_its_way_may_have_got_it() {
    let from = wanted(Queueing::None).owned.clone();
    let (asked, given, lost, refused) = (0, 1, 2, 3);
    for what in [asked, given, lost, refused] {
        let queues = Queues::default();
        let ticket = enter(&queues, Queueing::Shared);
        let hand_over = queues.next(&from).unwrap();
        let mut pending = None;
        match what {
            0 => pending = Some(hand_over),
            1 => assert!(hand_over.granted(grant(), false)),
            2 => drop(hand_over),
            _ => hand_over.not_ours(),
        }
        assert_eq!(ticket.leave().may_hold, what != refused, "{what}");
        drop(pending);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hand_over_that_went_wrong_unheard_is_not_forgotten_for_the_next() {
    let queues = Queues::default();
    let ticket = enter(&queues, Queueing::Shared);
    let from = wanted(Queueing::None).owned.clone();
    drop(queues.next(&from));
    assert!(queues.next(&from).is_none());
    assert!(matches!(ticket.take_outcome(), Some(Wakeup::Unknown(_))));
    assert!(queues.next(&from).is_some());
}

#[tokio::test(start_paused = true)]
async fn hand_overs_go_on_for_many_in_a_row_and_then_while_nobody_else_is_in_the_line() {
    let queues = Queues::default();
    let ticket = enter(&queues, Queueing::Shared);
    let from = wanted(Queueing::None).owned.clone();
    for _ in 0..IN_A_ROW {
        let hand_over = queues.next(&from).unwrap();
        assert!(hand_over.next().may_keep);
        assert!(hand_over.granted(grant(), false));
        assert!(matches!(ticket.take_outcome(), Some(Wakeup::HandedOver(..))));
    }
    let hand_over = queues.next(&from).unwrap();
    assert!(!hand_over.next().may_keep);
    assert!(hand_over.granted(grant(), true));
    assert!(matches!(ticket.take_outcome(), Some(Wakeup::HandedOver(..))));
    assert!(queues.next(&from).unwrap().next().may_keep);
}

#[tokio::test(start_paused = true)]
async fn hand_overs_of_locks_that_are_held_for_long_go_on_for_a_time_only() {
    let queues = Queues::default();
    let ticket = enter(&queues, Queueing::Shared);
    let from = wanted(Queueing::None).owned.clone();
    for may_keep in [true, false] {
        let hand_over = queues.next(&from).unwrap();
        assert_eq!(hand_over.next().may_keep, may_keep);
        assert!(hand_over.granted(grant(), false));
        assert!(matches!(ticket.take_outcome(), Some(Wakeup::HandedOver(..))));
        advance(TURN).await;
    }
}

#[tokio::test(start_paused = true)]
async fn those_who_share_a_place_keep_it_until_the_last_has_left_and_others_have_their_own() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    let [c, d] = [0; 2].map(|_| enter(&queues, Queueing::Own));
    let shared = a.line_place();
    assert!(shared == b.line_place() && c.line_place() != d.line_place() && c.line_place() != shared);
    assert!(a.is_first() && c.is_first() && !b.is_first() && !d.is_first());
    a.enters_line();
    assert_eq!(a.leave().line, None);
    assert_eq!(b.leave().line, Some(shared));
    let next = enter(&queues, Queueing::Shared);
    assert!(next.line_place() != shared, "what is late about the one before is not about this one");
    assert_eq!(next.leave().line, None, "it was never in the line");
    assert!(c.leave().line.is_some());
}

#[tokio::test(start_paused = true)]
async fn one_that_was_passed_by_is_in_the_line_and_the_others_have_to_ask() {
    let queues = Queues::default();
    let shared = enter(&queues, Queueing::Shared);
    let own = enter(&queues, Queueing::Own);
    let from = wanted(Queueing::None).owned.clone();
    for _ in 0..IN_A_ROW {
        assert!(queues.next(&from).unwrap().granted(grant(), false));
        assert!(matches!(shared.take_outcome(), Some(Wakeup::HandedOver(..))));
    }
    let hand_over = queues.next(&from).unwrap();
    assert_eq!(hand_over.next().place, own.line_place());
    assert!(hand_over.passed_by().is_none());
    assert!(own.next_heartbeat().is_some() && own.take_outcome().is_none());
    assert!(matches!(shared.take_outcome(), Some(Wakeup::NotHandedOver)));
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_polled_goes_behind_those_who_wait_with_it() {
    let queues = Queues::default();
    let parked = enter(&queues, Queueing::Shared);
    parked.expect(Instant::now() + HEARTBEAT);
    assert!(queues.find_abandoned(Instant::now()).is_none(), "nobody waits behind it");
    let other = enter(&queues, Queueing::Shared);
    advance(HEARTBEAT + LATE - Duration::from_millis(1)).await;
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(parked.is_first());
    advance(Duration::from_millis(1)).await;
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(other.is_first() && !parked.is_first());
    assert!(matches!(timeout(Duration::ZERO, other.until_first()).await, Ok(Wakeup::First)));
    // It is expected from now on, and comes.
    other.expect(Instant::now() + HEARTBEAT);
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(other.is_first());
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_not_polled_while_it_hands_over_keeps_nobody_waiting() {
    let queues = Queues::default();
    let ticket = enter(&queues, Queueing::Shared);
    let cleanups = Cleanups::new(TaskTracker::new());
    let parked = queues.next(&wanted(Queueing::None).owned).unwrap();
    parked.send(cleanups.register(Cleanup::Undo(ticket.waiter.wanted.clone())), Instant::now());
    advance(LATE - Duration::from_millis(1)).await;
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(ticket.take_outcome().is_none());
    advance(Duration::from_millis(1)).await;
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(matches!(ticket.take_outcome(), Some(Wakeup::Unknown(Some(_)))));
    // It has asked by itself meanwhile: what the release learns in the end changes nothing.
    assert!(parked.granted(grant(), false));
    assert!(ticket.take_outcome().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_is_not_taken_is_taken_back() {
    let queues = Queues::default();
    let [parked, other] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    let from = wanted(Queueing::None).owned.clone();
    assert!(queues.next(&from).unwrap().granted(grant(), false));
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    advance(TAKEN_WITHIN).await;
    let taken_back = queues.find_abandoned(Instant::now()).unwrap();
    assert_eq!(taken_back[0].wanted.owned.token, parked.waiter.wanted.owned.token);
    assert!(other.is_first());
    assert!(matches!(parked.take_outcome(), Some(Wakeup::TakenBack)));
    assert!(!parked.leave().may_hold, "it is released already");
    assert!(other.is_first() && !other.leave().may_hold);
    assert!(lock(&queues.by_key).is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_the_first_learned_is_known_to_those_behind_it_and_after_it() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    assert!(b.last_answer().is_none());
    a.set_last_answer(Some(LastAnswer::Failed(Error::Closed)));
    assert!(!a.leave().may_hold);
    assert!(matches!(b.last_answer(), Some(LastAnswer::Failed(Error::Closed))));
    let c = enter(&queues, Queueing::Shared);
    b.pass_on(None, Obtained { at: Instant::now(), held_until: Instant::now(), by: By::HandOver }, token_of(&b));
    assert!(matches!(c.last_answer(), Some(LastAnswer::Held(Held { key, .. })) if key == "k".into()));
    c.set_last_answer(None);
    assert!(c.last_answer().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_answer_ends_with_the_lock_that_it_is_about_and_with_no_other() {
    let queues = Queues::default();
    let [a, b] = [0; 2].map(|_| enter(&queues, Queueing::Shared));
    let now = Instant::now();
    let held_until = now + Duration::from_secs(1);
    a.pass_on(None, Obtained { at: now, held_until, by: By::HandOver }, token_of(&a));
    assert!(!a.leave().may_hold);
    let until = || match b.last_answer() {
        Some(LastAnswer::Held(Held { until, .. })) => until.unwrap(),
        other => panic!("{other:?}"),
    };
    // One that was held before is only released now.
    queues.next(&wanted(Queueing::None).owned).unwrap().not_tried();
    assert_eq!(until(), held_until);
    queues.next(&a.waiter.wanted.owned).unwrap().not_tried();
    assert!(until() < held_until);
}

#[tokio::test(start_paused = true)]
async fn a_token_from_elsewhere_is_handed_nothing() {
    let queues = Queues::default();
    let mut wanted = Wanted::clone(&wanted(Queueing::None));
    wanted.owned.own_token = false;
    let _ticket = queues.enter(Key::from("k"), Arc::new(wanted.clone()));
    assert!(queues.next(&wanted.owned).is_none());
}

fn reader(queues: &Queues) -> Ticket {
    queues.enter("k".into(), wanted_for(Queueing::Shared, Mode::Read))
}

/// Ends the turn of the first waiter as a grant that it has asked for does.
fn is_granted(ticket: &Ticket, place: Place) {
    let at = Instant::now();
    assert!(matches!(ticket.claim(), Claim::Kept(None)));
    ticket.pass_on(None, Obtained { at, held_until: at, by: By::Asking(place) }, token_of(ticket));
    ticket.leave();
}

#[tokio::test(start_paused = true)]
async fn readers_keep_the_place_for_each_other_for_as_many_turns_as_hand_overs_have() {
    for pause in [Duration::ZERO, TURN / 3] {
        let queues = Queues::default();
        let readers: Vec<_> = (0..40).map(|_| reader(&queues)).collect();
        let mut kept = Vec::new();
        for ticket in &readers {
            ticket.enters_line();
            let keeps = ticket.keeps_place();
            kept.push(keeps);
            is_granted(ticket, if keeps { Place::Kept } else { Place::TakenOut });
            advance(pause).await;
        }
        let in_a_row = if pause.is_zero() { IN_A_ROW as usize } else { 4 };
        assert!(kept[..in_a_row].iter().all(|kept| *kept) && !kept[in_a_row], "{kept:?}");
        // The next turn begins with a new place at the end of the line.
        assert!(kept[in_a_row + 1] && !kept[39], "{kept:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_place_is_kept_for_no_writer_and_by_none() {
    let queues = Queues::default();
    let (first, second) = (reader(&queues), reader(&queues));
    let (writer, last) = (enter(&queues, Queueing::Shared), reader(&queues));
    assert!(first.keeps_place());
    is_granted(&first, Place::Kept);
    assert!(!second.keeps_place());
    is_granted(&second, Place::TakenOut);
    assert!(!writer.keeps_place() && !last.keeps_place());
}

#[tokio::test(start_paused = true)]
async fn a_place_is_kept_for_no_reader_that_is_not_polled() {
    let queues = Queues::default();
    let (parked, next) = (reader(&queues), reader(&queues));
    parked.expect(Instant::now());
    advance(LATE).await;
    assert_eq!(queues.find_abandoned(Instant::now()).unwrap().len(), 0);
    assert!(next.is_first() && !next.keeps_place());
    // Nor does it keep those behind it from keeping the place for each other.
    is_granted(&next, Place::TakenOut);
    parked.expect(Instant::now());
    let _behind = reader(&queues);
    assert!(parked.is_first() && parked.keeps_place());
}

#[tokio::test(start_paused = true)]
async fn a_kept_place_is_left_with_the_last_who_waits() {
    let queues = Queues::default();
    let (first, second) = (reader(&queues), reader(&queues));
    first.enters_line();
    is_granted(&first, Place::Kept);
    assert!(second.may_be_in_line());
    assert_eq!(second.leave().line, Some(second.line_place()));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_handed_over_to_who_shares_the_key_nor_by_them() {
    let queues = Queues::default();
    let ticket = reader(&queues);
    assert!(queues.next(&wanted(Queueing::None).owned).is_none());
    ticket.leave();
    let writer = enter(&queues, Queueing::Shared);
    assert!(queues.next(&wanted_for(Queueing::None, Mode::Read).owned).is_none());
    // After a downgrade it has to ask, as nobody will hand the lock over to it.
    queues.ask_again(&"k".into());
    assert!(matches!(writer.take_outcome(), Some(Wakeup::NotHandedOver)));
}

#[tokio::test(start_paused = true)]
async fn waiters_that_are_not_polled_do_not_count() {
    let queues = Queues::default();
    let has_waiters = || queues.has_waiters(&"k".into());
    assert!(!has_waiters());
    let one = enter(&queues, Queueing::Shared);
    one.expect(Instant::now() + HEARTBEAT);
    assert!(has_waiters());
    advance(HEARTBEAT + LATE).await;
    assert!(!has_waiters());
    let other = enter(&queues, Queueing::Shared);
    assert!(has_waiters());
    // Each of them is found out when it is the first.
    for _ in 0..2 {
        queues.find_abandoned(Instant::now());
        assert!(has_waiters() == one.is_first() || has_waiters() == other.is_first());
        advance(LATE).await;
    }
    queues.find_abandoned(Instant::now());
    assert!(!has_waiters());
    let first = if one.is_first() { &one } else { &other };
    first.expect(Instant::now() + HEARTBEAT);
    assert!(has_waiters());
    one.leave();
    other.leave();
    assert!(!has_waiters());
    assert_eq!(queues.queues().count(), 0);
}
