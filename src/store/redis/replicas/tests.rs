//! On real servers, and, where only the number and the length of the calls matter, on a played one under paused time.

use std::future::Future;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tenure_test_support::{Server, eventually, soon};
use tokio::runtime::Handle;
use tokio::time::sleep_until;

use super::super::driver::{self, Calling, Nodes, PubSub, Value};
use super::super::router::all;
use super::super::url;
use super::*;
use crate::{Driver, RedisError, RedisErrorKind};

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn an_answer_on_another_connection_counts_for_nothing() {
    let primary = Server::start();
    let _replica = primary.start_replica();
    let waits = Waits::new();
    let connection = driver::connection_to(&primary.url()).await;
    let until = || Instant::now() + Duration::from_secs(5);
    let same = Writing::on(&*connection, 1).unwrap();
    soon(same.acknowledged(&waits, &*connection, until())).await.unwrap();
    let before = Writing::on(&*connection, 1).unwrap();
    connection.replace();
    let again = async || (connection.send("PING", Vec::new(), until()).await.is_ok()).then_some(());
    eventually("it is connected again", again).await;
    let refused = soon(before.acknowledged(&waits, &*connection, until())).await.unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn what_waits_behind_it_has_no_connection_replaced() {
    let server = Server::start();
    for driver in [Driver::Fred, Driver::Redis] {
        let target = url::parse(&server.url()).unwrap();
        let connection = match driver::open(driver, &target, Duration::from_secs(10)).await {
            Err(Error::Unsupported(_)) => continue,
            opened => opened.unwrap(),
        };
        let (made, waits) = (connection.connections_made(), Waits::new());
        let writing = Writing::on(&*connection, 1).unwrap();
        let blocks = writing.acknowledged(&waits, &*connection, Instant::now() + Duration::from_millis(2_000));
        let behind = async {
            eventually("it waits", async || {
                server.cli(&["INFO", "clients"]).contains("blocked_clients:1").then_some(())
            })
            .await;
            for _ in 0..3 {
                let sent = connection.begin(Instant::now()).unwrap();
                let reply = connection.send("PING", Vec::new(), Instant::now() + Duration::from_millis(300)).await;
                assert!(heard(&*connection, sent, reply.map_err(Error::from)).unwrap_err().is_timeout());
            }
        };
        let (refused, ()) = tokio::join!(blocks, behind);
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
        assert_eq!(connection.connections_made(), made);
    }
}

#[tokio::test]
#[ignore = "needs a server; tests/internals.rs runs it"]
async fn zero_is_not_for_ever() {
    let server = Server::start();
    let waits = Waits::new();
    let connection = driver::connection_to(&server.url()).await;
    let writing = Writing::on(&*connection, 1).unwrap();
    let refused = soon(writing.acknowledged(&waits, &*connection, Instant::now())).await.unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { .. }), "{refused}");
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// A connection to a server that runs one `WAIT` after the other. Each command takes 1 ms.
#[derive(Debug)]
struct Played {
    /// Replicas acknowledge nothing.
    is_stalled: bool,
    waits: Waits,
    state: Mutex<PlayedServer>,
}

#[derive(Debug)]
struct PlayedServer {
    made: u64,
    asked: usize,
    /// Until when the server runs what it was sent.
    busy_until: Instant,
}

impl Played {
    fn new(is_stalled: bool) -> Self {
        Self {
            is_stalled,
            waits: Waits::new(),
            state: Mutex::new(PlayedServer { made: 1, asked: 0, busy_until: Instant::now() }),
        }
    }

    fn busy_until(&self) -> Instant {
        self.state.lock().unwrap().busy_until
    }

    fn asked(&self) -> usize {
        self.state.lock().unwrap().asked
    }

    /// After a write that was sent on the connection as it is now.
    fn acknowledged(&self, timeout: Duration) -> impl Future<Output = Result<(), Error>> {
        let writing = Writing::on(self, 1).unwrap();
        writing.acknowledged(&self.waits, self, Instant::now() + timeout)
    }
}

impl Connection for Played {
    fn send(&self, command: &'static str, args: Vec<Bytes>, until: Instant) -> Calling<'_, Value> {
        assert_eq!(command, "WAIT");
        Box::pin(async move {
            let millis: u64 = std::str::from_utf8(&args[1]).unwrap().parse().unwrap();
            assert!(millis > 0, "to wait for ever");
            let over = {
                let mut state = self.state.lock().unwrap();
                state.asked += 1;
                state.busy_until = state.busy_until.max(Instant::now()) + ms(if self.is_stalled { millis } else { 1 });
                state.busy_until
            };
            sleep_until(over.min(until)).await;
            match over > until {
                true => Err(RedisError::new(RedisErrorKind::Timeout, "played")),
                false => Ok(Value::Integer((!self.is_stalled).into())),
            }
        })
    }

    fn address(&self) -> String {
        "played".to_owned()
    }

    fn nodes(&self) -> Option<Arc<dyn Nodes>> {
        None
    }

    fn is_cluster(&self) -> bool {
        false
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn connections_made(&self) -> u64 {
        self.state.lock().unwrap().made
    }

    fn ready(&self, _: Duration) -> Calling<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn begin(&self, now: Instant) -> Result<Sent, RedisError> {
        Ok(Sent::with_connection(now))
    }

    fn answered(&self) {}

    fn failed(&self, _: Sent, error: RedisError) -> RedisError {
        error
    }

    fn will_wait(&self, now: Instant) -> Sent {
        Sent::with_connection(now)
    }

    fn unheard(&self, _: Sent) -> RedisError {
        RedisError::new(RedisErrorKind::Timeout, "unheard")
    }

    fn replace(&self) {}

    fn runtime(&self) -> Option<Handle> {
        None
    }

    fn pub_sub(&self) -> Arc<dyn PubSub> {
        unreachable!("nobody waits")
    }
}

#[tokio::test(start_paused = true)]
async fn many_writes_at_once_block_the_connection_for_no_longer_than_one() {
    let server = Played::new(true);
    let began = Instant::now();
    let results = all((0..50).map(|n| server.acknowledged(ms(2_000 - n)))).await;
    for result in results {
        let refused = result.unwrap_err();
        assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
    }
    let blocked = server.busy_until() - began;
    assert!(blocked <= ms(1_610), "{blocked:?}");
    assert!(began.elapsed() <= ms(1_610), "too little time to undo them: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn many_writes_at_once_are_counted_together_where_replicas_are_well() {
    let server = Played::new(false);
    for result in all((0..1_000).map(|_| server.acknowledged(ms(100)))).await {
        result.unwrap();
    }
    // One for the first, and one for those that came while it was on its way.
    assert_eq!(server.asked(), 2);
    // A later write is not counted by an earlier call.
    server.acknowledged(ms(100)).await.unwrap();
    assert_eq!(server.asked(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_holds_up_nobody() {
    let server = Played::new(false);
    let leaves = tokio::time::timeout(ms(0), server.acknowledged(ms(100)));
    assert!(leaves.await.is_err());
    server.acknowledged(ms(100)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_write_on_an_earlier_connection_is_not_counted_with_others() {
    let server = Played::new(false);
    let earlier = server.acknowledged(ms(100));
    server.state.lock().unwrap().made = 2;
    let results = all([server.acknowledged(ms(100))].into_iter()).await;
    results.into_iter().for_each(Result::unwrap);
    let refused = earlier.await.unwrap_err();
    assert!(matches!(refused, Error::NotReplicated { needed: 1, acknowledged: 0 }), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_nobody_polls_any_more_keeps_its_turn_for_no_longer_than_others_can_wait() {
    let server = Played::new(false);
    let mut put_aside = Box::pin(server.acknowledged(ms(1_000)));
    assert!(tokio::time::timeout(ms(0), put_aside.as_mut()).await.is_err());
    let results = all((0..10).map(|_| server.acknowledged(ms(100)))).await;
    results.into_iter().for_each(Result::unwrap);
    let began = Instant::now();
    server.acknowledged(ms(100)).await.unwrap();
    assert_eq!(began.elapsed(), ms(1));
    put_aside.await.unwrap();
}
