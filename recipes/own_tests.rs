//! How to test code that uses locks: on the embedded store, under time that is paused, and with a locker that many
//! tests share.
//!
//!     cargo test -p tenure-recipes --example own_tests
//!
//! `send_reports` stands for your code. It takes a `&Locker`, so its tests decide where the locks are.

use std::time::Duration;

use tenure::{Error, Locker};

/// Sends tonight's reports, for ten minutes at most. Returns whether it was this process that did.
async fn send_reports(locker: &Locker, send: impl Future<Output = ()>) -> Result<bool, Error> {
    let at_most = Duration::from_secs(600);
    match locker.try_lock("reports").hold_at_most(at_most).hold_at_least(at_most).await {
        Ok(guard) => {
            guard.protect(send).await?;
            guard.release().await?;
            Ok(true)
        }
        Err(Error::NotObtained { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locker = Locker::in_memory();
    for _ in 0..2 {
        let sent = send_reports(&locker, async { println!("sending") }).await?;
        println!("sent: {sent}");
    }
    Ok(())
}

/// On the embedded store, under paused time: no server, no waiting, and every time is exact. Each test has a locker of
/// its own, as the embedded store goes by the clock of the test's runtime.
#[cfg(test)]
mod without_a_server {
    use tenure::Loss;
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_second_run_in_the_same_night_sends_nothing() {
        let locker = Locker::in_memory();
        assert!(send_reports(&locker, async {}).await.unwrap());
        sleep(Duration::from_secs(599)).await;
        assert!(!send_reports(&locker, async { unreachable!() }).await.unwrap());
        // This is over in a millisecond, too.
        sleep(Duration::from_secs(24 * 3600)).await;
        assert!(send_reports(&locker, async {}).await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_mail_server_that_hangs_is_given_up_after_ten_minutes() {
        let (locker, start) = (Locker::in_memory(), Instant::now());
        let sent = send_reports(&locker, std::future::pending()).await;
        assert!(matches!(sent, Err(Error::Lost(Loss::LimitReached))), "{sent:?}");
        // A guard ends before its limit, by the allowance for clock drift: at most 1 % of its ttl and 2 ms.
        let early = Duration::from_secs(600) - start.elapsed();
        assert!(early <= Duration::from_millis(302), "{early:?}");
    }
}

/// One locker for all tests of a program. Each `#[tokio::test]` has a runtime of its own, and a locker may be used on
/// all of them. With `REDIS_URL` set, it is on that server.
#[cfg(test)]
mod with_a_shared_locker {
    use tokio::sync::OnceCell;

    use super::*;

    async fn locker() -> &'static Locker {
        static LOCKER: OnceCell<Locker> = OnceCell::const_new();
        let connect = async || match std::env::var("REDIS_URL") {
            // A prefix that no other run has, so that runs beside this one don't meet.
            Ok(url) => {
                let prefix = format!("test-{}:", std::process::id());
                Locker::builder().prefix(prefix).connect(&url).await.expect("a server at REDIS_URL")
            }
            Err(_) => Locker::in_memory(),
        };
        LOCKER.get_or_init(connect).await
    }

    // Both want the same lock, and libtest runs them at the same time, each on a thread and a runtime of its own.
    #[tokio::test]
    async fn one_of_two_tests_waits_for_the_other() {
        work_ten_times().await;
    }

    #[tokio::test]
    async fn and_the_other_for_the_first() {
        work_ten_times().await;
    }

    async fn work_ten_times() {
        use std::sync::atomic::{AtomicU32, Ordering};
        static INSIDE: AtomicU32 = AtomicU32::new(0);
        for _ in 0..10 {
            let guard = locker().await.lock("shared").await.unwrap();
            assert_eq!(INSIDE.fetch_add(1, Ordering::SeqCst), 0);
            tokio::time::sleep(Duration::from_millis(2)).await;
            INSIDE.fetch_sub(1, Ordering::SeqCst);
            guard.release().await.unwrap();
        }
    }
}
