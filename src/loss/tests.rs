//! A loss is reported on whatever runtime a future waits for it.

use std::future::{Future, pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, advance, timeout};

use super::*;
use crate::{LockGuard, Locker};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Returns a guard of a runtime that nobody drives from then on.
fn guard_of(idle: &Runtime, ttl: Duration) -> LockGuard {
    idle.block_on(Locker::in_memory().lock("k").ttl(ttl).into_future()).unwrap()
}

/// Waits in a task of that runtime, where only its own wake-up polls the future again. The limit is generous: a future
/// that is not woken at the deadline is never woken.
fn loss_on(runtime: &Runtime, loss: impl Future<Output = Loss> + Send + 'static) -> Loss {
    runtime.block_on(async { timeout(Duration::from_secs(20), tokio::spawn(loss)).await.expect("not woken").unwrap() })
}

#[test]
fn a_loss_is_reported_while_nobody_drives_the_runtime_of_the_guard() {
    let (idle, other) = (runtime(), runtime());
    let guard = guard_of(&idle, ms(100));
    let over = guard.cancellation_token();
    assert_eq!(loss_on(&other, guard.lost()), Loss::Expired);
    assert!(Instant::now() >= guard.deadline());
    assert!(over.is_cancelled(), "the future that finds the loss fires the token");
}

#[test]
fn protected_work_ends_while_nobody_drives_the_runtime_of_the_guard() {
    let (idle, other) = (runtime(), runtime());
    let guard = guard_of(&idle, ms(100));
    let endless = guard.protect(pending::<()>());
    assert_eq!(loss_on(&other, async { endless.await.unwrap_err() }), Loss::Expired);
}

#[test]
fn a_loss_is_reported_while_the_runtime_of_the_guard_is_blocked() {
    let (blocked, other) = (runtime(), runtime());
    let (loss, reported) = std::sync::mpsc::channel();
    blocked.block_on(async {
        let guard = Locker::in_memory().lock("k").ttl(ms(100)).await.unwrap();
        let lost = guard.lost();
        let waiter = std::thread::spawn(move || loss.send(other.block_on(lost)));
        // The only thread of this runtime.
        assert_eq!(reported.recv_timeout(Duration::from_secs(20)), Ok(Loss::Expired));
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn a_future_that_moves_to_another_runtime_is_woken_there() {
    let (idle, left, other) = (runtime(), runtime(), runtime());
    let guard = guard_of(&idle, ms(300));
    let mut lost = Box::pin(guard.lost());
    left.block_on(async { assert!(timeout(ms(1), &mut lost).await.is_err()) });
    // Its timers end with it.
    drop(left);
    assert_eq!(loss_on(&other, lost), Loss::Expired);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_that_moves_is_followed() {
    let guard = Locker::in_memory().lock("k").ttl(ms(10_000)).no_renewal().await.unwrap();
    let lost = tokio::spawn(guard.lost());
    for _ in 0..3 {
        advance(ms(9_000)).await;
        guard.renew().await.unwrap();
    }
    let deadline = guard.deadline();
    assert_eq!(lost.await.unwrap(), Loss::Expired);
    let late = Instant::now() - deadline;
    assert!(late <= ms(1), "{late:?}");
}

#[test]
fn a_deadline_that_moves_closer_is_followed_without_the_renewer() {
    let (idle, other) = (runtime(), runtime());
    let guard = guard_of(&idle, Duration::from_secs(3_600));
    let lost = guard.lost();
    other.block_on(async {
        let lost = tokio::spawn(lost);
        tokio::task::yield_now().await;
        guard.renew_for(ms(100)).await.unwrap();
        assert_eq!(timeout(Duration::from_secs(20), lost).await.expect("not woken").unwrap(), Loss::Expired);
    });
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn outside_a_runtime_the_end_of_the_guard_wakes_the_futures() {
    let idle = runtime();
    let guard = guard_of(&idle, Duration::from_secs(30));
    let (mut lost, mut endless) = (pin!(guard.lost()), pin!(guard.protect(pending::<()>())));
    let woken = Arc::new(Woken(AtomicBool::new(false)));
    let waker = Waker::from(woken.clone());
    let mut cx = Context::from_waker(&waker);
    assert!(lost.as_mut().poll(&mut cx).is_pending() && endless.as_mut().poll(&mut cx).is_pending());
    assert!(!woken.0.load(Ordering::SeqCst));
    drop(guard);
    assert!(woken.0.load(Ordering::SeqCst));
    assert_eq!(lost.poll(&mut cx), Poll::Ready(Loss::Released));
    assert_eq!(endless.poll(&mut cx), Poll::Ready(Err(Loss::Released)));
}

#[test]
fn a_runtime_without_timers_is_no_reason_to_panic() {
    let idle = runtime();
    let guard = guard_of(&idle, Duration::from_secs(30));
    let without = Builder::new_current_thread().build().unwrap();
    let mut lost = Box::pin(guard.lost());
    assert!(without.block_on(poll_fn(|cx| Poll::Ready(lost.as_mut().poll(cx).is_pending()))));
    drop(guard);
    assert_eq!(without.block_on(lost), Loss::Released);
}

#[tokio::test(start_paused = true)]
async fn work_that_is_never_pending_needs_no_timer() {
    let guard = Locker::in_memory().lock("k").await.unwrap();
    let mut work = Box::pin(guard.protect(async { 42 }));
    let answer = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
    assert_eq!(answer, Poll::Ready(Ok(42)));
    assert!(work.lost.timer.sleep.is_none());
}
