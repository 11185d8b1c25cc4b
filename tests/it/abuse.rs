//! Servers that answer nonsense, announce too much, evict, have no room for clients or never finish a handshake.
//!
//! Whatever they do: errors are clear, nothing panics, nothing hangs beyond its timeout, no guard believes beyond its
//! deadline, and afterwards locks work again. What is too late is in `late.rs` and `errors.rs`, what is silent in
//! `loss.rs`, connections that are killed in `loss.rs` and `waiting.rs`, and a server that is out of memory in
//! `errors.rs`, `loss.rs` and `bounds.rs`. Many clients and many waiters are in `tests/many.rs`.

use std::fs;
use std::future::IntoFuture;
use std::time::{Duration, Instant};

use tenure::{Error, LockGuard, Locker, Loss};
use tenure_test_support::{Mode, Proxy, Server, eventually, soon, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What a call may take: less than the default, as every case of nonsense may take one.
const TIMEOUT: Duration = ms(500);

async fn locker(url: &str) -> Locker {
    let connect = async || Locker::builder().ttl(ms(1_000)).command_timeout(TIMEOUT).connect(url).await.ok();
    eventually("it is connected", connect).await
}

/// Locks can be obtained, are renewed, and can be released.
async fn works_again(locker: &Locker, key: &str) {
    let guard = eventually("a lock is obtained", async || locker.try_lock(key).ttl(ms(5_000)).await.ok()).await;
    eventually("it is renewed", async || guard.renew().await.ok()).await;
    assert_eq!(guard.check(), Ok(()));
    // A release of unknown outcome is tried again.
    soon(guard.release()).await.unwrap();
}

/// Asserts that the guard sees itself as held until its deadline at most.
async fn is_lost_in_time(guard: &LockGuard, what: &str) {
    let deadline = guard.deadline();
    let loss = within(deadline.saturating_duration_since(tokio::time::Instant::now()) + ms(50), guard.lost()).await;
    assert!(matches!(loss, Loss::Expired | Loss::Missing | Loss::Taken), "{what}: {loss}");
    assert!(!guard.is_held(), "{what}");
}

/// No reply to any request of ours, however it is read.
const NONSENSE: [&[u8]; 22] = [
    b"\r\n",
    b"hello\r\n",
    b"\0\0\0\0",
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    b"+OK\r\n",
    b":1\r\n",
    b":-1\r\n",
    b":9223372036854775807\r\n",
    b":-9223372036854775808\r\n",
    b":99999999999999999999\r\n",
    b":one\r\n",
    b"$-1\r\n",
    b"$-5\r\n",
    b"$5\r\nhello\r\n",
    b"$5\r\nhello world\r\n",
    b"$3\r\n\xff\xfe\xfd\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"*3\r\n:1\r\n:2\r\n:3\r\n",
    b"*4\r\n:1\r\n:2\r\n$-1\r\n$6\r\nLATE x\r\n",
    b"*2147483647\r\n",
    b"$500000000\r\nonly this",
];

#[tokio::test]
async fn a_server_that_answers_nonsense_is_believed_nothing() {
    let server = Server::start();
    let mut cases = JoinSet::new();
    // Deeper than any stack. fred overflows its own (driver/fred.rs).
    let levels = if cfg!(feature = "fred") { 100 } else { 1_000_000 };
    let nested: &[u8] = Box::leak(b"*1\r\n".repeat(levels).into_boxed_slice());
    for (n, nonsense) in NONSENSE.into_iter().chain([nested]).enumerate() {
        let proxy = Proxy::start(server.port()).await;
        cases.spawn(async move {
            let what = nonsense.get(..64).unwrap_or(nonsense).escape_ascii().to_string();
            let [held, other, again] = ["held", "other", "again"].map(|key| format!("{key}:{n}"));
            let locker = locker(&proxy.url()).await;
            let guard = eventually("it is held", async || locker.try_lock(held.as_str()).await.ok()).await;
            proxy.set(Mode::Instead(nonsense));
            let refused = within(TIMEOUT + ms(1_500), locker.try_lock(other.as_str())).await.unwrap_err();
            assert!(matches!(&refused, Error::Redis(_)), "{what}: {refused}");
            is_lost_in_time(&guard, &what).await;
            proxy.set(Mode::Pass);
            works_again(&locker, &again).await;
            soon(locker.close()).await;
        });
    }
    cases.join_all().await;
    let count =
        "return #redis.call('KEYS', 'held:*') + #redis.call('KEYS', 'other:*') + #redis.call('KEYS', 'again:*')";
    eventually("nothing is left", async || (server.cli(&["EVAL", count, "0"]) == "0").then_some(())).await;
}

/// Returns the memory of this process, in KiB.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or_default()
}

/// Listens, and accepts connections that it never answers; keeps them open.
async fn silent() -> (u16, tokio::task::AbortHandle) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepting = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            kept.push(connection);
        }
    });
    (port, accepting.abort_handle())
}

#[tokio::test]
async fn a_server_that_accepts_and_says_nothing_is_given_up_on_in_time() {
    let (port, accepting) = silent().await;
    let mut schemes = vec!["redis"];
    // A handshake that stalls.
    if cfg!(any(feature = "rustls", feature = "native-tls")) {
        schemes.push("rediss");
    }
    for scheme in schemes {
        let url = format!("{scheme}://127.0.0.1:{port}");
        let connecting = Locker::builder().command_timeout(TIMEOUT).connect(&url);
        let refused = within(TIMEOUT * 2 + ms(1_500), connecting).await.unwrap_err();
        assert!(refused.is_transient(), "{url}: {refused}");
        assert!(refused.to_string().contains(&port.to_string()), "{url}: {refused}");
    }
    accepting.abort();
}

#[tokio::test]
async fn a_server_without_room_for_clients_refuses_by_name_and_is_waited_out() {
    let server = Server::start();
    let locker = locker(&server.url()).await;
    let guard = soon(locker.lock("held")).await.unwrap();
    // Nobody else can come in, not even redis-cli.
    let mut only_one = TcpStream::connect(("127.0.0.1", server.port())).await.unwrap();
    let mut command = async |command: &str| {
        only_one.write_all(format!("{command}\r\n").as_bytes()).await.unwrap();
        let mut reply = [0; 256];
        let length = soon(only_one.read(&mut reply)).await.unwrap();
        assert!(length > 0 && reply[0] != b'-', "{command}: {}", reply[..length].escape_ascii());
    };
    command("CONFIG SET maxclients 1").await;
    // Whoever is in stays in.
    soon(guard.renew()).await.unwrap();
    let refused = soon(Locker::connect(&server.url())).await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    assert!(refused.to_string().contains("max number of clients"), "{refused}");
    command("CLIENT KILL TYPE normal SKIPME yes").await;
    is_lost_in_time(&guard, "no room").await;
    let refused = soon(locker.try_lock("other")).await.unwrap_err();
    assert!(matches!(refused, Error::Redis(_)) && refused.is_transient(), "{refused}");
    let waiter = tokio::spawn(locker.lock("waits").into_future());
    sleep(TIMEOUT * 2).await;
    assert!(!waiter.is_finished(), "{:?}", waiter.await);
    command("CONFIG SET maxclients 1000").await;
    soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
    works_again(&locker, "again").await;
}

#[tokio::test]
async fn a_lock_that_is_evicted_is_missing_and_fencing_tokens_grow_on() {
    let server = Server::start();
    let locker = locker(&server.url()).await;
    let guard = soon(locker.lock("k").ttl(ms(30_000))).await.unwrap();
    let fence = guard.fencing_token();
    server.cli(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    // Recent is what was used in the last second, and a sample of keys decides.
    server.cli(&["CONFIG", "SET", "maxmemory-samples", "64"]);
    sleep(ms(1_100)).await;
    server.cli(&["CONFIG", "SET", "maxmemory", "4mb"]);
    let fill = "for i = 1, 100 do redis.call('SET', KEYS[1] .. ARGV[1] .. i, string.rep('x', 10000)) end";
    eventually("it is evicted", async || {
        server.cli(&["EVAL", fill, "1", "junk", &format!("{}:", fastrand::u64(..))]);
        (server.cli(&["EXISTS", "k"]) == "0").then_some(())
    })
    .await;
    let lost = soon(guard.renew()).await.unwrap_err();
    assert!(matches!(lost, Error::NotHeld { loss: Loss::Missing, .. }), "{lost}");
    assert_eq!(guard.check(), Err(Loss::Missing));
    let next = eventually("another obtains it", async || locker.try_lock("k").await.ok()).await;
    assert!(next.fencing_token() > fence, "{:?} after {fence:?}", next.fencing_token());
    works_again(&locker, "again").await;
}

#[tokio::test]
async fn a_flood_on_the_channel_of_a_lock_neither_fills_memory_nor_hides_a_release() {
    let server = Server::start();
    // A client that doesn't keep up loses its connection.
    server.cli(&["CONFIG", "SET", "client-output-buffer-limit", "pubsub 64kb 32kb 1"]);
    let holder = locker(&server.url()).await;
    let waiting = soon(Locker::builder().poll_every(ms(60_000)).connect(&server.url())).await.unwrap();
    // The server does nothing else for as long as the flood lasts, which renews no lock.
    let guard = soon(holder.lock("k").ttl(ms(600_000))).await.unwrap();
    let waiter = tokio::spawn(waiting.lock("k").into_future());
    eventually("it listens", async || server.cli(&["PUBSUB", "NUMSUB", "k"]).ends_with('1').then_some(())).await;
    let before = memory();
    for _ in 0..20 {
        // 20 MB each, in one go: more than the server keeps for a client.
        let flood = "for i = 1, 200 do redis.call('PUBLISH', KEYS[1], string.rep('x', 100000)) end";
        server.cli(&["EVAL", flood, "1", "k"]);
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 200 * 1024, "{grown} KiB more");
    let released = Instant::now();
    guard.release().await.unwrap();
    drop(soon(waiter).await.unwrap());
    assert!(released.elapsed() < ms(10_000), "after {:?}", released.elapsed());
    works_again(&holder, "again").await;
}
