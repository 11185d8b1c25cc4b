//! What the Go libraries that tenure learned from let a user do, one test for each thing. A program of its own, so that
//! its list of tests is the list of these things. `tenure::docs::migrating_from_go` shows how each is written there and
//! here.

#![cfg(any(feature = "fred", feature = "redis"))]
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "these are tests")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tenure::{Error, Lease, Locker, Loss, Retry, Token, WatchDog, WatchEvent};
use tenure_test_support::{Server, eventually, soon};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

async fn locker() -> (Server, Locker) {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    (server, locker)
}

/// Returns a locker whose calls end soon, also where the server is busy when it connects.
async fn impatient(server: &Server, timeout: Duration) -> Locker {
    let builder = Locker::builder().command_timeout(timeout).wait_for_server(ms(20_000));
    builder.connect(&server.url()).await.unwrap()
}

fn token(text: &str) -> Token {
    text.parse().unwrap()
}

/// A watchdog, and every event that its callback gets.
fn watchdog(locker: &Locker) -> (WatchDog, Arc<Mutex<Vec<WatchEvent>>>) {
    let told: Arc<Mutex<Vec<WatchEvent>>> = Arc::default();
    let log = told.clone();
    (WatchDog::builder(locker).on_event(move |event| log.lock().unwrap().push(event.clone())).build(), told)
}

mod bsm_redislock {
    use super::*;

    #[cfg(feature = "fred")]
    #[tokio::test]
    async fn row_01_any_client_will_do() {
        use tenure::fred::prelude::{Builder, ClientLike, Config, ReconnectPolicy};
        let server = Server::start();
        let client = Builder::from_config(Config::from_url(&server.url()).unwrap())
            .set_policy(ReconnectPolicy::new_constant(0, 100))
            .build()
            .unwrap();
        client.init().await.unwrap();
        let guard = Locker::new(client).obtain("k").await.unwrap();
        assert_eq!(server.cli(&["GET", "k"]), guard.token().as_str());
    }

    #[tokio::test]
    async fn row_02_obtain_tries_once() {
        let (_server, locker) = locker().await;
        let _guard = locker.obtain("k").ttl(ms(5_000)).await.unwrap();
        let refused = locker.obtain("k").ttl(ms(5_000)).await.unwrap_err();
        assert!(matches!(refused, Error::NotObtained { attempts: 1, .. }));
    }

    #[tokio::test]
    async fn row_03_obtain_with_a_strategy_until_a_deadline() {
        let (_server, locker) = locker().await;
        let guard = locker.obtain("k").await.unwrap();
        eventually("several attempts", async || {
            let started = Instant::now();
            let request = locker.obtain("k").retry(Retry::linear(ms(50))).wait_at_most(ms(1_000));
            let refused = soon(request).await.unwrap_err();
            assert!(started.elapsed() >= ms(1_000));
            // Not on a machine that is too busy.
            matches!(refused, Error::NotObtained { attempts: 4.., .. }).then_some(())
        })
        .await;
        let waiting = locker.obtain("k").retry(Retry::linear(ms(10)));
        let (obtained, released) = tokio::join!(waiting, guard.release());
        released.unwrap();
        obtained.unwrap().release().await.unwrap();
    }

    #[test]
    fn row_04_strategies() {
        let first = |retry: Retry| retry.pauses().take(4).collect::<Vec<_>>();
        assert!(first(Retry::none()).is_empty());
        assert_eq!(first(Retry::linear(ms(7))), [ms(7); 4]);
        assert_eq!(first(Retry::exponential(ms(16), ms(100))), [ms(16), ms(32), ms(64), ms(100)]);
        assert_eq!(first(Retry::linear(ms(7)).max_retries(2)), [ms(7); 2]);
    }

    #[tokio::test]
    async fn row_05_a_strategy_of_ones_own() {
        let (_server, locker) = locker().await;
        let _guard = locker.obtain("k").await.unwrap();
        let fibonacci = std::iter::successors(Some((ms(1), ms(1))), |&(a, b)| Some((b, a + b))).map(|(pause, _)| pause);
        let refused = locker.obtain("k").retry(Retry::from_iter(fibonacci).max_retries(6)).await.unwrap_err();
        assert!(
            matches!(refused, Error::NotObtained { attempts: 7, waited, .. } if waited >= ms(1 + 1 + 2 + 3 + 5 + 8))
        );
    }

    #[tokio::test]
    async fn row_06_the_same_token_obtains_again_also_with_other_metadata() {
        let (_server, locker) = locker().await;
        let _one = locker.obtain("k").token(token("me")).metadata("a").await.unwrap();
        let _two = locker.obtain("k").token(token("me")).metadata("b").await.unwrap();
        assert_eq!(locker.inspect("k").await.unwrap().unwrap().metadata, b"b");
    }

    #[tokio::test]
    async fn row_07_metadata() {
        let (_server, locker) = locker().await;
        let guard = locker.obtain("k").metadata("host-3").await.unwrap();
        assert_eq!(guard.metadata(), b"host-3");
        assert_eq!(locker.inspect("k").await.unwrap().unwrap().metadata, b"host-3");
    }

    #[tokio::test]
    async fn row_08_many_keys_all_or_nothing() {
        let (server, locker) = locker().await;
        let guard = locker.obtain_all(["a", "b"]).ttl(ms(20_000)).no_renewal().await.unwrap();
        assert_eq!(guard.keys(), ["a".into(), "b".into()]);
        assert!(locker.obtain_all(["c", "b"]).await.is_err());
        assert_eq!(server.cli(&["EXISTS", "c"]), "0");
        // The ttl of the set is the shortest.
        server.cli(&["PEXPIRE", "b", "9000"]);
        assert!(guard.server_ttl().await.unwrap().unwrap() <= ms(9_000));
    }

    #[tokio::test]
    async fn row_09_the_ttl_at_the_server() {
        let (server, locker) = locker().await;
        let guard = locker.obtain("k").ttl(ms(60_000)).await.unwrap();
        assert!(guard.server_ttl().await.unwrap().is_some_and(|ttl| ttl <= ms(60_000) && ttl > ms(30_000)));
        server.cli(&["DEL", "k"]);
        assert_eq!(guard.server_ttl().await.unwrap(), None);
    }

    #[tokio::test]
    async fn row_10_refresh() {
        let (server, locker) = locker().await;
        let guard = locker.obtain("k").ttl(ms(60_000)).no_renewal().await.unwrap();
        server.cli(&["PEXPIRE", "k", "20000"]);
        guard.renew().await.unwrap();
        assert!(guard.server_ttl().await.unwrap().unwrap() > ms(30_000));
        guard.renew_for(ms(600_000)).await.unwrap();
        assert!(guard.server_ttl().await.unwrap().unwrap() > ms(300_000));
        server.cli(&["DEL", "k"]);
        assert!(matches!(guard.renew().await, Err(Error::NotHeld { loss: Loss::Missing, .. })));
    }

    #[tokio::test]
    async fn row_11_release() {
        let (server, locker) = locker().await;
        locker.obtain("k").await.unwrap().release().await.unwrap();
        assert_eq!(server.cli(&["EXISTS", "k"]), "0");
        let lost = locker.obtain("k").await.unwrap();
        server.cli(&["DEL", "k"]);
        assert!(matches!(lost.release().await, Err(Error::NotHeld { .. })));
    }

    #[tokio::test]
    async fn row_12_in_one_expression() {
        let server = Server::start();
        let guard = Locker::connect(&server.url()).await.unwrap().obtain("k").await.unwrap();
        // The locker is gone; the guard has what it needs.
        guard.renew().await.unwrap();
        guard.release().await.unwrap();
    }

    #[tokio::test]
    async fn row_13_the_watchdog_is_built_in() {
        let (server, locker) = locker().await;
        let guard = locker.obtain("k").ttl(ms(6_000)).await.unwrap();
        // Past several renewals it is held; then a failed one ends the work.
        let first = guard.deadline();
        let renewals = eventually("renewals", async || (guard.deadline() > first + ms(3_000)).then_some(()));
        guard.protect(renewals).await.unwrap();
        server.cli(&["DEL", "k"]);
        let over = guard.cancellation_token();
        assert_eq!(soon(guard.protect(std::future::pending::<()>())).await, Err(Loss::Missing));
        assert!(over.is_cancelled());
    }

    #[tokio::test]
    async fn row_42_a_fencing_token_that_is_not_minted_again_for_the_same_token() {
        let (_server, locker) = locker().await;
        let one = locker.obtain("k").token(token("me")).await.unwrap();
        let again = locker.obtain("k").token(token("me")).await.unwrap();
        assert_eq!(one.fencing_token(), again.fencing_token());
        one.release().await.unwrap();
        assert!(locker.obtain("k").await.unwrap().fencing_token() > again.fencing_token());
        assert_eq!(locker.obtain("other").fenced(false).await.unwrap().fencing_token(), None);
    }
}

async fn quorum() -> ([Server; 3], Locker) {
    let servers = [(); 3].map(|()| Server::start());
    // They have only just been started, and shall vote all the same.
    let builder = Locker::builder().ttl(ms(60_000)).restart_window(Duration::ZERO);
    let locker = builder.quorum(servers.iter().map(Server::url)).await.unwrap();
    (servers, locker)
}

mod amyangfei_redlock_go {
    use super::*;

    #[tokio::test]
    async fn row_14_several_servers_by_url() {
        let (mut servers, locker) = quorum().await;
        let guard = locker.lock("resource_name").ttl(ms(60_000)).await.unwrap();
        assert!(locker.try_lock("resource_name").await.is_err());
        guard.release().await.unwrap();
        servers[0].kill();
        locker.lock("resource_name").await.unwrap().release().await.unwrap();
    }

    #[tokio::test]
    async fn row_15_the_remaining_validity() {
        let (_server, locker) = locker().await;
        let guard = locker.lock("k").ttl(ms(60_000)).await.unwrap();
        assert!(guard.remaining() > ms(30_000) && guard.remaining() <= ms(60_000 - 600 - 2));
        assert!(guard.deadline() > tokio::time::Instant::now() + ms(30_000));
    }

    #[tokio::test]
    async fn row_16_release_by_name() {
        let (server, locker) = locker().await;
        let (dog, _) = watchdog(&locker);
        dog.watch(locker.lock("resource").ttl(ms(5_000)).await.unwrap()).unwrap();
        dog.release("resource").await.unwrap();
        assert_eq!(server.cli(&["EXISTS", "resource"]), "0");
        // What is lost is forgotten, and the name then frees no successor's lock in the same process.
        dog.watch(locker.lock("resource").renew_every(ms(50)).await.unwrap()).unwrap();
        server.cli(&["DEL", "resource"]);
        eventually("it is forgotten", async || (!dog.contains("resource")).then_some(())).await;
        let successor = locker.lock("resource").await.unwrap();
        assert!(matches!(dog.release("resource").await, Err(Error::NotHeld { .. })));
        assert!(successor.server_ttl().await.unwrap().is_some());
    }

    #[tokio::test]
    async fn row_17_retry_count_delay_and_drift() {
        let server = Server::start();
        let builder = Locker::builder().retry(Retry::linear(ms(10)).max_retries(10)).drift(0.1, ms(100));
        let locker = builder.connect(&server.url()).await.unwrap();
        let guard = locker.obtain("k").ttl(ms(10_000)).await.unwrap();
        assert!(guard.remaining() <= ms(10_000 - 1_000 - 100));
        assert!(matches!(locker.obtain("k").await, Err(Error::NotObtained { attempts: 11, .. })));
    }

    #[tokio::test]
    async fn row_44_urls_with_database_and_password() {
        let server = Server::start_with(&["--requirepass", "secret"]);
        let url = format!("redis://:secret@127.0.0.1:{}/3", server.port());
        let guard = Locker::connect(&url).await.unwrap().lock("k").await.unwrap();
        let cli = |db| server.cli(&["-a", "secret", "-n", db, "EXISTS", "k"]);
        assert_eq!((cli("3"), cli("0")), ("1".into(), "0".into()));
        guard.release().await.unwrap();
    }
}

mod redislock_attempt_lock {
    use super::*;

    #[tokio::test]
    async fn row_18_key_and_ttl_are_options() {
        let (server, locker) = locker().await;
        let _guard = locker.try_lock("migrations").ttl(ms(60_000)).await.unwrap();
        assert!(server.cli(&["PTTL", "migrations"]).parse::<u64>().unwrap() > 30_000);
    }

    #[tokio::test]
    async fn row_19_one_attempt_where_busy_is_told_apart_from_broken() {
        let (mut server, locker) = locker().await;
        let _guard = locker.try_lock("k").await.unwrap();
        assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
        server.kill();
        assert!(matches!(soon(locker.try_lock("k")).await, Err(Error::Redis(_))));
    }

    #[tokio::test]
    async fn row_20_a_release_of_what_is_not_ours_says_so() {
        let (server, locker) = locker().await;
        let guard = locker.try_lock("k").await.unwrap();
        server.cli(&["SET", "k", "another"]);
        assert!(matches!(guard.release().await, Err(Error::NotHeld { loss: Loss::Taken, .. })));
        assert_eq!(server.cli(&["GET", "k"]), "another");
    }

    #[tokio::test]
    async fn row_21_one_runner_of_migrations() {
        let (_server, locker) = locker().await;
        let applied = Mutex::new(Vec::new());
        let run = |name| {
            let (locker, applied) = (locker.clone(), &applied);
            async move {
                // Looks again under the lock: another may have been quicker.
                let migrate = async |guard: &tenure::LockGuard| {
                    let mut applied = applied.lock().unwrap();
                    if applied.is_empty() {
                        applied.push((name, guard.fencing_token()));
                    }
                };
                locker.scope("migrations", migrate).await.unwrap();
            }
        };
        tokio::join!(run("a"), run("b"), run("c"));
        assert_eq!(applied.lock().unwrap().len(), 1);
    }
}

mod trviph_redlock {
    use super::*;

    #[tokio::test]
    async fn row_22_retries_pause_and_jitter() {
        let (_server, locker) = locker().await;
        let _guard = locker.lock("k").await.unwrap();
        let retry = Retry::linear(ms(10)).jitter(ms(5)).max_retries(3);
        let refused = locker.obtain("k").retry(retry).await.unwrap_err();
        assert!(matches!(refused, Error::NotObtained { attempts: 4, waited, .. } if waited >= ms(30)));
    }

    #[tokio::test]
    async fn row_23_acquire_and_try_acquire() {
        let (_server, locker) = locker().await;
        let guard = locker.lock("k").await.unwrap();
        assert!(matches!(locker.try_lock("k").await, Err(Error::NotObtained { .. })));
        let (waited, released) = tokio::join!(locker.lock("k"), guard.release());
        released.unwrap();
        drop(waited.unwrap());
    }

    #[tokio::test]
    async fn row_24_a_token_of_ones_own_and_a_fencing_token_besides() {
        let (server, locker) = locker().await;
        let guard = locker.lock("k").token(token("41")).await.unwrap();
        assert_eq!(server.cli(&["GET", "k"]), "41");
        assert!(guard.fencing_token().is_some());
        assert!(locker.try_lock("k").token(token("4")).await.is_err());
    }

    #[tokio::test]
    async fn row_25_extend() {
        let (_server, locker) = locker().await;
        let guard = locker.lock("k").ttl(ms(20_000)).await.unwrap();
        guard.renew_for(ms(60_000)).await.unwrap();
        assert!(guard.server_ttl().await.unwrap().unwrap() > ms(30_000));
    }

    #[tokio::test]
    async fn row_26_acquire_or_extend() {
        let (_server, locker) = locker().await;
        let acquired = locker.obtain("k").token(token("me")).ttl(ms(20_000)).no_renewal().await.unwrap();
        let extended = locker.obtain("k").token(token("me")).ttl(ms(60_000)).await.unwrap();
        assert!(acquired.server_ttl().await.unwrap().unwrap() > ms(30_000));
        // One that fails leaves what is held alone.
        assert!(locker.obtain("k").token(token("other")).await.is_err());
        extended.renew().await.unwrap();
    }

    #[tokio::test]
    async fn row_27_release() {
        let (_server, locker) = locker().await;
        let guard = locker.obtain("k").token(token("me")).await.unwrap();
        guard.release().await.unwrap();
        locker.try_lock("k").await.unwrap().release().await.unwrap();
    }

    #[tokio::test]
    async fn row_28_drift_timeout_and_retry_on_several_servers() {
        let servers = [(); 3].map(|()| Server::start());
        let locker = Locker::builder()
            .drift(0.1, ms(100))
            .command_timeout(ms(5_000))
            .retry(Retry::linear(ms(5)).max_retries(4).jitter(ms(5)))
            .restart_window(Duration::ZERO)
            .quorum(servers.iter().map(Server::url))
            .await
            .unwrap();
        let guard = soon(locker.lock("k").ttl(ms(60_000))).await.unwrap();
        assert!(guard.remaining() <= ms(60_000 - 6_000 - 100));
        // Unless a node was too slow to vote.
        eventually("it is refused after all attempts", async || {
            matches!(locker.obtain("k").await, Err(Error::NotObtained { attempts: 5, .. })).then_some(())
        })
        .await;
        guard.release().await.unwrap();
    }

    #[tokio::test]
    async fn row_29_one_server_and_several_are_used_alike() {
        async fn work(locker: &Locker) -> Option<u64> {
            let guard = locker.lock("k").metadata("host-3").await.unwrap();
            guard.renew().await.unwrap();
            assert_eq!(locker.inspect("k").await.unwrap().unwrap().metadata, b"host-3");
            let fence = guard.fencing_token();
            locker.adopt(guard.into_lease()).await.unwrap().release().await.unwrap();
            fence
        }
        let (_server, one) = locker().await;
        let (_servers, several) = quorum().await;
        for locker in [one, several] {
            assert!(work(&locker).await < work(&locker).await);
        }
    }

    #[tokio::test]
    async fn row_36_the_errors_of_each_server() {
        let (mut servers, locker) = quorum().await;
        servers[0].kill();
        servers[1].kill();
        let refused = soon(locker.try_lock("k")).await.unwrap_err();
        let Error::Quorum { needed: 2, nodes, .. } = refused else { unreachable!("{refused}") };
        for (node, server) in nodes.iter().zip(&servers) {
            assert_eq!(node.address, format!("127.0.0.1:{}", server.port()));
            assert!(matches!(node.error, Error::Redis(_)) && node.error.is_transient(), "{node}");
        }
        assert_eq!(nodes.len(), 2);
    }

    #[tokio::test]
    async fn row_43_how_many_have_released() {
        let (mut servers, locker) = quorum().await;
        let guard = locker.lock("k").await.unwrap();
        servers[0].kill();
        // Two of three are enough.
        guard.release().await.unwrap();
        let guard = soon(locker.lock("k")).await.unwrap();
        servers[1].kill();
        let failed = soon(guard.release()).await.unwrap_err();
        assert!(matches!(failed, Error::Quorum { needed: 2, granted: 0..=1, .. }), "{failed}");
    }

    #[tokio::test]
    async fn row_30_watch_a_key_and_token_at_an_interval() {
        let (server, locker) = locker().await;
        let (dog, _) = watchdog(&locker);
        server.cli(&["SET", "k", "me", "PX", "6000"]);
        dog.watch_lease(Lease::new("k", token("me"), ms(6_000))).renew_every(ms(100)).await.unwrap();
        // Past its ttl.
        eventually("renewals", async || dog.status("k").is_some_and(|it| it.renewals >= 70).then_some(())).await;
        assert_eq!(server.cli(&["GET", "k"]), "me");
        // Stopped, and let be.
        assert_eq!(dog.unwatch("k").map(|lease| lease.ttl()), Some(ms(6_000)));
        assert_eq!(server.cli(&["EXISTS", "k"]), "1");
    }

    #[tokio::test]
    async fn row_31_a_watchdog_of_many_items_with_a_callback() {
        let (_server, locker) = locker().await;
        let (dog, told) = watchdog(&locker);
        for (key, interval) in [("a", 50), ("b", 100)] {
            let lease = Lease::new(key, token("me"), ms(60_000));
            dog.watch_lease(lease).renew_every(ms(interval)).obtain_when_free(true).await.unwrap();
        }
        let renewals = |of: &'static str| dog.status(of).map_or(0, |status| status.renewals);
        eventually("renewals of both", async || (renewals("a") > 3 && renewals("b") > 3).then_some(())).await;
        assert_eq!(dog.shutdown().await.len(), 2);
        eventually("the end of both is told", async || {
            let stopped = |event: &&WatchEvent| matches!(event, WatchEvent::Stopped { reason: None, .. });
            (told.lock().unwrap().iter().filter(stopped).count() == 2).then_some(())
        })
        .await;
    }

    #[tokio::test]
    async fn row_32_the_callback_is_told_every_error_and_last_of_all_the_end() {
        let mut server = Server::start();
        let locker = impatient(&server, ms(300)).await;
        let (dog, told) = watchdog(&locker);
        dog.watch(locker.lock("lost").ttl(ms(3_000)).await.unwrap()).unwrap();
        dog.watch(locker.lock("stopped").ttl(ms(60_000)).renew_every(ms(100)).await.unwrap()).unwrap();
        server.kill();
        eventually("the one is lost", async || (!dog.contains("lost")).then_some(())).await;
        assert!(dog.unwatch("stopped").is_some());
        soon(dog.delivered()).await;
        let told = told.lock().unwrap();
        let of = |key: &str| told.iter().filter(|event| *event.key() == key.into()).collect::<Vec<_>>();
        let failed = |event: &&&WatchEvent| matches!(event, WatchEvent::RenewFailed { .. });
        for key in ["lost", "stopped"] {
            assert!(of(key).iter().filter(failed).count() >= 1, "{told:?}");
        }
        assert!(matches!(of("lost").last(), Some(WatchEvent::Lost { loss: Loss::Expired, .. })), "{told:?}");
        assert!(matches!(of("stopped").last(), Some(WatchEvent::Stopped { reason: None, .. })), "{told:?}");
    }

    #[tokio::test]
    async fn row_33_watched_before_it_is_obtained_and_through_failures() {
        let mut server = Server::start_with(&["--appendonly", "yes", "--appendfsync", "always"]);
        let locker = impatient(&server, ms(200)).await;
        let (dog, told) = watchdog(&locker);
        let lease = Lease::new("k", token("me"), ms(60_000));
        let other = locker.lock("k").await.unwrap();
        dog.watch_lease(lease).renew_every(ms(100)).obtain_when_free(true).await.unwrap();
        assert!(dog.status("k").is_some_and(|status| !status.held));
        other.release().await.unwrap();
        eventually("it is obtained", async || dog.status("k").is_some_and(|status| status.held).then_some(())).await;
        server.kill();
        let failing = async || dog.status("k").is_some_and(|status| status.last_error.is_some()).then_some(());
        eventually("a renewal fails", failing).await;
        server.restart();
        let recovered = async || dog.status("k").is_some_and(|status| status.last_error.is_none()).then_some(());
        eventually("a renewal succeeds", recovered).await;
        soon(dog.delivered()).await;
        let told = told.lock().unwrap();
        assert!(matches!(told.first(), Some(WatchEvent::Obtained { fencing_token: Some(_), .. })), "{told:?}");
        assert!(matches!(told.last(), Some(WatchEvent::Renewed { .. })), "{told:?}");
    }

    #[tokio::test]
    async fn row_34_a_lost_lock_leaves_with_one_event() {
        let (server, locker) = locker().await;
        let (dog, told) = watchdog(&locker);
        dog.watch(locker.lock("k").renew_every(ms(50)).await.unwrap()).unwrap();
        server.cli(&["SET", "k", "another", "PX", "60000"]);
        eventually("it leaves", async || dog.is_empty().then_some(())).await;
        drop(dog);
        locker.close().await;
        let losses = || {
            let told = told.lock().unwrap();
            let taken = |event: &&WatchEvent| matches!(event, WatchEvent::Lost { loss: Loss::Taken, .. });
            (told.iter().filter(taken).count(), told.last().is_some_and(|last| taken(&last)))
        };
        eventually("the loss is told", async || (losses() == (1, true)).then_some(())).await;
        assert_eq!(server.cli(&["GET", "k"]), "another");
    }

    #[tokio::test]
    async fn row_43_callbacks_for_errors_and_for_extensions() {
        let mut server = Server::start();
        let locker = impatient(&server, ms(300)).await;
        let (errors, extensions) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
        let dog = WatchDog::builder(&locker)
            .on_event({
                let (errors, extensions) = (errors.clone(), extensions.clone());
                move |event| match event {
                    WatchEvent::RenewFailed { count, .. } => *errors.lock().unwrap() += count,
                    WatchEvent::Renewed { count, .. } => *extensions.lock().unwrap() += count,
                    _ => {}
                }
            })
            .build();
        dog.watch(locker.lock("k").renew_every(ms(50)).await.unwrap()).unwrap();
        eventually("extensions", async || (*extensions.lock().unwrap() >= 3).then_some(())).await;
        server.kill();
        eventually("errors", async || (*errors.lock().unwrap() >= 2).then_some(())).await;
        assert!(dog.status("k").is_some_and(|status| status.held));
    }

    #[tokio::test]
    async fn row_35_errors_that_say_what_a_caller_needs() {
        let (_server, locker) = locker().await;
        let _guard = locker.lock("k").await.unwrap();
        let refused = locker.obtain("k").retry(Retry::linear(ms(5)).max_retries(2)).await.unwrap_err();
        let Error::NotObtained { key, attempts, waited } = refused else { unreachable!("{refused}") };
        assert_eq!((key, attempts), ("k".into(), 3));
        assert!(waited >= ms(10));
        let lease = Lease::new("k", token("me"), ms(1_000));
        assert!(matches!(locker.adopt(lease).await, Err(Error::NotHeld { .. })));
    }
}

mod distlock {
    use super::*;

    #[tokio::test]
    async fn row_37_obtain_refresh_release_and_ttl() {
        let (_server, locker) = locker().await;
        let guard = locker.obtain("my-key").ttl(ms(4_000)).no_renewal().await.unwrap();
        assert!(guard.server_ttl().await.unwrap().is_some());
        guard.renew().await.unwrap();
        assert_eq!(soon(guard.lost()).await, Loss::Expired);
        assert!(matches!(guard.release().await, Err(Error::NotHeld { .. })));
    }

    #[tokio::test]
    async fn row_38_a_lock_is_a_value() {
        let (_server, locker) = locker().await;
        let lease = locker.obtain("k").await.unwrap().into_lease();
        let stored = lease.to_string();
        let lease: Lease = stored.parse().unwrap();
        assert_eq!((lease.key(), lease.token()), ("k".into(), lease.token()));
        locker.adopt(lease).await.unwrap().release().await.unwrap();
    }

    #[tokio::test]
    async fn row_39_ensure() {
        let (server, locker) = locker().await;
        let lease = locker.obtain("k").ttl(ms(60_000)).await.unwrap().into_lease();
        locker.ensure(&lease, ms(5_000)).await.unwrap();
        assert!(server.cli(&["PTTL", "k"]).parse::<u64>().unwrap() > 30_000);
        locker.ensure(&lease, ms(600_000)).await.unwrap();
        assert!(server.cli(&["PTTL", "k"]).parse::<u64>().unwrap() > 300_000);
        server.cli(&["SET", "k", "another"]);
        assert!(matches!(locker.ensure(&lease, ms(5_000)).await, Err(Error::NotHeld { .. })));
    }

    #[tokio::test]
    async fn row_40_retry_strategies() {
        let (_server, locker) = locker().await;
        let _guard = locker.obtain("k").await.unwrap();
        let backoff = Retry::exponential(ms(1), ms(4)).max_retries(3);
        assert!(matches!(locker.obtain("k").retry(backoff).await, Err(Error::NotObtained { attempts: 4, .. })));
    }

    #[tokio::test]
    async fn row_41_tests_need_no_server() {
        let locker = Locker::in_memory();
        let _guard = locker.obtain("k").await.unwrap();
        assert!(matches!(locker.obtain("k").await, Err(Error::NotObtained { .. })));
    }
}
