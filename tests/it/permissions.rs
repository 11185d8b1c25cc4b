//! The ACL rules that the README lists for a user of the server are sufficient as they are.

use std::time::Duration;

use tenure::{Error, Locker, LockerBuilder};
use tenure_test_support::{Cluster, Sentinel, Server, Version, eventually, soon};

const README: &str = include_str!("../../README.md");

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The rules of that section.
struct Documented {
    /// The rules that every user needs.
    base: Vec<&'static str>,
    /// The rules for notifications; and on a cluster.
    news: Vec<&'static str>,
    news_on_a_cluster: Vec<&'static str>,
    fair: Vec<&'static str>,
    /// The list of cases: the topic and the rules of each.
    cases: Vec<(&'static str, Vec<&'static str>)>,
}

impl Documented {
    fn read() -> Self {
        let section = README.split("\n## ").find(|section| section.starts_with("Permissions")).unwrap();
        let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
        let blocks: Vec<&str> = section.lines().filter_map(|line| line.strip_prefix("    ")).collect();
        // If you add a block, add a test.
        let [base, news, fair] = blocks[..] else { panic!("{blocks:?}") };
        let (news, rest) = news.split_once("(on a cluster ").unwrap();
        let cases: Vec<_> = section
            .lines()
            .filter_map(|line| line.strip_prefix("- "))
            .map(|case| {
                // The last part that is marked as code.
                let mut parts = case.trim_end_matches(|c| c != '`').rsplit('`').skip(1);
                (case, words(parts.next().unwrap()))
            })
            .collect();
        assert_eq!(cases.len(), 8, "{cases:?}");
        let news_on_a_cluster = words(rest.trim_end_matches(')'));
        Self { base: words(base), news: words(news), news_on_a_cluster, fair: words(fair), cases }
    }

    fn case(&self, about: &str) -> &[&'static str] {
        let mut cases = self.cases.iter().filter(|(case, _)| case.starts_with(about));
        let (_, rules) = cases.next().unwrap();
        assert!(cases.next().is_none(), "{about}");
        rules
    }

    fn base_and(&self, more: &[&'static str]) -> Vec<&'static str> {
        [&self.base, more].concat()
    }
}

/// Creates the user `app` with the password `secret` again.
fn allow(server: &Server, rules: &[&str]) {
    server.cli(&["ACL", "DELUSER", "app"]);
    assert_eq!(server.cli(&[&["ACL", "SETUSER", "app", "on", ">secret"][..], rules].concat()), "OK", "{rules:?}");
}

fn url(server: &Server) -> String {
    server.url().replace("redis://", "redis://app:secret@")
}

fn builder() -> LockerBuilder {
    // A waiter without notifications won't find a release by polling within the patience of a test.
    Locker::builder().prefix("app:").poll_every(Duration::from_secs(60))
}

/// Does what every user of the crate does.
async fn use_locks(locker: &Locker, key: &str) -> Result<(), Error> {
    let guard = soon(locker.lock(key).metadata("m")).await?;
    guard.renew().await?;
    guard.renew_for(ms(5_000)).await?;
    guard.ensure(ms(60_000)).await?;
    guard.server_ttl().await?;
    locker.inspect(key).await?;
    match locker.try_lock(key).await {
        Err(Error::NotObtained { .. }) => {}
        other => drop(other?),
    }
    let guard = locker.adopt(guard.into_lease()).await?;
    guard.release().await?;
    let own = soon(locker.lock(key).token("own".parse()?)).await?;
    soon(locker.lock(key).token("own".parse()?)).await?.renew().await?;
    own.release().await?;
    for request in [locker.lock(key), locker.lock(key).token("own".parse()?)] {
        soon(request.hold_at_least(ms(20)).hold_at_most(ms(20_000))).await?.release().await?;
    }
    drop(soon(locker.lock(key).hold_at_least(ms(20))).await?);
    let (one, other) = (format!("{{{key}}}:1"), format!("{{{key}}}:2"));
    let set = soon(locker.lock_all([one.as_str(), &other])).await?;
    set.renew().await?;
    set.release().await
}

/// Waits on one locker until the other releases the lock.
async fn wait(here: &Locker, there: &Locker, key: &str, fair: bool) {
    let guard = soon(here.lock(key).fair(fair)).await.unwrap();
    let waiter = tokio::spawn(there.lock(key).fair(fair).into_future());
    tokio::time::sleep(ms(50)).await;
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn the_documented_permissions_suffice() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base);
    let locker = builder().connect(&url(&server)).await.unwrap();
    use_locks(&locker, "k").await.unwrap();
}

#[tokio::test]
async fn each_documented_permission_is_needed() {
    let (server, documented) = (Server::start(), Documented::read());
    for needless in documented.base.iter().filter(|rule| rule.starts_with(['+', '~'])) {
        let rules: Vec<&str> = documented.base.iter().copied().filter(|rule| rule != needless).collect();
        allow(&server, &rules);
        server.cli(&["SCRIPT", "FLUSH"]);
        server.cli(&["FLUSHALL"]);
        let locker = builder().connect(&url(&server)).await.unwrap();
        let refused = use_locks(&locker, "k").await.expect_err(needless);
        assert_eq!(refused.code(), Some("NOPERM"), "without {needless}: {refused}");
    }
}

#[tokio::test]
async fn with_the_documented_permissions_waiters_hear_of_releases_and_requests_are_fair() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &[documented.base_and(&documented.news), documented.fair.clone()].concat());
    let here = builder().connect(&url(&server)).await.unwrap();
    let there = builder().connect(&url(&server)).await.unwrap();
    for fair in [false, true] {
        wait(&here, &there, "k", fair).await;
    }
    // The client asks for things that it can do without; the scripts ask for nothing beyond the rules.
    let denied = server.cli(&["ACL", "LOG"]);
    assert!(!denied.lines().any(|line| line == "lua"), "{denied}");
}

/// Those who wait without being fair do without the line from then on.
#[tokio::test]
async fn who_may_not_stand_in_line_can_not_be_fair_whatever_others_do() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base_and(&documented.news));
    let here = builder().connect(&url(&server)).await.unwrap();
    let there = builder().connect(&url(&server)).await.unwrap();
    for round in ["before", "after"] {
        for request in [there.lock("k"), there.try_lock("k")] {
            let refused = soon(request.fair(true)).await.unwrap_err();
            assert_eq!(refused.code(), Some("NOPERM"), "{round}: {refused}");
        }
        wait(&here, &there, "k", false).await;
    }
}

/// Returns how often scripts were refused something since the log was emptied.
fn refusals_of_scripts(server: &Server) -> u32 {
    let log = server.cli(&["ACL", "LOG"]);
    let lines: Vec<&str> = log.lines().collect();
    let counts = lines.windows(6).filter(|lines| lines[0] == "count" && lines[5] == "lua");
    counts.map(|lines| lines[1].parse::<u32>().unwrap()).sum()
}

#[tokio::test]
async fn who_may_not_stand_in_line_does_not_ask_for_it_at_every_turn() {
    const TURNS: u32 = 6;
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base_and(&documented.news));
    let locker = builder().connect(&url(&server)).await.unwrap();
    let mut guard = locker.lock("k").await.unwrap();
    let mut waiters = Vec::new();
    for _ in 0..TURNS {
        waiters.push(tokio::spawn(locker.lock("k").into_future()));
    }
    eventually("the first has asked for it", async || (refusals_of_scripts(&server) > 0).then_some(())).await;
    for waiter in waiters {
        // Longer than a process keeps a lock from the line.
        tokio::time::sleep(ms(150)).await;
        guard.release().await.unwrap();
        guard = soon(waiter).await.unwrap().unwrap();
    }
    // What was asked before the refusal was known may still be on its way.
    let refusals = refusals_of_scripts(&server);
    assert!(refusals < TURNS / 2, "{}", server.cli(&["ACL", "LOG"]));
    guard.release().await.unwrap();
}

#[tokio::test]
async fn who_may_not_stand_in_line_waits_for_several_keys_all_the_same() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base_and(&documented.news));
    let locker = builder().connect(&url(&server)).await.unwrap();
    let guard = locker.lock("l").await.unwrap();
    let waiter = tokio::spawn(locker.lock_all(["k", "l"]).into_future());
    eventually("it listens", async || server.cli(&["PUBSUB", "CHANNELS"]).contains("app:l").then_some(())).await;
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

/// Does what those do who share keys.
async fn share_locks(locker: &Locker, key: &str) -> Result<(), Error> {
    let token = || "own".parse().unwrap();
    let reader = soon(locker.read(key).metadata("m")).await?;
    let again = soon(locker.read(key).token(token())).await?;
    soon(locker.read(key).token(token())).await?.renew_for(ms(5_000)).await?;
    reader.renew().await?;
    reader.server_ttl().await?;
    assert_eq!(locker.holders(key).await?.len(), 2);
    assert!(locker.inspect(key).await?.is_some());
    let reader = locker.adopt(reader.into_lease()).await?;
    reader.release().await?;
    again.release().await?;
    soon(locker.lock(key)).await?.downgrade().await?.release().await?;
    let one = soon(locker.permit(key, 1)).await?;
    match locker.try_permit(key, 1).await {
        Err(Error::NotObtained { .. }) => one.release().await,
        other => other.map(drop),
    }
}

/// Waits with a permit that another has.
async fn wait_for_a_permit(here: &Locker, there: &Locker, key: &str) {
    let guard = soon(here.permit(key, 1)).await.unwrap();
    let waiter = tokio::spawn(there.permit(key, 1).into_future());
    tokio::time::sleep(ms(50)).await;
    guard.release().await.unwrap();
    soon(waiter).await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test]
async fn with_the_documented_permissions_keys_can_be_shared_and_each_is_needed() {
    let (server, documented) = (Server::start(), Documented::read());
    let shares = documented.case("readers and permits");
    let all = [documented.base_and(&documented.news), documented.fair.clone(), shares.to_vec()].concat();
    allow(&server, &all);
    let here = builder().connect(&url(&server)).await.unwrap();
    let there = builder().connect(&url(&server)).await.unwrap();
    share_locks(&here, "k").await.unwrap();
    wait_for_a_permit(&here, &there, "k").await;
    let denied = server.cli(&["ACL", "LOG"]);
    assert!(!denied.lines().any(|line| line == "lua"), "{denied}");
    for needless in shares {
        let rules: Vec<&str> = all.iter().copied().filter(|rule| rule != needless).collect();
        allow(&server, &rules);
        server.cli(&["FLUSHALL"]);
        let locker = builder().connect(&url(&server)).await.unwrap();
        let refused = share_locks(&locker, "k").await.expect_err(needless);
        assert_eq!(refused.code(), Some("NOPERM"), "without {needless}: {refused}");
        assert!(refused.to_string().contains("{app:k}:holders"), "{refused}");
    }
}

#[tokio::test]
async fn with_the_documented_permissions_a_database_can_be_chosen() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base_and(documented.case("a database")));
    for database in [0, 3] {
        let locker = builder().connect(&format!("{}/{database}", url(&server))).await.unwrap();
        use_locks(&locker, "k").await.unwrap();
    }
}

#[tokio::test]
async fn with_the_documented_permissions_a_cluster_can_be_used() {
    let (cluster, documented) = (Cluster::start(), Documented::read());
    let mut rules = documented.base_and(documented.case("a cluster"));
    let hears = Version::of_this_run().has_redis(7, 0);
    if hears {
        rules.extend(&documented.news);
        rules.extend(&documented.news_on_a_cluster);
    }
    cluster.nodes.iter().for_each(|node| allow(node, &rules));
    let url = cluster.url().replace("redis-cluster://", "redis-cluster://app:secret@");
    let here = builder().connect(&url).await.unwrap();
    let there = builder().connect(&url).await.unwrap();
    for key in ["a", "b", "c"] {
        use_locks(&here, key).await.unwrap();
        if hears {
            wait(&here, &there, key, false).await;
        }
    }
    rules.extend(&documented.fair);
    rules.extend(documented.case("readers and permits"));
    cluster.nodes.iter().for_each(|node| allow(node, &rules));
    let (here, there) = (builder().connect(&url).await.unwrap(), builder().connect(&url).await.unwrap());
    for key in ["a", "b", "c"] {
        share_locks(&here, key).await.unwrap();
        if hears {
            wait_for_a_permit(&here, &there, key).await;
        }
    }
}

#[tokio::test]
async fn with_the_documented_permissions_a_server_under_sentinels_can_be_used() {
    let (watched, documented) = (Sentinel::start(), Documented::read());
    allow(&watched.primary, &documented.base_and(documented.case("Sentinels")));
    let url = watched.url().replace("redis-sentinel://", "redis-sentinel://app:secret@");
    let locker = builder().connect(&url).await.unwrap();
    use_locks(&locker, "k").await.unwrap();
}

#[tokio::test]
async fn with_the_documented_permissions_a_quorum_knows_who_was_restarted() {
    let (servers, documented) = ([(); 3].map(|()| Server::start()), Documented::read());
    servers.iter().for_each(|server| allow(server, &documented.base_and(documented.case("a quorum"))));
    let builder = builder().ttl(ms(1_500)).restart_window(ms(2_000));
    let locker = builder.quorum(servers.iter().map(url)).await.unwrap();
    // The servers have just started, and don't vote at first.
    let guard = eventually("it is granted", async || match locker.try_lock("k").token("own".parse().unwrap()).await {
        Err(Error::Quorum { nodes, .. }) => {
            let young = |error: &Error| matches!(error, Error::NotVoting { .. });
            assert!(nodes.iter().all(|node| young(&node.error) || node.error.is_transient()), "{nodes:?}");
            None
        }
        other => Some(other.unwrap()),
    });
    guard.await.release().await.unwrap();
    // Votes are taken back, too.
    for server in &servers[..2] {
        server.cli(&["SET", "app:k", "another"]);
    }
    let refused = soon(locker.try_lock("k").token("own".parse().unwrap())).await;
    assert!(matches!(refused, Err(Error::NotObtained { .. })), "{refused:?}");
    eventually("it is taken back", async || (servers[2].cli(&["EXISTS", "app:k"]) == "0").then_some(())).await;
}

#[tokio::test]
async fn with_the_documented_permissions_replicas_are_asked() {
    let (primary, documented) = (Server::start(), Documented::read());
    let _replica = primary.start_replica();
    allow(&primary, &documented.base_and(documented.case("`min_replicas`")));
    let locker = builder().min_replicas(1).connect(&url(&primary)).await.unwrap();
    use_locks(&locker, "k").await.unwrap();
}

#[tokio::test]
async fn with_the_documented_permissions_or_without_one_for_speed_many_locks_share_calls() {
    let (server, documented) = (Server::start(), Documented::read());
    let faster = documented.case("many operations");
    for rules in [documented.base.clone(), documented.base_and(faster)] {
        allow(&server, &rules);
        let locker = builder().connect(&url(&server)).await.unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..100 {
            let request = locker.lock(format!("k:{n}"));
            tasks.spawn(async move { request.await?.release().await });
        }
        for done in soon(tasks.join_all()).await {
            done.unwrap();
        }
    }
}

#[tokio::test]
async fn with_the_documented_permissions_keys_may_have_a_brace_of_their_own() {
    let (server, documented) = (Server::start(), Documented::read());
    allow(&server, &documented.base_and(documented.case("keys with")));
    let locker = builder().connect(&url(&server)).await.unwrap();
    for key in ["a}b", "}", "a}}b"] {
        use_locks(&locker, key).await.unwrap();
    }
}
