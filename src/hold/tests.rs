//! Deadlines, losses and final steps of a hold, under paused time.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Wake, Waker};

use tokio::time::advance;

use super::suspension::suspend;
use super::timing::Renewal;
use super::*;
use crate::mode::Mode;
use crate::{Key, Token};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Held for 1,000 ms from now, as its drift is none.
fn hold() -> Hold {
    of(&["k"])
}

fn of(keys: &[&'static str]) -> Hold {
    from(keys, &Grant::new(Instant::now(), ms(1_000), None))
}

fn from(keys: &[&'static str], grant: &Grant) -> Hold {
    let keys = keys.iter().copied().map(Key::from).collect();
    let owned = Owned { keys, token: Token::random(), own_token: true, grant: None, mode: Mode::Exclusive };
    let drift = Drift { factor: 0.0, margin: Duration::ZERO };
    Hold::new(owned, Box::default(), grant, drift, Renewal::Third.into(), Instant::now(), false)
}

#[tokio::test(start_paused = true)]
async fn held_until_the_deadline_and_not_at_it() {
    let hold = hold();
    advance(ms(999)).await;
    assert_eq!(hold.check(), Ok(()));
    advance(ms(1)).await;
    assert_eq!(hold.check(), Err(Loss::Expired));
}

#[tokio::test(start_paused = true)]
async fn a_confirmation_counts_from_its_send() {
    let hold = hold();
    advance(ms(300)).await;
    let renewing = hold.renewing(None, Duration::ZERO);
    advance(ms(600)).await;
    hold.renewed(renewing).unwrap();
    assert_eq!(hold.deadline(), renewing.sent + ms(1_000));
}

#[tokio::test(start_paused = true)]
async fn a_confirmation_after_the_deadline_revives_nothing() {
    let hold = hold();
    let renewing = hold.renewing(None, Duration::ZERO);
    advance(ms(1_000)).await;
    assert_eq!(hold.renewed(renewing), Err(Loss::Expired));
    assert!(hold.over().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn the_first_reason_stays() {
    let hold = hold();
    assert_eq!(hold.end(Loss::Taken), Loss::Taken);
    assert_eq!(hold.end(Loss::Missing), Loss::Taken);
    advance(ms(5_000)).await;
    assert_eq!(hold.check(), Err(Loss::Taken));
}

#[tokio::test(start_paused = true)]
async fn a_passed_deadline_goes_before_any_reason() {
    let hold = hold();
    advance(ms(1_000)).await;
    assert_eq!(hold.check(), Err(Loss::Expired));
    assert_eq!(hold.end(Loss::Released), Loss::Expired);
}

#[tokio::test(start_paused = true)]
async fn a_shorter_ttl_counts_from_its_send_and_outdates_what_was_sent_before() {
    let hold = hold();
    let before = hold.renewing(None, Duration::ZERO);
    advance(ms(100)).await;
    let shorter = hold.setting_ttl(ms(200), ms(500));
    assert_eq!(hold.deadline(), shorter.sent + ms(200), "before any answer");
    hold.renewed(shorter).unwrap();
    hold.renewed(before).unwrap();
    assert_eq!(hold.deadline(), shorter.sent + ms(200), "the older answer counts for nothing");
    advance(ms(50)).await;
    let after = hold.renewing(None, Duration::ZERO);
    hold.renewed(after).unwrap();
    assert_eq!(hold.deadline(), after.sent + ms(200), "later renewals follow the new ttl");
}

#[tokio::test(start_paused = true)]
async fn what_was_sent_before_an_exact_ttl_counts_for_nothing_also_when_another_one_follows() {
    let hold = hold();
    let before = hold.renewing(None, Duration::ZERO);
    advance(ms(100)).await;
    let shorter = hold.setting_ttl(ms(200), ms(500));
    hold.renewed(shorter).unwrap();
    advance(ms(50)).await;
    // The server may have run both of the others, and not this one yet.
    hold.setting_ttl(ms(900), ms(500));
    hold.renewed(before).unwrap();
    assert_eq!(hold.deadline(), shorter.sent + ms(200));
}

#[tokio::test(start_paused = true)]
async fn a_renewal_goes_along_with_others_when_it_is_due_and_the_deadline_is_far() {
    let hold = hold();
    let start = Instant::now();
    let renewing_after = |past, time| hold.renewing_when_due(start + ms(past), ms(time)).map(|renewing| renewing.sent);
    assert_eq!(renewing_after(300, 0), None, "not due");
    assert_eq!(renewing_after(400, 600), Some(start + ms(400)));
    assert_eq!(renewing_after(400, 601), None, "it might end after the deadline");
    assert_eq!(renewing_after(1_000, 0), None, "too late");
    hold.end(Loss::Released);
    assert_eq!(renewing_after(400, 600), None);
}

#[tokio::test(start_paused = true)]
async fn a_longer_ttl_counts_from_its_confirmation() {
    let hold = hold();
    let was = hold.deadline();
    let longer = hold.setting_ttl(ms(9_000), ms(500));
    assert_eq!((hold.deadline(), hold.ttl()), (was, ms(1_000)));
    hold.renewed(longer).unwrap();
    assert_eq!((hold.deadline(), hold.ttl()), (longer.sent + ms(9_000), ms(9_000)));
}

#[tokio::test(start_paused = true)]
async fn while_an_exact_ttl_may_still_be_set_no_confirmation_is_worth_more() {
    let hold = hold();
    hold.setting_ttl(ms(200), ms(600));
    advance(ms(100)).await;
    let longer = hold.setting_ttl(ms(9_000), ms(600));
    hold.renewed(longer).unwrap();
    assert_eq!(hold.deadline(), longer.sent + ms(200), "the first may come after the second");
    assert!(hold.next_duty() < longer.sent + ms(100), "renewed as a lock with this little time is");
    advance(ms(50)).await;
    let renewal = hold.renewing(None, Duration::ZERO);
    hold.renewed(renewal).unwrap();
    assert_eq!(hold.deadline(), renewal.sent + ms(200));
    // At 600 ms the server refuses the first.
    for _ in 0..4 {
        advance(ms(120)).await;
        let renewal = hold.renewing(None, Duration::ZERO);
        hold.renewed(renewal).unwrap();
    }
    assert_eq!(hold.deadline(), Instant::now() + ms(9_000));
}

#[tokio::test(start_paused = true)]
async fn an_exact_ttl_that_was_refused_or_confirmed_limits_nothing() {
    let hold = hold();
    let refused = hold.setting_ttl(ms(500), ms(600));
    hold.was_refused(refused);
    let longer = hold.setting_ttl(ms(9_000), ms(600));
    hold.renewed(longer).unwrap();
    assert_eq!(hold.deadline(), longer.sent + ms(9_000));
    let shorter = hold.setting_ttl(ms(500), ms(600));
    hold.renewed(shorter).unwrap();
    let longer = hold.setting_ttl(ms(9_000), ms(600));
    hold.renewed(longer).unwrap();
    assert_eq!(hold.deadline(), longer.sent + ms(9_000));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_comes_after_that_of_an_exact_ttl_but_was_asked_for_before_is_worth_no_more() {
    let hold = hold();
    let shorter = hold.setting_ttl(ms(200), ms(500));
    let longer = hold.renewing(Some(ms(9_000)), ms(500));
    advance(ms(50)).await;
    hold.renewed(shorter).unwrap();
    // It may have been run before the other.
    hold.renewed(longer).unwrap();
    assert_eq!(hold.deadline(), longer.sent + ms(200));
    advance(ms(1)).await;
    let after = hold.renewing(Some(ms(9_000)), ms(500));
    hold.renewed(after).unwrap();
    assert_eq!(hold.deadline(), after.sent + ms(9_000));
}

#[tokio::test(start_paused = true)]
async fn what_is_left_to_do_is_decided_with_the_loss() {
    for (loss, keys, is_left) in [
        (Loss::Missing, &["k"][..], false),
        (Loss::Taken, &["k"], false),
        (Loss::Missing, &["k", "l"], true),
        (Loss::Taken, &["k", "l"], true),
    ] {
        let hold = of(keys);
        hold.end(loss);
        // As a guard does that is dropped.
        assert_eq!(hold.set_final_step(FinalStep::Release(None)), is_left, "{loss:?} {keys:?}");
    }
    let hold = hold();
    advance(ms(1_000)).await;
    assert_eq!(hold.end(Loss::Missing), Loss::Expired);
    assert!(hold.set_final_step(FinalStep::Nothing), "a late renewal may have to be undone");
}

#[test]
fn the_clock_decides_even_where_no_runtime_runs() {
    let hold = hold();
    assert_eq!(hold.check(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn the_reason_is_there_when_the_token_fires() {
    /// Looks at the hold at the moment when the token wakes it.
    struct Looking {
        hold: Hold,
        seen: Mutex<Option<Result<(), Loss>>>,
    }
    impl Wake for Looking {
        fn wake(self: Arc<Self>) {
            *self.seen.lock().unwrap() = Some(self.hold.check());
        }
    }
    let looking = Arc::new(Looking { hold: hold(), seen: Mutex::default() });
    let waker = Waker::from(looking.clone());
    let mut over = pin!(looking.hold.over().cancelled_owned());
    assert!(over.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    looking.hold.end(Loss::Missing);
    assert_eq!(*looking.seen.lock().unwrap(), Some(Err(Loss::Missing)));
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_sleeps_with_its_machine_is_over_when_that_wakes() {
    let hold = hold();
    advance(ms(1)).await;
    suspend(ms(998));
    assert_eq!(hold.check(), Ok(()));
    assert_eq!(hold.deadline(), Instant::now() + ms(1));
    suspend(ms(500));
    assert_eq!(hold.check(), Err(Loss::Expired));
    assert!(hold.over().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_renewal_counts_from_its_send_across_a_suspension() {
    let hold = hold();
    advance(ms(100)).await;
    let renewing = hold.renewing(None, Duration::ZERO);
    suspend(ms(600));
    advance(ms(1)).await;
    hold.renewed(renewing).unwrap();
    assert_eq!(hold.deadline(), renewing.sent + ms(400));
    advance(ms(1)).await;
    let renewing = hold.renewing(None, Duration::ZERO);
    hold.renewed(renewing).unwrap();
    assert_eq!(hold.deadline(), Instant::now() + ms(1_000));
}

/// A confirmation that leaves the deadline where it is doesn't hide that the machine was suspended since that was set.
#[tokio::test(start_paused = true)]
async fn a_deadline_is_earlier_by_a_suspension_whatever_is_confirmed_after_it() {
    let hold = hold();
    let renewing = hold.setting_ttl(ms(60_000), Duration::ZERO);
    hold.renewed(renewing).unwrap();
    advance(ms(1)).await;
    suspend(ms(50_000));
    let renewing = hold.renewing(Some(ms(1_000)), Duration::ZERO);
    hold.renewed(renewing).unwrap();
    assert_eq!(hold.deadline(), Instant::now() + ms(9_999));
}

#[tokio::test(start_paused = true)]
async fn a_lock_that_was_requested_before_a_suspension_counts_from_then() {
    let grant = Grant::new(Instant::now(), ms(1_000), None);
    suspend(ms(700));
    assert_eq!(from(&["k"], &grant).deadline(), Instant::now() + ms(300));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_the_loss_is_told_when_a_suspension_is_found() {
    let hold = Arc::new(hold());
    let lost = tokio::spawn(crate::loss::Lost::new(hold.clone()));
    advance(ms(1)).await;
    suspend(ms(5_000));
    let start = Instant::now();
    assert!(hold.check().is_err());
    assert_eq!(lost.await.unwrap(), Loss::Expired);
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_a_hold_counts_while_the_machine_is_suspended() {
    let owned = Owned {
        keys: [Key::from("k")].into(),
        token: Token::random(),
        own_token: true,
        grant: None,
        mode: Mode::Exclusive,
    };
    let bounds = Bounds { at_most: Some(ms(10_000)), ..Bounds::default() };
    let grant = Grant::new(Instant::now(), ms(60_000), None);
    let terms = Terms { bounds, ..Renewal::Third.into() };
    let hold = Hold::new(owned, Box::default(), &grant, Drift::default(), terms, Instant::now(), false);
    suspend(ms(9_000));
    assert_eq!(hold.check(), Ok(()));
    advance(ms(1_000)).await;
    assert_eq!(hold.check(), Err(Loss::LimitReached));
}
