//! Locks that change hands in one process without the server: what the server sees of it, on real servers.

use std::future::IntoFuture;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure::{Error, Locker};
use tenure_test_support::{Cluster, Server, eventually, soon};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

const TASKS: usize = 8;
const TURNS: usize = 50;

/// Returns how many scripts the server has run.
fn scripts_run(server: &Server) -> u64 {
    let stats = server.cli(&["INFO", "commandstats"]);
    let calls = |line: &str| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok();
    stats.lines().filter(|line| line.starts_with("cmdstat_eval")).filter_map(calls).sum()
}

/// Returns the fencing tokens of all turns, in the order of the turns.
async fn take_turns(locker: &Locker) -> Vec<u64> {
    let tokens = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (locker, tokens) = (locker.clone(), tokens.clone());
        tasks.spawn(async move {
            for _ in 0..TURNS {
                let guard = locker.lock("k").await.unwrap();
                tokens.lock().unwrap().push(guard.fencing_token().unwrap());
                guard.release().await.unwrap();
            }
        });
    }
    soon(tasks.join_all()).await;
    let tokens = tokens.lock().unwrap();
    tokens.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_goes_round_in_a_process_at_few_calls_and_fencing_tokens_grow() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let before = scripts_run(&server);
    let tokens = take_turns(&locker).await;
    assert_eq!(tokens.len(), TASKS * TURNS);
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    let calls = scripts_run(&server) - before;
    assert!(calls <= (TASKS * TURNS / 5) as u64, "{calls} calls");
    let next = soon(locker.lock("k").into_future()).await.unwrap();
    assert!(next.fencing_token() > tokens.last().copied());
}

/// Otherwise its clock alone would make them grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fencing_tokens_grow_also_where_the_servers_clock_was_set_back() {
    let server = Server::start();
    let (locker, other) =
        (Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap());
    let hour = Duration::from_secs(3_600).as_micros();
    let ahead = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() + hour;
    server.cli(&["SET", "{k}:fence", &ahead.to_string()]);
    let tokens = take_turns(&locker).await;
    assert!(u128::from(tokens[0]) > ahead && tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    let next = soon(other.lock("k").into_future()).await.unwrap();
    assert!(next.fencing_token() > tokens.last().copied());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_cluster_too() {
    let cluster = Cluster::start();
    let locker = Locker::connect(&cluster.url()).await.unwrap();
    let tokens = take_turns(&locker).await;
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    // Those that the server grants come from its clock, or follow the block before.
    let in_a_row = tokens.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
    assert!(in_a_row > TASKS * TURNS / 2, "{tokens:?}");
}

/// Replicas have to acknowledge each grant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_replicas_that_count_each_holder_asks_the_server() {
    let (primary, replica) = (Server::start(), Server::start());
    replica.cli(&["REPLICAOF", "127.0.0.1", &primary.port().to_string()]);
    let is_linked = async || primary.cli(&["INFO", "replication"]).contains("state=online").then_some(());
    eventually("the replica is linked", is_linked).await;
    let locker = Locker::builder().min_replicas(1).connect(&primary.url()).await.unwrap();
    let before = scripts_run(&primary);
    take_turns(&locker).await;
    let calls = scripts_run(&primary) - before;
    assert!(calls >= (TASKS * TURNS) as u64, "{calls} calls");
}

#[tokio::test]
async fn the_fencing_token_that_is_shown_is_never_below_the_holders() {
    let server = Server::start();
    let locker = Locker::connect(&server.url()).await.unwrap();
    let mut guard = locker.lock("k").await.unwrap();
    let waiters = [0; 20].map(|_| tokio::spawn(locker.lock("k").into_future()));
    tokio::time::sleep(Duration::from_millis(50)).await;
    for waiter in waiters {
        drop(guard);
        guard = soon(waiter).await.unwrap().unwrap();
        let (own, shown) = (guard.fencing_token().unwrap(), locker.inspect("k").await.unwrap().unwrap().fencing_token);
        assert!(shown.is_some_and(|shown| (own..=own + 16).contains(&shown)), "{own}, and {shown:?}");
    }
}

/// As after a failover to a replica that has nothing of it.
#[tokio::test]
async fn a_server_that_forgets_between_two_turns_grants_greater_fencing_tokens_than_those_to_spare() {
    let server = Server::start();
    let builder = Locker::builder().ttl(Duration::from_millis(900));
    let there = Locker::connect(&server.url()).await.unwrap();
    for _ in 0..20 {
        let here = builder.clone().connect(&server.url()).await.unwrap();
        if forgets_between_two_turns(&server, &here, &there).await {
            return;
        }
        soon(here.close()).await;
    }
    panic!("a waiter of the same process came first each time");
}

/// Returns false if a waiter of the same process has asked between the two commands: then there is no other holder.
async fn forgets_between_two_turns(server: &Server, here: &Locker, there: &Locker) -> bool {
    let mut guard = here.lock("k").await.unwrap();
    let waiters = [0; 12].map(|_| AbortOnDropHandle::new(tokio::spawn(here.lock("k").into_future())));
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut elsewhere = None;
    for (turn, mut waiter) in waiters.into_iter().enumerate() {
        if turn == 4 {
            server.cli(&["FLUSHALL"]);
            match there.try_lock("k").await {
                Ok(other) => elsewhere = Some(other),
                Err(Error::NotObtained { .. }) => return false,
                Err(error) => panic!("{error}"),
            }
        }
        let before = guard.fencing_token();
        drop(guard);
        guard = match tokio::time::timeout(Duration::from_secs(2), &mut waiter).await {
            Ok(obtained) => obtained,
            // On a busy machine, a holder here has learned of the loss already.
            Err(_) => {
                elsewhere = None;
                soon(waiter).await
            }
        }
        .unwrap()
        .unwrap();
        assert!(guard.fencing_token() > before);
        let Some(other) = &elsewhere else { continue };
        assert!(guard.fencing_token() < other.fencing_token(), "in turn {turn}");
        if turn == 8 {
            // So that those after it can have the lock, once a holder here has learned of its loss.
            elsewhere = None;
        }
    }
    assert!(guard.is_held());
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_processes_get_their_turns_and_greater_fencing_tokens() {
    let server = Server::start();
    let (here, there) = (Locker::connect(&server.url()).await.unwrap(), Locker::connect(&server.url()).await.unwrap());
    let (here, there) = soon(async { tokio::join!(take_turns(&here), take_turns(&there)) }).await;
    let mut both: Vec<u64> = here.iter().chain(&there).copied().collect();
    both.sort_unstable();
    both.dedup();
    assert_eq!(both.len(), 2 * TASKS * TURNS, "no token is granted twice");
    assert!(here.is_sorted_by(|a, b| a < b) && there.is_sorted_by(|a, b| a < b));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_handed_over_is_renewed_and_ends_with_its_last_guard() {
    let server = Server::start();
    let builder = Locker::builder().ttl(Duration::from_secs(60)).renew_every(Duration::from_millis(300));
    let locker = builder.connect(&server.url()).await.unwrap();
    take_turns(&locker).await;
    let guard = locker.lock("k").await.unwrap();
    let first = guard.deadline();
    let is_renewed = async || (guard.deadline() > first + Duration::from_secs(1)).then_some(());
    eventually("it is renewed several times", is_renewed).await;
    assert!(guard.is_held());
    assert_eq!(server.cli(&["EXISTS", "k"]).trim(), "1");
    drop(guard);
    soon(locker.close()).await;
    assert_eq!(server.cli(&["EXISTS", "k"]).trim(), "0");
}
