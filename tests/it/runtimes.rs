//! A locker works on any runtime that it is used on, even after the runtime that it was connected on has ended; and
//! outside any runtime, nothing panics.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use tenure::{Driver, Error, Lease, Locker, WatchDog};
use tenure_test_support::{Server, StandsStill, soon};
use tokio::runtime::{Builder, Runtime};

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Three servers, for a quorum.
struct Three([Server; 3]);

impl Three {
    fn start() -> Self {
        Self([0; 3].map(|_| Server::start()))
    }

    fn urls(&self) -> [String; 3] {
        [0, 1, 2].map(|n: usize| self.0[n].url())
    }
}

async fn lock_and_release(locker: &Locker, key: &str) {
    let guard = soon(locker.lock(key)).await.unwrap();
    guard.renew().await.unwrap();
    soon(guard.release()).await.unwrap();
}

#[test]
fn a_locker_outlives_the_runtime_that_it_was_connected_on() {
    let server = Server::start();
    let locker = runtime().block_on(async {
        let locker = Locker::connect(&server.url()).await.unwrap();
        lock_and_release(&locker, "k").await;
        locker
    });
    // Like several `#[tokio::test]`s with a static locker.
    for _ in 0..3 {
        let started = Instant::now();
        runtime().block_on(async {
            lock_and_release(&locker, "k").await;
            // Batched calls, too.
            let many = (0..200).map(|n| {
                let locker = locker.clone();
                tokio::spawn(async move { lock_and_release(&locker, &format!("k:{n}")).await })
            });
            for one in many.collect::<Vec<_>>() {
                soon(one).await.unwrap();
            }
        });
        assert!(started.elapsed() < ms(10_000), "{:?}", started.elapsed());
    }
    runtime().block_on(async { soon(locker.close()).await });
}

#[test]
fn waiters_hear_of_releases_on_a_runtime_that_came_later() {
    let server = Server::start();
    let locker = runtime().block_on(async {
        let locker = Locker::builder().poll_every(ms(60_000)).connect(&server.url()).await.unwrap();
        let held = locker.lock("k").await.unwrap();
        let waits = tokio::spawn(locker.lock("k").into_future());
        held.release().await.unwrap();
        soon(waits).await.unwrap().unwrap().release().await.unwrap();
        locker
    });
    runtime().block_on(async {
        let other = Locker::connect(&server.url()).await.unwrap();
        let held = other.lock("k").await.unwrap();
        let mut waits = tokio::spawn(locker.lock("k").into_future());
        // Time enough to subscribe.
        assert!(tokio::time::timeout(ms(500), &mut waits).await.is_err());
        held.release().await.unwrap();
        let waited = Instant::now();
        soon(waits).await.unwrap().unwrap().release().await.unwrap();
        assert!(waited.elapsed() < ms(5_000), "{:?}", waited.elapsed());
    });
}

#[test]
fn a_quorum_outlives_the_runtime_that_it_was_connected_on() {
    let servers = Three::start();
    let locker = runtime().block_on(async {
        let locker = Locker::builder().restart_window(Duration::ZERO).quorum(servers.urls()).await.unwrap();
        lock_and_release(&locker, "k").await;
        locker
    });
    for _ in 0..2 {
        runtime().block_on(lock_and_release(&locker, "k"));
    }
    runtime().block_on(async { soon(locker.close()).await });
}

#[test]
fn a_locker_whose_runtime_stands_still_goes_on_elsewhere() {
    let server = Server::start();
    let idle = runtime();
    let locker = idle.block_on(async {
        Locker::builder().command_timeout(ms(300)).wait_for_server(ms(20_000)).connect(&server.url()).await.unwrap()
    });
    runtime().block_on(async {
        lock_and_release(&locker, "k").await;
        soon(locker.close()).await;
    });
    drop(idle);
}

/// Locks and releases in so many tasks at once, each of which has a key of its own.
async fn many_lock_and_release(locker: &Locker, count: usize) {
    let tasks = (0..count).map(|n| {
        let locker = locker.clone();
        tokio::spawn(async move { lock_and_release(&locker, &format!("k:{n}")).await })
    });
    for task in tasks.collect::<Vec<_>>() {
        soon(task).await.unwrap();
    }
}

#[test]
fn a_locker_whose_runtime_stands_still_goes_on_elsewhere_for_many() {
    let server = Server::start();
    for driver in drivers() {
        let idle = runtime();
        let builder = Locker::builder().driver(driver).command_timeout(ms(300)).wait_for_server(ms(15_000));
        let locker = idle.block_on(builder.connect(&server.url())).unwrap();
        runtime().block_on(many_lock_and_release(&locker, 40));
    }
}

/// Many lock and release on one runtime, while futures that were polled on another are polled no more.
fn many_beside_a_runtime_that_stands_still(rt: &Runtime, locker: &Locker) {
    let still = StandsStill::new();
    let mut aside: Vec<_> = (0..40).map(|n| Box::pin(locker.lock(format!("still:{n}")).into_future())).collect();
    for future in &mut aside {
        assert!(still.poll(future.as_mut()).is_pending());
    }
    rt.block_on(many_lock_and_release(locker, 40));
    rt.block_on(many_lock_and_release(locker, 40));
}

#[test]
fn a_runtime_that_stands_still_holds_up_nobody_on_another() {
    let server = Server::start();
    let rt = runtime();
    let builder = || Locker::builder().command_timeout(ms(300)).wait_for_server(ms(15_000));
    for driver in drivers() {
        let locker = rt.block_on(builder().driver(driver).connect(&server.url())).unwrap();
        many_beside_a_runtime_that_stands_still(&rt, &locker);
    }
    #[cfg(feature = "fred")]
    {
        use tenure::fred::interfaces::ClientLike;
        let client = fred_client(&server);
        rt.block_on(client.init()).unwrap();
        many_beside_a_runtime_that_stands_still(&rt, &builder().client(client));
    }
    #[cfg(feature = "redis")]
    {
        let client = redis::Client::open(server.url()).unwrap();
        let connection = rt.block_on(client.get_multiplexed_async_connection()).unwrap();
        many_beside_a_runtime_that_stands_still(&rt, &builder().with_redis(connection));
    }
}

/// The drivers that are compiled in.
fn drivers() -> impl Iterator<Item = Driver> {
    let compiled = [(Driver::Fred, cfg!(feature = "fred")), (Driver::Redis, cfg!(feature = "redis"))];
    compiled.into_iter().filter(|(_, is_compiled)| *is_compiled).map(|(driver, _)| driver)
}

#[cfg(feature = "fred")]
#[test]
fn a_client_of_ones_own_whose_runtime_has_ended_is_an_error_and_no_wait() {
    use tenure::fred::interfaces::ClientLike;
    let server = Server::start();
    let locker = runtime().block_on(async {
        let client = fred_client(&server);
        client.init().await.unwrap();
        let locker = Locker::new(client);
        lock_and_release(&locker, "k").await;
        locker
    });
    runtime().block_on(async {
        let refused = soon(locker.lock("k")).await.unwrap_err();
        assert!(!refused.is_transient(), "{refused}");
        assert!(refused.to_string().contains("init"), "{refused}");
        let closing = Instant::now();
        soon(locker.close()).await;
        assert!(closing.elapsed() < ms(5_000), "{:?}", closing.elapsed());
    });
}

#[cfg(feature = "fred")]
#[test]
fn a_client_of_ones_own_that_was_ended_and_begun_again_works_on() {
    use tenure::fred::interfaces::ClientLike;
    let server = Server::start();
    runtime().block_on(async {
        let client = fred_client(&server);
        client.init().await.unwrap();
        let locker = Locker::builder().command_timeout(ms(500)).client(client.clone());
        lock_and_release(&locker, "k").await;
        for _ in 0..2 {
            client.quit().await.unwrap();
            let refused = soon(locker.try_lock("k")).await.unwrap_err();
            assert!(refused.is_transient(), "{refused}");
            client.init().await.unwrap();
            lock_and_release(&locker, "k").await;
        }
        let held = locker.lock("k").await.unwrap();
        let waits = tokio::spawn(locker.lock("k").into_future());
        client.quit().await.unwrap();
        client.init().await.unwrap();
        soon(held.release()).await.unwrap();
        soon(waits).await.unwrap().unwrap().release().await.unwrap();
    });
}

#[cfg(feature = "fred")]
fn fred_client(server: &Server) -> fred::clients::Client {
    use tenure::fred::types::Builder as FredBuilder;
    use tenure::fred::types::config::{Config, ReconnectPolicy};
    let config = Config::from_url(&server.url()).unwrap();
    let policy = ReconnectPolicy::new_exponential(0, 50, 2_000, 2);
    FredBuilder::from_config(config).set_policy(policy).build().unwrap()
}

/// Polls a future outside any runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    let until = Instant::now() + ms(20_000);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        assert!(Instant::now() < until, "it never ends outside of a runtime");
        thread::park_timeout(ms(100));
    }
}

fn assert_no_runtime<T: std::fmt::Debug>(what: &str, answer: Result<T, Error>) {
    assert!(matches!(&answer, Err(Error::NoRuntime)), "{what}: {answer:?}");
}

/// Makes every call that may have to ask the server.
fn nothing_works_and_nothing_panics(locker: &Locker, rt: &Runtime) {
    let (guards, lease) = rt.block_on(async {
        let mut guards = Vec::new();
        for n in 0..8 {
            guards.push(locker.lock(format!("held:{n}")).await.unwrap());
        }
        (guards, locker.lock("leased").await.unwrap().into_lease())
    });
    let mut guards = guards.into_iter();
    let guard = guards.next().unwrap();
    assert_no_runtime("lock", block_on(locker.lock("k").into_future()));
    assert_no_runtime("try_lock", block_on(locker.try_lock("k").into_future()));
    assert_no_runtime("obtain", block_on(locker.obtain("k").wait_at_most(ms(50)).into_future()));
    assert_no_runtime("lock_all", block_on(locker.lock_all(["a", "b"]).into_future()));
    assert_no_runtime("scope", block_on(locker.scope("k", async |_| ())));
    assert_no_runtime("inspect", block_on(locker.inspect("k")));
    assert_no_runtime("adopt", block_on(locker.adopt(lease.clone())));
    assert_no_runtime("ensure", block_on(locker.ensure(&lease, ms(60_000))));
    assert_no_runtime("renew", block_on(guard.renew()));
    assert_no_runtime("renew_for", block_on(guard.renew_for(ms(60_000))));
    assert_no_runtime("ensure", block_on(guard.ensure(ms(60_000))));
    assert_no_runtime("server_ttl", block_on(guard.server_ttl()));
    assert!(guard.is_held(), "nothing was changed");
    assert_eq!(block_on(guard.protect(async { 42 })), Ok(42));
    assert_no_runtime("release", block_on(guard.release()));

    let dog = WatchDog::builder(locker).on_event(|_| {}).build();
    dog.watch(guards.next().unwrap()).unwrap();
    dog.watch(guards.next().unwrap()).unwrap();
    assert_no_runtime("watch_lease", block_on(dog.watch_lease(lease.clone()).into_future()));
    let obtaining = dog.watch_lease(Lease::new("free", "t".parse().unwrap(), ms(9_000))).obtain_when_free(true);
    assert_no_runtime("obtain_when_free", block_on(obtaining.into_future()));
    assert_no_runtime("release of a watchdog", block_on(dog.release("held:1")));
    for (_, error) in block_on(dog.release_all()) {
        assert!(matches!(error, Error::NoRuntime), "{error}");
    }
    drop(block_on(dog.shutdown()));
    drop(guards);
    // Releases go on in the background, on the runtime of their locks.
    rt.block_on(async {
        for key in ["held:0", "held:1", "held:7"] {
            let released = async || locker.inspect(key).await.unwrap().is_none().then_some(());
            tenure_test_support::eventually(key, released).await;
        }
    });
    block_on(locker.close());
    assert!(matches!(block_on(locker.lock("k").into_future()), Err(Error::Closed)));
}

#[test]
fn outside_a_runtime_every_call_says_so_on_a_server() {
    let server = Server::start();
    let rt = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for isolated in [false, true] {
        let builder = Locker::builder().prefix(isolated.to_string()).isolated(isolated);
        let locker = rt.block_on(builder.connect(&server.url())).unwrap();
        nothing_works_and_nothing_panics(&locker, &rt);
    }
}

#[test]
fn outside_a_runtime_every_call_says_so_on_a_quorum() {
    let servers = Three::start();
    let rt = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for isolated in [false, true] {
        let builder = Locker::builder().restart_window(Duration::ZERO).prefix(isolated.to_string()).isolated(isolated);
        let locker = rt.block_on(builder.quorum(servers.urls())).unwrap();
        nothing_works_and_nothing_panics(&locker, &rt);
    }
}

#[test]
fn outside_a_runtime_every_call_says_so_on_the_embedded_store() {
    let rt = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for isolated in [false, true] {
        nothing_works_and_nothing_panics(
            &Locker::builder().prefix(isolated.to_string()).isolated(isolated).in_memory(),
            &rt,
        );
    }
}

#[cfg(feature = "fred")]
#[test]
fn outside_a_runtime_every_call_says_so_on_a_client_of_ones_own() {
    use tenure::fred::interfaces::ClientLike;
    let server = Server::start();
    let rt = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for isolated in [false, true] {
        let client = fred_client(&server);
        rt.block_on(client.init()).unwrap();
        nothing_works_and_nothing_panics(
            &Locker::builder().prefix(isolated.to_string()).isolated(isolated).client(client),
            &rt,
        );
    }
}

#[test]
fn outside_a_runtime_nothing_is_connected() {
    let server = Server::start();
    for isolated in [false, true] {
        let builder = || Locker::builder().prefix(isolated.to_string()).isolated(isolated);
        assert_no_runtime("connect", block_on(builder().connect(&server.url())));
        assert_no_runtime("quorum", block_on(builder().quorum([server.url()])));
        // An invalid argument is reported all the same.
        assert!(matches!(block_on(builder().connect("http://a")), Err(Error::InvalidUrl(_))));
    }
}

#[test]
fn an_isolated_locker_may_be_made_and_dropped_anywhere() {
    let server = Server::start();
    let url = server.url();
    drop(Locker::builder().isolated(true).in_memory());
    runtime().block_on(async {
        drop(Locker::builder().isolated(true).in_memory());
        drop(Locker::builder().isolated(true).connect(&url).await.unwrap());
    });
}
