//! Slots of a cluster that are half moved: some keys are on the new node, and the slot still belongs to the old one.
//! The old node replies ASK for keys that it doesn't have, and TRYAGAIN for several keys of which it has some.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use fred::clients::Client;
#[cfg(feature = "fred")]
use fred::prelude::ReconnectPolicy;
use fred::prelude::{Builder, ClientLike, Config};
use fred::types::{ClusterHash, CustomCommand, Value};
use tenure::{Error, LockGuard, Locker};
use tenure_test_support::{Cluster, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{builder, contend, end, ms};

/// What the nodes really hold, read over separate connections.
struct Truth {
    nodes: Vec<Client>,
}

impl Truth {
    async fn of(cluster: &Cluster) -> Self {
        let mut nodes = Vec::new();
        for node in &cluster.nodes {
            let client = Builder::from_config(Config::from_url(&node.url()).unwrap()).build().unwrap();
            client.init().await.unwrap();
            nodes.push(client);
        }
        Self { nodes }
    }

    /// Returns the token and the fencing token of the key at this node.
    async fn read(&self, node: usize, key: &str) -> (Option<String>, Option<String>) {
        let calls = self.nodes[node].pipeline();
        for key in [key, &fence_of(key)] {
            // Works even if the node has the key but not yet its slot.
            let asking = CustomCommand::new_static("ASKING", ClusterHash::FirstKey, false);
            let _: Value = calls.custom(asking, Vec::<Value>::new()).await.unwrap();
            let get = CustomCommand::new_static("GET", ClusterHash::FirstKey, false);
            let _: Value = calls.custom(get, vec![key]).await.unwrap();
        }
        let (_, held, _, fence): (Value, Option<String>, Value, _) = calls.all().await.unwrap();
        // Metadata may follow the token.
        (held.map(|held| held.split('\n').next().unwrap().to_owned()), fence)
    }

    /// Asserts that a guard's token and fencing token are those of its key at the node, and not those of another key.
    async fn confirm(&self, node: usize, guard: &LockGuard) {
        let key = guard.key().to_string();
        let held = self.read(node, &key).await;
        let told = (Some(guard.token().as_str().to_owned()), guard.fencing_token().map(|fence| fence.to_string()));
        assert!(!guard.is_held() || held == told, "{key}: the server holds {held:?}, the guard has {told:?}");
    }
}

/// Returns the fence key of a key that has a hash tag.
fn fence_of(key: &str) -> String {
    format!("{key}:fence")
}

/// Returns a typical client of a user: it follows redirections by itself.
#[cfg(feature = "fred")]
pub(super) async fn client_of_the_user(cluster: &Cluster) -> Client {
    let client = Builder::from_config(Config::from_url(&cluster.url()).unwrap())
        .set_policy(ReconnectPolicy::new_constant(0, 50))
        .build()
        .unwrap();
    client.init().await.unwrap();
    client
}

/// Returns a key whose slot is at this node.
fn key_at(cluster: &Cluster, node: usize) -> String {
    (0..).map(|n| format!("{{at{n}}}")).find(|key| cluster.place_of(key) == node).unwrap()
}

const MOVES: &str = "{moves}:held";

/// Asserts that the locker reports that another holds the key, and no other error.
async fn refuses(locker: &Locker, key: &str) {
    match locker.try_lock(key).await {
        Err(Error::NotObtained { .. }) => {}
        Err(error) => panic!("{key}: {error}"),
        Ok(guard) => panic!("granted a lock that another holds: {guard:?}"),
    }
}

/// Lets `locker` try for a while to get a lock that another holds in a half-moved slot. On the same connections it also
/// works with keys of the node to which the slot moves.
async fn tries_beside_other_traffic(cluster: Cluster, locker: Locker) {
    let other = builder().command_timeout(ms(2_000)).connect(&cluster.url()).await.unwrap();
    let held = soon(other.lock(MOVES).ttl(ms(60_000)).no_renewal()).await.unwrap();
    let from = cluster.place_of(MOVES);
    let to = (from + 1) % 3;
    let migration = cluster.begin_migration(MOVES, from, to);
    migration.move_all(ms(0));
    let truth = Arc::new(Truth::of(&cluster).await);
    let tag = key_at(&cluster, to);
    let taken = format!("{tag}:taken");
    let theirs = soon(other.lock(taken.as_str()).ttl(ms(60_000)).no_renewal()).await.unwrap();
    let renewed = soon(locker.lock(format!("{tag}:renewed")).renew_every(ms(50))).await.unwrap();
    let (mut refused, over, turns) = (0, Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut traffic = JoinSet::new();
    for n in 0..8 {
        let (locker, truth, over, turns) = (locker.clone(), truth.clone(), over.clone(), turns.clone());
        let (key, taken) = (format!("{tag}:{n}"), taken.clone());
        traffic.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                refuses(&locker, &taken).await;
                // Nobody else wants the lock.
                let guard = match locker.try_lock(key.as_str()).await {
                    Ok(guard) => guard,
                    Err(error) => panic!("{key}: {error}"),
                };
                truth.confirm(to, &guard).await;
                guard.release().await.unwrap_or_else(|error| panic!("{key}: {error}"));
                turns.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let until = Instant::now() + ms(3_000);
    while Instant::now() < until {
        refuses(&locker, MOVES).await;
        refused += 1;
    }
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = soon(traffic.join_next()).await {
        ended.unwrap();
    }
    assert_eq!(renewed.check(), Ok(()));
    assert!(refused > 20, "{refused}");
    assert!(turns.load(Ordering::Relaxed) > 100, "{turns:?}");
    truth.confirm(to, &theirs).await;
    truth.confirm(to, &held).await;
    held.release().await.unwrap();
    assert_eq!(truth.read(to, MOVES).await.0, None);
    migration.finish();
}

/// Asserts that every operation on keys of a half-moved slot is decided as in any other slot.
async fn decides(cluster: Cluster, locker: Locker) {
    let (from, other) =
        (cluster.place_of(MOVES), builder().command_timeout(ms(2_000)).connect(&cluster.url()).await.unwrap());
    let to = (from + 1) % 3;
    let truth = Truth::of(&cluster).await;
    let held = soon(locker.lock("{moves}:ours").ttl(ms(60_000)).metadata("m")).await.unwrap();
    let unfenced = soon(locker.lock("{moves}:unfenced").fenced(false).ttl(ms(60_000))).await.unwrap();
    let stays = soon(other.lock("{moves}:stays").ttl(ms(60_000))).await.unwrap();
    let split = soon(other.lock("{moves}:split").ttl(ms(60_000)).renew_every(ms(50))).await.unwrap();
    let meets = soon(other.lock("{moves}:meets").ttl(ms(60_000))).await.unwrap();
    let migration = cluster.begin_migration(MOVES, from, to);
    for key in ["{moves}:ours", "{moves}:ours:fence", "{moves}:unfenced", "{moves}:split", "{moves}:meets"] {
        migration.move_key(key);
    }
    // That node doesn't know any script yet.
    cluster.nodes[to].cli(&["SCRIPT", "FLUSH"]);

    truth.confirm(to, &held).await;
    let holder = soon(locker.inspect("{moves}:ours")).await.unwrap().unwrap();
    assert_eq!((holder.token, holder.fencing_token), (held.token().clone(), held.fencing_token()));
    assert!(soon(held.server_ttl()).await.unwrap().is_some_and(|left| left > ms(50_000)));
    soon(held.renew()).await.unwrap();
    refuses(&other, "{moves}:ours").await;

    let holder = soon(locker.inspect("{moves}:unfenced")).await.unwrap().unwrap();
    assert_eq!((holder.token, holder.fencing_token), (unfenced.token().clone(), None));
    refuses(&other, "{moves}:unfenced").await;

    refuses(&locker, "{moves}:stays").await;
    assert!(soon(locker.inspect("{moves}:stays")).await.unwrap().is_some());
    soon(stays.renew()).await.unwrap();

    // A key that was never locked has no fence key, on either node.
    assert!(soon(locker.inspect("{moves}:new")).await.unwrap().is_none());
    let mut last = None;
    for _ in 0..3 {
        let new = soon(locker.try_lock("{moves}:new")).await.unwrap();
        truth.confirm(to, &new).await;
        assert!(new.fencing_token() > last);
        last = new.fencing_token();
        refuses(&other, "{moves}:new").await;
        soon(new.release()).await.unwrap();
        assert_eq!(truth.read(to, "{moves}:new").await.0, None);
    }
    let fair = soon(locker.lock("{moves}:new").fair(true)).await.unwrap();
    assert!(fair.fencing_token() > last);
    soon(fair.release()).await.unwrap();

    // The lock key and the fence key are on different nodes: nobody can take the lock, and its holder keeps it.
    let refused = soon(locker.try_lock("{moves}:split")).await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    // The inspection takes a while, and those keys are on one node before it is over.
    let looks = tokio::spawn({
        let locker = locker.clone();
        async move { locker.inspect("{moves}:meets").await }
    });
    sleep(ms(100)).await;
    migration.move_key("{moves}:meets:fence");
    assert!(soon(looks).await.unwrap().unwrap().is_some());
    let deadline = split.deadline();
    eventually("renewed there", async || (split.deadline() > deadline).then_some(())).await;
    soon(split.release()).await.unwrap();
    assert_eq!(truth.read(to, "{moves}:split").await.0, None);
    let waiter = tokio::spawn(locker.lock("{moves}:split").into_future());

    soon(held.release()).await.unwrap();
    soon(unfenced.release()).await.unwrap();
    soon(stays.release()).await.unwrap();
    soon(meets.release()).await.unwrap();
    assert!(!waiter.is_finished());
    migration.move_all(ms(0));
    migration.finish();
    soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
    for key in ["{moves}:ours", "{moves}:unfenced", "{moves}:stays", "{moves}:split"] {
        let again = soon(locker.try_lock(key)).await.unwrap();
        truth.confirm(to, &again).await;
    }
}

/// Asserts that locks of a short ttl survive while their slot moves slowly, key by key, and then by itself.
async fn survive(cluster: Cluster, locker: Locker) {
    let mut guards = Vec::new();
    // Shorter than the migration takes.
    let ttl = ms(7_000);
    for n in 0..40 {
        guards.push(soon(locker.lock(format!("{{moves}}:{n}")).ttl(ttl).renew_every(ms(600))).await.unwrap());
    }
    let several = ["{moves}:several:1", "{moves}:several:2"];
    guards.push(soon(locker.lock_all(several).ttl(ttl).renew_every(ms(600))).await.unwrap());
    let from = cluster.place_of(MOVES);
    let to = (from + 1) % 3;
    let began = Instant::now();
    let moving = tokio::task::spawn_blocking(move || {
        // 41 lock keys and fence keys, and one more of each.
        cluster.migrate(MOVES, from, to, || ());
        cluster
    });
    while !moving.is_finished() {
        for guard in &guards {
            assert_eq!(guard.check(), Ok(()), "{} after {:?}", guard.key(), began.elapsed());
        }
        sleep(ms(20)).await;
    }
    assert!(began.elapsed() > ms(8_000), "{:?}", began.elapsed());
    let cluster = moving.await.unwrap();
    let truth = Truth::of(&cluster).await;
    for guard in guards {
        truth.confirm(to, &guard).await;
        assert_eq!(guard.check(), Ok(()));
        let (key, fence) = (guard.key().clone(), guard.fencing_token());
        soon(guard.release()).await.unwrap();
        assert!(soon(locker.try_lock(key)).await.unwrap().fencing_token() > fence);
    }
}

/// Asserts that several keys of which one has moved can't be obtained, and can be when all have moved.
async fn waits_for_all(cluster: Cluster, locker: Locker) {
    let keys = ["{moves}:a", "{moves}:b"];
    // The keys exist, so they can move.
    let first = soon(locker.lock_all(keys).ttl(ms(60_000)).renew_every(ms(50))).await.unwrap();
    let from = cluster.place_of(MOVES);
    let migration = cluster.begin_migration(MOVES, from, (from + 1) % 3);
    migration.move_key("{moves}:a");
    let refused = soon(locker.obtain_all(keys)).await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    let waiter = tokio::spawn(locker.lock_all(keys).into_future());
    let deadline = first.deadline();
    eventually("renewed", async || (first.deadline() > deadline).then_some(())).await;
    let fence = first.fencing_token();
    soon(first.release()).await.unwrap();
    sleep(ms(300)).await;
    assert!(!waiter.is_finished());
    migration.move_all(ms(0));
    let second = soon(waiter).await.unwrap().unwrap();
    assert!(second.fencing_token() > fence);
    migration.finish();
    soon(second.release()).await.unwrap();
}

/// Asserts that keys are shared while their slot moves, but for the moment at which they are on two nodes.
async fn shares(cluster: Cluster, locker: Locker) {
    let other = builder().command_timeout(ms(2_000)).connect(&cluster.url()).await.unwrap();
    let read = || locker.read("{moves}:read").ttl(ms(60_000));
    let (reader, leaves) = (soon(read()).await.unwrap(), soon(read()).await.unwrap());
    let permit = soon(other.permit("{moves}:permit", 1).ttl(ms(60_000))).await.unwrap();
    let from = cluster.place_of(MOVES);
    let migration = cluster.begin_migration(MOVES, from, (from + 1) % 3);
    // Still on the old node, and on neither.
    soon(reader.renew()).await.unwrap();
    soon(leaves.release()).await.unwrap();
    let new = soon(locker.try_read("{moves}:new")).await.unwrap();
    let also_new = soon(other.try_read("{moves}:new")).await.unwrap();
    refuses(&locker, "{moves}:new").await;
    soon(new.release()).await.unwrap();
    soon(also_new.release()).await.unwrap();
    // On two nodes.
    migration.move_key("{moves}:read");
    let refused = soon(reader.renew()).await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    assert_eq!(reader.check(), Ok(()));
    // On the new node.
    migration.move_all(ms(0));
    soon(reader.renew()).await.unwrap();
    soon(permit.renew()).await.unwrap();
    assert_eq!(soon(locker.holders("{moves}:read")).await.unwrap().len(), 1);
    assert!(soon(locker.inspect("{moves}:permit")).await.unwrap().is_some());
    refuses(&other, "{moves}:read").await;
    let second = soon(other.try_read("{moves}:read")).await.unwrap();
    let full = soon(locker.try_permit("{moves}:permit", 1)).await;
    assert!(matches!(full, Err(Error::NotObtained { .. })), "{full:?}");
    let waiter = tokio::spawn(locker.permit("{moves}:permit", 1).into_future());
    sleep(ms(100)).await;
    soon(permit.release()).await.unwrap();
    soon(soon(waiter).await.unwrap().unwrap().release()).await.unwrap();
    let writer = soon(locker.lock("{moves}:down")).await.unwrap();
    soon(soon(writer.downgrade()).await.unwrap().release()).await.unwrap();
    soon(reader.release()).await.unwrap();
    soon(second.release()).await.unwrap();
    migration.finish();
    for key in ["{moves}:read", "{moves}:permit", "{moves}:new", "{moves}:down"] {
        soon(soon(locker.try_lock(key)).await.unwrap().release()).await.unwrap();
    }
}

/// Asserts that what empties a key on the node that a slot leaves is done, and reported as done: from then on that node
/// redirects whoever asks for the key, also in the middle of a script.
async fn empties(cluster: Cluster, locker: Locker) {
    let other = builder().command_timeout(ms(2_000)).connect(&cluster.url()).await.unwrap();
    let reader = soon(locker.read("{moves}:read").ttl(ms(60_000))).await.unwrap();
    let lingers = soon(locker.read("{moves}:lingers").ttl(ms(60_000)).hold_at_least(ms(2_000))).await.unwrap();
    let permit = soon(locker.permit("{moves}:permit", 1).ttl(ms(60_000))).await.unwrap();
    let (full, leaves) = (
        soon(locker.permit("{moves}:full", 2).ttl(ms(60_000))).await.unwrap(),
        soon(locker.permit("{moves}:full", 2).ttl(ms(60_000))).await.unwrap(),
    );
    let held = soon(locker.lock("{moves}:fair").fair(true).ttl(ms(60_000))).await.unwrap();
    let shares = soon(locker.permit("{moves}:gives-up", 1).ttl(ms(60_000))).await.unwrap();
    // Each is the only one in its line.
    let next = tokio::spawn(other.lock("{moves}:fair").fair(true).ttl(ms(60_000)).into_future());
    let joins = tokio::spawn(other.permit("{moves}:full", 2).ttl(ms(60_000)).into_future());
    let gives_up = tokio::spawn(other.permit("{moves}:gives-up", 1).ttl(ms(60_000)).into_future());
    let from = cluster.place_of(MOVES);
    for key in ["{moves}:fair", "{moves}:full", "{moves}:gives-up"] {
        let line = format!("{key}:queue");
        eventually("it is in the line", async || (cluster.nodes[from].cli(&["ZCARD", &line]) == "1").then_some(()))
            .await;
    }
    let migration = cluster.begin_migration(MOVES, from, (from + 1) % 3);
    for released in [soon(reader.release()).await, soon(permit.release()).await, soon(held.release()).await] {
        released.unwrap();
    }
    soon(lingers.release()).await.unwrap();
    soon(leaves.release()).await.unwrap();
    let joined = soon(joins).await.unwrap().unwrap();
    gives_up.abort();
    let is_left = |key: &str| migration.left().iter().any(|left| left == key);
    eventually("it has left the line", async || (!is_left("{moves}:gives-up:queue")).then_some(())).await;
    for key in ["{moves}:read", "{moves}:permit"] {
        assert!(!is_left(key), "{key} is still taken");
    }
    migration.move_all(ms(0));
    migration.finish();
    soon(soon(next).await.unwrap().unwrap().release()).await.unwrap();
    for share in [full, joined, shares] {
        soon(share.release()).await.unwrap();
    }
    for key in ["{moves}:read", "{moves}:permit", "{moves}:fair", "{moves}:full", "{moves}:gives-up"] {
        soon(soon(other.try_lock(key)).await.unwrap().release()).await.unwrap();
    }
}

/// Asserts that operations on keys of one slot share calls. If the keys are on two nodes, no call is decided as a
/// whole, but each operation is.
async fn shares_calls(cluster: Cluster, locker: Locker) {
    let from = cluster.place_of(MOVES);
    let to = (from + 1) % 3;
    let mut held = Vec::new();
    for n in 0..32 {
        held.push(soon(locker.lock(format!("{{moves}}:held:{n}")).ttl(ms(60_000)).renew_every(ms(100))).await.unwrap());
    }
    let migration = cluster.begin_migration(MOVES, from, to);
    for n in (0..32).step_by(2) {
        migration.move_key(&format!("{{moves}}:held:{n}"));
        migration.move_key(&format!("{{moves}}:held:{n}:fence"));
    }
    let deadlines: Vec<_> = held.iter().map(LockGuard::deadline).collect();
    let mut tasks = JoinSet::new();
    for n in 0..64 {
        let locker = locker.clone();
        tasks.spawn(async move {
            let (key, mut last) = (format!("{{moves}}:new:{n}"), None);
            for _ in 0..5 {
                refuses(&locker, &format!("{{moves}}:held:{}", n % 32)).await;
                let guard = locker.try_lock(key.as_str()).await.unwrap_or_else(|error| panic!("{key}: {error}"));
                assert!(guard.fencing_token() > last, "{key}");
                last = guard.fencing_token();
                guard.release().await.unwrap_or_else(|error| panic!("{key}: {error}"));
            }
        });
    }
    while let Some(ended) = soon(tasks.join_next()).await {
        ended.unwrap();
    }
    eventually("all are renewed", async || {
        held.iter().zip(&deadlines).all(|(guard, before)| guard.deadline() > *before).then_some(())
    })
    .await;
    let truth = Truth::of(&cluster).await;
    for (n, guard) in held.iter().enumerate() {
        assert_eq!(guard.check(), Ok(()), "{}", guard.key());
        truth.confirm(if n % 2 == 0 { to } else { from }, guard).await;
    }
    migration.finish();
}

/// Moves a slot to another node and back, again and again; it stays half moved for a while each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_stay_exclusive_while_their_slot_moves_to_and_fro() {
    let cluster = Cluster::start();
    let (witness, mut contenders) = contend(&cluster.url(), builder(), &["{moves}:a", "{moves}:b", "{moves}:c"]).await;
    for key in ["{moves}:a", "{moves}:b", "{moves}:c"] {
        #[cfg(feature = "fred")]
        let locker = builder().client(client_of_the_user(&cluster).await);
        #[cfg(not(feature = "fred"))]
        let locker = builder().connect(&cluster.url()).await.unwrap();
        witness.clone().contends(&mut contenders, locker, key);
    }
    let locker = builder().connect(&cluster.url()).await.unwrap();
    let held = soon(locker.lock(MOVES).ttl(ms(60_000)).renew_every(ms(300))).await.unwrap();
    let home = cluster.place_of(MOVES);
    let away = (home + 1) % 3;
    let moving = tokio::task::spawn_blocking(move || {
        for (from, to) in [(home, away), (away, home), (home, away), (away, home)] {
            let migration = cluster.begin_migration(MOVES, from, to);
            migration.move_all(ms(50));
            std::thread::sleep(ms(300));
            migration.finish();
            std::thread::sleep(ms(200));
        }
        cluster
    });
    let began = witness.turns();
    // On a busy machine, the hundreds of commands take longer than is soon.
    let cluster = moving.await.unwrap();
    assert!(witness.turns() > began + 20, "{} turns", witness.turns() - began);
    witness.goes_on(20).await;
    let deadline = held.deadline();
    eventually("it is renewed", async || (held.deadline() > deadline).then_some(())).await;
    assert_eq!(held.check(), Ok(()));
    end(contenders).await;
    Truth::of(&cluster).await.confirm(home, &held).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_ask_the_new_node_is_told_so() {
    let cluster = Cluster::start();
    let rights = "resetchannels ~* +eval +evalsha +get +set +del +pexpire +pttl +time +cluster|info +cluster|slots";
    for node in &cluster.nodes {
        let user: Vec<&str> = ["ACL", "SETUSER", "u", "on", ">p"].into_iter().chain(rights.split(' ')).collect();
        assert_eq!(node.cli(&user), "OK");
    }
    let locker = builder().command_timeout(ms(2_000)).connect(&cluster.url().replace("://", "://u:p@")).await.unwrap();
    let held = soon(locker.lock(MOVES).ttl(ms(60_000))).await.unwrap();
    let from = cluster.place_of(MOVES);
    let migration = cluster.begin_migration(MOVES, from, (from + 1) % 3);
    migration.move_all(ms(0));
    let refused = soon(locker.try_lock(MOVES)).await.unwrap_err();
    assert!(refused.code() == Some("NOPERM") && refused.to_string().contains("asking"), "{refused}");
    for node in &cluster.nodes {
        assert_eq!(node.cli(&["ACL", "SETUSER", "u", "+asking"]), "OK");
    }
    refuses(&locker, MOVES).await;
    soon(held.release()).await.unwrap();
    migration.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_leaves_a_key_empty_is_done() {
    let cluster = Cluster::start();
    let locker = builder().command_timeout(ms(2_000)).connect(&cluster.url()).await.unwrap();
    empties(cluster, locker).await;
}

/// Runs each test with a client of our own, and with one that follows redirections by itself.
macro_rules! with_either_client {
    ($($name:ident: $case:ident within $timeout:expr,)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn by_its_own_client() {
                let cluster = Cluster::start();
                let locker = builder().command_timeout($timeout).connect(&cluster.url()).await.unwrap();
                $case(cluster, locker).await;
            }

            #[cfg(feature = "fred")]
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn by_a_client_of_the_user() {
                let cluster = Cluster::start();
                let locker = builder().command_timeout($timeout).client(client_of_the_user(&cluster).await);
                $case(cluster, locker).await;
            }
        }
    )*};
}

with_either_client! {
    what_another_holds_is_never_granted_beside_other_traffic: tries_beside_other_traffic within ms(2_000),
    keys_are_decided_on_as_ever: decides within ms(2_000),
    operations_that_share_calls_are_decided_one_by_one: shares_calls within ms(2_000),
    forty_locks_survive_the_slow_migration_of_their_slot: survive within ms(2_000),
    keys_are_shared: shares within ms(2_000),
    several_keys_of_which_one_has_moved_are_waited_for: waits_for_all within ms(2_000),
}
