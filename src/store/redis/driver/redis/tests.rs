//! Connections to a peer that the test plays itself.

use tenure_test_support::{eventually, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::heard;
use super::*;
use crate::store::redis::url::parse;

const LONG: Duration = Duration::from_secs(10);

/// Replies to a login, which is one `PING`.
async fn greet(listener: &TcpListener) -> TcpStream {
    let (mut peer, _) = listener.accept().await.unwrap();
    let mut ping = [0; 14];
    peer.read_exact(&mut ping).await.unwrap();
    assert_eq!(&ping, b"*1\r\n$4\r\nPING\r\n");
    peer.write_all(b"+PONG\r\n").await.unwrap();
    peer
}

async fn listen() -> (TcpListener, Target) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let target = parse(&format!("redis://127.0.0.1:{}", listener.local_addr().unwrap().port())).unwrap();
    (listener, target)
}

async fn connected(waits: bool) -> (TcpListener, TcpStream, Arc<OwnConnection>) {
    let (listener, target) = listen().await;
    let origin = Origin::of(&target, LONG).unwrap();
    let (first, peer) = tokio::join!(origin.open(), greet(&listener));
    let connection = OwnConnection::new(origin, waits, Some(first.unwrap())).unwrap();
    (listener, peer, Arc::new(connection))
}

/// Sends a command whose argument is of this length.
async fn echo(connection: &OwnConnection, length: usize) -> Result<Value, Error> {
    let sent = connection.begin(Instant::now())?;
    let args = vec![Bytes::from(vec![b'x'; length])];
    let reply = connection.send("ECHO", args, Instant::now() + LONG).await;
    heard(connection, sent, reply.map_err(Error::from))
}

/// Sends more than the sockets take, and waits until they are full.
async fn fill(connection: &Arc<OwnConnection>) -> JoinHandle<Result<Value, Error>> {
    let filling = connection.clone();
    let filling = tokio::spawn(async move { echo(&filling, 32 * 1024 * 1024).await });
    let written = || connection.shared.link().unwrap().written();
    eventually("the sockets are full", async || {
        let before = written();
        sleep(Duration::from_millis(50)).await;
        (before > 100_000 && written() == before).then_some(())
    })
    .await;
    filling
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_full_socket_a_call_was_surely_not_sent_and_one_in_part_may_have_been() {
    let (_listener, peer, connection) = connected(false).await;
    let first = fill(&connection).await;
    let second = connection.clone();
    let second = tokio::spawn(async move { echo(&second, 3).await });
    sleep(Duration::from_millis(100)).await;
    drop(peer);
    let first = timeout(LONG, first).await.unwrap().unwrap().unwrap_err();
    assert!(first.is_transient() && !first.was_not_sent(), "{first}");
    let second = timeout(LONG, second).await.unwrap().unwrap().unwrap_err();
    assert!(second.is_transient() && second.was_not_sent(), "{second}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_was_surely_not_sent_goes_to_the_next_connection() {
    let (listener, peer, connection) = connected(true).await;
    let first = fill(&connection).await;
    let second = connection.clone();
    let second = tokio::spawn(async move { echo(&second, 3).await });
    sleep(Duration::from_millis(100)).await;
    drop(peer);
    let mut peer = timeout(LONG, greet(&listener)).await.unwrap();
    let mut command = [0; 23];
    timeout(LONG, peer.read_exact(&mut command)).await.unwrap().unwrap();
    assert_eq!(&command, b"*2\r\n$4\r\nECHO\r\n$3\r\nxxx\r\n");
    peer.write_all(b"$3\r\nxxx\r\n").await.unwrap();
    assert_eq!(timeout(LONG, second).await.unwrap().unwrap().unwrap(), Value::Bytes("xxx".into()));
    assert!(timeout(LONG, first).await.unwrap().unwrap().unwrap_err().is_transient());
    assert_eq!(connection.connections_made(), 2);
}

#[tokio::test]
async fn a_call_judges_only_the_connection_that_it_was_sent_on() {
    let (listener, target) = listen().await;
    let connection = Arc::new(OwnConnection::new(Origin::of(&target, LONG).unwrap(), true, None).unwrap());
    let early = connection.begin(Instant::now()).unwrap();
    let mut peer = greet(&listener).await;
    soon(connection.ready(LONG)).await.unwrap();
    let late = connection.begin(Instant::now()).unwrap();
    // As long as a server may be silent that is far away.
    sleep(Duration::from_millis(200)).await;
    // The early one has waited for the connection, which is as good as new.
    assert!(Error::from(connection.failed(early, convert::late())).is_timeout());
    let (echoed, ()) = soon(async {
        tokio::join!(echo(&connection, 3), async {
            peer.read_exact(&mut [0; 23]).await.unwrap();
            peer.write_all(b":1\r\n").await.unwrap();
        })
    })
    .await;
    assert_eq!(echoed.unwrap(), Value::Integer(1));
    // By now it has replied.
    assert!(Error::from(connection.failed(late, convert::late())).is_timeout());
    let silent = connection.begin(Instant::now()).unwrap();
    let waiting = connection.clone();
    let waiting = tokio::spawn(async move { echo(&waiting, 3).await });
    soon(peer.read_exact(&mut [0; 23])).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    assert!(Error::from(connection.failed(silent, convert::late())).is_timeout());
    let given_up = soon(waiting).await.unwrap().unwrap_err();
    assert!(given_up.is_transient() && given_up.to_string().contains("given up"), "{given_up}");
    assert_eq!(soon(peer.read(&mut [0; 1])).await.unwrap(), 0);
}

#[tokio::test]
async fn a_connection_ends_with_its_owner_also_while_a_subscriber_may_follow_it() {
    let (_listener, mut peer, connection) = connected(true).await;
    let pub_sub = connection.pub_sub();
    assert!(pub_sub.runtime().is_some());
    drop(connection);
    assert_eq!(timeout(LONG, peer.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
    assert!(pub_sub.runtime().is_none());
}

#[tokio::test]
async fn what_was_asked_for_before_there_is_a_connection_waits_for_it_or_was_not_sent() {
    let (listener, target) = listen().await;
    let waits = OwnConnection::new(Origin::of(&target, LONG).unwrap(), true, None).unwrap();
    let echoed = echo(&waits, 3);
    let peer = async {
        let mut peer = greet(&listener).await;
        peer.read_exact(&mut [0; 23]).await.unwrap();
        peer.write_all(b":1\r\n").await.unwrap();
        peer
    };
    let (echoed, _peer) = timeout(LONG, async { tokio::join!(echoed, peer) }).await.unwrap();
    assert_eq!(echoed.unwrap(), Value::Integer(1));
    let (listener, target) = listen().await;
    drop(listener);
    let fails = open_lazily(&target, LONG, WithoutConnection::CallsFail).unwrap();
    let refused = eventually_refused(&*fails).await;
    assert!(refused.was_not_sent() && refused.to_string().contains("connection refused"), "{refused}");
}

async fn eventually_refused(connection: &dyn Connection) -> Error {
    eventually("it knows why", async || {
        let refused = Error::from(connection.begin(Instant::now()).err()?);
        refused.to_string().contains("refused").then_some(refused)
    })
    .await
}

#[tokio::test]
async fn what_speaks_another_protocol_is_named_even_before_anything_is_asked() {
    let (listener, target) = listen().await;
    let (opened, ()) = tokio::join!(open(&target, LONG), async {
        let (mut peer, _) = listener.accept().await.unwrap();
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // It goes on reading, so that nothing is reset.
        drop(timeout(Duration::from_millis(200), peer.read(&mut [0; 64])).await);
        sleep(Duration::from_millis(100)).await;
    });
    let refused = opened.unwrap_err();
    assert!(refused.to_string().contains("no Redis or Valkey server"), "{refused}");
}
