//! The contenders, and how each of them obtains and releases the lock; run in a process of waiters.

use std::future::Future;
use std::io::{self, BufRead, Write};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use rslock::LockManager;
use serde::Serialize;
use tenure::fred::prelude::ClientLike;
use tenure::{LockGuard, LockRequest, Locker, Token};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::raw_fred::RawFred;
use crate::turns::{Log, Nanos, Ready, Span, Turn, histogram, now};

const TTL: Duration = Duration::from_secs(30);

const COMPARE_AND_DELETE: &str =
    "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// The commands that its clients send, in lower case, without those that only its scripts run.
    pub(crate) sends: &'static [&'static str],
    /// How unevenly it may treat waiters in several processes, if that is a target of ours.
    pub(crate) most_to_fewest: Option<f64>,
    way: Way,
}

enum Way {
    Tenure(fn(&Locker, &str) -> LockRequest),
    /// The same with local hand-overs switched off.
    TenureByServer,
    /// With default settings: three attempts with pauses of up to 200 ms, repeated.
    Rslock,
    /// Like the Go libraries: try, then pause for this long.
    Polling(fn() -> Duration),
}

const TENURE_SENDS: &[&str] =
    &["evalsha", "eval", "subscribe", "unsubscribe", "ssubscribe", "sunsubscribe", "publish", "ping"];
const OTHERS_SEND: &[&str] = &["set", "evalsha", "script|load"];

impl Contender {
    pub(crate) const ALL: &[Self] = &[
        Self {
            name: "tenure",
            sends: TENURE_SENDS,
            most_to_fewest: Some(1.2),
            way: Way::Tenure(|locker, key| locker.lock(key).ttl(TTL)),
        },
        Self { name: "tenure, by server", sends: TENURE_SENDS, most_to_fewest: Some(1.2), way: Way::TenureByServer },
        Self {
            name: "tenure, fair",
            sends: TENURE_SENDS,
            most_to_fewest: Some(1.2),
            way: Way::Tenure(|locker, key| locker.lock(key).ttl(TTL).fair(true)),
        },
        Self { name: "rslock", sends: OTHERS_SEND, most_to_fewest: None, way: Way::Rslock },
        Self {
            name: "raw fred, 100 ms",
            sends: OTHERS_SEND,
            most_to_fewest: None,
            way: Way::Polling(|| Duration::from_millis(100)),
        },
        Self {
            name: "raw fred, 0 to 300 ms",
            sends: OTHERS_SEND,
            most_to_fewest: None,
            way: Way::Polling(|| Duration::from_millis(300).mul_f64(fastrand::f64())),
        },
    ];

    async fn connect(&self, url: &str) -> Waiter {
        match self.way {
            Way::Tenure(request) => Waiter::Tenure(Locker::connect(url).await.expect("a connection"), request),
            Way::TenureByServer => {
                let locker = Locker::builder().local_hand_over(false).connect(url).await.expect("a connection");
                Waiter::Tenure(locker, |locker, key| locker.lock(key).ttl(TTL))
            }
            Way::Rslock => Waiter::Rslock(LockManager::new(vec![url])),
            Way::Polling(pause) => Waiter::Polling(RawFred::connect(url, COMPARE_AND_DELETE).await, pause),
        }
    }

    /// Returns the median round trip of a PING.
    async fn ping(&self, url: &str) -> Nanos {
        match self.way {
            Way::Rslock => {
                let client = redis::Client::open(url).expect("a URL");
                let connection = client.get_multiplexed_async_connection().await.expect("a connection");
                median_of(|| ping_with_redis(connection.clone())).await
            }
            Way::Tenure(_) | Way::TenureByServer | Way::Polling(_) => {
                let raw = RawFred::connect(url, COMPARE_AND_DELETE).await;
                median_of(|| raw.client.ping::<String>(None)).await
            }
        }
    }
}

async fn ping_with_redis(mut connection: MultiplexedConnection) -> redis::RedisResult<String> {
    redis::cmd("PING").query_async(&mut connection).await
}

async fn median_of<F: Future<Output = Result<String, impl std::fmt::Debug>>>(mut call: impl FnMut() -> F) -> Nanos {
    let mut calls = histogram();
    for _ in 0..2_000 {
        let sent = now();
        call().await.expect("an answer");
        calls.saturating_record(now() - sent);
    }
    calls.value_at_quantile(0.5)
}

#[derive(Clone)]
enum Waiter {
    Tenure(Locker, fn(&Locker, &str) -> LockRequest),
    Rslock(LockManager),
    Polling(RawFred, fn() -> Duration),
}

enum Held {
    Tenure(LockGuard),
    Rslock(rslock::Lock),
    Polling(Token),
}

impl Waiter {
    async fn obtain(&self, key: &str) -> Held {
        match self {
            Self::Tenure(locker, request) => Held::Tenure(request(locker, key).await.expect("in the end")),
            Self::Rslock(manager) => Held::Rslock(manager.acquire_no_guard(key, TTL).await.expect("in the end")),
            Self::Polling(raw, pause) => {
                let token = Token::random();
                while !raw.try_lock(key, token.as_str()).await {
                    sleep(pause()).await;
                }
                Held::Polling(token)
            }
        }
    }

    async fn release(&self, key: &str, held: Held) {
        match (self, held) {
            (_, Held::Tenure(guard)) => guard.release().await.expect("held"),
            (Self::Polling(raw, _), Held::Polling(token)) => {
                assert!(raw.run_script(key, token.as_str()).await.expect("an answer"), "held");
            }
            // It reports no result.
            (_, Held::Rslock(lock)) => lock.release().await,
            (_, Held::Polling(_)) => {}
        }
    }
}

/// Does what the arguments describe: gets ready, waits for the start, and prints its log.
pub(crate) fn take_turns(args: &[String]) -> Result<(), String> {
    let [contender, waiters, hold, url, key] = args else { return Err("five arguments are needed".to_owned()) };
    let known = Contender::ALL.iter().find(|known| known.name == contender);
    let contender = known.ok_or_else(|| format!("unknown contender `{contender}`"))?;
    let waiters: usize = waiters.parse().map_err(|_| format!("`{waiters}` is not a number of waiters"))?;
    let hold = hold.parse().map(Duration::from_micros).map_err(|_| format!("`{hold}` is not a time"))?;

    let runtime = Runtime::new().expect("a runtime");
    // On the runtime's own threads, like the waiters.
    let getting_ready = runtime.spawn({
        let url = url.clone();
        async move { (contender.connect(&url).await, contender.ping(&url).await) }
    });
    let (waiter, ping) = runtime.block_on(getting_ready).map_err(|error| error.to_string())?;
    say(&Ready { ping })?;

    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|error| error.to_string())?;
    let span: Span = serde_json::from_str(&line).map_err(|error| error.to_string())?;
    let logs = runtime.block_on(async {
        let here = (now(), Instant::now());
        let at = |then: Nanos| here.1 + Duration::from_nanos(then.saturating_sub(here.0));
        let mut waiting = JoinSet::new();
        for _ in 0..waiters {
            waiting.spawn(wait(waiter.clone(), key.clone(), hold, at(span.start), at(span.end)));
        }
        waiting.join_all().await
    });
    say(&logs)
}

fn say(what: &impl Serialize) -> Result<(), String> {
    let line = serde_json::to_string(what).map_err(|error| error.to_string())?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).map_err(|error| error.to_string())
}

/// Obtains and releases until the time is over.
async fn wait(waiter: Waiter, key: String, hold: Duration, start: Instant, end: Instant) -> Log {
    let mut log = Log { turns: Vec::new(), asked_in_vain: None };
    sleep_until(start).await;
    while Instant::now() < end {
        let asked = now();
        let Ok(held) = timeout_at(end, waiter.obtain(&key)).await else {
            log.asked_in_vain = Some(asked);
            break;
        };
        let obtained = now();
        if !hold.is_zero() {
            sleep(hold).await;
        }
        let released = now();
        waiter.release(&key, held).await;
        log.turns.push(Turn { asked, obtained, released });
    }
    log
}
